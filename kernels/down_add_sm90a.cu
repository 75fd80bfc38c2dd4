// arch: sm_90a
/* down_add_sm90a.cu: down and combine of a call with deterministic=False, or of topk 1:
 * out[token(r)] += round(scale * rows[r])
 * In     as down_sm90a.cu; out holds shared_output or zeros, from moe_down_fill, the grid in front
 * Out    out [num_tokens, hidden_size], by reductions in memory; where topk is 1 and nothing is shared, by stores (and
 *        moe_down_fill writes dropped tokens alone); rows are not written
 * Math   f32 up to the weighted row, which is rounded; then each sum is, in any order: repeatable for topk 1 only
 * Grid   as down_sm90a.cu
 * Needs  as down_sm90a.cu, and 16-byte aligned rows of out
 * Cost   num_rows * hidden_size * 2 bytes through the reductions of L2 instead of num_rows * hidden_size * 4 through
 *        memory, as long as out stays in L2: where it does not fit, a band of its columns after the other */
#include "down_wgmma.cuh"

// One warp a block, 32 registers a thread: there is room for it beside a thread block of a prefill gate_up, in front of
// which everything was complete before this grid could start. So it writes at once, unless gate_up reads from there;
// and one block that waits for gate_up is enough: the grid in front of down ends with its last block.
extern "C" __global__ void __maxnreg__(32) moe_down_fill(const __grid_constant__ moe_fill_args args)
{
    grid_launch_dependents();
    if (args.wait) grid_dependency_wait();
    const int32_t chunks = args.hidden_size / 8;
    for (int64_t token = blockIdx.x; token < args.num_tokens; token += gridDim.x) {
        if (args.row_of_slot &&
            static_cast<uint32_t>(args.row_of_slot[token]) < static_cast<uint64_t>(args.num_tokens))
            continue;
        uint4 *to = reinterpret_cast<uint4 *>(static_cast<unsigned short *>(args.out) +
                                              token * args.out_stride);
        if (!args.shared_output) {
            for (int32_t chunk = threadIdx.x; chunk < chunks; chunk += MOE_FILL_THREADS)
                to[chunk] = make_uint4(0, 0, 0, 0);
            continue;
        }
        const uint4 *from = reinterpret_cast<const uint4 *>(
            static_cast<const unsigned short *>(args.shared_output) + token * args.shared_stride);
        int32_t chunk = threadIdx.x;
        for (; chunk + MOE_FILL_THREADS < chunks; chunk += 2 * MOE_FILL_THREADS) {
            uint4 a = from[chunk], b = from[chunk + MOE_FILL_THREADS];
            to[chunk] = a;
            to[chunk + MOE_FILL_THREADS] = b;
        }
        for (; chunk < chunks; chunk += MOE_FILL_THREADS)
            to[chunk] = from[chunk];
    }
    if (blockIdx.x == 0 && !args.wait) grid_dependency_wait();
}

#define MOE_KERNEL_sm90a_down_add(name, type, rows, cols, k, stages, wm, wn, wk, align)            \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a, 1)                           \
        name(const __grid_constant__ moe_down_add_args args,                                       \
             const __grid_constant__ tensor_map weights,                                           \
             const __grid_constant__ tensor_map tokens)                                            \
    {                                                                                              \
        prefetch_maps(weights, tokens);                                                            \
        run_gemm<gemm_wgmma<type, false, rows, cols, k, stages>>(                                  \
            down_problem<type, moe_down_add_args>{                                                 \
                args.stage, &weights, &tokens, args.stage.hidden_size,                             \
                args.stage.intermediate_size, args.band_tiles, args.scale, args.once != 0});                       \
    }
#include "gemm_instances.cuh"
