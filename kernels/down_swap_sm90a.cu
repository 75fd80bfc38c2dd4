// arch: sm_90a
/* down_swap_sm90a.cu: down.cu as a stream of weights: the same arguments, formula and order of rounding
 * In     weights  tensor map of w2 as [num_experts, 1, hidden_size, I], boxes of half an item's rows
 *        tokens   tensor map of intermediate as [1, 1, num_slots, I], boxes of 16 rows
 * Grid   min(MOE_GEMM_GRID(max_tiles, hidden_size, cols), SMs) blocks that walk over the items
 * Needs  align == 16, as there; compute capability 9.0
 * Cost   as gate_up_swap_sm90a.cu, and num_rows * hidden_size * 2 bytes written */
#include "down.cuh"
#include "gemm_swap.cuh"

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
    __device__ __forceinline__ void write(typename Gemm::shared &smem,
                                          const typename Gemm::work &work,
                                          const float (&sums)[Gemm::kBlocks][Gemm::kSums]) const
    {
        if (args.w2_bias)
            write<Gemm, true>(smem, work, sums);
        else
            write<Gemm, false>(smem, work, sums);
    }

    template <class Gemm, bool kBias>
    __device__ __forceinline__ void write(typename Gemm::shared &smem,
                                          const typename Gemm::work &work,
                                          const float (&sums)[Gemm::kBlocks][Gemm::kSums]) const
    {
#pragma unroll
        for (int block = 0; block < Gemm::kBlocks; ++block) {
            int32_t begin = work.col_begin + block * 64;
            float bias[2] = {0.0f, 0.0f};
#pragma unroll
            for (int half = 0; half < 2 * kBias; ++half) {
                int32_t col = begin + Gemm::lane_col() + half * 8;
                if (col < num_cols)
                    bias[half] = load_f32(args.w2_bias, work.expert * args.w2_bias_stride + col,
                                          args.w2_bias_dtype);
            }
#pragma unroll
            for (int j = 0; j < Gemm::kRows / 8; j += 2) {
                if (j * 8 >= work.num_rows) break;
                float weight[4] = {1.0f, 1.0f, 1.0f, 1.0f}, y[8];
                if (args.topk_weights) Gemm::lane_weights(weight, smem, j * 8);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float z = sums[block][j * 4 + i];
                    if constexpr (kBias) z += bias[i / 2 % 2];
                    y[i] = z * weight[i / 4 * 2 + i % 2];
                }
                Gemm::write_block(smem, work, y, j * 8, args.rows, args.rows_stride, begin,
                                  num_cols);
            }
        }
    }
};

#define MOE_KERNEL_sm90a_swap_down(name, type, rows, cols, k, stages, wm, wn, wk)                  \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a_swap, 1)                      \
        name(const __grid_constant__ moe_down_args args,                                           \
             const __grid_constant__ tensor_map weights,                                           \
             const __grid_constant__ tensor_map tokens)                                            \
    {                                                                                              \
        prefetch_maps(weights, tokens);                                                            \
        run_gemm<gemm_swap<type, false, rows, cols, k, stages>>(down_problem<type>{                \
            args, &weights, &tokens, args.hidden_size, args.intermediate_size});                   \
    }
#define MOE_KERNEL_sm90a_swap_gate_up(...)
#define MOE_KERNEL_sm90a_gate_up(...)
#define MOE_KERNEL_sm90a_down(...)
#define MOE_KERNEL_sm80_gate_up(...)
#define MOE_KERNEL_sm80_down(...)
#define MOE_KERNEL_sm90a_decode_gate_up(...)
#define MOE_KERNEL_sm90a_decode_down(...)
#define MOE_GEMM_VARIANT(name, arch, stage, act, weight, scale, orient, layout, rows, cols, k,     \
                         stages, wm, wn, wk, cluster, align)                                       \
    MOE_KERNEL_##arch##_##stage(name, act, rows, cols, k, stages, wm, wn, wk)
#include "gemm_variants.def"
