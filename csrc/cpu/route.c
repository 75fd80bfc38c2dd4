/* route.c: topk_weights, topk_ids = select(router_logits)                              (stage 1 of 5)
 * In     router_logits, and what the method needs (moe_route_args)
 * Out    topk_weights, topk_ids
 * Math   f32. One function for all methods (route_general), whose keys have the bits of the CUDA kernel's
 *        (route_math.h), and a short one for softmax alone. Order: descending key, the lowest id first among
 *        equals
 *
 * Any bit pattern gives distinct ids in range and finite weights: NaN comes after every number, by ascending
 * id, and weighs 0; so does every expert of a softmax over NaN, +inf or only -inf. */
#include "../../kernels/route_math.h"

#include "simd.h"

#include "threads.h"

#include <stdatomic.h>

enum {
    BLOCK_TOKENS = 16,
    LOGITS_PER_THREAD = 64 * 1024 /* 60 to 100 us of softmax, which pay for waking a thread */
};

typedef struct route_run {
    const moe_route_args *args;
    const moe_simd *simd;
    atomic_llong next;
} route_run;

static inline const void *logits_of(const moe_route_args *args, int64_t token)
{
    return (const char *)args->router_logits +
           token * args->logits_stride * moe_dtype_bytes(args->logits_dtype);
}

/* softmax alone. */
static void route_token(const route_run *run, int64_t token)
{
    const moe_route_args *args = run->args;
    const int32_t num_experts = args->num_experts, topk = args->topk;
    float logits[MOE_MAX_EXPERTS], chosen[MOE_MAX_TOPK];
    uint32_t key[MOE_MAX_EXPERTS];
    int32_t ids[MOE_MAX_TOPK];
    const bool nan = run->simd->load_logits(logits, key, logits_of(args, token), num_experts,
                                            args->logits_dtype);
    run->simd->select_largest(key, num_experts, topk, ids); /* no key is 0 */

    const float maximum = logits[ids[0]];
    const bool bad = nan || !route_is_finite(maximum); /* no softmax */
    for (int32_t s = 0; s < topk; ++s)
        chosen[s] = logits[ids[s]];
    double sum = run->simd->exp_sum(chosen, maximum, topk);
    if (!args->renormalize) sum = run->simd->exp_sum(logits, maximum, num_experts);

    const double factor = (double)args->scale / sum;
    float *weights = (float *)args->topk_weights + token * args->weights_stride;
    for (int32_t s = 0; s < topk; ++s)
        weights[s] = bad ? 0.0f : route_finite((float)((double)chosen[s] * factor));
    if (args->ids_dtype == MOE_I64) {
        int64_t *to = (int64_t *)args->topk_ids + token * args->ids_stride;
        for (int32_t s = 0; s < topk; ++s)
            to[s] = ids[s];
    } else {
        memcpy((int32_t *)args->topk_ids + token * args->ids_stride, ids,
               (size_t)topk * sizeof *ids);
    }
}

/* ---- all methods ----------------------------------------------------------------------------- */

/* route_general exists twice, for CPUs with fused multiply-add and for those whose C library does it; what it is
 * made of is inlined into either. The bits are the same. */
#define GENERAL static inline __attribute__((always_inline))

enum { LANES = 32 };

/* A sum in the order of the CUDA kernel: a partial sum for each lane, then halves onto each other. */
GENERAL float sum_lanes(float *lane)
{
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i)
            lane[i] += lane[i + half];
    return lane[0];
}

GENERAL int64_t load_integer(const void *base, int64_t at, int32_t dtype)
{
    return dtype == MOE_I64 ? ((const int64_t *)base)[at] : ((const int32_t *)base)[at];
}

GENERAL void store_slot(const moe_route_args *args, int64_t row, int32_t slot, int64_t id,
                        float weight)
{
    const int64_t weight_at = row * args->weights_stride + slot,
                  id_at = row * args->ids_stride + slot;
    if (args->weights_dtype == MOE_F32)
        ((float *)args->topk_weights)[weight_at] = weight;
    else
        ((uint16_t *)args->topk_weights)[weight_at] =
            args->weights_dtype == MOE_BF16 ? f32_to_bf16(weight) : f32_to_f16(weight);
    if (args->ids_dtype == MOE_I64)
        ((int64_t *)args->topk_ids)[id_at] = id;
    else
        ((int32_t *)args->topk_ids)[id_at] = (int32_t)id;
    if (args->packed)
        args->packed[row * args->packed_stride + slot] =
            (int32_t)((uint32_t)id << 16 | f32_to_bf16(weight));
}

