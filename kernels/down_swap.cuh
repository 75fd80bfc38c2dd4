/* down_swap.cuh: down as a problem of gemm_swap.cuh, for down_swap_sm90a.cu and experts_swap_sm90a.cu: its weights, its
 * token rows, its epilogue. */
#ifndef MOE_DOWN_SWAP_CUH
#define MOE_DOWN_SWAP_CUH

#include "down.cuh"
#include "gemm_swap.cuh"

// kPlain: without bias.
template <class T, bool kPlain = false>
struct down_swap_problem {
    const moe_down_args &args;
    const tensor_map *weights;
    int32_t num_cols, k_size;
    static constexpr int kTaken = 2;
    static constexpr bool kWeighs = true;

    // Measured: worth it while the results fill a part of L2 only.
    __device__ __forceinline__ bool once() const
    {
        return args.num_slots * args.hidden_size * 2 <= 8 << 20;
    }

    __device__ __forceinline__ int2 box(int32_t col, int32_t part, int32_t rows) const
    {
        return make_int2(col + part * rows, 0);
    }

    __device__ __forceinline__ const typename T::element *token_row(int32_t row) const
    {
        return static_cast<const typename T::element *>(args.intermediate) +
               row * args.intermediate_stride;
    }

    template <class Gemm>
    __device__ __forceinline__ void write(typename Gemm::shared &smem,
                                          const typename Gemm::work &work,
                                          const float (&sums)[Gemm::kBlocks][Gemm::kSums]) const
    {
        if (!kPlain && args.w2_bias)
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

#endif
