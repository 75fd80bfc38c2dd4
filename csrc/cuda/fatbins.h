/* fatbins.h: the compiled kernels. setup.py compiles each kernels/NAME.cu to one compressed fatbin and
 * generates the table from them; launch.c loads each as its own CUlibrary at first use. */
#ifndef MOE_FATBINS_H
#define MOE_FATBINS_H

typedef struct moe_fatbin {
    const char *name; /* the .cu file's, without its suffix; NULL ends the table */
    const unsigned char *begin;
    const unsigned char *end;
} moe_fatbin;

extern const moe_fatbin moe_fatbins[]; /* sorted by name */
extern const int moe_num_fatbins;

#endif
