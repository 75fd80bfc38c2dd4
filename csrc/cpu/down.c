/* down.c: rows[r] = topk_weights[slot(r)] * (intermediate[r] . w2[e]^T + w2_bias[e])     (stage 4 of 5)
 * In     intermediate, w2, w2_bias, topk_weights, expert_offsets, sorted_token_ids
 * Out    rows [num_rows, hidden_size], rows below num_rows
 * Math   f32, one rounding
 * Cost   at decode the bytes of w2 of the experts hit, at prefill the products (gemm.c) */
#include "gemm.h"

static void finish(const void *opaque, const moe_simd *simd, const moe_gemm_block *block)
{
    const moe_down_args *args = opaque;
    const char *bias = NULL;
    if (args->w2_bias)
        bias = (const char *)args->w2_bias + (block->expert * args->w2_bias_stride + block->col) *
                                                 element_bytes(args->w2_bias_dtype);

    for (int32_t i = 0; i < block->num_rows; ++i) {
        const int64_t row = block->row + i;
        float *c = block->c[0] + i * block->c_stride;
        if (bias) simd->add(c, bias, block->num_cols, args->w2_bias_dtype);
        if (args->topk_weights) {
            const float weight =
                slot_weight(args->topk_weights, args->weights_dtype, args->weights_stride,
                            args->sorted_token_ids[row], args->topk, args->num_tokens);
            simd->scale(c, weight, block->num_cols);
        }
        const int64_t at = row * args->rows_stride + block->col;
        simd->round((char *)args->rows + at * element_bytes(args->dtype), c, block->num_cols,
                    args->dtype);
    }
}

int moe_cpu_down(const moe_down_args *args, moe_error *err)
{
    moe_gemm gemm = {.a = args->intermediate,
                     .w = args->w2,
                     .expert_offsets = args->expert_offsets,
                     .a_stride = args->intermediate_stride,
                     .w_expert_stride = args->w2_expert_stride,
                     .w_row_stride = args->w2_row_stride,
                     .num_sources = args->num_slots,
                     .num_slots = args->num_slots,
                     .num_parts = 1,
                     .part_step = 1,
                     .num_experts = args->num_experts,
                     .topk = args->topk,
                     .num_cols = args->hidden_size,
                     .k = args->intermediate_size,
                     .dtype = args->dtype,
                     .simd = moe_get_simd(),
                     .finish = finish,
                     .args = args};
    return moe_grouped_gemm(&gemm, err);
}
