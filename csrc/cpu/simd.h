/* simd.h: one table of inner loops per instruction set, chosen at run time.
 *
 * simd_scalar.c, simd_avx2.c, simd_avx512.c and simd_avx512_bf16.c each fill one table. Code above it
 * (gemm.c, the stages) is the same for all of them and knows no vector type. Within one table an output
 * element is always computed by the same additions in the same order, whatever the number of threads or
 * of rows in the call. */
#ifndef MOE_SIMD_H
#define MOE_SIMD_H

#include "../moe.h"

#include <math.h>
#include <string.h>

enum {
    MOE_SIMD_SCALAR = 0, /* what the compiler makes of plain C */
    MOE_SIMD_AVX2,       /* AVX2, FMA, F16C */
    MOE_SIMD_AVX512,     /* AVX-512 F, BW, DQ, VL */
    MOE_SIMD_AVX512_BF16,
    MOE_SIMD_COUNT
};

enum {
    MOE_DOT_ROWS = 4,       /* weight rows of one dot tile */
    MOE_DOT_MAX_TOKENS = 6, /* token rows of one dot tile; a table may take fewer */
    MOE_DOT_MAX_STEP = 32,  /* elements of K per step; a table may take fewer, a power of two */
    MOE_VECTOR_FLOATS = 16, /* floats that a loop over C may touch past its end */
    MOE_NUM_DTYPES = MOE_F16 + 1
};

/* One dot tile: c[token][row] (+)= sum over k of x[token][k] * w[row][k], products and sums in f32.
 * x is packed (pack below). Weights are read exactly below k; prefetch addresses may lie anywhere. */
typedef struct moe_dot {
    const void *w[MOE_DOT_ROWS]; /* weight rows, at the block's first k, any alignment */
    const void *x;               /* packed tokens, 64-byte aligned */
    float *c;                    /* 16-byte aligned, rows contiguous */
    int64_t c_stride;            /* from token to token */
    int64_t k;                   /* elements, 1 .. */
    int32_t accumulate;          /* 0: c is set, 1: added to */
    int32_t fresh;               /* 1: nothing has read these weights yet, they come from memory */
    int32_t in_turn;             /* 1: better read one row after the other, where tokens are few */
    /* The weights to fetch into L2 meanwhile: while byte b of a weight row is used, the lines at
     * prefetch + b * prefetch_step + i * prefetch_stride, 0 <= i < num_prefetch. */
    uintptr_t prefetch; /* a number, as it may lie outside the weights */
    int64_t prefetch_step, prefetch_stride;
    int32_t num_prefetch; /* 0 .. MOE_DOT_ROWS */
} moe_dot;

typedef struct moe_simd {
    const char *name;
    int32_t level;
    int32_t max_tokens;           /* token rows of one dot tile */
    int32_t step[MOE_NUM_DTYPES]; /* elements of K per step */
    int32_t packed_element_bytes[MOE_NUM_DTYPES];

    /* Token rows in the order dot reads them: [step of K][token][lane], zeros behind k. */
    void (*pack[MOE_NUM_DTYPES])(void *packed, const void *const *rows, int num_rows, int64_t k);
    void (*dot[MOE_NUM_DTYPES])(const moe_dot *dot, int num_tokens);

    /* NULL, or: to = n weights as f32, so that dot[MOE_F32] gives the same bits as dot[dtype], for tables
     * where widening in every dot costs more than once for all token rows. */
    void (*widen)(float *to, const void *weights, int64_t n, int32_t dtype);

    /* Epilogues on n floats of a row of C, which may be touched up to a multiple of 16. */
    void (*add)(float *c, const void *values, int64_t n, int32_t dtype);
    void (*scale)(float *c, float factor, int64_t n);
    void (*activate)(float *gate, const float *up, int64_t n, const moe_gate_up_args *args);
    void (*round)(void *out, const float *c, int64_t n, int32_t dtype);

    /* out[h] = round(scale * sum over i of rows[i][h] + shared[h]); shared may be NULL. */
    void (*sum_rows)(void *out, const void *const *rows, int num_rows, const void *shared,
                     float scale, int64_t n, int32_t dtype);
    /* Routing. A row of n logits as f32 and as keys (route_order in route_math.h); returns whether there is
     * a NaN. Both may be touched up to a multiple of 16. */
    bool (*load_logits)(float *x, uint32_t *key, const void *row, int64_t n, int32_t dtype);
    /* The ids of the topk largest of n keys, best first, the lowest id among equals, never a key of 0;
     * returns how many there are. key may be touched up to a multiple of 64. */
    int32_t (*select_largest)(uint32_t *key, int32_t n, int32_t topk, int32_t *ids);
    /* c[i] = exp(c[i] - maximum) of n numbers <= maximum, and their sum; c may be touched up to a multiple
     * of 16. */
    double (*exp_sum)(float *c, float maximum, int64_t n);
    /* Reads n bytes (a multiple of 4096, 64-byte aligned) and does nothing with them. */
    uint32_t (*read)(const void *data, int64_t n);
} moe_simd;

/* The best table this machine runs; FUSEDMOE_CPU_ISA=scalar|avx2|avx512|avx512_bf16 asks for a lower one. */
const moe_simd *moe_get_simd(void);
void moe_read_simd(void); /* the variable; with the GIL, see moe_cpu_read_environment */

/* Whether memory is read faster by one weight row after the other than by four abreast, while there are one or
 * two tokens: 5 to 15 % on a Zen 4 with two cores, where 16 Sapphire Rapids lose 10 to 15 %. */
bool moe_rows_in_turn(void);

extern const moe_simd moe_simd_scalar;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MOE_SIMD_X86 1
extern const moe_simd moe_simd_avx2;
extern const moe_simd moe_simd_avx512;
extern const moe_simd moe_simd_avx512_bf16;
#endif

/* Element conversions, one value. To nearest even; NaN stays NaN, infinity stays infinity. */
static inline float bf16_to_f32(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t f32_to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu,
             mantissa = h & 0x3ffu;
    uint32_t bits;
    float value;
    if (exponent == 0) { /* zero and denormals: mantissa * 2^-24, exact */
        value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | mantissa << 13;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t f32_to_f16(float value)
{
    uint32_t bits, sign, magnitude;
    memcpy(&bits, &value, sizeof bits);
    sign = (bits >> 16) & 0x8000u;
    magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above */
    if (magnitude <
        0x38800000u) { /* below 2^-14: adding 0.5 leaves multiples of 2^-24 in the low bits */
        float small;
        uint32_t rounded;
        memcpy(&small, &magnitude, sizeof small);
        small += 0.5f;
        memcpy(&rounded, &small, sizeof rounded);
        return (uint16_t)(sign | (rounded - 0x3f000000u));
    }
    magnitude += 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((magnitude - 0x38000000u) >> 13));
}

/* Element i of data, as f32. */
static inline float load_element(const void *data, int64_t i, int32_t dtype)
{
    if (dtype == MOE_F32) {
        float value;
        memcpy(&value, (const char *)data + i * 4, sizeof value);
        return value;
    }
    uint16_t h;
    memcpy(&h, (const char *)data + i * 2, sizeof h);
    return dtype == MOE_BF16 ? bf16_to_f32(h) : f16_to_f32(h);
}

/* Bytes of one element of MOE_F32, MOE_BF16, MOE_F16. */
static inline int64_t element_bytes(int32_t dtype)
{
    return dtype == MOE_F32 ? 4 : 2;
}

#endif
