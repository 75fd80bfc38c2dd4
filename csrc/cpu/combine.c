/* combine.c: out[t] = scale * sum over slots s of rows[row_of_slot[t, s]] + shared_output[t] (stage 5 of 5)
 * In     rows, row_of_slot (-1: dropped), shared_output or NULL
 * Out    out [num_tokens, hidden_size], every element
 * Math   f32, slots in order, one rounding
 * Cost   (num_rows + num_tokens) * hidden_size elements of traffic; threads over tokens */
#include "simd.h"

#include "threads.h"

#include <stdatomic.h>

enum {
    BLOCK_TOKENS = 8,
    SMALL_ELEMENTS = 256 * 1024 /* rows * hidden_size that do not pay for waking a thread */
};

typedef struct combine_run {
    const moe_combine_args *args;
    const moe_simd *simd;
    atomic_llong next;
} combine_run;

static void combine_token(const combine_run *run, int64_t token)
{
    const moe_combine_args *args = run->args;
    const int64_t bytes = element_bytes(args->dtype);
    const void *rows[MOE_MAX_TOPK];
    int num_rows = 0;
    for (int32_t s = 0; s < args->topk; ++s) {
        const int32_t row = args->row_of_slot[token * args->topk + s];
        if (row >= 0 && row < args->num_rows)
            rows[num_rows++] = (const char *)args->rows + row * args->rows_stride * bytes;
    }
    const void *shared = NULL;
    if (args->shared_output)
        shared = (const char *)args->shared_output + token * args->shared_stride * bytes;
    /* No rows: 0, also where scale is infinite. */
    run->simd->sum_rows((char *)args->out + token * args->out_stride * bytes, rows, num_rows,
                        shared, num_rows ? args->scale : 0.0f, args->hidden_size, args->dtype);
}

static void combine_region(void *context, int thread)
{
    combine_run *run = context;
    (void)thread;
    for (;;) {
        int64_t token = atomic_fetch_add_explicit(&run->next, BLOCK_TOKENS, memory_order_relaxed);
        for (int i = 0; i < BLOCK_TOKENS; ++i, ++token) {
            if (token >= run->args->num_tokens) return;
            combine_token(run, token);
        }
    }
}

int moe_cpu_combine(const moe_combine_args *args, moe_error *err)
{
    combine_run run = {.args = args, .simd = moe_get_simd()};
    (void)err; /* cannot fail; all stages look alike */
    const int64_t elements = args->num_tokens * args->topk * args->hidden_size;
    moe_parallel(elements < SMALL_ELEMENTS ? 1 : moe_num_threads(), combine_region, &run);
    return MOE_OK;
}
