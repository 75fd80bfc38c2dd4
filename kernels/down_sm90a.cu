// arch: sm_90a
/* down_sm90a.cu: down.cu with wgmma: the same arguments, formula and order of rounding (stage 4 of 5)
 * In     weights  tensor map of w2 as [num_experts, 4, hidden_size / 4, I], boxes of half a tile's rows: every fourth, then
 *                 those behind them, and so on (down_wgmma.cuh)
 *        tokens   tensor map of intermediate as [1, 1, num_slots, I], boxes of 64 rows
 * Grid   min(MOE_GEMM_GRID(max_tiles, hidden_size, cols), SMs) blocks that walk over the tiles
 * Needs  align == 16, as there; compute capability 9.0
 * Cost   as gate_up_sm90a.cu, and num_rows * hidden_size * 2 bytes written */
#include "down_wgmma.cuh"

template <class T>
using any_down = down_problem<T, moe_down_args>;

#define MOE_KERNEL_down(problem, name, type, rows, cols, k, stages, wm, wn, wk)                    \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a, 1)                           \
        name(const __grid_constant__ moe_down_args args,                                           \
             const __grid_constant__ tensor_map weights,                                           \
             const __grid_constant__ tensor_map tokens)                                            \
    {                                                                                              \
        prefetch_maps(weights, tokens);                                                            \
        run_gemm<gemm_wgmma<type, false, rows, cols, k, stages>>(                                  \
            problem{args, &weights, &tokens, args.hidden_size, args.intermediate_size, 0, 1.0f});  \
    }
#define MOE_KERNEL_sm90a_down(name, type, rows, cols, k, stages, wm, wn, wk, align)                \
    MOE_KERNEL_down(any_down<type>, name, type, rows, cols, k, stages, wm, wn, wk)
#define MOE_KERNEL_sm90a_bare_down(name, type, rows, cols, k, stages, wm, wn, wk, align)           \
    MOE_KERNEL_down(plain_down<type>, name, type, rows, cols, k, stages, wm, wn, wk)
#include "gemm_instances.cuh"
