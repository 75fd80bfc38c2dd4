/* down.cu: rows[r] = topk_weights[slot(r)] * (intermediate[r] . w2[e]^T + w2_bias[e])       (stage 4 of 5)
 * In     intermediate      [num_rows, I]               bf16, f16
 *        w2                [num_experts, hidden_size, I]  the same dtype
 *        w2_bias           [num_experts, hidden_size]  f32 or the same dtype, or NULL
 *        topk_weights      [num_tokens, topk]          f32, bf16, f16, or NULL: weight 1
 *        sorted_token_ids  row -> token * topk + slot
 *        tiles, num_tiles  written by align
 * Out    rows              [num_rows, hidden_size]     the same dtype, every row of a tile
 * Math   f32, bias before weight, one rounding; bitwise repeatable
 * Grid   MOE_GEMM_GRID(max_tiles, hidden_size, cols) blocks of MOE_GEMM_THREADS(wm, wn, wk);
 *        dynamic shared memory MOE_GEMM_SMEM_BYTES(rows, cols, k, stages)
 * Needs  align == 16: I % 8 == 0 and 16-byte aligned rows of intermediate, w2 and rows
 * Cost   as gate_up, and num_rows * hidden_size * 2 bytes written
 *
 * The first weights are asked for before the wait for gate_up: that only reads tiles and sorted_token_ids,
 * which align wrote and gate_up had waited for before it let this grid start. */
#include "down.cuh"
#include "gemm_mma.cuh"

// Phase 2 of the epilogue: a thread takes eight neighbouring columns of one row at a time.
template <class Gemm>
static __device__ __forceinline__ void write_rows(const typename Gemm::shared &smem,
                                                  const typename Gemm::work &work,
                                                  const moe_down_args &args)
{
    constexpr int kRowGroups = Gemm::kCols / 8;
    for (int32_t item = threadIdx.x; item < work.num_rows * kRowGroups; item += Gemm::kThreads) {
        int32_t row = item / kRowGroups, group = item % kRowGroups;
        int32_t col = work.col_begin + group * 8;
        if (col >= args.hidden_size) continue;
        float4 low = Gemm::read_sums(smem, row, group * 8);
        float4 high = Gemm::read_sums(smem, row, group * 8 + 4);
        float z[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        write_outputs<typename Gemm::T, Gemm::kVector>(
            z, int64_t{work.row_begin} + row, col, args.topk_weights ? smem.row_weight[row] : 1.0f,
            work.expert, args);
    }
}

template <class Gemm>
static __device__ __forceinline__ void down(const moe_down_args &args)
{
    using element = typename Gemm::element;
    extern __shared__ __align__(128) unsigned char dynamic_shared[];
    typename Gemm::shared &smem = *reinterpret_cast<typename Gemm::shared *>(dynamic_shared);

    typename Gemm::work work = Gemm::find_work(args.tiles, args.num_tiles, args.max_tiles,
                                               args.hidden_size, args.num_slots);
    if (work.num_rows == 0) {
        grid_dependency_wait(); // a grid that did not wait would let the next one overtake gate_up
        grid_launch_dependents();
        return;
    }
    weight_rows rows = down_rows<typename Gemm::T>(work.expert, args);

    int32_t slot = Gemm::load_slot(work, args);
    int32_t num_steps = (args.intermediate_size + Gemm::kTileK - 1) / Gemm::kTileK;
    typename Gemm::copier copy;
    copy.set_weights(rows, work.col_begin, args.intermediate_size);
    Gemm::prefetch_weights(smem, copy, num_steps);

    const element *first =
        static_cast<const element *>(args.intermediate) + work.row_begin * args.intermediate_stride;
    copy.set_tokens(work.num_rows, [&](int32_t r) { return first + r * args.intermediate_stride; });
    grid_dependency_wait();
    grid_launch_dependents();
    Gemm::prefetch_tokens(smem, copy, num_steps);
    Gemm::store_weight(smem, slot, args);
    Gemm::run(smem, copy, work.num_rows, num_steps);
    write_rows<Gemm>(smem, work, args);
}

#define MOE_KERNEL_sm80_down(name, type, rows, cols, k, stages, wm, wn, wk, align)                 \
    extern "C" __global__ void __launch_bounds__(MOE_GEMM_THREADS(wm, wn, wk), 1)                  \
        name(const __grid_constant__ moe_down_args args)                                           \
    {                                                                                              \
        down<gemm_mma<type, rows, cols, k, stages, wm, wn, wk, align == 16>>(args);                \
    }
#include "gemm_instances.cuh"
