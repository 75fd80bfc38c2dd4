// arch: sm_90a
/* experts_high_sm90a.cu: experts_swap_sm90a.cu for plain layers with tiles of another height behind it, for routings that only
 * align knows: the same arguments, formulas and order of rounding
 * In     w13, w2  tensor maps, as there; high_w13, high_w2, high_rows: those of gate_up_sm90a.cu and down_sm90a.cu
 * Out    as there
 * Grid   as there
 * Needs  as there; num_tiles[3]: tiles of MOE_HIGH_ROWS rows, where num_tiles[0] is 0
 * Cost   as there; with few experts of many rows as gate_up_sm90a.cu and down_sm90a.cu, less a launch */
#include "down_swap.cuh"
#include "down_wgmma.cuh"
#include "gate_up_swap.cuh"
#include "gate_up_tiles.cuh"
#include "gemm_high.cuh"

#define MOE_KERNEL_high(name, type, rows, cols, k, stages, wm, wn, wk, up_cols, up_stages)         \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a_wide, 1)                      \
        name(const __grid_constant__ moe_experts_args args,                                        \
             const __grid_constant__ tensor_map w13, const __grid_constant__ tensor_map w2,        \
             const __grid_constant__ tensor_map high_w13,                                          \
             const __grid_constant__ tensor_map high_w2,                                           \
             const __grid_constant__ tensor_map high_rows)                                         \
    {                                                                                              \
        extern __shared__ __align__(1024) unsigned char dynamic_shared[];                          \
        using swap = gemm_swap<type, rows, cols, k, stages>;                                       \
        using up = gemm_wgmma<type, true, MOE_HIGH_ROWS, up_cols, 64, up_stages>;                  \
        using low = gemm_wgmma<type, false, MOE_HIGH_ROWS, MOE_HIGH_DOWN_COLS, 64, 4>;             \
        prefetch_maps(w13, w2);                                                                    \
        const plain_gate_up<type> high_up = {                                                      \
            {args.gate_up, &high_w13, gate_up_cols(args.gate_up), args.gate_up.hidden_size}};      \
        const plain_down<type> high_low = {                                                        \
            args.down, &high_w2, &high_rows, args.down.hidden_size, args.down.intermediate_size,   \
            0,         1.0f};                                                                      \
        swap::run_before(                                                                          \
            *reinterpret_cast<typename swap::shared *>(dynamic_shared),                            \
            gemm_high<up, low, plain_gate_up<type>, plain_down<type>>{high_up, high_low,           \
                                                                      dynamic_shared},             \
            gate_up_swap_problem<type, true>{args.gate_up, &w13, gate_up_cols(args.gate_up),       \
                                             args.gate_up.hidden_size},                            \
            down_swap_problem<type, true>{args.down, &w2, args.down.hidden_size,                   \
                                          args.down.intermediate_size});                           \
    }
#define MOE_KERNEL_sm90a_high_experts(name, type, rows, cols, k, stages, wm, wn, wk, align)        \
    MOE_KERNEL_high(name, type, rows, cols, k, stages, wm, wn, wk, 192, 5)
#define MOE_KERNEL_sm90a_wide_experts(name, type, rows, cols, k, stages, wm, wn, wk, align)        \
    MOE_KERNEL_high(name, type, rows, cols, k, stages, wm, wn, wk, 256, 4)
#include "gemm_instances.cuh"
