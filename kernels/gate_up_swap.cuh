/* gate_up_swap.cuh: gate_up as a problem of gemm_swap.cuh, for gate_up_swap_sm90a.cu and experts_swap_sm90a.cu: its
 * weights, its token rows, its epilogue. */
#ifndef MOE_GATE_UP_SWAP_CUH
#define MOE_GATE_UP_SWAP_CUH

#include "gate_up.cuh"
#include "gemm_swap.cuh"

// kPlain: gated silu without limit, bias and router weights; the code of all else is not there.
template <class T, bool kPlain = false>
struct gate_up_swap_problem {
    const moe_gate_up_args &args;
    const tensor_map *weights;
    int32_t num_cols, k_size;
    static constexpr int kTaken = 1;
    static constexpr bool kWeighs = !kPlain;

    __device__ __forceinline__ bool once() const { return true; }

    __device__ __forceinline__ int2 box(int32_t col, int32_t part, int32_t rows) const
    {
        return kPlain || args.gated
                   ? make_int2(col / 2, args.w13_order == MOE_ORDER_UP_GATE ? 1 - part : part)
                   : make_int2(col + part * rows, 0);
    }

    __device__ __forceinline__ const typename T::element *token_row(int32_t row) const
    {
        int32_t token = token_of(args.sorted_token_ids[row], args);
        return token >= 0 ? static_cast<const typename T::element *>(args.hidden_states) +
                                token * args.hidden_stride
                          : nullptr;
    }

    // Plain silu from registers; all else is one loop, not a copy of each activation for every sum.
    template <class Gemm>
    __device__ __forceinline__ void write(typename Gemm::shared &smem,
                                          const typename Gemm::work &work,
                                          const float (&sums)[Gemm::kBlocks][Gemm::kSums]) const
    {
        if constexpr (kPlain)
            write_silu<Gemm>(smem, work, sums);
        else if (args.activation == MOE_ACT_SILU && args.gated && !args.w13_bias &&
                 !args.topk_weights && !(args.activation_limit > 0.0f))
            write_silu<Gemm>(smem, work, sums);
        else
            write_any<Gemm>(smem, work, sums);
    }

    template <class Gemm>
    __device__ __forceinline__ void
    write_silu(typename Gemm::shared &smem, const typename Gemm::work &work,
               const float (&sums)[Gemm::kBlocks][Gemm::kSums]) const
    {
        constexpr int kPairs = Gemm::kBlocks / 2;
#pragma unroll
        for (int block = 0; block < kPairs; ++block) {
#pragma unroll
            for (int j = 0; j < Gemm::kRows / 8; j += 2) {
                if (j * 8 >= work.num_rows) break;
                float y[8];
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    y[i] = swish(sums[block][j * 4 + i], 1.0f) * sums[kPairs + block][j * 4 + i];
                Gemm::write_block(smem, work, y, j * 8, args.intermediate, args.intermediate_stride,
                                  work.col_begin / 2 + block * 64, args.intermediate_size);
            }
        }
    }

    // Where not gated the second half of the blocks are outputs of their own.
    template <class Gemm>
    __device__ __forceinline__ void write_any(typename Gemm::shared &smem,
                                              const typename Gemm::work &work,
                                              const float (&sums)[Gemm::kBlocks][Gemm::kSums]) const
    {
        constexpr int kPairs = Gemm::kBlocks / 2;
        bool gated = args.gated;
        weight_rows rows = gate_up_rows<T>(work.expert, args);
        int64_t bias_base = work.expert * args.w13_bias_stride;
#pragma unroll 1
        for (int block = 0; block < (gated ? kPairs : 2 * kPairs); ++block) {
            int32_t begin = (gated ? work.col_begin / 2 : work.col_begin) + block * 64;
            float gate_bias[2] = {0.0f, 0.0f}, up_bias[2] = {0.0f, 0.0f};
            if (args.w13_bias) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int32_t out = begin + Gemm::lane_col() + half * 8;
                    if (out >= args.intermediate_size) break;
                    int32_t col = gated ? 2 * out : out;
                    gate_bias[half] =
                        load_f32(args.w13_bias, bias_base + rows.row(col), args.w13_bias_dtype);
                    if (gated)
                        up_bias[half] = load_f32(args.w13_bias, bias_base + rows.row(col + 1),
                                                 args.w13_bias_dtype);
                }
            }
#pragma unroll 1
            for (int j = 0; j < Gemm::kRows / 8 && j * 8 < work.num_rows; j += 2) {
                float first[8], second[8]; // of the block, of its other half where gated
#pragma unroll
                for (int of = 0; of < 2 * kPairs; ++of) // registers have no index: compare
#pragma unroll
                    for (int from = 0; from < Gemm::kRows / 8; from += 2)
                        if (of == block && from == j) {
#pragma unroll
                            for (int i = 0; i < 8; ++i) {
                                first[i] = sums[of][from * 4 + i];
                                second[i] = sums[(of + kPairs) % (2 * kPairs)][from * 4 + i];
                            }
                        }
                float weight[4] = {1.0f, 1.0f, 1.0f, 1.0f};
                if (args.topk_weights) Gemm::lane_weights(weight, smem, j * 8);
                float y[8];
#pragma unroll
                for (int at = 0; at < 8; at += 4) {
                    float g[4], u[4], four[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float times = weight[at / 2 + i % 2];
                        g[i] = (first[at + i] + gate_bias[i / 2]) * times;
                        u[i] = gated ? (second[at + i] + up_bias[i / 2]) * times : 1.0f;
                    }
                    activate(four, g, u, args);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        y[at + i] = four[i];
                }
                Gemm::write_block(smem, work, y, j * 8, args.intermediate, args.intermediate_stride,
                                  begin, args.intermediate_size);
            }
        }
    }
};

#endif
