/* simd_avx2.c: AVX2 with FMA and F16C, eight lanes. bf16 and fp16 are widened to f32. */
#include "simd.h"

#if MOE_SIMD_X86
#include <immintrin.h>

#define TARGET                  __attribute__((target("avx2,fma,f16c")))
#define LANES                   8
#define MAX_TOKENS              3
#define MULTIPLY_ADD(sum, a, b) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(sum)))
#define NATIVE_BF16             0
#define LARGER(a, b)            ((vi)_mm256_max_epi32((__m256i)(a), (__m256i)(b)))
#define GREATER_MASK(a, b)      ((unsigned)_mm256_movemask_ps((__m256)((a) > (b))))
#define DOT_BF16(sum, a, b)     (sum)
#define LOAD_F16(p)             ((vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p))))
#define STORE_F16(p, v)                                                                            \
    _mm_storeu_si128((__m128i *)(void *)(p),                                                       \
                     _mm256_cvtps_ph((__m256)(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))

#include "simd_vector.h"

INLINE void reduce_tile(vf (*sum)[MOE_DOT_ROWS], int num_tokens, const moe_dot *dot)
{
#pragma GCC unroll 8
    for (int t = 0; t < num_tokens; ++t) {
        __m256 low = _mm256_hadd_ps((__m256)sum[t][0], (__m256)sum[t][1]);
        __m256 high = _mm256_hadd_ps((__m256)sum[t][2], (__m256)sum[t][3]);
        __m256 both = _mm256_hadd_ps(low, high); /* rows 0..3, once for each 128-bit half */
        __m128 total = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        float *c = dot->c + t * dot->c_stride;
        if (dot->accumulate) total = _mm_add_ps(_mm_load_ps(c), total);
        _mm_store_ps(c, total);
    }
}

const moe_simd moe_simd_avx2 = {.name = "avx2", .level = MOE_SIMD_AVX2, MOE_SIMD_FUNCTIONS};
#else
typedef int moe_no_avx2; /* a translation unit may not be empty */
#endif
