// arch: sm_90a
/* experts_swap_sm90a.cu: gate_up_swap_sm90a.cu and down_swap_sm90a.cu in one launch: the same arguments, formulas and
 * order of rounding; between the two the stream of weights goes on. Rows of sm90a_plain are the same for layers of gated
 * silu without limit, biases and router weights on input, without the code of all these: it costs also where it does not run
 * In     w13, w2  tensor maps, as there
 * Out    intermediate, rows; tiles[i].done counts the warps that have written their part of tile i of intermediate
 * Grid   at most SMs blocks that walk over the items of gate_up, then over those of down. Any number is correct
 * Needs  as there; tiles and num_tiles from the launch in front, with zeros in tiles[i].done
 * Cost   the sum of both, less a launch, the end of one stage and the start of the other */
#include "down_swap.cuh"
#include "gate_up_swap.cuh"

#define MOE_KERNEL_experts(name, type, rows, cols, k, stages, wm, wn, wk, plain)                   \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a_swap, 1)                      \
        name(const __grid_constant__ moe_experts_args args,                                        \
             const __grid_constant__ tensor_map w13, const __grid_constant__ tensor_map w2)        \
    {                                                                                              \
        prefetch_maps(w13, w2);                                                                    \
        run_gemm<gemm_swap<type, rows, cols, k, stages>>(                                          \
            gate_up_swap_problem<type, plain>{args.gate_up, &w13, gate_up_cols(args.gate_up),      \
                                              args.gate_up.hidden_size},                           \
            down_swap_problem<type, plain>{args.down, &w2, args.down.hidden_size,                  \
                                           args.down.intermediate_size});                          \
    }
#define MOE_KERNEL_sm90a_swap_experts(name, type, rows, cols, k, stages, wm, wn, wk, align)        \
    MOE_KERNEL_experts(name, type, rows, cols, k, stages, wm, wn, wk, false)
#define MOE_KERNEL_sm90a_plain_experts(name, type, rows, cols, k, stages, wm, wn, wk, align)       \
    MOE_KERNEL_experts(name, type, rows, cols, k, stages, wm, wn, wk, true)
#include "gemm_instances.cuh"
