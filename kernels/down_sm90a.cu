// arch: sm_90a
/* down_sm90a.cu: down.cu with wgmma: the same arguments, formula and order of rounding (stage 4 of 5)
 * In     weights  tensor map of w2 as [num_experts, 1, hidden_size, I], boxes of half a tile's rows
 *        tokens   tensor map of intermediate as [1, 1, num_slots, I], boxes of 64 rows
 * Grid   min(MOE_GEMM_GRID(max_tiles, hidden_size, cols), SMs) blocks that walk over the tiles
 * Needs  align == 16, as there; compute capability 9.0
 * Cost   as gate_up_sm90a.cu, and num_rows * hidden_size * 2 bytes written */
#include "down.cuh"
#include "gemm_wgmma.cuh"

template <class T>
struct down_problem {
    const moe_down_args &args;
    const tensor_map *weights, *tokens;
    int32_t num_cols, k_size;
    static constexpr int kTaken = 2;

    __device__ __forceinline__ int2 box(int32_t col, int32_t part, int32_t rows) const
    {
        return make_int2(col + part * rows, 0);
    }

    template <class Gemm>
    __device__ __forceinline__ void write(const typename Gemm::results &to,
                                          const float (&sums)[Gemm::kSums],
                                          const float (&weight)[2]) const
    {
        if (args.w2_bias)
            write<Gemm, true>(to, sums, weight);
        else
            write<Gemm, false>(to, sums, weight);
    }

    template <class Gemm, bool kBias>
    __device__ __forceinline__ void write(const typename Gemm::results &to,
                                          const float (&sums)[Gemm::kSums],
                                          const float (&weight)[2]) const
    {
        constexpr int kBlocks = Gemm::kOutCols / 8;
#pragma unroll
        for (int begin = 0; begin < Gemm::kCols / 8; begin += kBlocks) {
            const uint32_t out = to.out();
            const auto work = to.work();
            const int32_t first = work.col_begin + begin * 8;
#pragma unroll
            for (int j = 0; j < kBlocks; j += 2) {
                float bias[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (int i = 0; i < 4 * kBias; ++i) {
                    int32_t col = first + Gemm::lane_col(j + i / 2) + i % 2;
                    if (col < num_cols)
                        bias[i] = load_f32(args.w2_bias, work.expert * args.w2_bias_stride + col,
                                           args.w2_bias_dtype);
                }
                uint32_t pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float z[2] = {sums[(begin + j) * 4 + i * 2], sums[(begin + j) * 4 + i * 2 + 1]};
                    if constexpr (kBias) z[0] += bias[i / 2 * 2], z[1] += bias[i / 2 * 2 + 1];
                    pairs[i] = T::round2(z[0] * weight[i % 2], z[1] * weight[i % 2]);
                }
                Gemm::out_put(out, j, pairs);
            }
            Gemm::out_copy(to.out(), to.work(), args.rows, args.rows_stride, first, num_cols);
        }
    }
};

#define MOE_KERNEL_sm90a_down(name, type, rows, cols, k, stages, wm, wn, wk)                       \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a, 1)                           \
        name(const __grid_constant__ moe_down_args args,                                           \
             const __grid_constant__ tensor_map weights,                                           \
             const __grid_constant__ tensor_map tokens)                                            \
    {                                                                                              \
        prefetch_maps(weights, tokens);                                                            \
        run_gemm<gemm_wgmma<type, false, rows, cols, k, stages>>(down_problem<type>{               \
            args, &weights, &tokens, args.hidden_size, args.intermediate_size});                   \
    }
#define MOE_KERNEL_sm90a_gate_up(...)
#define MOE_KERNEL_sm80_gate_up(...)
#define MOE_KERNEL_sm80_down(...)
#define MOE_KERNEL_sm90a_decode_gate_up(...)
#define MOE_KERNEL_sm90a_decode_down(...)
#define MOE_KERNEL_sm90a_swap_gate_up(...)
#define MOE_KERNEL_sm90a_swap_down(...)
#define MOE_KERNEL_sm90a_swap_experts(...)
#define MOE_GEMM_VARIANT(name, arch, stage, act, weight, scale, orient, layout, rows, cols, k,     \
                         stages, wm, wn, wk, cluster, align)                                       \
    MOE_KERNEL_##arch##_##stage(name, act, rows, cols, k, stages, wm, wn, wk)
#include "gemm_variants.def"
