/* route_math.h: the arithmetic of routing, the same bits in C and in CUDA.
 *
 * Which experts are chosen hangs on the last bit of a key, so exp and log are not left to two libraries:
 * they are made here of additions, multiplications, fused multiply-adds, divisions, reciprocals and square
 * roots, each rounded once. No compiler may fuse anything further: the _rn forms keep CUDA's from it, ISO C
 * the other. Errors stay below 3 ulp. */
#ifndef MOE_ROUTE_MATH_H
#define MOE_ROUTE_MATH_H

#include <stdint.h>

#include "moe_kernels.h"

#ifdef __CUDACC__
#include "ptx.cuh"
#define ROUTE_FUNCTION static __device__ __forceinline__
#define route_bits(x)  __float_as_uint(x)
#define route_float(b) __uint_as_float(b)
#define route_add      __fadd_rn
#define route_mul      __fmul_rn
#define route_fma      __fmaf_rn
#define route_div      __fdiv_rn
#define route_sqrt     __fsqrt_rn
#define route_min      fminf
#define route_max      fmaxf
/* 1 / x for x in [1, 2^126), correctly rounded: one step of Newton from an approximation to 1 ulp. */
ROUTE_FUNCTION float route_reciprocal(float x)
{
    const float r = reciprocal_approximate(x);
    return __fmaf_rn(r, __fmaf_rn(-x, r, 1.0f), r);
}
#else
#include <math.h>
#include <string.h>
/* always inlined: into a caller that is compiled for a CPU with fused multiply-add, too */
#define ROUTE_FUNCTION static inline __attribute__((always_inline))
ROUTE_FUNCTION uint32_t route_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
ROUTE_FUNCTION float route_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
ROUTE_FUNCTION float route_add(float a, float b)
{
    return a + b;
}
ROUTE_FUNCTION float route_mul(float a, float b)
{
    return a * b;
}
ROUTE_FUNCTION float route_fma(float a, float b, float c)
{
    return __builtin_fmaf(a, b, c);
}
ROUTE_FUNCTION float route_div(float a, float b)
{
    return a / b;
}
ROUTE_FUNCTION float route_reciprocal(float x)
{
    return 1.0f / x;
}
ROUTE_FUNCTION float route_sqrt(float x)
{
    return sqrtf(x);
}
/* which of the two a NaN gives is nobody's business: the callers below look for it themselves */
ROUTE_FUNCTION float route_min(float a, float b)
{
    return a < b ? a : b;
}
ROUTE_FUNCTION float route_max(float a, float b)
{
    return a > b ? a : b;
}
#endif

ROUTE_FUNCTION float route_abs(float x)
{
    return route_float(route_bits(x) & 0x7fffffffu);
}

ROUTE_FUNCTION int route_is_nan(float x)
{
    return (route_bits(x) & 0x7fffffffu) > 0x7f800000u;
}

ROUTE_FUNCTION int route_is_finite(float x)
{
    return (route_bits(x) & 0x7fffffffu) < 0x7f800000u;
}

/* Unsigned order of a key: 0 taken, dropped or past the end, 1 NaN, above it the numbers -inf to +inf. */
ROUTE_FUNCTION uint32_t route_order_or(float x, int nan)
{
    const uint32_t bits = route_bits(route_add(x, 0.0f)); /* -0 becomes +0 */
    const uint32_t order = bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
    return nan ? 1 : order;
}

ROUTE_FUNCTION uint32_t route_order(float x)
{
    return route_order_or(x, route_is_nan(x));
}

