/* simd_avx512.c: AVX-512 without bf16 products; bf16 and fp16 are widened to f32. */
#include "simd.h"

#if MOE_SIMD_X86
#define TARGET              __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define NATIVE_BF16         0
#define DOT_BF16(sum, a, b) (sum)
#include "simd_avx512.h"

const moe_simd moe_simd_avx512 = {.name = "avx512", .level = MOE_SIMD_AVX512, MOE_SIMD_FUNCTIONS};
#else
typedef int moe_no_avx512; /* a translation unit may not be empty */
#endif
