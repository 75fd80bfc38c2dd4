/* simd_avx512_bf16.c: AVX-512 with VDPBF16PS, 32 bf16 products per instruction: the main path.
 * The instruction takes denormal bf16 inputs and f32 sums as zero. */
#include "simd.h"

#if MOE_SIMD_X86
#define TARGET                                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))
#define NATIVE_BF16
static void pack_bf16(void *packed, const void *const *rows, int num_rows, int64_t k);
static void dot_bf16(const moe_dot *dot, int num_tokens);
#include "simd_avx512.h"

enum { STEP = 32 }; /* bf16 in a vector */

static TARGET void pack_bf16(void *packed, const void *const *rows, int num_rows, int64_t k)
{
    pack_bytes(packed, rows, num_rows, k * 2, 2 * STEP);
}

INLINE void dot_bf16_tile(const moe_dot *dot, const int num_tokens)
{
    const char *w0 = dot->w[0], *w1 = dot->w[1], *w2 = dot->w[2], *w3 = dot->w[3];
    const char *x = dot->x, *prefetch = dot->prefetch;
    const int num_prefetch = dot->num_prefetch;
    const int64_t prefetch_stride = dot->prefetch_stride;
    const int64_t bytes = dot->k * 2;
    vf sum[MAX_TOKENS][MOE_DOT_ROWS];
#pragma GCC unroll 8
    for (int t = 0; t < num_tokens; ++t)
        sum[t][0] = sum[t][1] = sum[t][2] = sum[t][3] = (vf){0};

    int64_t k = 0;
    for (; k + 64 <= bytes; k += 64, x += num_tokens * 64) {
        __m512bh a = (__m512bh)_mm512_loadu_si512(w0 + k), b = (__m512bh)_mm512_loadu_si512(w1 + k);
        __m512bh c = (__m512bh)_mm512_loadu_si512(w2 + k), d = (__m512bh)_mm512_loadu_si512(w3 + k);
#pragma GCC unroll 8
        for (int t = 0; t < num_tokens; ++t) {
            __m512bh y = (__m512bh)_mm512_load_si512(x + t * 64);
            sum[t][0] = (vf)_mm512_dpbf16_ps((__m512)sum[t][0], y, a);
            sum[t][1] = (vf)_mm512_dpbf16_ps((__m512)sum[t][1], y, b);
            sum[t][2] = (vf)_mm512_dpbf16_ps((__m512)sum[t][2], y, c);
            sum[t][3] = (vf)_mm512_dpbf16_ps((__m512)sum[t][3], y, d);
        }
        for (int i = 0; i < num_prefetch; ++i)
            _mm_prefetch(prefetch + i * prefetch_stride + k, _MM_HINT_T0);
    }
    if (k < bytes) {
        const __mmask32 mask = (1u << (unsigned)((bytes - k) / 2)) - 1u;
        __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(mask, w0 + k);
        __m512bh b = (__m512bh)_mm512_maskz_loadu_epi16(mask, w1 + k);
        __m512bh c = (__m512bh)_mm512_maskz_loadu_epi16(mask, w2 + k);
        __m512bh d = (__m512bh)_mm512_maskz_loadu_epi16(mask, w3 + k);
#pragma GCC unroll 8
        for (int t = 0; t < num_tokens; ++t) {
            __m512bh y = (__m512bh)_mm512_load_si512(x + t * 64);
            sum[t][0] = (vf)_mm512_dpbf16_ps((__m512)sum[t][0], y, a);
            sum[t][1] = (vf)_mm512_dpbf16_ps((__m512)sum[t][1], y, b);
            sum[t][2] = (vf)_mm512_dpbf16_ps((__m512)sum[t][2], y, c);
            sum[t][3] = (vf)_mm512_dpbf16_ps((__m512)sum[t][3], y, d);
        }
    }
    reduce_tile(sum, num_tokens, dot);
}

static TARGET void dot_bf16(const moe_dot *dot, int num_tokens)
{
    switch (num_tokens) {
    case 6:
        dot_bf16_tile(dot, 6);
        break;
    case 5:
        dot_bf16_tile(dot, 5);
        break;
    case 4:
        dot_bf16_tile(dot, 4);
        break;
    case 3:
        dot_bf16_tile(dot, 3);
        break;
    case 2:
        dot_bf16_tile(dot, 2);
        break;
    default:
        dot_bf16_tile(dot, 1);
    }
}

const moe_simd moe_simd_avx512_bf16 = {.name = "avx512_bf16",
                                       .level = MOE_SIMD_AVX512_BF16,
                                       .step = {0, LANES, STEP, LANES},
                                       .packed_element_bytes = {0, 4, 2, 4},
                                       MOE_SIMD_FUNCTIONS};
#else
typedef int moe_no_avx512_bf16; /* a translation unit may not be empty */
#endif
