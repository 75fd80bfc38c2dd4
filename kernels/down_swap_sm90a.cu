// arch: sm_90a
/* down_swap_sm90a.cu: down.cu as a stream of weights: the same arguments, formula and order of rounding
 * In     weights  tensor map of w2 as [num_experts, 1, hidden_size, I], boxes of half an item's rows
 * Grid   min(MOE_GEMM_GRID(max_tiles, hidden_size, cols), SMs) blocks that walk over the items
 * Needs  align == 16, as there; compute capability 9.0
 * Cost   as gate_up_swap_sm90a.cu, and num_rows * hidden_size * 2 bytes written */
#include "down_swap.cuh"

#define MOE_KERNEL_sm90a_swap_down(name, type, rows, cols, k, stages, wm, wn, wk, align)           \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a_swap, 1)                      \
        name(const __grid_constant__ moe_down_args args,                                           \
             const __grid_constant__ tensor_map weights)                                           \
    {                                                                                              \
        prefetch_maps(weights);                                                                    \
        run_gemm<gemm_swap<type, rows, cols, k, stages>>(                                          \
            down_swap_problem<type>{args, &weights, args.hidden_size, args.intermediate_size});    \
    }
#include "gemm_instances.cuh"
