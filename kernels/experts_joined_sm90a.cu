// arch: sm_90a
/* experts_joined_sm90a.cu: gate_up_sm90a.cu and down_sm90a.cu in one launch: the same arguments, formulas and order of rounding
 * In     w13, w2, rows  tensor maps, those of gate_up_sm90a.cu and down_sm90a.cu
 * Grid   min(items of both, SMs) blocks that take items from a counter
 * Needs  as there; tiles[i].done and the counter are zero (align)
 * Cost   as there, less a launch and what the last items of gate_up leave idle */
#include "down_wgmma.cuh"
#include "gate_up_tiles.cuh"
#include "gemm_joined.cuh"

template <class T>
struct any_down : down_problem<T, moe_down_args> {
    static constexpr bool kInPlace = true; // as gate_up's, whose registers these are
};

#define MOE_KERNEL_joined(up_problem, low_problem, name, type, rows, cols, k, stages, wm, wn, wk)  \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a_joined, 1)                    \
        name(const __grid_constant__ moe_experts_args args,                                        \
             const __grid_constant__ tensor_map w13, const __grid_constant__ tensor_map w2,        \
             const __grid_constant__ tensor_map tokens)                                            \
    {                                                                                              \
        using up = gemm_wgmma<type, true, rows, cols, k, stages>;                                  \
        using low = gemm_wgmma<type, false, rows, MOE_JOINED_DOWN_COLS(rows, cols), k,             \
                               MOE_JOINED_DOWN_STAGES>;                                            \
        prefetch_maps(w13, w2, tokens);                                                            \
        run_joined<up, low>(up_problem<type>{{args.gate_up, &w13, gate_up_cols(args.gate_up),      \
                                              args.gate_up.hidden_size}},                          \
                            low_problem<type>{args.down, &w2, &tokens, args.down.hidden_size,      \
                                              args.down.intermediate_size, 0, 1.0f});              \
    }
#define MOE_KERNEL_sm90a_joined_experts(name, type, rows, cols, k, stages, wm, wn, wk, align)      \
    MOE_KERNEL_joined(gate_up_problem, any_down, name, type, rows, cols, k, stages, wm, wn, wk)
#define MOE_KERNEL_sm90a_joined_bare_experts(name, type, rows, cols, k, stages, wm, wn, wk, align) \
    MOE_KERNEL_joined(plain_gate_up, plain_down, name, type, rows, cols, k, stages, wm, wn, wk)
#include "gemm_instances.cuh"