/* One row while it is being routed. */
typedef struct route_row {
    float x[MOE_MAX_EXPERTS];
    uint32_t key[MOE_MAX_EXPERTS];
    float maximum, sum; /* of the softmax */
    bool bad;           /* no softmax: NaN or +inf in the row, or only -inf */
    int32_t ids[MOE_MAX_TOPK];
    float weights[MOE_MAX_TOPK];
} route_row;

GENERAL float softmax_term(const route_row *row, float x)
{
    return route_term(x, row->maximum);
}

/* The logits and their order, which is the key of some methods. The loops over experts here and in make_keys
 * decide nothing inside, so that the compiler makes vectors of them. */
GENERAL void load_row(const route_run *run, int64_t token, route_row *row)
{
    const moe_route_args *args = run->args;
    const int32_t num_experts = args->num_experts;
    run->simd->load_logits(row->x, row->key, logits_of(args, token), num_experts,
                           args->logits_dtype);
    if (args->softcap > 0 || args->bias == MOE_BIAS_LOGIT)
        for (int32_t e = 0; e < num_experts; ++e) {
            float x = route_softcap(row->x[e], args->softcap);
            if (args->bias == MOE_BIAS_LOGIT)
                x += load_element(args->correction_bias, e, args->bias_dtype);
            row->x[e] = x;
            row->key[e] = route_order(x);
        }
    uint32_t largest = 0;
    int32_t nan = 0;
    for (int32_t e = 0; e < num_experts; ++e) {
        largest = row->key[e] > largest ? row->key[e] : largest;
        nan |= row->key[e] == 1;
    }
    row->maximum = route_unorder(largest);
    row->bad = nan || !route_is_finite(row->maximum);
    row->sum = 1.0f;
    if (!moe_route_needs_sum(args)) return;
    float lane[LANES] = {0};
    int32_t e = 0;
    for (; e + LANES <= num_experts; e += LANES)
        for (int32_t i = 0; i < LANES; ++i) {
            const float term = softmax_term(row, row->x[e + i]);
            lane[i] += route_is_nan(row->x[e + i]) ? 0.0f : term;
        }
    for (int32_t i = 0; e + i < num_experts; ++i)
        if (!route_is_nan(row->x[e + i])) lane[i] += softmax_term(row, row->x[e + i]);
    row->sum = sum_lanes(lane);
}

GENERAL float row_score(int32_t score, const route_row *row, float x)
{
    if (score != MOE_SCORE_SOFTMAX) return route_score_or_nan(score, x);
    const float s = route_mul(softmax_term(row, x), route_reciprocal(row->sum));
    return route_is_nan(x) ? x : s;
}

/* score is a constant where this is inlined. */
GENERAL void row_scores(int32_t score, const route_row *row, int32_t num_experts, float *scores)
{
    for (int32_t e = 0; e < num_experts; ++e)
        scores[e] = row_score(score, row, row->x[e]);
}

GENERAL void make_keys(const moe_route_args *args, int64_t token, route_row *row)
{
    const int32_t num_experts = args->num_experts;
    float key[MOE_MAX_EXPERTS];
    if (args->key == MOE_KEY_LOGIT && args->bias != MOE_BIAS_KEY) return;
    if (args->key == MOE_KEY_LOGIT)
        memcpy(key, row->x, (size_t)num_experts * sizeof *key);
    else if (args->key != MOE_KEY_SCORE)
        for (int32_t e = 0; e < num_experts; ++e)
            key[e] = route_random_key(args->key, token, e);
    else if (args->score == MOE_SCORE_SOFTMAX)
        row_scores(MOE_SCORE_SOFTMAX, row, num_experts, key);
    else if (args->score == MOE_SCORE_SIGMOID)
        row_scores(MOE_SCORE_SIGMOID, row, num_experts, key);
    else
        row_scores(args->score, row, num_experts, key);
    if (args->bias == MOE_BIAS_KEY && args->bias_dtype == MOE_F32)
        for (int32_t e = 0; e < num_experts; ++e)
            key[e] += load_element(args->correction_bias, e, MOE_F32);
    else if (args->bias == MOE_BIAS_KEY)
        for (int32_t e = 0; e < num_experts; ++e)
            key[e] += load_element(args->correction_bias, e, args->bias_dtype);
    for (int32_t e = 0; e < num_experts; ++e)
        row->key[e] = route_order(key[e]);
}

