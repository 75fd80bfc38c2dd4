/* cpu.h: what the CPU backend tells the rest of the project besides the stages in moe.h. */
#ifndef MOE_CPU_H
#define MOE_CPU_H

#include "../moe.h"

/* Instruction set in use: "scalar", "avx2", "avx512" or "avx512_bf16". */
const char *moe_cpu_isa(void);

/* Threads a stage may use, the caller's own among them. */
int moe_cpu_threads(void);

/* Read bandwidth of memory, bytes per microsecond, all threads on a buffer of 256 MiB or more (eight
 * last-level caches), best of several passes. Takes about a tenth of a second; 0 where memory for it is
 * lacking. */
double moe_cpu_read_bandwidth(void);

#endif
