/* route.c: topk_weights, topk_ids = select(router_logits)                              (stage 1 of 5)
 * In     router_logits [num_tokens, num_experts]
 * Out    topk_weights f32, topk_ids
 * Math   f32; the topk largest logits, descending, the lowest id first among equals; weights are the
 *        softmax over all experts, or over the chosen ones (topk_softmax)
 *
 * Any bit pattern gives distinct ids in range: NaN comes after every number, by ascending id. A row that
 * holds NaN or +inf, or only -inf, has NaN weights, as the formula says. */
#include "simd.h"

#include "threads.h"

#include <stdatomic.h>

enum {
    BLOCK_TOKENS = 16,
    SMALL_LOGITS = 8 * 1024 /* logits that do not pay for waking a thread */
};

typedef struct route_run {
    const moe_route_args *args;
    const moe_simd *simd;
    atomic_llong next;
} route_run;

/* The topk largest of logits, best first, by insertion: a later equal value stays behind. NaN fills what
 * the numbers leave. Returns whether there is a NaN. */
static bool select_experts(const float *logits, int32_t num_experts, int32_t topk, int32_t *ids)
{
    int32_t count = 0;
    bool nan = false;
    for (int32_t e = 0; e < num_experts; ++e) {
        nan |= isnan(logits[e]);
        if (isnan(logits[e]) || (count == topk && !(logits[e] > logits[ids[topk - 1]]))) continue;
        int32_t at = count < topk ? count++ : topk - 1;
        for (; at > 0 && logits[e] > logits[ids[at - 1]]; --at)
            ids[at] = ids[at - 1];
        ids[at] = e;
    }
    for (int32_t e = 0; count < topk; ++e)
        if (isnan(logits[e])) ids[count++] = e;
    return nan;
}

static void route_token(const route_run *run, int64_t token)
{
    const moe_route_args *args = run->args;
    const int32_t num_experts = args->num_experts, topk = args->topk;
    float logits[MOE_MAX_EXPERTS + MOE_VECTOR_FLOATS], chosen[MOE_MAX_TOPK + MOE_VECTOR_FLOATS];
    int32_t ids[MOE_MAX_TOPK];
    for (int32_t e = 0; e < num_experts; ++e)
        logits[e] =
            load_element(args->router_logits, token * args->logits_stride + e, args->logits_dtype);
    const bool nan = select_experts(logits, num_experts, topk, ids);

    const float maximum = logits[ids[0]];
    for (int32_t s = 0; s < topk; ++s)
        chosen[s] = logits[ids[s]];
    run->simd->exp_minus(chosen, maximum, topk);
    double sum = 0;
    if (args->method == MOE_ROUTE_SOFTMAX_TOPK) {
        run->simd->exp_minus(logits, maximum, num_experts);
        for (int32_t e = 0; e < num_experts; ++e)
            sum += (double)logits[e];
    } else {
        for (int32_t s = 0; s < topk; ++s)
            sum += (double)chosen[s];
    }

    float *weights = (float *)args->topk_weights + token * args->weights_stride;
    for (int32_t s = 0; s < topk; ++s) {
        weights[s] = nan ? NAN : (float)((double)chosen[s] / sum * (double)args->scale);
        const int64_t at = token * args->ids_stride + s;
        if (args->ids_dtype == MOE_I64)
            ((int64_t *)args->topk_ids)[at] = ids[s];
        else
            ((int32_t *)args->topk_ids)[at] = ids[s];
    }
}

static void route_region(void *context, int thread)
{
    route_run *run = context;
    (void)thread;
    for (;;) {
        int64_t token = atomic_fetch_add_explicit(&run->next, BLOCK_TOKENS, memory_order_relaxed);
        for (int i = 0; i < BLOCK_TOKENS; ++i, ++token) {
            if (token >= run->args->num_tokens) return;
            route_token(run, token);
        }
    }
}

int moe_cpu_route(const moe_route_args *args, moe_error *err)
{
    route_run run = {.args = args, .simd = moe_get_simd()};
    if (args->num_experts > MOE_MAX_EXPERTS || args->topk > MOE_MAX_TOPK ||
        args->topk > args->num_experts)
        return moe_fail(
            err, MOE_ERROR_VALUE,
            "router_logits: expected topk <= num_experts <= %d and topk <= %d, got topk %d "
            "of %d experts",
            MOE_MAX_EXPERTS, MOE_MAX_TOPK, args->topk, args->num_experts);
    const int64_t num_logits = args->num_tokens * args->num_experts;
    moe_parallel(num_logits < SMALL_LOGITS ? 1 : moe_num_threads(), route_region, &run);
    return MOE_OK;
}
