/* simd_vector.h: the part of a table that is the same for every instruction set, written with the
 * compiler's vector extension. Included once by each simd_*.c, which defines before:
 *   LANES    floats per vector
 *   TARGET   the function attribute that selects the instruction set, or nothing
 *   LOAD_F16(p), STORE_F16(p, v)   vector <-> LANES halves in memory, any alignment
 *   MULTIPLY_ADD(sum, a, b)        sum + a * b
 *   LARGER(a, b)                   of signed words
 *   GREATER_MASK(a, b)             a bit for each lane in which a > b, signed words
 *   NATIVE_BF16                    1: DOT_BF16(sum, a, b) adds products of pairs of bf16
 *   MAX_TOKENS                     3 or 6: 4 * MAX_TOKENS accumulators have to fit the registers
 * and afterwards reduce_tile, and takes the functions below into its table (MOE_SIMD_FUNCTIONS). */
#include "simd.h"

#define INLINE static inline __attribute__((always_inline)) TARGET

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

/* Writes the sums over the lanes of sum[token][row] to C, or adds them. The order of the additions is
 * the same for every num_tokens. */
INLINE void reduce_tile(vf (*sum)[MOE_DOT_ROWS], int num_tokens, const moe_dot *dot);

INLINE vf splat(float x)
{
    return x - (vf){0};
}

INLINE vf select_f(vi mask, vf yes, vf no)
{
    return (vf)((mask & (vi)yes) | (~mask & (vi)no));
}

/* Comparisons are false for NaN, so a NaN in x survives all three. */
INLINE vf at_most(vf x, vf limit)
{
    return select_f(x > limit, limit, x);
}
INLINE vf at_least(vf x, vf limit)
{
    return select_f(x < limit, limit, x);
}
INLINE vf clamped(vf x, vf limit)
{
    return at_least(at_most(x, limit), -limit);
}

INLINE vf load_f32(const void *p)
{
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_f32(void *p, vf v)
{
    memcpy(p, &v, sizeof v);
}

INLINE vf load_bf16(const void *p)
{
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

INLINE void store_bf16(void *p, vf v)
{
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vu quiet = (bits >> 16) | 0x40u; /* rounding could carry a NaN into infinity */
    vu is_nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
    vh h = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), vh);
    memcpy(p, &h, sizeof h);
}

INLINE vf load_vector(const void *data, int64_t i, int32_t dtype)
{
    if (dtype == MOE_F32) return load_f32((const char *)data + i * 4);
    if (dtype == MOE_BF16) return load_bf16((const char *)data + i * 2);
    return LOAD_F16((const char *)data + i * 2);
}

INLINE void store_vector(void *data, int64_t i, vf v, int32_t dtype)
{
    if (dtype == MOE_F32)
        store_f32((char *)data + i * 4, v);
    else if (dtype == MOE_BF16)
        store_bf16((char *)data + i * 2, v);
    else
        STORE_F16((char *)data + i * 2, v);
}

/* The last n < LANES elements of an array that ends there. */
INLINE vf load_part(const void *data, int64_t i, int64_t n, int32_t dtype)
{
    char part[LANES * 4] = {0};
    memcpy(part, (const char *)data + i * element_bytes(dtype), (size_t)(n * element_bytes(dtype)));
    return load_vector(part, 0, dtype);
}

INLINE void store_part(void *data, int64_t i, int64_t n, vf v, int32_t dtype)
{
    char part[LANES * 4];
    store_vector(part, 0, v, dtype);
    memcpy((char *)data + i * element_bytes(dtype), part, (size_t)(n * element_bytes(dtype)));
}

INLINE vf load_up_to(const void *data, int64_t i, int64_t n, int32_t dtype)
{
    return n - i >= LANES ? load_vector(data, i, dtype) : load_part(data, i, n - i, dtype);
}

INLINE void store_up_to(void *data, int64_t i, int64_t n, vf v, int32_t dtype)
{
    if (n - i >= LANES)
        store_vector(data, i, v, dtype);
    else
        store_part(data, i, n - i, v, dtype);
}

/* 2^n for -126 <= n <= 127 */
INLINE vf power_of_two(vi n)
{
    return (vf)((n + 127) << 23);
}

