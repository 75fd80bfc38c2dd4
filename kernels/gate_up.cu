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
#include "gate_up.cuh"
#include "gemm_mma.cuh"

// Phase 2 of the epilogue: a thread takes four neighbouring outputs of one row at a time.
template <class Gemm>
static __device__ __forceinline__ void
write_intermediate(const typename Gemm::shared &smem, const typename Gemm::work &work,
                   const weight_rows &rows, const moe_gate_up_args &args)
{
    int32_t gated = args.gated;
    const bool plain = Gemm::kVector && is_plain(args);
    int32_t row_groups = Gemm::kCols / (gated ? 8 : 4), shift = __ffs(row_groups) - 1;
    int32_t out_begin = gated ? work.col_begin / 2 : work.col_begin;
    for (int32_t item = threadIdx.x; item < work.num_rows * row_groups; item += Gemm::kThreads) {
        int32_t row = item >> shift, group = item & (row_groups - 1);
        int32_t out = out_begin + group * 4;
        if (out >= args.intermediate_size) continue;
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
        if (plain && out + 4 <= args.intermediate_size) {
            *reinterpret_cast<uint2 *>(static_cast<typename Gemm::element *>(args.intermediate) +
                                       (int64_t{work.row_begin} + row) * args.intermediate_stride +
                                       out) =
                make_uint2(plain_pair<typename Gemm::T>(g[0], g[1], u[0], u[1]),
                           plain_pair<typename Gemm::T>(g[2], g[3], u[2], u[3]));
            continue;
        }
        write_outputs<typename Gemm::T, Gemm::kVector>(
            g, u, int64_t{work.row_begin} + row, out,
            args.topk_weights ? smem.row_weight[row] : 1.0f, work.expert, rows, args);
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
    typename Gemm::work work = Gemm::find_work(args.tiles, args.num_tiles, args.max_tiles,
                                               gate_up_cols(args), args.num_slots);
    if (work.num_rows == 0) return;

    weight_rows rows = gate_up_rows<typename Gemm::T>(work.expert, args);
    int32_t slot = Gemm::load_slot(work, args);
    int32_t num_steps = (args.hidden_size + Gemm::kTileK - 1) / Gemm::kTileK;
    typename Gemm::copier copy;
    copy.set_weights(rows, work.col_begin, args.hidden_size);
    Gemm::prefetch_weights(smem, copy, num_steps);

    if (threadIdx.x < Gemm::kRows) smem.row_token[threadIdx.x] = token_of(slot, args);
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

#define MOE_KERNEL_sm80_gate_up(name, type, rows, cols, k, stages, wm, wn, wk, align)              \
    extern "C" __global__ void __launch_bounds__(MOE_GEMM_THREADS(wm, wn, wk), 1)                  \
        name(const __grid_constant__ moe_gate_up_args args)                                        \
    {                                                                                              \
        gate_up<gemm_mma<type, rows, cols, k, stages, wm, wn, wk, align == 16>>(args);             \
    }
#include "gemm_instances.cuh"
