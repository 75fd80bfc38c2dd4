/* status.h: errors are values. Every function that can fail returns 0 or the moe_status it also
 * wrote, with its text, into the caller's moe_error. Python hears of them in one place (module.c). */
#ifndef MOE_STATUS_H
#define MOE_STATUS_H

typedef enum moe_status {
    MOE_OK = 0,
    MOE_ERROR_TYPE,  /* TypeError: wrong dtype, wrong kind of object */
    MOE_ERROR_VALUE, /* ValueError: shape, stride, alignment, device, overflow, refused buffer */
    MOE_ERROR_NOT_IMPLEMENTED, /* NotImplementedError: no such combination */
    MOE_ERROR_RUNTIME,         /* RuntimeError: driver, device or no GPU */
    MOE_ERROR_MEMORY,          /* MemoryError */
    MOE_ERROR_PYTHON           /* a Python exception is already set; text is empty */
} moe_status;

typedef struct moe_error {
    moe_status status;
    int cuda_code; /* CUresult where the driver failed, else 0 */
    char text[1000];
} moe_error;

/* Writes status and text (printf style) into err and returns status, so that a check reads
 * `return moe_fail(err, MOE_ERROR_VALUE, "topk_ids: expected ..., got ...");`. The first text wins:
 * an error that is already set is kept. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
int moe_fail(moe_error *err, moe_status status, const char *format, ...);

#endif
