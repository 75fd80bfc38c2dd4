/* gate_up.cuh: what gate_up.cu and gate_up_sm90a.cu share: the activations, where w13's rows lie, and the
 * epilogue of four neighbouring outputs of one row. */
#ifndef MOE_GATE_UP_CUH
#define MOE_GATE_UP_CUH

#include "gemm_common.cuh"

// x . sigmoid(c x). For x = -inf NaN, as the formula says; for very negative x minus zero.
static __device__ __forceinline__ float swish(float x, float c)
{
    return __fdividef(x, 1.0f + exp2_approx(-c * x * 1.4426950408889634f));
}

// min and clamp that keep NaN.
static __device__ __forceinline__ float at_most(float x, float limit)
{
    return min_nan(x, limit);
}

static __device__ __forceinline__ float clamp(float x, float limit)
{
    return max_nan(min_nan(x, limit), -limit);
}

// x / 2 (1 + tanh(c (x + 0.044715 x^3))), c = sqrt(2 / pi): 1 + tanh(z) is twice the sigmoid of 2 z.
static __device__ __forceinline__ float gelu_tanh(float x)
{
    const float inner = x * fmaf(0.044715f * x, x, 1.0f);
    return __fdividef(
        x, 1.0f + exp2_approx(-2.0f * 0.79788456080286536f * 1.4426950408889634f * inner));
}

static __device__ __forceinline__ float gelu(float x)
{
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}

static __device__ __forceinline__ float relu2(float x)
{
    const float positive = x < 0.0f ? 0.0f : x;
    return positive * positive;
}

// y = silu(g) u, with a limit before or after the product's first factor where there is one.
template <int N>
static __device__ __forceinline__ void
activate_silu(float (&y)[N], const float (&g)[N], const float (&u)[N], const moe_gate_up_args &args)
{
    float limit = args.activation_limit;
    bool gated = args.gated, limited = limit > 0.0f;
    bool before = limited && args.clamp == MOE_CLAMP_BEFORE;
    bool after = limited && args.clamp == MOE_CLAMP_AFTER;
    bool both = before || after;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float f = swish(before ? at_most(g[i], limit) : g[i], 1.0f);
        if (after) f = at_most(f, limit);
        y[i] = gated ? f * (both ? clamp(u[i], limit) : u[i]) : f;
    }
}

// y = f(g) u; u is 1 where not gated (swiglu_oai always is).
template <int N>
static __device__ __forceinline__ void activate(float (&y)[N], const float (&g)[N],
                                                const float (&u)[N], const moe_gate_up_args &args)
{
    float alpha = args.activation_alpha, limit = args.activation_limit;
    bool gated = args.gated, limited = limit > 0.0f;
    switch (args.activation) {
    case MOE_ACT_SILU:
        activate_silu(y, g, u, args);
        break;
    case MOE_ACT_GELU:
#pragma unroll
        for (int i = 0; i < N; ++i)
            y[i] = gelu(g[i]) * u[i];
        break;
    case MOE_ACT_GELU_TANH:
#pragma unroll
        for (int i = 0; i < N; ++i)
            y[i] = gelu_tanh(g[i]) * u[i];
        break;
    case MOE_ACT_RELU2:
#pragma unroll
        for (int i = 0; i < N; ++i)
            y[i] = relu2(g[i]) * u[i];
        break;
    case MOE_ACT_SWIGLU_OAI:
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float x = limited ? at_most(g[i], limit) : g[i];
            y[i] = swish(x, alpha) * ((limited ? clamp(u[i], limit) : u[i]) + 1.0f);
        }
        break;
    default: // MOE_ACT_SITU
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float up = gated && limited ? limit * tanhf(u[i] / limit) : u[i];
            y[i] = alpha * tanhf(g[i] / alpha) * swish(1.0f, g[i]) * up;
        }
    }
}

// silu(gate) up and nothing else, which takes a fraction of the instructions of what follows.
static __device__ __forceinline__ bool is_plain(const moe_gate_up_args &args)
{
    return args.gated && args.activation == MOE_ACT_SILU && !args.w13_bias && !args.topk_weights &&
           !(args.activation_limit > 0.0f);
}

template <class T>
static __device__ __forceinline__ uint32_t plain_pair(float g0, float g1, float u0, float u1)
{
    return T::round2(swish(g0, 1.0f) * u0, swish(g1, 1.0f) * u1);
}

// Columns of one expert's w13: (gate, up) of output i are columns 2 i, 2 i + 1 where gated.
static __device__ __forceinline__ int32_t gate_up_cols(const moe_gate_up_args &args)
{
    return args.gated ? 2 * args.intermediate_size : args.intermediate_size;
}

template <class T>
static __device__ __forceinline__ weight_rows gate_up_rows(int32_t expert,
                                                           const moe_gate_up_args &args)
{
    int32_t size = args.intermediate_size;
    weight_rows rows;
    rows.base =
        static_cast<const typename T::element *>(args.w13) + expert * args.w13_expert_stride;
    rows.stride = args.w13_row_stride;
    rows.num_cols = gate_up_cols(args);
    rows.split = args.gated && args.w13_order != MOE_ORDER_INTERLEAVED ? size : 0;
    rows.gate_first = args.w13_order == MOE_ORDER_UP_GATE ? size : 0;
    rows.up_first = size - rows.gate_first;
    return rows;
}

// Outputs out .. out + N - 1 of a row, in f32: bias, weight, activation. g, u: the sums (u: 1 where not gated).
// Those past intermediate_size are anything.
template <int N>
static __device__ __forceinline__ void
make_outputs(float (&y)[N], float (&g)[N], float (&u)[N], int32_t out, float weight, int32_t expert,
             const weight_rows &rows, const moe_gate_up_args &args)
{
    int32_t gated = args.gated;
    if (args.w13_bias) {
        const int64_t base = expert * args.w13_bias_stride;
        int64_t bias_at[2 * N];
        float bias[2 * N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int32_t at = out + i, col = gated ? 2 * at : at;
            const bool there = at < args.intermediate_size;
            bias_at[i] = there ? base + rows.row(col) : -1;
            bias_at[i + N] = there && gated ? base + rows.row(col + 1) : -1;
        }
        load_f32(bias, args.w13_bias, bias_at, args.w13_bias_dtype);
#pragma unroll
        for (int i = 0; i < N; ++i)
            g[i] += bias[i], u[i] += bias[i + N];
    }
    if (args.topk_weights) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            g[i] *= weight;
            if (gated) u[i] *= weight;
        }
    }
    activate(y, g, u, args);
}

// Outputs out .. out + 3 of row `row` of intermediate, those below intermediate_size, rounded once.
// kVector: 8-byte aligned groups of four.
template <class T, bool kVector>
static __device__ __forceinline__ void
write_outputs(float (&g)[4], float (&u)[4], int64_t row, int32_t out, float weight, int32_t expert,
              const weight_rows &rows, const moe_gate_up_args &args)
{
    using element = typename T::element;
    int32_t count = min(4, args.intermediate_size - out);
    if (count <= 0) return;
    float y[4];
    make_outputs(y, g, u, out, weight, expert, rows, args);
    element *to = static_cast<element *>(args.intermediate) + row * args.intermediate_stride + out;
    if (kVector && count == 4) {
        *reinterpret_cast<uint2 *>(to) = make_uint2(T::round2(y[0], y[1]), T::round2(y[2], y[3]));
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < count) to[i] = T::round(y[i]);
    }
}

#endif