/* e^x within 1.5 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, e^r by a polynomial whose own error is 3e-9
 * (fitted by reweighted least squares). The scale 2^n is applied in two halves, so that results
 * overflow to infinity and underflow through the denormals to 0. */
INLINE vf exponential(vf x)
{
    const float round =
        12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    x = at_least(at_most(x, splat(89.0f)), splat(-104.0f));
    vf shifted = x * 1.44269504f + round;
    vi n = (vi)shifted - 0x4b400000;
    vf whole = shifted - round;
    vf r = x - whole * 0.693359375f; /* ln 2 in two parts, the first short enough to be exact */
    r = r + whole * 2.12194440e-4f;
    vf p = r * 0.0013813142431899905f + 0.008369418792426586f;
    p = p * r + 0.04166845604777336f;
    p = p * r + 0.16666515171527863f;
    p = p * r + 0.4999999403953552f;
    p = (p * (r * r) + r) + 1.0f;
    vi half = n >> 1;
    return p * power_of_two(half) * power_of_two(n - half);
}

/* x / (1 + e^-y): x * sigmoid(y) without the loss that 1 - e^.. would bring */
INLINE vf times_sigmoid(vf x, vf y)
{
    return x / (1.0f + exponential(-y));
}

INLINE vf hyperbolic_tangent(vf x)
{
    vf magnitude = (vf)((vu)x & 0x7fffffffu), square = x * x;
    vf small = square * -0.005648307502269745f + 0.020589817315340042f;
    small = small * square - 0.05372512340545654f;
    small = small * square + 0.13331274688243866f;
    small = small * square - 0.33333274722099304f;
    small = x + x * square * small;
    vf e = exponential(-2.0f * magnitude);
    vf large = (1.0f - e) / (1.0f + e);
    large = (vf)((vu)large | ((vu)x & 0x80000000u));
    return select_f(magnitude < 0.625f, small, large);
}

static TARGET void add_values(float *c, const void *values, int64_t n, int32_t dtype)
{
    for (int64_t i = 0; i < n; i += LANES)
        store_f32(c + i, load_f32(c + i) + load_up_to(values, i, n, dtype));
}

static TARGET void scale_values(float *c, float factor, int64_t n)
{
    for (int64_t i = 0; i < n; i += LANES)
        store_f32(c + i, load_f32(c + i) * factor);
}

static TARGET void round_values(void *out, const float *c, int64_t n, int32_t dtype)
{
    for (int64_t i = 0; i < n; i += LANES)
        store_up_to(out, i, n, load_f32(c + i), dtype);
}

/* ---- routing: what it does for every expert or every candidate ---- */

/* Order of f32 as route_order has it (route_math.h), biased so that signed comparisons follow it. */
INLINE vi load_key(const uint32_t *key)
{
    vu k;
    memcpy(&k, key, sizeof k);
    return (vi)(k ^ 0x80000000u);
}

INLINE vi splat_i(int32_t x)
{
    return x - (vi){0};
}

INLINE void logits_of(float *x, uint32_t *key, vu *nan, const void *row, int64_t i, int64_t n,
                      int32_t dtype)
{
    vf value = load_up_to(row, i, n, dtype);
    vu bits = (vu)(value + 0.0f); /* -0 becomes +0 */
    vu is_nan = (vu)(value != value);
    vu order = bits ^ ((vu)((vi)bits >> 31) | 0x80000000u);
    order = (~is_nan & order) | (is_nan & 1u);
    *nan |= is_nan;
    store_f32(x + i, value);
    memcpy(key + i, &order, sizeof order);
}

static TARGET bool load_logits(float *x, uint32_t *key, const void *row, int64_t n, int32_t dtype)
{
    vu nan = {0};
    if (dtype == MOE_F32)
        for (int64_t i = 0; i < n; i += LANES)
            logits_of(x, key, &nan, row, i, n, MOE_F32);
    else if (dtype == MOE_BF16)
        for (int64_t i = 0; i < n; i += LANES)
            logits_of(x, key, &nan, row, i, n, MOE_BF16);
    else
        for (int64_t i = 0; i < n; i += LANES)
            logits_of(x, key, &nan, row, i, n, MOE_F16);
    uint32_t any = 0;
    for (int i = 0; i < LANES; ++i)
        any |= nan[i];
    return any != 0;
}

