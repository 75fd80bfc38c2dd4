/* down_wgmma.cuh: what down_sm90a.cu and down_add_sm90a.cu share: where w2's rows lie, and the epilogue. */
#ifndef MOE_DOWN_WGMMA_CUH
#define MOE_DOWN_WGMMA_CUH

#include "down.cuh"
#include "gemm_wgmma.cuh"

#include <type_traits>

// Args: moe_down_args; moe_down_add_args, whose results are added to their tokens' rows of out.
template <class T, class Args>
struct down_problem {
    static constexpr bool kAdd = std::is_same_v<Args, moe_down_add_args>;
    const moe_down_args &args;
    const tensor_map *weights, *tokens;
    int32_t num_cols, k_size;
    uint32_t band_tiles;
    float scale; // kAdd
    static constexpr int kTaken = 2;
    static constexpr int32_t k_begin = 0;

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
        float factor[2] = {weight[0], weight[1]};
        int32_t token = -1; // of the warp's row lane % 16
        if constexpr (kAdd) {
            const auto work = to.work();
            int32_t row = threadIdx.x / 32 * 16 + threadIdx.x % 16;
            if (row < work.num_rows)
                token = args.sorted_token_ids[work.row_begin + row] / args.topk;
            factor[0] *= scale, factor[1] *= scale;
        }
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
                    pairs[i] = T::round2(z[0] * factor[i % 2], z[1] * factor[i % 2]);
                }
                Gemm::out_put(out, j, pairs);
            }
            if constexpr (kAdd)
                add_rows<Gemm>(out, token, first);
            else
                Gemm::out_copy(to.out(), to.work(), args.rows, args.rows_stride, first, num_cols);
        }
    }

    // As out_copy, but that each row is added to its token's.
    template <class Gemm>
    __device__ __forceinline__ void add_rows(uint32_t out, int32_t token, int32_t col) const
    {
        using element = typename T::element;
        constexpr int kLanes = Gemm::kOutCols / 8, kAtOnce = 32 / kLanes;
        int32_t lane = threadIdx.x % 32, chunk = lane % kLanes * 8;
        bool mine = lane < kLanes * kAtOnce && chunk < num_cols - col;
        __syncwarp();
#pragma unroll
        for (int r = 0; r < 16; r += kAtOnce) {
            int32_t row = r + lane / kLanes, of = __shfl_sync(0xffffffffu, token, row % 16);
            if (mine && row < 16 && of >= 0) {
                uint4 held = load_shared_16(Gemm::out_chunk(out, row, chunk / 8));
                element *to =
                    static_cast<element *>(args.rows) + of * args.rows_stride + col + chunk;
                if constexpr (T::kDtype == MOE_BF16)
                    add_16_bf16_kept(to, held);
                else
                    add_16_f16_kept(to, held);
            }
        }
        __syncwarp(); // before the next put
    }
};

#endif
