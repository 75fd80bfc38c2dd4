// arch: sm_90a
/* down_split_sm90a.cu: down_sm90a.cu with K split over a cluster: the same arguments, formula and rounding; sums of parts
 * of K are added up in their order (stage 4 of 5)
 * In     weights  tensor map of w2 as [num_experts, 1, hidden_size, I], boxes of half a tile's rows
 *        tokens   as down_sm90a.cu
 * Grid   clusters of up to MOE_SPLIT_BLOCKS blocks, MOE_GEMM_GRID(max_tiles, hidden_size, cols) of them
 * Needs  align == 16, as there; compute capability 9.0; no more blocks in a cluster than steps of K
 * Cost   as gate_up_split_sm90a.cu, and num_rows * hidden_size * 2 bytes written */
#include "down_wgmma.cuh"
#include "gemm_split.cuh"

template <class T>
struct down_part : down_problem<T, moe_down_args> {
    using down_problem<T, moe_down_args>::args;

    __device__ __forceinline__ int2 box(int32_t col, int32_t part, int32_t rows) const
    {
        return make_int2(col + part * rows, 0);
    }

    // low, high: columns of the tile from unit_col and unit_col + half on.
    template <class Work>
    __device__ __forceinline__ void write_unit(const Work &work, int32_t row, int32_t unit_col,
                                               int32_t half, float (&low)[4], float (&high)[4],
                                               const float (&weight)[2]) const
    {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int32_t col = work.col_begin + part * half + unit_col + threadIdx.x % 4 * 2;
            if (col >= args.hidden_size) return;
            float bias[2] = {0.0f, 0.0f};
            if (args.w2_bias) {
                const int64_t first = work.expert * args.w2_bias_stride + col,
                              at[2] = {first, first + 1};
                load_f32(bias, args.w2_bias, at, args.w2_bias_dtype);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (row + i * 8 >= work.num_rows) continue;
                const float(&z)[4] = part ? high : low;
                auto *to = static_cast<typename T::element *>(args.rows) +
                           (int64_t{work.row_begin} + row + i * 8) * args.rows_stride + col;
                *reinterpret_cast<uint32_t *>(to) = T::round2((z[2 * i] + bias[0]) * weight[i],
                                                              (z[2 * i + 1] + bias[1]) * weight[i]);
            }
        }
    }
};

#define MOE_KERNEL_sm90a_split_down(name, type, rows, cols, k, stages, wm, wn, wk, align)          \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a_split, 1)                     \
        name(const __grid_constant__ moe_down_args args,                                           \
             const __grid_constant__ tensor_map weights,                                           \
             const __grid_constant__ tensor_map tokens)                                            \
    {                                                                                              \
        prefetch_maps(weights, tokens);                                                            \
        run_gemm<gemm_split<type, false, rows, cols, k, stages>>(down_part<type>{                  \
            args, &weights, &tokens, args.hidden_size, args.intermediate_size, 0, 1.0f});          \
    }
#include "gemm_instances.cuh"
