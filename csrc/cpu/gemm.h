/* gemm.h: the grouped matrix product under gate_up and down. */
#ifndef MOE_GEMM_H
#define MOE_GEMM_H

#include "simd.h"

enum {
    MOE_GEMM_MAX_PARTS = 2,
    MOE_GEMM_MAX_COLS = 128 /* of a block; a multiple of MOE_VECTOR_FLOATS */
};

/* A block of results, f32, for the stage to finish: rows [row, row + num_rows) of the sorted order,
 * columns [col, col + num_cols). c[part] + i * c_stride holds row i; may be overwritten, and touched up
 * to a multiple of 16 columns. */
typedef struct moe_gemm_block {
    int64_t row, c_stride;
    int32_t num_rows, col, num_cols, expert;
    float *c[MOE_GEMM_MAX_PARTS];
} moe_gemm_block;

/* For every expert e and every row r of it (expert_offsets):
 *   c[part][r][j] = a[source(r)] . w[e][part_row[part] + j * part_step]      j in [0, num_cols)
 * source(r) is sorted_token_ids[r] / topk, or r where sorted_token_ids is NULL.
 * expert_offsets and sorted_token_ids may hold anything (stages called alone): rows outside
 * [0, num_slots) are skipped, a source outside [0, num_sources) reads as zeros. */
typedef struct moe_gemm {
    const void *a; /* rows of k elements */
    const void *w; /* [num_experts, rows, k] */
    const int32_t *expert_offsets;
    const int32_t *sorted_token_ids;
    int64_t a_stride, w_expert_stride, w_row_stride; /* elements */
    int64_t num_sources, num_slots;
    int64_t part_row[MOE_GEMM_MAX_PARTS];
    int32_t num_parts;
    int32_t part_step;
    int32_t num_experts;
    int32_t topk;
    int32_t num_cols;
    int32_t k;
    int32_t dtype;
    const moe_simd *simd;
    void (*finish)(const void *args, const moe_simd *simd, const moe_gemm_block *block);
    const void *args; /* of finish */
} moe_gemm;

/* The router weight of a slot: 0 where its token is none. */
static inline float slot_weight(const void *topk_weights, int32_t dtype, int64_t stride,
                                int32_t slot, int32_t topk, int64_t num_tokens)
{
    const int32_t token = slot < 0 ? -1 : slot / topk;
    if (token < 0 || token >= num_tokens) return 0;
    return load_element(topk_weights, token * stride + slot % topk, dtype);
}

/* Runs on all threads. Fails only where memory for scratch is lacking, before anything is written. */
int moe_grouped_gemm(const moe_gemm *gemm, moe_error *err);

#endif