/* The largest key of [begin, end) that is not taken, the lowest expert among equals; -1: there is none. */
GENERAL int32_t largest_key(const uint32_t *key, const bool *taken, int32_t begin, int32_t end)
{
    int32_t best = -1;
    for (int32_t e = begin; e < end; ++e)
        if (key[e] && !(taken && taken[e]) && (best < 0 || key[e] > key[best])) best = e;
    return best;
}

/* Drops the keys that the groups forbid. */
GENERAL void keep_groups(const moe_route_args *args, route_row *row)
{
    const int32_t size = args->num_experts / args->num_groups;
    bool kept[MOE_MAX_EXPERTS] = {false};
    uint32_t groups[MOE_MAX_TOPK];
    for (int32_t g = 0; g < args->num_groups; ++g) {
        const int32_t begin = g * size, end = begin + size;
        if (args->groups == MOE_GROUPS_QUOTA) {
            int32_t best;
            for (int32_t i = 0; i < args->topk / args->num_groups; ++i)
                if ((best = largest_key(row->key, kept, begin, end)) >= 0) kept[best] = true;
            continue;
        }
        uint32_t first = 0, second = 0;
        for (int32_t e = begin; e < end; ++e) {
            const uint32_t key = row->key[e], less = key < first ? key : first;
            second = less > second ? less : second;
            first = key > first ? key : first;
        }
        groups[g] = args->groups == MOE_GROUPS_TOP2
                        ? route_order(route_unorder(first) + route_unorder(second))
                        : first;
    }
    for (int32_t i = 0; args->groups != MOE_GROUPS_QUOTA && i < args->topk_groups; ++i) {
        const int32_t g = largest_key(groups, NULL, 0, args->num_groups);
        groups[g] = 0;
        for (int32_t e = g * size; e < (g + 1) * size; ++e)
            kept[e] = true;
    }
    for (int32_t e = 0; e < args->num_experts; ++e)
        if (!kept[e]) row->key[e] = 0;
}

GENERAL void choose_given(const moe_route_args *args, int64_t token, int64_t number, route_row *row)
{
    int64_t at = token;
    if (args->token_ids) at = load_integer(args->token_ids, token, args->token_ids_dtype);
    for (int32_t s = 0; s < args->topk; ++s) {
        int64_t id = -1;
        if (args->ids == MOE_IDS_ROUND_ROBIN)
            id = (number * args->topk + s) % args->num_experts;
        else if (at >= 0 && at < args->tid_rows)
            id = load_integer(args->tid2eid, at * args->tid_stride + s, args->tid_dtype);
        row->ids[s] = id >= 0 && id < args->num_experts ? (int32_t)id : -1;
    }
}

/* 1 / the softmax terms of the experts that sparsemixer sees for a slot: those not chosen before it, within the
 * jitter of its own. */
GENERAL float sparsemixer_score(const moe_route_args *args, const route_row *row, int32_t slot)
{
    const float chosen = row->x[row->ids[slot]];
    float lane[LANES] = {0};
    for (int32_t e = 0; e < args->num_experts; ++e) {
        bool seen = route_within_jitter(row->x[e], chosen);
        for (int32_t s = 0; s < slot; ++s)
            seen &= row->ids[s] != e;
        if (seen) lane[e % LANES] += isnan(row->x[e]) ? row->x[e] : route_exp(row->x[e] - chosen);
    }
    return 1.0f / sum_lanes(lane);
}

GENERAL float slot_score(const moe_route_args *args, const route_row *row, int32_t slot)
{
    const int32_t id = row->ids[slot];
    if (id < 0 || (args->ids == MOE_IDS_LARGEST && row->key[id] == 1)) return 0.0f;
    if (args->score == MOE_SCORE_SPARSEMIXER) return sparsemixer_score(args, row, slot);
    if (args->score == MOE_SCORE_SOFTMAX && row->bad) return 0.0f;
    const float score = row_score(args->score, row, row->x[id]);
    return isnan(score) ? 0.0f : score;
}

