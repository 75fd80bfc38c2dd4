/* gate_up.cu: intermediate[r] = act(x[token(r)] . w13[e]^T + w13_bias[e])                  (stage 3 of 5)
 * In     hidden_states     [num_tokens, hidden_size]                bf16, f16  gathered: row r reads token
 *                                                                   sorted_token_ids[r] / topk
 *        w13               [num_experts, 2 I (or I), hidden_size]   the same dtype, any MOE_ORDER_*
 *        w13_bias          [num_experts, 2 I (or I)]                f32 or the same dtype, or NULL
 *        topk_weights      [num_tokens, topk]                       f32, bf16, f16, or NULL: weight 1
 *        tiles, num_tiles  written by align
 * Out    intermediate      [num_rows, I]                            the same dtype, every row of a tile
 * Math   f32: (x . w13 + bias) * weight, then MOE_ACT_*; one rounding; bitwise repeatable
 * Grid   MOE_GEMM_GRID(max_tiles, 2 I (or I), cols) blocks of MOE_GEMM_THREADS(wm, wn, wk);
 *        dynamic shared memory MOE_GEMM_SMEM_BYTES(rows, cols, k, stages)
 * Needs  align == 16: hidden_size % 8 == 0 and 16-byte aligned rows of hidden_states, w13 and intermediate
 *        (plan.c chooses an `any` variant otherwise)
 * Cost   each tile reads its weight rows once: weights up to about a hundred rows an expert, then math */
#include "gemm_mma.cuh"

// x . sigmoid(c x). For x = -inf NaN, as the formula says; for very negative x minus zero.
static __device__ __forceinline__ float swish(float x, float c)
{
    return __fdividef(x, 1.0f + __expf(-c * x));
}

// min and clamp that keep NaN.
static __device__ __forceinline__ float at_most(float x, float limit)
{
    return x > limit ? limit : x;
}

static __device__ __forceinline__ float clamp(float x, float limit)
{
    return x > limit ? limit : x < -limit ? -limit : x;
}

// y = f(g) u; u is 1 where not gated (swiglu_oai always is).
static __device__ __forceinline__ void activate(float (&y)[4], const float (&g)[4],
                                                const float (&u)[4], const moe_gate_up_args &args)
{
    float alpha = args.activation_alpha, limit = args.activation_limit;
    bool gated = args.gated, limited = limit > 0.0f;
    switch (args.activation) {
    case MOE_ACT_SILU: {
        bool before = limited && args.clamp == MOE_CLAMP_BEFORE;
        bool after = limited && args.clamp == MOE_CLAMP_AFTER;
        bool both = before || after;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float f = swish(before ? at_most(g[i], limit) : g[i], 1.0f);
            if (after) f = at_most(f, limit);
            y[i] = gated ? f * (both ? clamp(u[i], limit) : u[i]) : f;
        }
        break;
    }
    case MOE_ACT_GELU:
#pragma unroll
        for (int i = 0; i < 4; ++i)
            y[i] = 0.5f * g[i] * (1.0f + erff(g[i] * 0.70710678118654752f)) * u[i];
        break;
    case MOE_ACT_GELU_TANH:
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float inner = 0.79788456080286536f * (g[i] + 0.044715f * g[i] * g[i] * g[i]);
            y[i] = 0.5f * g[i] * (1.0f + tanhf(inner)) * u[i];
        }
        break;
    case MOE_ACT_RELU2:
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float positive = g[i] < 0.0f ? 0.0f : g[i];
            y[i] = positive * positive * u[i];
        }
        break;
    case MOE_ACT_SWIGLU_OAI:
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float x = limited ? at_most(g[i], limit) : g[i];
            y[i] = swish(x, alpha) * ((limited ? clamp(u[i], limit) : u[i]) + 1.0f);
        }
        break;
    default: // MOE_ACT_SITU
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float up = gated && limited ? limit * tanhf(u[i] / limit) : u[i];
            y[i] = alpha * tanhf(g[i] / alpha) * swish(1.0f, g[i]) * up;
        }
    }
}