ROUTE_FUNCTION float route_unorder(uint32_t order)
{
    return route_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

enum { ROUTE_EXP_RANGE = 86 }; /* exp and 1 / exp of it are normal numbers */

/* exp(x), |x| <= ROUTE_EXP_RANGE: 2^n * polynomial of what is left, |r| <= ln(2) / 2. */
ROUTE_FUNCTION float route_exp_within(float x)
{
    const float shifted = route_fma(x, 1.44269504f, 12582912.0f); /* 1.5 * 2^23: rounds */
    const float n = route_add(shifted, -12582912.0f);
    float r = route_fma(n, -0.693145752f, x); /* ln(2) in two pieces */
    r = route_fma(n, -1.42860677e-6f, r);
    float p = 1.38145417e-3f;
    p = route_fma(p, r, 8.36874545e-3f);
    p = route_fma(p, r, 4.16683890e-2f);
    p = route_fma(p, r, 1.66665211e-1f);
    p = route_fma(p, r, 4.99999940e-1f);
    p = route_fma(p, r, 1.0f);
    p = route_fma(p, r, 1.0f);
    return route_float(route_bits(p) + (route_bits(shifted) << 23)); /* n is in the last bits */
}

ROUTE_FUNCTION float route_clamp(float x)
{
    return route_min(route_max(x, -(float)ROUTE_EXP_RANGE), (float)ROUTE_EXP_RANGE);
}

/* exp(x), 0 below -ROUTE_EXP_RANGE, above it as there. Of NaN: some number. The 0 is made by a mask, since the CUDA
 * compiler makes a condition a branch, and of 16 of them in a row a long way. */
ROUTE_FUNCTION float route_exp(float x)
{
    const uint32_t below =
        (uint32_t)((int32_t)route_bits(route_add(x, (float)ROUTE_EXP_RANGE)) >> 31);
    return route_float(route_bits(route_exp_within(route_clamp(x))) & ~below);
}

/* exp(x - maximum), a term of a softmax; of x = maximum 1, whatever they are. */
ROUTE_FUNCTION float route_term(float x, float maximum)
{
    const float below = route_add(x, -maximum);
    return route_exp(x == maximum ? 0.0f : below);
}

/* log(1 + u), 0 <= u <= 1: 2 atanh(u / (2 + u)). */
ROUTE_FUNCTION float route_log1p(float u)
{
    const float z = route_mul(u, route_reciprocal(route_add(2.0f, u))), z2 = route_mul(z, z);
    float p = 1.0f / 15;
    p = route_fma(p, z2, 1.0f / 13);
    p = route_fma(p, z2, 1.0f / 11);
    p = route_fma(p, z2, 1.0f / 9);
    p = route_fma(p, z2, 1.0f / 7);
    p = route_fma(p, z2, 1.0f / 5);
    p = route_fma(p, z2, 1.0f / 3);
    p = route_mul(route_mul(p, z2), z);
    return route_mul(2.0f, route_add(z, p));
}

/* tanh(x): a continued fraction near 0, where 1 - exp would lose the small ones. */
ROUTE_FUNCTION float route_tanh(float x)
{
    if (route_is_nan(x)) return x;
    const float a = route_abs(x);
    float t;
    if (a < 0.75f) {
        const float s = route_mul(a, a);
        t = route_add(9.0f, route_div(s, 11.0f));
        t = route_add(7.0f, route_div(s, t));
        t = route_add(5.0f, route_div(s, t));
        t = route_add(3.0f, route_div(s, t));
        t = route_div(a, route_add(1.0f, route_div(s, t)));
    } else {
        const float e = route_exp(route_mul(-2.0f, a));
        t = route_div(route_add(1.0f, -e), route_add(1.0f, e));
    }
    return x < 0 ? -t : t;
}

/* The pointwise scores of a number; those over a whole row (softmax, sparsemixer) are made by the caller.
 * 0 below -ROUTE_EXP_RANGE, never -0. Of NaN: some number, which the caller has to look for. */
ROUTE_FUNCTION float route_score(int32_t score, float x)
{
    if (score == MOE_SCORE_SIGMOID) {
        const float s = route_reciprocal(route_add(1.0f, route_exp_within(-route_clamp(x))));
        return x < -(float)ROUTE_EXP_RANGE ? 0.0f : s;
    }
    if (score == MOE_SCORE_SQRT_SOFTPLUS) {
        const float e = route_exp_within(route_max(-route_abs(x), -(float)ROUTE_EXP_RANGE));
        const float s = route_sqrt(route_add(route_max(x, 0.0f), route_log1p(e)));
        return x < -(float)ROUTE_EXP_RANGE ? 0.0f : s;
    }
    return 1.0f;
}

ROUTE_FUNCTION float route_softcap(float x, float cap)
{
    return cap > 0 ? route_mul(cap, route_tanh(route_div(x, cap))) : x;
}

ROUTE_FUNCTION uint32_t route_hash(uint32_t x)
{
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* The key of simulated routing: a number of (token, expert) alone. uniform: the hash. zipf: -(expert + 1) times
 * an exponentially distributed number, so that the first choice has probability ~ 1 / (expert + 1). */
ROUTE_FUNCTION float route_random_key(int32_t key, int64_t token, int32_t expert)
{
    const uint32_t random =
        route_hash(route_hash((uint32_t)token * 0x9e3779b1u + 1) + (uint32_t)expert) >> 8;
    if (key == MOE_KEY_UNIFORM) return (float)random;
    /* -log(v / 2^24), v in 1 .. 2^24, by halving until v / 2^24 is in (1/2, 1] */
    uint32_t v = random + 1;
    float log2s = 0.0f;
    while (v <= (1u << 23)) {
        v *= 2;
        log2s = route_add(log2s, 0.693147182f);
    }
    const float u = route_div((float)((1u << 24) - v), (float)v); /* 1 / fraction - 1, [0, 1) */
    return route_mul(-(float)(expert + 1), route_add(log2s, route_log1p(u)));
}

/* A pointwise score, NaN of NaN where it hangs on x at all. */
ROUTE_FUNCTION float route_score_or_nan(int32_t score, float x)
{
    const float s = route_score(score, x);
    return score != MOE_SCORE_CONSTANT && route_is_nan(x) ? x : s;
}

/* The jitter of sparsemixer: experts further than 2 * 0.01 below the chosen one do not count. */
ROUTE_FUNCTION int route_within_jitter(float x, float chosen)
{
    float factor = route_abs(x);
    factor = factor < chosen ? chosen : factor;
    return !(route_div(route_add(chosen, -x), factor) > 0.02f);
}

/* The weight a slot ends with: finite, whatever came. */
ROUTE_FUNCTION float route_finite(float weight)
{
    return route_is_finite(weight) ? weight : 0.0f;
}

/* replica_map and expert_map: the id that is written for a logical expert (-1: none). */
ROUTE_FUNCTION int64_t route_map_id(const moe_route_args *args, int64_t token, int64_t id)
{
    if (id < 0 || id >= args->num_experts - args->num_zero_experts) return -1;
    if (args->replica_map) {
        const int32_t *row = args->replica_map + id * args->replica_stride;
        uint32_t count = 0;
        while (count < (uint32_t)args->num_replicas && row[count] >= 0)
            ++count;
        if (count == 0) return -1;
        id = row[count == 1 ? 0 : (uint32_t)token * 2654435769u % count];
    }
    if (args->expert_map) id = id < args->expert_map_size ? args->expert_map[id] : -1;
    return id < 0 ? -1 : id;
}

#endif
