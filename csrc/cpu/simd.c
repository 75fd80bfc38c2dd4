/* simd.c: which table of inner loops this machine runs. */
#include "simd.h"

#include <stdatomic.h>
#include <stdlib.h>

#if MOE_SIMD_X86
#include <cpuid.h>

static int detect_level(void)
{
    /* __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers. */
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return MOE_SIMD_SCALAR;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return MOE_SIMD_SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return MOE_SIMD_AVX2;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return MOE_SIMD_AVX512;
    return MOE_SIMD_AVX512_BF16;
}

static const moe_simd *const TABLES[MOE_SIMD_COUNT] = {&moe_simd_scalar, &moe_simd_avx2,
                                                       &moe_simd_avx512, &moe_simd_avx512_bf16};
#else
static int detect_level(void)
{
    return MOE_SIMD_SCALAR;
}

static const moe_simd *const TABLES[1] = {&moe_simd_scalar};
#endif

bool moe_rows_in_turn(void)
{
#if MOE_SIMD_X86
    __builtin_cpu_init(); /* CPUID the first time only */
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

static atomic_int asked_level_plus_one; /* FUSEDMOE_CPU_ISA; 0: not given, or no such table */

void moe_read_simd(void)
{
    const char *name = getenv("FUSEDMOE_CPU_ISA");
    int asked = 0;
    for (int i = 0; name && i < (int)(sizeof TABLES / sizeof *TABLES); ++i)
        if (!strcmp(name, TABLES[i]->name)) asked = i + 1;
    atomic_store_explicit(&asked_level_plus_one, asked, memory_order_relaxed);
}

const moe_simd *moe_get_simd(void)
{
    /* Kept, because CPUID leaves a virtual machine: 20 us in a call. 0: not asked yet. */
    static atomic_int level_plus_one;
    int level = atomic_load_explicit(&level_plus_one, memory_order_relaxed) - 1;
    if (level < 0) {
        level = detect_level();
        atomic_store_explicit(&level_plus_one, level + 1, memory_order_relaxed);
    }
    const int asked = atomic_load_explicit(&asked_level_plus_one, memory_order_relaxed) - 1;
    return TABLES[asked >= 0 && asked < level ? asked : level];
}
