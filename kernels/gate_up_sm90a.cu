// arch: sm_90a
/* gate_up_sm90a.cu: gate_up.cu with wgmma: the same arguments, formula and order of rounding (stage 3 of 5)
 * In     weights  tensor map of w13 as [num_experts, halves, I, hidden_size], boxes of half a tile's rows: the gate
 *                 rows of a tile, then its up rows, whatever their order in memory
 * Grid   min(MOE_GEMM_GRID(max_tiles, 2 I (or I), cols), SMs) blocks that walk over the tiles
 * Needs  align == 16, as there; compute capability 9.0
 * Cost   from about a hundred rows an expert on math, else the weights once for each tile of an expert */
#include "gate_up_tiles.cuh"

#define MOE_KERNEL_gate_up(problem, name, type, rows, cols, k, stages, wm, wn, wk)                 \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a, 1)                           \
        name(const __grid_constant__ moe_gate_up_args args,                                        \
             const __grid_constant__ tensor_map weights)                                           \
    {                                                                                              \
        prefetch_maps(weights);                                                                    \
        run_gemm<gemm_wgmma<type, true, rows, cols, k, stages>>(                                   \
            problem<type>{{args, &weights, gate_up_cols(args), args.hidden_size}});                \
    }
#define MOE_KERNEL_sm90a_gate_up(name, type, rows, cols, k, stages, wm, wn, wk, align)             \
    MOE_KERNEL_gate_up(gate_up_problem, name, type, rows, cols, k, stages, wm, wn, wk)
#define MOE_KERNEL_sm90a_bare_gate_up(name, type, rows, cols, k, stages, wm, wn, wk, align)        \
    MOE_KERNEL_gate_up(plain_gate_up, name, type, rows, cols, k, stages, wm, wn, wk)
#include "gemm_instances.cuh"
