/* simd_scalar.c: the table that always works: plain C, four lanes, whatever the compiler makes of it. */
#define TARGET
#define LANES                   4
#define MAX_TOKENS              3
#define MULTIPLY_ADD(sum, a, b) ((sum) + (a) * (b))
#define NATIVE_BF16             0
#define LARGER(a, b)            ((((a) > (b)) & (a)) | (((a) <= (b)) & (b)))
#define GREATER_MASK(a, b)      lane_bits((a) > (b))
#define DOT_BF16(sum, a, b)     (sum)
#define LOAD_F16(p)             load_halves(p)
#define STORE_F16(p, v)         store_halves(p, v)

#include "simd.h"

typedef float four_floats __attribute__((vector_size(16)));
typedef int32_t four_integers __attribute__((vector_size(16)));
typedef uint32_t four_words __attribute__((vector_size(16)));
typedef uint16_t four_halves __attribute__((vector_size(8)));

/* f16_to_f32 on four lanes */
static inline four_floats load_halves(const void *p)
{
    four_halves h;
    memcpy(&h, p, sizeof h);
    four_words bits = __builtin_convertvector(h, four_words), magnitude = bits & 0x7fffu;
    four_words small = (four_words)(magnitude < 0x400u);
    four_words special = (four_words)(magnitude >= 0x7c00u);
    four_words normal = (magnitude << 13) + (112u << 23) + (special & (112u << 23));
    four_words denormal = (four_words)(__builtin_convertvector(magnitude, four_floats) * 0x1p-24f);
    return (four_floats)((small & denormal) | (~small & normal) | (bits & 0x8000u) << 16);
}

static inline void store_halves(void *p, four_floats v)
{
    uint16_t h[4] = {f32_to_f16(v[0]), f32_to_f16(v[1]), f32_to_f16(v[2]), f32_to_f16(v[3])};
    memcpy(p, h, sizeof h);
}

static inline unsigned lane_bits(four_integers mask)
{
    return (unsigned)((mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8));
}

#include "simd_vector.h"

INLINE void reduce_tile(vf (*sum)[MOE_DOT_ROWS], int num_tokens, const moe_dot *dot)
{
    for (int t = 0; t < num_tokens; ++t)
        for (int row = 0; row < MOE_DOT_ROWS; ++row) {
            vf s = sum[t][row];
            float total = (s[0] + s[2]) + (s[1] + s[3]);
            float *c = dot->c + t * dot->c_stride + row;
            *c = dot->accumulate ? *c + total : total;
        }
}

const moe_simd moe_simd_scalar = {.name = "scalar", .level = MOE_SIMD_SCALAR, MOE_SIMD_FUNCTIONS};