// Phase 2 of the epilogue: a thread takes four neighbouring outputs of one row at a time.
template <class Gemm>
static __device__ __forceinline__ void
write_intermediate(const typename Gemm::shared &smem, const typename Gemm::work &work,
                   const weight_rows &rows, const moe_gate_up_args &args)
{
    using T = typename Gemm::T;
    using element = typename T::element;
    int32_t gated = args.gated;
    int32_t row_groups = Gemm::kCols / (gated ? 8 : 4); // a power of two
    int32_t out_begin = gated ? work.col_begin / 2 : work.col_begin;
    for (int32_t item = threadIdx.x; item < work.num_rows * row_groups; item += Gemm::kThreads) {
        int32_t row = item / row_groups, group = item & (row_groups - 1);
        int32_t out = out_begin + group * 4;
        int32_t count = min(4, args.intermediate_size - out);
        if (count <= 0) continue;
        float g[4], u[4];
        if (gated) {
            float4 low = Gemm::read_sums(smem, row, group * 8);
            float4 high = Gemm::read_sums(smem, row, group * 8 + 4);
            g[0] = low.x, u[0] = low.y, g[1] = low.z, u[1] = low.w;
            g[2] = high.x, u[2] = high.y, g[3] = high.z, u[3] = high.w;
        } else {
            float4 x = Gemm::read_sums(smem, row, group * 4);
            g[0] = x.x, g[1] = x.y, g[2] = x.z, g[3] = x.w;
            u[0] = u[1] = u[2] = u[3] = 1.0f;
        }
        if (args.w13_bias) {
            int64_t base = work.expert * args.w13_bias_stride;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (i >= count) break;
                int32_t col = gated ? 2 * (out + i) : out + i;
                g[i] += load_f32(args.w13_bias, base + rows.row(col), args.w13_bias_dtype);
                if (gated)
                    u[i] += load_f32(args.w13_bias, base + rows.row(col + 1), args.w13_bias_dtype);
            }
        }
        if (args.topk_weights) {
            float weight = smem.row_weight[row];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                g[i] *= weight;
                if (gated) u[i] *= weight;
            }
        }
        float y[4];
        activate(y, g, u, args);
        element *to = static_cast<element *>(args.intermediate) +
                      (static_cast<int64_t>(work.row_begin) + row) * args.intermediate_stride + out;
        if (Gemm::kVector && count == 4) {
            *reinterpret_cast<uint2 *>(to) =
                make_uint2(T::round2(y[0], y[1]), T::round2(y[2], y[3]));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i < count) to[i] = T::round(y[i]);
        }
    }
}

template <class Gemm>
static __device__ __forceinline__ void gate_up(const moe_gate_up_args &args)
{
    using element = typename Gemm::element;
    extern __shared__ __align__(128) unsigned char dynamic_shared[];
    typename Gemm::shared &smem = *reinterpret_cast<typename Gemm::shared *>(dynamic_shared);

    grid_dependency_wait();
    grid_launch_dependents();
    int32_t size = args.intermediate_size;
    int32_t num_cols = args.gated ? 2 * size : size;
    typename Gemm::work work =
        Gemm::find_work(args.tiles, args.num_tiles, args.max_tiles, num_cols, args.num_slots);
    if (work.num_rows == 0) return;

    weight_rows rows;
    rows.base = static_cast<const element *>(args.w13) + work.expert * args.w13_expert_stride;
    rows.stride = args.w13_row_stride;
    rows.num_cols = num_cols;
    rows.split = args.gated && args.w13_order != MOE_ORDER_INTERLEAVED ? size : 0;
    rows.gate_first = args.w13_order == MOE_ORDER_UP_GATE ? size : 0;
    rows.up_first = size - rows.gate_first;

    int32_t slot = Gemm::load_slot(work, args);
    int32_t num_steps = (args.hidden_size + Gemm::kTileK - 1) / Gemm::kTileK;
    typename Gemm::copier copy;
    copy.set_weights(rows, work.col_begin, args.hidden_size);
    Gemm::prefetch_weights(smem, copy, num_steps);

    if (threadIdx.x < Gemm::kRows) smem.row_token[threadIdx.x] = Gemm::token_of(slot, args);
    __syncthreads();
    const element *tokens = static_cast<const element *>(args.hidden_states);
    copy.set_tokens(work.num_rows, [&](int32_t r) {
        int32_t token = smem.row_token[r];
        return token >= 0 ? tokens + token * args.hidden_stride : nullptr;
    });
    Gemm::prefetch_tokens(smem, copy, num_steps);
    Gemm::store_weight(smem, slot, args);
    Gemm::run(smem, copy, work.num_rows, num_steps);
    write_intermediate<Gemm>(smem, work, rows, args);
}

#define MOE_KERNEL_gate_up(name, type, rows, cols, k, stages, wm, wn, wk, align)                   \
    extern "C" __global__ void __launch_bounds__(MOE_GEMM_THREADS(wm, wn, wk), 1)                  \
        name(const __grid_constant__ moe_gate_up_args args)                                        \
    {                                                                                              \
        gate_up<gemm_mma<type, rows, cols, k, stages, wm, wn, wk, align == 16>>(args);             \
    }
#define MOE_KERNEL_down(...)
#define MOE_GEMM_VARIANT(name, arch, stage, act, weight, scale, orient, layout, rows, cols, k,     \
                         stages, wm, wn, wk, cluster, align)                                       \
    MOE_KERNEL_##stage(name, act, rows, cols, k, stages, wm, wn, wk, align)
#include "gemm_variants.def"