/* e^x, x <= 0, within 2 ulp; 0 below -87. Of NaN: some number. */
INLINE vf exponential_below(vf x)
{
    const vf shifted = MULTIPLY_ADD(splat(12582912.0f), x, splat(1.44269504f));
    const vf n = shifted - 12582912.0f;
    vf r = MULTIPLY_ADD(x, n, splat(-0.693145752f)); /* ln 2 in two parts */
    r = MULTIPLY_ADD(r, n, splat(-1.42860677e-6f));
    vf p = MULTIPLY_ADD(splat(8.36874545e-3f), splat(1.38145417e-3f), r);
    p = MULTIPLY_ADD(splat(4.16683890e-2f), p, r);
    p = MULTIPLY_ADD(splat(1.66665211e-1f), p, r);
    p = MULTIPLY_ADD(splat(4.99999940e-1f), p, r);
    p = MULTIPLY_ADD(splat(1.0f), p, r);
    p = MULTIPLY_ADD(splat(1.0f), p, r);
    const vu scaled = (vu)p + ((vu)shifted << 23); /* n is in the last bits */
    return (vf)(scaled & (vu)(x >= -87.0f));
}

static TARGET double exp_sum(float *c, float maximum, int64_t n)
{
    vf sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vf value = exponential_below(load_f32(c + i) - maximum);
        store_f32(c + i, value);
        sum += value;
    }
    double total = 0;
    for (int j = 0; j < LANES; ++j)
        total += (double)sum[j];
    if (i == n) return total;
    store_f32(c + i, exponential_below(load_f32(c + i) - maximum));
    for (; i < n; ++i)
        total += (double)c[i];
    return total;
}

enum { BLOCK_KEYS = 64, MAX_CANDIDATES = 64 };