GENERAL void weigh(const moe_route_args *args, int64_t token, route_row *row)
{
    float lane[LANES] = {0}, sum, routed;
    for (int32_t s = 0; s < args->topk; ++s)
        lane[s] = row->weights[s] = slot_score(args, row, s);
    routed = sum_lanes(lane);
    for (int32_t s = args->topk; s < args->num_slots; ++s) {
        const int64_t at = token * args->logits_stride + args->num_experts + s - args->topk;
        row->weights[s] =
            args->shared >= MOE_SHARED_GATE
                ? route_score_or_nan(MOE_SCORE_SIGMOID,
                                     load_element(args->router_logits, at, args->logits_dtype))
                : 0.0f;
        if (isnan(row->weights[s])) row->weights[s] = 0.0f;
    }
    memcpy(lane, row->weights, (size_t)args->num_slots * sizeof *lane);
    memset(lane + args->num_slots, 0, (size_t)(LANES - args->num_slots) * sizeof *lane);
    sum = args->shared == MOE_SHARED_SINK ? sum_lanes(lane) : routed;
    const bool has_sum = sum > 0 && isfinite(sum);
    for (int32_t s = 0; s < args->num_slots; ++s) {
        float weight = row->weights[s];
        const bool shared = s >= args->topk;
        if (shared && args->shared == MOE_SHARED_SUM)
            weight = args->renormalize ? 1.0f : routed;
        else if (shared && args->shared == MOE_SHARED_CONSTANT)
            weight = args->shared_weight;
        else if (!shared || args->shared == MOE_SHARED_SINK) {
            if (args->renormalize) weight = has_sum ? weight / sum : 0.0f;
            if (args->expert_scale && !shared && row->ids[s] >= 0)
                weight *= args->expert_scale[row->ids[s]];
            weight *= args->scale;
        }
        row->weights[s] = route_finite(weight);
    }
}

GENERAL void route_general_body(const route_run *run, int64_t token)
{
    const moe_route_args *args = run->args;
    const int64_t number = args->first_token + token;
    if (args->num_token_non_padded && number >= *args->num_token_non_padded) {
        for (int32_t s = 0; s < args->num_slots; ++s)
            store_slot(args, token, s, -1, 0.0f);
        return;
    }
    route_row row;
    load_row(run, token, &row);
    if (args->ids == MOE_IDS_LARGEST) {
        make_keys(args, number, &row);
        if (args->num_groups) keep_groups(args, &row);
        int32_t count = run->simd->select_largest(row.key, args->num_experts, args->topk, row.ids);
        for (; count < args->topk; ++count)
            row.ids[count] = -1;
    } else {
        choose_given(args, token, number, &row);
    }
    weigh(args, token, &row);
    for (int32_t s = 0; s < args->num_slots; ++s) {
        const int64_t id = s < args->topk ? route_map_id(args, number, row.ids[s])
                                          : args->shared_id + s - args->topk;
        if (args->counts && s < args->topk && row.ids[s] >= 0)
            __atomic_fetch_add(&args->counts[row.ids[s]], 1, __ATOMIC_RELAXED);
        store_slot(args, token, s, id, row.weights[s]);
    }
}

static void route_general(const route_run *run, int64_t token)
{
    route_general_body(run, token);
}

#if defined(__x86_64__) && !defined(__FMA__)
__attribute__((target("avx2,fma"))) static void route_general_fma(const route_run *run,
                                                                  int64_t token)
{
    route_general_body(run, token);
}
#else
#define route_general_fma route_general
#endif

static void route_region(void *context, int thread)
{
    route_run *run = context;
    (void)thread;
    for (;;) {
        int64_t token = atomic_fetch_add_explicit(&run->next, BLOCK_TOKENS, memory_order_relaxed);
        for (int i = 0; i < BLOCK_TOKENS; ++i, ++token) {
            if (token >= run->args->num_tokens) return;
            if (run->args->general && run->simd->level >= MOE_SIMD_AVX2)
                route_general_fma(run, token);
            else if (run->args->general)
                route_general(run, token);
            else
                route_token(run, token);
        }
    }
}

int moe_cpu_route(const moe_route_args *args, moe_error *err)
{
    (void)err;
    route_run run = {.args = args, .simd = moe_get_simd()};
    const int64_t share = args->general ? LOGITS_PER_THREAD / 4 : LOGITS_PER_THREAD;
    const int64_t threads = args->num_tokens * args->num_experts / share;
    moe_parallel(threads < moe_num_threads() ? (int)threads : moe_num_threads(), route_region,
                 &run);
    return MOE_OK;
}
