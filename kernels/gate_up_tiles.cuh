/* gate_up_tiles.cuh: gate_up as a problem of gemm_wgmma.cuh, for gate_up_sm90a.cu and experts_high_sm90a.cu: its epilogue. */
#ifndef MOE_GATE_UP_TILES_CUH
#define MOE_GATE_UP_TILES_CUH

#include "gate_up_wgmma.cuh"

template <class T>
struct gate_up_problem : gate_up_operands<T> {
    using gate_up_operands<T>::args;

    // Plain silu from registers; all else is one loop, not 32 copies of each activation.
    template <class Gemm>
    __device__ __forceinline__ void write(const typename Gemm::results &to,
                                          const float (&sums)[Gemm::kSums],
                                          const float (&weight)[2]) const
    {
        if (args.activation == MOE_ACT_SILU && args.gated && !args.w13_bias && !args.topk_weights &&
            !(args.activation_limit > 0.0f))
            write_silu<Gemm>(to, sums);
        else
            write_any<Gemm>(to, sums, weight);
    }

    template <class Gemm>
    __device__ __forceinline__ void write_silu(const typename Gemm::results &to,
                                               const float (&sums)[Gemm::kSums]) const
    {
        constexpr int kBlocks = Gemm::kOutCols / 8;
#pragma unroll
        for (int begin = 0; begin < Gemm::kCols / 16; begin += kBlocks) {
            const uint32_t out = to.out();
#pragma unroll
            for (int j = 0; j < kBlocks && begin + j < Gemm::kCols / 16; j += 2) {
                float y[8];
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    y[i] = swish(sums[(begin + j) * 4 + i], 1.0f) *
                           sums[(begin + j) * 4 + i + Gemm::kSums / 2];
                uint32_t pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    pairs[i] = T::round2(y[2 * i], y[2 * i + 1]);
                Gemm::out_put(out, j, pairs);
            }
            const auto work = to.work();
            Gemm::out_copy(out, work, args.intermediate, args.intermediate_stride,
                           work.col_begin / 2 + begin * 8,
                           min(args.intermediate_size, (work.col_begin + Gemm::kCols) / 2));
        }
    }

    // Where not gated there are twice as many outputs.
    template <class Gemm>
    __device__ __forceinline__ void write_any(const typename Gemm::results &to,
                                              const float (&sums)[Gemm::kSums],
                                              const float (&weight)[2]) const
    {
        constexpr int kBlocks = Gemm::kOutCols / 8, kHalfBlocks = Gemm::kCols / 16,
                      kHalf = Gemm::kSums / 2,
                      kAtOnce = Gemm::kSums > 96 || Gemm::kGroups == 3 ? 1 : 2;
        bool gated = args.gated;
#pragma unroll 1
        for (int part = 0; part < (gated ? 1 : 2); ++part)
#pragma unroll 1
            for (int j = 0; j < kHalfBlocks; j += 2) {
                uint32_t pairs[4];
                // the sums leave few registers: what they are chosen by, and what tile this is, is looked at anew
                int32_t second = part, with_up = gated;
                forget(second);
                forget(with_up);
                const uint32_t out = to.out();
                const auto work = to.work();
                weight_rows rows = gate_up_rows<T>(work.expert, args);
                int32_t col =
                    (gated ? work.col_begin / 2 : work.col_begin) + (part * kHalfBlocks + j) * 8;
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int block = 0; block < 2; block += kAtOnce) {
                        float g[2 * kAtOnce], u[2 * kAtOnce], y[2 * kAtOnce];
#pragma unroll
                        for (int from = 0; from < kHalfBlocks;
                             from += 2) // registers have no index: compare
#pragma unroll
                            for (int i = 0; i < 2 * kAtOnce; ++i) {
                                int at = (from + block + i / 2) * 4 + half * 2 + i % 2;
                                if (from == j) {
                                    g[i] = second == 0 ? sums[at] : sums[at + kHalf];
                                    u[i] = with_up ? sums[at + kHalf] : 1.0f;
                                }
                            }
                        make_outputs(y, g, u, col + Gemm::lane_col(block), 8, weight[half],
                                     work.expert, rows, args);
#pragma unroll
                        for (int i = 0; i < kAtOnce; ++i)
                            pairs[half + 2 * (block + i)] = T::round2(y[2 * i], y[2 * i + 1]);
                    }
                Gemm::out_put(out, j % kBlocks, pairs);
                if ((j + 2) % kBlocks == 0 || j + 2 == kHalfBlocks)
                    Gemm::out_copy(out, work, args.intermediate, args.intermediate_stride,
                                   col - j % kBlocks * 8, min(args.intermediate_size, col + 16));
            }
    }
};

// Without what a plain layer (gemm_variants.def) has no use for.
template <class T>
struct plain_gate_up : gate_up_problem<T> {
    template <class Gemm>
    __device__ __forceinline__ void write(const typename Gemm::results &to,
                                          const float (&sums)[Gemm::kSums],
                                          const float (&)[2]) const
    {
        this->template write_silu<Gemm>(to, sums);
    }
};

#endif
