/* simd_avx512.h: what the two AVX-512 tables share; TARGET is defined before. Sixteen lanes. */
#include "simd.h"

#include <immintrin.h>

#define LANES                   16
#define MAX_TOKENS              6
#define MULTIPLY_ADD(sum, a, b) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(sum)))
#define LARGER(a, b)            ((vi)_mm512_max_epi32((__m512i)(a), (__m512i)(b)))
#define GREATER_MASK(a, b)      _mm512_cmpgt_epi32_mask((__m512i)(a), (__m512i)(b))
#define LOAD_F16(p)             ((vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(p))))
#define STORE_F16(p, v)                                                                            \
    _mm256_storeu_si256(                                                                           \
        (__m256i *)(void *)(p),                                                                    \
        _mm512_cvtps_ph((__m512)(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))

#include "simd_vector.h"

/* Four accumulators -> for each 128-bit lane, the four sums over its floats. */
INLINE __m512 sum_within_lanes(const vf *sum)
{
    __m512 a = (__m512)sum[0], b = (__m512)sum[1], c = (__m512)sum[2], d = (__m512)sum[3];
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

/* The four lanes of each of a, b, c, d added up; the results are the lanes of the result. */
INLINE __m512 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d)
{
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

INLINE void put_sums(float *c, __m128 total, int accumulate)
{
    if (accumulate) total = _mm_add_ps(_mm_load_ps(c), total);
    _mm_store_ps(c, total);
}

/* A tree of shuffles over sixteen accumulators at a time: 3 % of a tile at K = 768, 2 % at 2048. */
INLINE void reduce_tile(vf (*sum)[MOE_DOT_ROWS], int num_tokens, const moe_dot *dot)
{
    const int64_t stride = dot->c_stride;
    const int accumulate = dot->accumulate;
#pragma GCC unroll 2
    for (int t = 0; t < num_tokens; t += 4) {
        const int left = num_tokens - t;
        __m512 zero = _mm512_setzero_ps();
        __m512 total =
            sum_lanes(sum_within_lanes(sum[t]), left > 1 ? sum_within_lanes(sum[t + 1]) : zero,
                      left > 2 ? sum_within_lanes(sum[t + 2]) : zero,
                      left > 3 ? sum_within_lanes(sum[t + 3]) : zero);
        float *c = dot->c + t * stride;
        put_sums(c, _mm512_castps512_ps128(total), accumulate);
        if (left > 1) put_sums(c + stride, _mm512_extractf32x4_ps(total, 1), accumulate);
        if (left > 2) put_sums(c + 2 * stride, _mm512_extractf32x4_ps(total, 2), accumulate);
        if (left > 3) put_sums(c + 3 * stride, _mm512_extractf32x4_ps(total, 3), accumulate);
    }
}