/* The topk-th largest of the largest keys of num_groups interleaved groups: topk keys reach it. */
INLINE int32_t bound_of_groups(const uint32_t *key, int32_t n, int32_t topk, int num_groups)
{
    enum { MAX_VECTORS = 32 / LANES };
    const int vectors = num_groups / LANES;
    vi top[MAX_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
        top[v] = splat_i(INT32_MIN);
    for (int32_t e = 0; e < n; e += num_groups) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            top[v] = LARGER(top[v], load_key(key + e + v * LANES));
    }
    int32_t value[32];
    memcpy(value, top, (size_t)num_groups * sizeof *value);
    vi above[MAX_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
        above[v] = (vi){0};
    for (int i = 0; i < num_groups; ++i) {
        const vi one = splat_i(value[i]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            above[v] += one > top[v]; /* counts down */
    }
    vi least = splat_i(INT32_MIN);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) { /* ~x turns the least into the largest */
        vi kept = above[v] > splat_i(-topk);
        least = LARGER(least, (kept & ~top[v]) | (~kept & INT32_MIN));
    }
    int32_t bound = INT32_MIN;
    for (int i = 0; i < LANES; ++i)
        bound = least[i] > bound ? least[i] : bound;
    return ~bound;
}

/* By insertion; for rows in which too many keys reach the bound, and for large topk. */
static int32_t insert_largest(const uint32_t *key, int32_t n, int32_t topk, int32_t *ids)
{
    int32_t count = 0;
    for (int32_t e = 0; e < n; ++e) {
        if (key[e] == 0 || (count == topk && key[e] <= key[ids[count - 1]])) continue;
        int32_t at = count < topk ? count++ : count - 1;
        for (; at > 0 && key[e] > key[ids[at - 1]]; --at)
            ids[at] = ids[at - 1];
        ids[at] = e;
    }
    return count;
}

/* Few keys reach the bound, ten or so; each counts how many come before it, which is its place. No
 * branch hangs on a comparison of keys, and the time does not grow with topk. */
static TARGET int32_t select_largest(uint32_t *key, int32_t n, int32_t topk, int32_t *ids)
{
    int32_t value[MAX_CANDIDATES + LANES], id[MAX_CANDIDATES], place[MAX_CANDIDATES + LANES],
        ordered[MAX_CANDIDATES], count = 0;
    for (int32_t e = n; e % BLOCK_KEYS; ++e)
        key[e] = 0;
    int32_t bound = INT32_MIN + 1;
    if (n > 16) {
        if (topk > 24) return insert_largest(key, n, topk, ids);
        const int32_t reached =
            topk > 10 ? bound_of_groups(key, n, topk, 32) : bound_of_groups(key, n, topk, 16);
        if (reached > bound) bound = reached;
    }
    const vi below = splat_i(bound - 1);
    for (int32_t e = 0; e < n; e += BLOCK_KEYS) {
        uint64_t hits = 0;
#pragma GCC unroll 16
        for (int i = 0; i < BLOCK_KEYS; i += LANES)
            hits |= (uint64_t)GREATER_MASK(load_key(key + e + i), below) << i;
        if (count + __builtin_popcountll(hits) > MAX_CANDIDATES)
            return insert_largest(key, n, topk, ids);
        for (; hits; hits &= hits - 1, ++count) {
            const int32_t at = e + __builtin_ctzll(hits);
            id[count] = at;
            value[count] = (int32_t)(key[at] ^ 0x80000000u);
        }
    }
    for (int i = 0; i < LANES; ++i)
        value[count + i] = INT32_MIN + 1; /* the least that has a predecessor */

    vi lane;
    for (int i = 0; i < LANES; ++i)
        lane[i] = i;
    for (int32_t block = 0; block < count; block += LANES) {
        vi mine, before = {0};
        memcpy(&mine, value + block, sizeof mine);
        int32_t i = 0;
        for (; i < block; ++i) /* lower ids come first among equals */
            before += splat_i(value[i]) > mine - 1;
#pragma GCC unroll 16
        for (int j = 0; j < LANES; ++j, ++i)
            before += splat_i(value[i]) > mine + (lane > splat_i(j));
        for (; i < count; ++i)
            before += splat_i(value[i]) > mine;
        before = -before;
        memcpy(place + block, &before, sizeof before);
    }
    for (int32_t i = 0; i < count; ++i)
        ordered[place[i]] = id[i];
    if (count > topk) count = topk;
    memcpy(ids, ordered, (size_t)count * sizeof *ids);
    return count;
}

INLINE vf silu(vf g, int32_t clamp, vf limit)
{
    if (clamp == MOE_CLAMP_BEFORE) g = at_most(g, limit);
    g = times_sigmoid(g, g);
    return clamp == MOE_CLAMP_AFTER ? at_most(g, limit) : g;
}

/* g * (1 + erf(g / sqrt 2)) / 2 = g / 2 * erfc(-g / sqrt 2), so that the far negative side keeps its
 * digits. For a >= 0: erfc(a) = e^(-a^2) p(t), t = 1 / (1 + 0.4 a); p fitted to 3e-8 on a <= 10.6, where
 * the exponential is below the smallest f32. */
INLINE vf gelu(vf g)
{
    vf a = (vf)((vu)g & 0x7fffffffu) * 0.70710678f;
    vf t = 1.0f / (1.0f + 0.4f * a);
    vf p = t * 0.03056851588189602f - 0.08469509333372116f;
    p = p * t - 0.04085918515920639f;
    p = p * t + 0.24613749980926514f;
    p = p * t - 0.04459775984287262f;
    p = p * t + 0.25615930557250977f;
    p = p * t + 0.1815916746854782f;
    p = p * t + 0.23049071431159973f;
    p = p * t + 0.2251829355955124f;
    p = p * t + 2.1430230844998732e-05f;
    vf tail = p * exponential(-0.5f * g * g);
    return 0.5f * g * select_f(g < 0.0f, tail, 2.0f - tail);
}

/* One value of the activation (MOE_ACT_* in moe_kernels.h). activation is a constant where this is
 * inlined; up is not read where not gated. */
INLINE vf activation_value(vf g, vf u, int32_t activation, const moe_gate_up_args *args)
{
    const bool gated = args->gated;
    const float alpha = args->activation_alpha, limit = args->activation_limit;
    vf f;
    switch (activation) {
    case MOE_ACT_SILU: {
        int32_t clamp = limit > 0 ? args->clamp : MOE_CLAMP_NONE;
        f = silu(g, clamp, splat(limit));
        if (clamp != MOE_CLAMP_NONE) u = clamped(u, splat(limit));
        break;
    }
    case MOE_ACT_GELU:
        f = gelu(g);
        break;
    case MOE_ACT_GELU_TANH: /* (1 + tanh z) / 2 = sigmoid(2 z) */
        f = times_sigmoid(g, 1.5957691f * g * (1.0f + 0.044715f * g * g));
        break;
    case MOE_ACT_RELU2:
        f = at_least(g, (vf){0});
        f = f * f;
        break;
    case MOE_ACT_SWIGLU_OAI:
        if (limit > 0) {
            g = at_most(g, splat(limit));
            u = clamped(u, splat(limit));
        }
        f = times_sigmoid(g, g * alpha);
        u = u + 1.0f;
        break;
    default: /* MOE_ACT_SITU */
        f = times_sigmoid(hyperbolic_tangent(g / alpha) * alpha, g);
        if (limit > 0) u = hyperbolic_tangent(u / limit) * limit;
        break;
    }
    return gated ? f * u : f;
}

#define ACTIVATE(activation)                                                                       \
    case activation:                                                                               \
        for (int64_t i = 0; i < n; i += LANES)                                                     \
            store_f32(gate + i,                                                                    \
                      activation_value(load_f32(gate + i), load_f32(up + i), activation, args));   \
        break

/* gate = f(gate, up); up may be gate where the activation is not gated. */
static TARGET void activate(float *gate, const float *up, int64_t n, const moe_gate_up_args *args)
{
    switch (args->activation) {
        ACTIVATE(MOE_ACT_SILU);
        ACTIVATE(MOE_ACT_GELU);
        ACTIVATE(MOE_ACT_GELU_TANH);
        ACTIVATE(MOE_ACT_RELU2);
        ACTIVATE(MOE_ACT_SWIGLU_OAI);
    default:
        ACTIVATE(MOE_ACT_SITU);
    }
}

INLINE vf sum_vector(const void *const *rows, int num_rows, const void *shared, float scale,
                     int64_t i, int64_t n, int32_t dtype)
{
    vf sum = {0};
    for (int r = 0; r < num_rows; ++r)
        sum += load_up_to(rows[r], i, n, dtype);
    sum *= scale;
    return shared ? sum + load_up_to(shared, i, n, dtype) : sum;
}

INLINE void sum_rows_of(void *out, const void *const *rows, int num_rows, const void *shared,
                        float scale, int64_t n, int32_t dtype)
{
    int64_t i = 0;
    for (; i + 4 * LANES <= n;
         i += 4 * LANES) { /* four vectors keep the row pointers in use longer */
        vf s0 = {0}, s1 = s0, s2 = s0, s3 = s0;
        for (int r = 0; r < num_rows; ++r) {
            s0 += load_vector(rows[r], i, dtype);
            s1 += load_vector(rows[r], i + LANES, dtype);
            s2 += load_vector(rows[r], i + 2 * LANES, dtype);
            s3 += load_vector(rows[r], i + 3 * LANES, dtype);
        }
        s0 *= scale, s1 *= scale, s2 *= scale, s3 *= scale;
        if (shared) {
            s0 += load_vector(shared, i, dtype);
            s1 += load_vector(shared, i + LANES, dtype);
            s2 += load_vector(shared, i + 2 * LANES, dtype);
            s3 += load_vector(shared, i + 3 * LANES, dtype);
        }
        store_vector(out, i, s0, dtype);
        store_vector(out, i + LANES, s1, dtype);
        store_vector(out, i + 2 * LANES, s2, dtype);
        store_vector(out, i + 3 * LANES, s3, dtype);
    }
    for (; i < n; i += LANES)
        store_up_to(out, i, n, sum_vector(rows, num_rows, shared, scale, i, n, dtype), dtype);
}

static TARGET void sum_rows(void *out, const void *const *rows, int num_rows, const void *shared,
                            float scale, int64_t n, int32_t dtype)
{
    if (dtype == MOE_BF16)
        sum_rows_of(out, rows, num_rows, shared, scale, n, MOE_BF16);
    else if (dtype == MOE_F16)
        sum_rows_of(out, rows, num_rows, shared, scale, n, MOE_F16);
    else
        sum_rows_of(out, rows, num_rows, shared, scale, n, MOE_F32);
}

static TARGET uint32_t read_bytes(const void *data, int64_t n)
{
    const char *p = data;
    vu sum = {0};
    for (int64_t i = 0; i < n; i += 256) {
        __builtin_prefetch(p + i + 4096);
        __builtin_prefetch(p + i + 4096 + 64);
        __builtin_prefetch(p + i + 4096 + 128);
        __builtin_prefetch(p + i + 4096 + 192);
        for (int j = 0; j < 256; j += LANES * 4)
            sum |= (vu)load_f32(p + i + j);
    }
    uint32_t total = 0;
    for (int i = 0; i < LANES; ++i)
        total |= sum[i];
    return total;
}

/* Packs token rows of 2- or 4-byte elements as f32, step elements of K at a time. */
INLINE void pack_as_f32(void *packed, const void *const *rows, int num_rows, int64_t k, int step,
                        int32_t dtype)
{
    float *to = packed;
    for (int64_t i = 0; i < k; i += step)
        for (int r = 0; r < num_rows; ++r, to += step)
            for (int j = 0; j < step; j += LANES)
                store_f32(to + j, i + j < k ? load_up_to(rows[r], i + j, k, dtype) : (vf){0});
}

/* Packs token rows without conversion. */
INLINE void pack_bytes(void *packed, const void *const *rows, int num_rows, int64_t bytes, int step)
{
    char *to = packed;
    int64_t i = 0;
    for (; i + step <= bytes; i += step)
        for (int r = 0; r < num_rows; ++r, to += step)
            memcpy(to, (const char *)rows[r] + i, (size_t)step);
    if (i == bytes) return;
    for (int r = 0; r < num_rows; ++r, to += step) {
        memset(to, 0, (size_t)step);
        memcpy(to, (const char *)rows[r] + i, (size_t)(bytes - i));
    }
}

/* The dot tile. Its operands are f32, widened from bf16 or fp16 as they are loaded, once for all tokens of
 * the tile; with NATIVE_BF16, bf16 pairs in the same number of bytes. There is one accumulator per output
 * element whatever num_tokens is, so that results do not depend on it. */
INLINE bool is_native(int32_t dtype)
{
    return NATIVE_BF16 && dtype == MOE_BF16;
}

INLINE vf load_weights(const char *w, int64_t k, int32_t dtype)
{
    return is_native(dtype) ? load_f32(w + k * 2) : load_vector(w, k, dtype);
}

INLINE vf load_last_weights(const char *w, int64_t k, int64_t n, int32_t dtype)
{
    if (!is_native(dtype)) return load_part(w, k, n, dtype);
    char part[LANES * 4] = {0};
    memcpy(part, w + k * 2, (size_t)n * 2);
    return load_f32(part);
}

INLINE vf multiply_add(vf sum, vf a, vf b, int32_t dtype)
{
    return is_native(dtype) ? DOT_BF16(sum, a, b) : MULTIPLY_ADD(sum, a, b);
}

enum {
    NEAR_BYTES = 1024,  /* how far ahead a fresh weight row is fetched into L1 */
    SERIAL_BYTES = 2048 /* how far ahead into L2 where rows are read one after the other */
};

/* Addresses are numbers here: they may lie outside the array. */
INLINE uintptr_t address_of(const char *p, int64_t offset)
{
    return (uintptr_t)p + (uintptr_t)offset;
}

#define PREFETCH_L1(address) __builtin_prefetch((const void *)(address), 0, 3)
#define PREFETCH_L2(address) __builtin_prefetch((const void *)(address), 0, 2)

/* Four weight rows at once. Fetching far ahead into L2 and near ahead into L1 reads memory at 1.3 to 1.7
 * times the speed of fetching into L1 alone (docs/notes/cpu_gemm.md). */
INLINE void dot_tile(const moe_dot *dot, int num_tokens, int32_t dtype)
{
    const int64_t step = is_native(dtype) ? 2 * LANES : LANES, width = dtype == MOE_F32 ? 4 : 2;
    const char *w0 = dot->w[0], *w1 = dot->w[1], *w2 = dot->w[2], *w3 = dot->w[3];
    const uintptr_t prefetch = dot->prefetch;
    const int64_t prefetch_step = dot->prefetch_step, prefetch_stride = dot->prefetch_stride;
    const int num_prefetch = dot->num_prefetch, fresh = dot->fresh;
    const float *x = dot->x;
    vf sum[MAX_TOKENS][MOE_DOT_ROWS];
#pragma GCC unroll 8
    for (int t = 0; t < num_tokens; ++t)
        sum[t][0] = sum[t][1] = sum[t][2] = sum[t][3] = (vf){0};

    int64_t k = 0;
    for (; k + step <= dot->k; k += step, x += num_tokens * LANES) {
        const int64_t byte = k * width;
        vf a = load_weights(w0, k, dtype), b = load_weights(w1, k, dtype);
        vf c = load_weights(w2, k, dtype), d = load_weights(w3, k, dtype);
#pragma GCC unroll 8
        for (int t = 0; t < num_tokens; ++t) {
            vf y = load_f32(x + t * LANES);
            sum[t][0] = multiply_add(sum[t][0], y, a, dtype);
            sum[t][1] = multiply_add(sum[t][1], y, b, dtype);
            sum[t][2] = multiply_add(sum[t][2], y, c, dtype);
            sum[t][3] = multiply_add(sum[t][3], y, d, dtype);
        }
        if (step * width < 64 && byte % 64) continue; /* once per line */
        if (fresh) {
            PREFETCH_L1(address_of(w0, byte + NEAR_BYTES));
            PREFETCH_L1(address_of(w1, byte + NEAR_BYTES));
            PREFETCH_L1(address_of(w2, byte + NEAR_BYTES));
            PREFETCH_L1(address_of(w3, byte + NEAR_BYTES));
        }
        for (int i = 0; i < num_prefetch; ++i)
            PREFETCH_L2(prefetch + (uintptr_t)(byte * prefetch_step + i * prefetch_stride));
    }
    if (k < dot->k) {
        const int64_t n = dot->k - k;
        vf a = load_last_weights(w0, k, n, dtype), b = load_last_weights(w1, k, n, dtype);
        vf c = load_last_weights(w2, k, n, dtype), d = load_last_weights(w3, k, n, dtype);
#pragma GCC unroll 8
        for (int t = 0; t < num_tokens; ++t) {
            vf y = load_f32(x + t * LANES);
            sum[t][0] = multiply_add(sum[t][0], y, a, dtype);
            sum[t][1] = multiply_add(sum[t][1], y, b, dtype);
            sum[t][2] = multiply_add(sum[t][2], y, c, dtype);
            sum[t][3] = multiply_add(sum[t][3], y, d, dtype);
        }
    }
    reduce_tile(sum, num_tokens, dot);
}

/* The same for one or two tokens whose weights come from memory: one row after the other, so that memory
 * is read in one sequence. The additions are those of dot_tile. */
INLINE void dot_serial(const moe_dot *dot, int num_tokens, int32_t dtype)
{
    const int64_t step = is_native(dtype) ? 2 * LANES : LANES, width = dtype == MOE_F32 ? 4 : 2;
    const int64_t whole = dot->k / step * step, bytes = whole * width;
    const int64_t distance = bytes < SERIAL_BYTES ? bytes : SERIAL_BYTES;
    vf sum[MAX_TOKENS][MOE_DOT_ROWS];
#pragma GCC unroll 4
    for (int row = 0; row < MOE_DOT_ROWS; ++row) {
        const char *w = dot->w[row];
        const uintptr_t next =
            row + 1 < MOE_DOT_ROWS ? address_of(dot->w[row + 1], 0) : dot->prefetch;
        const float *x = dot->x;
        vf s[2] = {{0}, {0}};
        int64_t k = 0;
        for (int part = 0; part < 2;
             ++part) { /* what is fetched lies in this row, then in the next */
            const uintptr_t ahead =
                part ? next - (uintptr_t)(bytes - distance) : address_of(w, distance);
            const int64_t end = part ? whole : whole - distance / width;
#pragma GCC unroll 4
            for (; k < end; k += step, x += num_tokens * LANES) {
                vf a = load_weights(w, k, dtype);
                s[0] = multiply_add(s[0], load_f32(x), a, dtype);
                if (num_tokens > 1) s[1] = multiply_add(s[1], load_f32(x + LANES), a, dtype);
                PREFETCH_L2(ahead + (uintptr_t)(k * width));
            }
        }
        if (k < dot->k) {
            vf a = load_last_weights(w, k, dot->k - k, dtype);
            s[0] = multiply_add(s[0], load_f32(x), a, dtype);
            if (num_tokens > 1) s[1] = multiply_add(s[1], load_f32(x + LANES), a, dtype);
        }
        sum[0][row] = s[0];
        if (num_tokens > 1) sum[1][row] = s[1];
    }
    reduce_tile(sum, num_tokens, dot);
}

/* num_tokens becomes a constant, so that the accumulators live in registers. */
INLINE void dot_tokens(const moe_dot *dot, int num_tokens, int32_t dtype)
{
    const bool serial =
        LANES == 16 && dot->in_turn && dot->fresh && dot->num_prefetch == MOE_DOT_ROWS;
    switch (num_tokens) {
#if MAX_TOKENS > 3
    case 6:
        dot_tile(dot, 6, dtype);
        break;
    case 5:
        dot_tile(dot, 5, dtype);
        break;
    case 4:
        dot_tile(dot, 4, dtype);
        break;
#endif
    case 3:
        dot_tile(dot, 3, dtype);
        break;
    case 2:
        if (serial)
            dot_serial(dot, 2, dtype);
        else
            dot_tile(dot, 2, dtype);
        break;
    default:
        if (serial)
            dot_serial(dot, 1, dtype);
        else
            dot_tile(dot, 1, dtype);
    }
}

static TARGET void dot_f32(const moe_dot *dot, int num_tokens)
{
    dot_tokens(dot, num_tokens, MOE_F32);
}

static TARGET void dot_f16(const moe_dot *dot, int num_tokens)
{
    dot_tokens(dot, num_tokens, MOE_F16);
}

static TARGET void dot_bf16(const moe_dot *dot, int num_tokens)
{
    dot_tokens(dot, num_tokens, MOE_BF16);
}

static TARGET void pack_f32(void *packed, const void *const *rows, int num_rows, int64_t k)
{
    pack_as_f32(packed, rows, num_rows, k, LANES, MOE_F32);
}

static TARGET void pack_f16(void *packed, const void *const *rows, int num_rows, int64_t k)
{
    pack_as_f32(packed, rows, num_rows, k, LANES, MOE_F16);
}

static TARGET void pack_bf16(void *packed, const void *const *rows, int num_rows, int64_t k)
{
    if (NATIVE_BF16)
        pack_bytes(packed, rows, num_rows, k * 2, LANES * 4);
    else
        pack_as_f32(packed, rows, num_rows, k, LANES, MOE_BF16);
}

#if LANES < 16
static TARGET void widen_weights(float *to, const void *weights, int64_t n, int32_t dtype)
{
    for (int64_t i = 0; i < n; i += LANES)
        store_up_to(to, i, n, load_up_to(weights, i, n, dtype), MOE_F32);
}
#else
#define widen_weights NULL
#endif

/* The entries of a table that this file brings. */
#define MOE_SIMD_FUNCTIONS                                                                         \
    .max_tokens = MAX_TOKENS, .step = {0, LANES, NATIVE_BF16 ? 2 * LANES : LANES, LANES},          \
    .packed_element_bytes = {0, 4, NATIVE_BF16 ? 2 : 4, 4},                                        \
    .pack = {0, pack_f32, pack_bf16, pack_f16}, .dot = {0, dot_f32, dot_bf16, dot_f16},            \
    .widen = widen_weights, .add = add_values, .scale = scale_values, .activate = activate,        \
    .round = round_values, .sum_rows = sum_rows, .load_logits = load_logits,                       \
    .select_largest = select_largest, .exp_sum = exp_sum, .read = read_bytes
