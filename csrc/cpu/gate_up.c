/* gate_up.c: intermediate[r] = act(x[token(r)] . w13[e]^T + w13_bias[e])               (stage 3 of 5)
 * In     hidden_states, w13, w13_bias, topk_weights, expert_offsets, sorted_token_ids
 * Out    intermediate [num_rows, intermediate_size], rows below num_rows
 * Math   f32, one rounding; the topk weight, where given, multiplies before the activation
 * Cost   at decode the bytes of w13 of the experts hit, at prefill the products (gemm.c) */
#include "gemm.h"

/* Bias of columns [col, col + n) of one part into buffer, in f32. */
static void load_bias(const moe_gemm *gemm, const moe_gate_up_args *args, int part,
                      const moe_gemm_block *block, float *buffer)
{
    for (int32_t j = 0; j < block->num_cols; ++j) {
        int64_t row = gemm->part_row[part] + (int64_t)(block->col + j) * gemm->part_step;
        buffer[j] = load_element(args->w13_bias, block->expert * args->w13_bias_stride + row,
                                 args->w13_bias_dtype);
    }
}

typedef struct gate_up_context {
    const moe_gate_up_args *args;
    const moe_gemm *gemm;
} gate_up_context;

static void finish(const void *opaque, const moe_simd *simd, const moe_gemm_block *block)
{
    const gate_up_context *context = opaque;
    const moe_gate_up_args *args = context->args;
    const int parts = context->gemm->num_parts;
    float bias[MOE_GEMM_MAX_PARTS][MOE_GEMM_MAX_COLS];
    if (args->w13_bias)
        for (int p = 0; p < parts; ++p)
            load_bias(context->gemm, args, p, block, bias[p]);

    for (int32_t i = 0; i < block->num_rows; ++i) {
        const int64_t row = block->row + i;
        float weight = 1;
        if (args->topk_weights)
            weight = slot_weight(args->topk_weights, args->weights_dtype, args->weights_stride,
                                 args->sorted_token_ids[row], args->topk, args->num_tokens);
        for (int p = 0; p < parts; ++p) {
            float *c = block->c[p] + i * block->c_stride;
            if (args->w13_bias) simd->add(c, bias[p], block->num_cols, MOE_F32);
            if (args->topk_weights) simd->scale(c, weight, block->num_cols);
        }
        float *gate = block->c[0] + i * block->c_stride;
        const float *up = parts > 1 ? block->c[1] + i * block->c_stride : gate;
        simd->activate(gate, up, block->num_cols, args);
        const int64_t at = row * args->intermediate_stride + block->col;
        simd->round((char *)args->intermediate + at * element_bytes(args->dtype), gate,
                    block->num_cols, args->dtype);
    }
}

int moe_cpu_gate_up(const moe_gate_up_args *args, moe_error *err)
{
    gate_up_context context = {.args = args};
    moe_gemm gemm = {.a = args->hidden_states,
                     .w = args->w13,
                     .expert_offsets = args->expert_offsets,
                     .sorted_token_ids = args->sorted_token_ids,
                     .a_stride = args->hidden_stride,
                     .w_expert_stride = args->w13_expert_stride,
                     .w_row_stride = args->w13_row_stride,
                     .num_sources = args->num_tokens,
                     .num_slots = args->num_slots,
                     .num_parts = args->gated ? 2 : 1,
                     .part_step = 1,
                     .num_experts = args->num_experts,
                     .topk = args->topk,
                     .num_cols = args->intermediate_size,
                     .k = args->hidden_size,
                     .dtype = args->dtype,
                     .simd = moe_get_simd(),
                     .finish = finish,
                     .args = &context};
    context.gemm = &gemm;
    if (args->gated) { /* part 0 is the gate, part 1 the up projection */
        switch (args->w13_order) {
        case MOE_ORDER_UP_GATE:
            gemm.part_row[0] = args->intermediate_size;
            break;
        case MOE_ORDER_INTERLEAVED:
            gemm.part_row[1] = 1;
            gemm.part_step = 2;
            break;
        default:
            gemm.part_row[1] = args->intermediate_size;
        }
    }
    return moe_grouped_gemm(&gemm, err);
}
