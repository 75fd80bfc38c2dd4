/* simd_avx512_bf16.c: AVX-512 with VDPBF16PS, 32 bf16 products per instruction: the main path.
 * The instruction takes denormal bf16 inputs and f32 sums as zero. */
#include "simd.h"

#if MOE_SIMD_X86
#define TARGET                                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))
#define NATIVE_BF16         1
#define DOT_BF16(sum, a, b) ((vf)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)(a), (__m512bh)(b)))
#include "simd_avx512.h"

const moe_simd moe_simd_avx512_bf16 = {
    .name = "avx512_bf16", .level = MOE_SIMD_AVX512_BF16, MOE_SIMD_FUNCTIONS};
#else
typedef int moe_no_avx512_bf16; /* a translation unit may not be empty */
#endif
