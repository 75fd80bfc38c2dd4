// arch: sm_90a
/* gate_up_swap_sm90a.cu: gate_up.cu as a stream of weights: the same arguments, formula and order of rounding
 * In     weights  tensor map of w13 as [num_experts, halves, I, hidden_size], boxes of half an item's rows: the gate
 *                 rows of an item, then its up rows, whatever their order in memory
 * Grid   min(MOE_GEMM_GRID(max_tiles, 2 I (or I), cols), SMs) blocks that walk over the items
 * Needs  align == 16, as there; compute capability 9.0
 * Cost   the weights once for each tile of an expert: as long as tiles hold an expert's rows, the stream from memory */
#include "gate_up_swap.cuh"

#define MOE_KERNEL_sm90a_swap_gate_up(name, type, rows, cols, k, stages, wm, wn, wk, align)        \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a_swap, 1)                      \
        name(const __grid_constant__ moe_gate_up_args args,                                        \
             const __grid_constant__ tensor_map weights)                                           \
    {                                                                                              \
        prefetch_maps(weights);                                                                    \
        run_gemm<gemm_swap<type, rows, cols, k, stages>>(                                          \
            gate_up_swap_problem<type>{args, &weights, gate_up_cols(args), args.hidden_size});     \
    }
#include "gemm_instances.cuh"
