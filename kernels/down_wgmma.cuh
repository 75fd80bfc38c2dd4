/* down_wgmma.cuh: what down_sm90a.cu and down_add_sm90a.cu share: where w2's rows lie, and the epilogue.
 *
 * The map of w2 is [num_experts, 4, hidden_size / 4, I]: a box of R weight rows is rows 0, 4, 8 .. of R neighbouring ones,
 * then rows 1, 5, 9 .., then those from 2, then from 3. wgmma gives lane q of four columns 2 q and 2 q + 1 of each block of
 * eight, and blocks b, b + R / 32, b + R / 16 and b + 3 R / 32 of a box are columns 32 b + 4 i, + 1, + 2 and + 3, i = 0 .. 7.
 * So a lane has columns 32 b + 8 q .. + 7 of its two rows: 16 bytes, which leave without a way through shared memory. */
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
    bool once;   // kAdd: rows are written
    static constexpr int kTaken = 2;
    static constexpr bool kInPlace = false;
    static constexpr int32_t k_begin = 0;

    __device__ __forceinline__ int2 box(int32_t col, int32_t part, int32_t rows) const
    {
        return make_int2((col + part * rows) / 4, 0);
    }

    template <class Gemm>
    __device__ __forceinline__ void write(const typename Gemm::results &to,
                                          const float (&sums)[Gemm::kSums],
                                          const float (&weight)[2]) const
    {
        float factor[2] = {weight[0], weight[1]};
        if constexpr (kAdd) factor[0] *= scale, factor[1] *= scale;
        if (args.w2_bias)
            write<Gemm, true>(to, sums, factor);
        else
            write<Gemm, false>(to, sums, factor);
    }

    template <class Gemm>
    __device__ __forceinline__ void bring_bias(typename Gemm::shared &smem, uint32_t tile) const
    {
        if (!Gemm::kColBias || !args.w2_bias) return;
        const auto work = Gemm::get_work(smem, tile);
        const uint32_t to = Gemm::bias_rows(smem);
        constexpr int kAtOnce = Gemm::kCols / 32;
        int32_t at[kAtOnce];
        float bias[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
            const int32_t col = work.col_begin + threadIdx.x % 32 + n * 32;
            at[n] = col < num_cols ? col : -1;
        }
        load_f32(bias,
                 element_of(args.w2_bias, work.expert * args.w2_bias_stride, args.w2_bias_dtype),
                 at, args.w2_bias_dtype);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
            store_shared_4(to + (threadIdx.x % 32 + n * 32) * 4, bias[n]);
    }

    // kCols / 64 blocks of 32 columns in each box, of which this lane has eight.
    template <class Gemm, bool kBias>
    __device__ __forceinline__ void write(const typename Gemm::results &to,
                                          const float (&sums)[Gemm::kSums],
                                          const float (&factor)[2]) const
    {
        constexpr int kBlocks = Gemm::kCols / 64, kBoxBlocks = 4 * kBlocks;
        // With few registers left, where the results go is looked at anew each time.
        constexpr bool kAnew = kBias && Gemm::kFewRegisters;
        uint32_t thread = threadIdx.x;
        place places[2];
        if constexpr (kBias && Gemm::kColBias) __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half)
            places[half] = find_place(to.work(), thread, half);
#pragma unroll
        for (int block = 0; block < 2 * kBlocks; ++block) {
            const int first = block / kBlocks * kBoxBlocks + block % kBlocks;
            float bias[4][2];
            if constexpr (kBias && Gemm::kColBias) {
                const uint32_t held = Gemm::bias_rows(to.smem) + (block * 32 + thread % 4 * 8) * 4;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 two = load_shared_8(held + i * 8);
                    bias[i][0] = two.x, bias[i][1] = two.y;
                }
            } else if constexpr (kBias && !kAnew) {
                get_bias(reinterpret_cast<float(&)[8]>(bias), to.work(),
                         block * 32 + thread % 4 * 8);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int j = first + i % 2 * 2 * kBlocks, of = half * 2 + i / 2;
                    float z[2] = {sums[j * 4 + of], sums[(j + kBlocks) * 4 + of]};
                    if constexpr (kBias) {
                        if constexpr (kAnew) forget(thread);
                        if constexpr (kAnew)
                            get_bias(bias[i], to.work(), block * 32 + thread % 4 * 8 + i * 2);
                        z[0] += bias[i][0], z[1] += bias[i][1];
                    }
                    pairs[i] = T::round2(z[0] * factor[half], z[1] * factor[half]);
                }
                if constexpr (kAnew) {
                    forget(thread);
                    places[half] = find_place(to.work(), thread, half);
                }
                store(places[half], block * 32, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
            }
        }
    }

    // Biases of N of the tile's columns, from col on; all of them are there or none, hidden_size is a multiple of 8.
    template <int N, class Work>
    __device__ __forceinline__ void get_bias(float (&bias)[N], const Work &work, int32_t col) const
    {
        int32_t at[N];
#pragma unroll
        for (int i = 0; i < N; ++i)
            bias[i] = 0.0f, at[i] = i;
        col += work.col_begin;
        if (col >= num_cols) return;
        load_f32(
            bias,
            element_of(args.w2_bias, work.expert * args.w2_bias_stride + col, args.w2_bias_dtype),
            at, args.w2_bias_dtype);
    }

    // Where a thread's results of its row `half` of two go: the first of a tile's columns that are its own, how many of
    // the tile's columns there are from there on, none where the row is padding.
    struct place {
        typename T::element *to;
        int32_t num_cols;
    };

    template <class Work>
    __device__ __forceinline__ place find_place(const Work &work, uint32_t thread,
                                                int32_t half) const
    {
        const int32_t row = thread / 32 * 16 + thread % 32 / 4 + half * 8;
        const int32_t col = work.col_begin + thread % 4 * 8;
        int64_t to_row = int64_t{work.row_begin} + row;
        if constexpr (kAdd)
            to_row = row < work.num_rows ? args.sorted_token_ids[to_row] / args.topk : 0;
        return {static_cast<typename T::element *>(args.rows) + to_row * args.rows_stride + col,
                row < work.num_rows ? num_cols - col : 0};
    }

    __device__ __forceinline__ void store(const place &of, int32_t col, uint4 held) const
    {
        if (col >= of.num_cols) return;
        if (!kAdd || once)
            __stcs(reinterpret_cast<uint4 *>(of.to + col), held); // more than L2 holds
        else if constexpr (T::kDtype == MOE_BF16)
            add_16_bf16_kept(of.to + col, held);
        else
            add_16_f16_kept(of.to + col, held);
    }
};

// Without bias, for a plain layer.
template <class T>
struct plain_down : down_problem<T, moe_down_args> {
    template <class Gemm>
    __device__ __forceinline__ void bring_bias(typename Gemm::shared &, uint32_t) const
    {
    }

    template <class Gemm>
    __device__ __forceinline__ void write(const typename Gemm::results &to,
                                          const float (&sums)[Gemm::kSums],
                                          const float (&weight)[2]) const
    {
        down_problem<T, moe_down_args>::template write<Gemm, false>(to, sums, weight);
    }
};

#endif
