/* down.cuh: what down.cu and down_sm90a.cu share: where w2's rows lie, and the epilogue of eight neighbouring
 * outputs of one row. */
#ifndef MOE_DOWN_CUH
#define MOE_DOWN_CUH

#include "gemm_common.cuh"

template <class T>
static __device__ __forceinline__ weight_rows down_rows(int32_t expert, const moe_down_args &args)
{
    weight_rows rows;
    rows.base = static_cast<const typename T::element *>(args.w2) + expert * args.w2_expert_stride;
    rows.stride = args.w2_row_stride;
    rows.num_cols = args.hidden_size;
    rows.split = rows.gate_first = rows.up_first = 0;
    return rows;
}

// Outputs col .. col + 7 of row `row` of rows, those below hidden_size: bias, weight, one rounding.
// kVector: 16-byte aligned groups of eight.
template <class T, bool kVector>
static __device__ __forceinline__ void write_outputs(float (&z)[8], int64_t row, int32_t col,
                                                     float weight, int32_t expert,
                                                     const moe_down_args &args)
{
    using element = typename T::element;
    int32_t count = min(8, args.hidden_size - col);
    if (count <= 0) return;
    if (args.w2_bias) {
        int64_t at[8];
        float bias[8];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            at[i] = i < count ? expert * args.w2_bias_stride + col + i : -1;
        load_f32(bias, args.w2_bias, at, args.w2_bias_dtype);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            z[i] += bias[i];
    }
    if (args.topk_weights) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            z[i] *= weight;
    }
    element *to = static_cast<element *>(args.rows) + row * args.rows_stride + col;
    if (kVector && count == 8) {
        *reinterpret_cast<uint4 *>(to) = make_uint4(T::round2(z[0], z[1]), T::round2(z[2], z[3]),
                                                    T::round2(z[4], z[5]), T::round2(z[6], z[7]));
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) to[i] = T::round(z[i]);
    }
}

#endif
