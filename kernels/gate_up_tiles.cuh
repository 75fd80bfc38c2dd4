/* gate_up_tiles.cuh: gate_up as a problem of gemm_wgmma.cuh, for gate_up_sm90a.cu and experts_high_sm90a.cu: its epilogue. */
#ifndef MOE_GATE_UP_TILES_CUH
#define MOE_GATE_UP_TILES_CUH

#include "gate_up_wgmma.cuh"

template <class T>
struct gate_up_problem : gate_up_operands<T> {
    using gate_up_operands<T>::args;
    static constexpr bool kInPlace = true;

    template <class Gemm>
    __device__ __forceinline__ void write(const typename Gemm::results &to,
                                          float (&sums)[Gemm::kSums],
                                          const float (&weight)[2]) const
    {
        if (args.w13_bias) add_bias<Gemm>(to, sums);
        if (args.topk_weights) {
#pragma unroll
            for (int i = 0; i < Gemm::kSums; ++i)
                sums[i] *= weight[i / 2 % 2];
        }
        activate_all<Gemm>(sums);
        write_rounded<Gemm>(to, sums);
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

    // The biases of the tile's columns to shared memory, f32.
    template <class Gemm>
    __device__ __forceinline__ void put_bias(uint32_t to, const typename Gemm::work &work) const
    {
        constexpr int kHalf = Gemm::kCols / 2,
                      kAtOnce = Gemm::kFewRegisters && Gemm::kCols > 224 ? 2 : Gemm::kCols / 32;
        const weight_rows rows = gate_up_rows<T>(work.expert, args);
        const void *base =
            element_of(args.w13_bias, work.expert * args.w13_bias_stride, args.w13_bias_dtype);
        for (int32_t begin = threadIdx.x % 32; begin < Gemm::kCols; begin += 32 * kAtOnce) {
            int32_t at[kAtOnce];
            float bias[kAtOnce];
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n) {
                const int32_t i = begin + n * 32, of_half = i < kHalf ? i : i - kHalf;
                const int32_t out = args.gated ? work.col_begin / 2 + of_half : work.col_begin + i;
                const int32_t col = args.gated ? 2 * out + (i >= kHalf) : out;
                at[n] = out < args.intermediate_size ? static_cast<int32_t>(rows.row(col)) : -1;
            }
            load_f32(bias, base, at, args.w13_bias_dtype);
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n)
                store_shared_4(to + (begin + n * 32) * 4, bias[n]);
        }
    }

    template <class Gemm>
    __device__ __forceinline__ void bring_bias(typename Gemm::shared &smem, uint32_t tile) const
    {
        if (Gemm::kBiasAhead && args.w13_bias)
            put_bias<Gemm>(Gemm::bias_rows(smem), Gemm::get_work(smem, tile));
    }

    template <class Gemm>
    __device__ __forceinline__ void add_bias(const typename Gemm::results &to,
                                             float (&sums)[Gemm::kSums]) const
    {
        const uint32_t held = to.out();
        if constexpr (!Gemm::kBiasAhead) put_bias<Gemm>(held, to.work());
        __syncwarp();
#pragma unroll
        for (int j = 0; j < Gemm::kCols / 8; ++j) {
            const float2 bias = load_shared_8(held + Gemm::lane_col(j) * 4);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sums[j * 4 + half * 2] += bias.x;
                sums[j * 4 + half * 2 + 1] += bias.y;
            }
        }
        __syncwarp(); // before the results
    }

    // Where token rows are in registers: ptxas must not have more of the sums under way than there is room for.
    template <class Gemm>
    static __device__ __forceinline__ void part(int i)
    {
        if (Gemm::kTokenRegisters && i % 16 == 0) __syncwarp();
    }

    // In place: f(gate) up where the gates were; where not gated f of all. What is common has a copy for every sum.
    template <class Gemm>
    __device__ __forceinline__ void activate_all(float (&sums)[Gemm::kSums]) const
    {
        constexpr int kHalf = Gemm::kSums / 2;
        const int32_t kind = args.activation;
        const float limit = args.activation_limit > 0.0f ? args.activation_limit
                                                         : __int_as_float(0x7f800000); // none
        if (args.gated && kind == MOE_ACT_SILU) {
            const bool before = args.clamp == MOE_CLAMP_BEFORE;
#pragma unroll
            for (int i = 0; i < kHalf; ++i) {
                part<Gemm>(i);
                const float g = before ? at_most(sums[i], limit) : sums[i];
                const float f = swish(g, 1.0f);
                sums[i] = (before ? f : at_most(f, limit)) * clamp(sums[i + kHalf], limit);
            }
        } else if (args.gated && kind == MOE_ACT_SWIGLU_OAI) {
            const float alpha = args.activation_alpha;
#pragma unroll
            for (int i = 0; i < kHalf; ++i) {
                part<Gemm>(i);
                sums[i] =
                    swish(at_most(sums[i], limit), alpha) * (clamp(sums[i + kHalf], limit) + 1.0f);
            }
        } else if (args.gated && kind == MOE_ACT_GELU_TANH) {
#pragma unroll
            for (int i = 0; i < kHalf; ++i) {
                part<Gemm>(i);
                sums[i] = gelu_tanh(sums[i]) * sums[i + kHalf];
            }
        } else if (args.gated && kind == MOE_ACT_GELU) {
#pragma unroll
            for (int i = 0; i < kHalf; ++i) {
                part<Gemm>(i);
                sums[i] = gelu(sums[i]) * sums[i + kHalf];
            }
        } else if (kind == MOE_ACT_RELU2) {
#pragma unroll
            for (int i = 0; i < Gemm::kSums; ++i) {
                if (i >= kHalf && args.gated) break;
                sums[i] = relu2(sums[i]) * (args.gated ? sums[(i + kHalf) % Gemm::kSums] : 1.0f);
            }
        } else {
            activate_in_turn<Gemm>(sums);
        }
    }

    // The rest: registers have no index, so all of them move on to where four sums are made.
    template <class Gemm>
    __device__ __forceinline__ void activate_in_turn(float (&sums)[Gemm::kSums]) const
    {
        constexpr int kHalf = Gemm::kSums / 2;
        const bool gated = args.gated; // gates and ups are two rings of their own
#pragma unroll 1
        for (int32_t turn = gated ? kHalf / 4 : Gemm::kSums / 4; turn > 0; --turn) {
            float g[4], second[4], u[4], y[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                g[i] = sums[i];
                second[i] = sums[i + kHalf];
                u[i] = gated ? second[i] : 1.0f;
            }
            activate(y, g, u, args);
#pragma unroll
            for (int i = 0; i < Gemm::kSums - 4; ++i)
                sums[i] = sums[i + 4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[kHalf - 4 + i] = gated ? y[i] : second[i];
                sums[Gemm::kSums - 4 + i] = gated ? second[i] : y[i];
            }
        }
    }

    // Where not gated there are twice as many sums.
    template <class Gemm>
    __device__ __forceinline__ void write_rounded(const typename Gemm::results &to,
                                                  const float (&sums)[Gemm::kSums]) const
    {
        constexpr int kBlocks = Gemm::kOutCols / 8, kHalfBlocks = Gemm::kCols / 16;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            if (part == 1 && args.gated) break;
#pragma unroll
            for (int begin = 0; begin < kHalfBlocks; begin += kBlocks) {
                const uint32_t out = to.out();
#pragma unroll
                for (int j = begin; j < begin + kBlocks && j < kHalfBlocks; j += 2) {
                    uint32_t pairs[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int at = part * (Gemm::kSums / 2) + j * 4 + 2 * i;
                        pairs[i] = T::round2(sums[at], sums[at + 1]);
                    }
                    Gemm::out_put(out, j - begin, pairs);
                }
                const auto work = to.work();
                const int32_t col =
                    args.gated ? work.col_begin / 2 : work.col_begin + part * (Gemm::kCols / 2);
                Gemm::out_copy(out, work, args.intermediate, args.intermediate_stride,
                               col + begin * 8, min(args.intermediate_size, col + Gemm::kCols / 2));
            }
        }
    }
};

// Without what a plain layer (gemm_variants.def) has no use for.
template <class T>
struct plain_gate_up : gate_up_problem<T> {
    static constexpr bool kInPlace = false;

    template <class Gemm>
    __device__ __forceinline__ void bring_bias(typename Gemm::shared &, uint32_t) const
    {
    }

    template <class Gemm>
    __device__ __forceinline__ void write(const typename Gemm::results &to,
                                          const float (&sums)[Gemm::kSums],
                                          const float (&)[2]) const
    {
        this->template write_silu<Gemm>(to, sums);
    }
};

#endif
