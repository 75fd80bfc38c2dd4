/* cpu.h: what the CPU backend tells the rest of the project besides the stages in moe.h. */
#ifndef MOE_CPU_H
#define MOE_CPU_H

#include "../moe.h"

/* Reads FUSEDMOE_NUM_THREADS, FUSEDMOE_CPU_ISA and FUSEDMOE_CHECK, for this call and those that run. With
 * the GIL, before a call releases it: whoever sets a variable in Python holds it, and getenv beside a setenv
 * reads freed memory (glibc before 2.41). Nothing below here asks the environment by itself. */
void moe_cpu_read_environment(void);
void moe_read_check(void); /* its part in align.c */

/* Instruction set in use: "scalar", "avx2", "avx512" or "avx512_bf16". */
const char *moe_cpu_isa(void);

/* Threads a stage may use, the caller's own among them. */
int moe_cpu_threads(void);

/* Read bandwidth of memory, bytes per microsecond, all threads on a buffer of 256 MiB or more (eight
 * last-level caches), best of several passes. Takes about a tenth of a second; 0 where memory for it is
 * lacking. */
double moe_cpu_read_bandwidth(void);

#endif
