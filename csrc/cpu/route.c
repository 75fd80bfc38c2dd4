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
    SMALL_LOGITS = 8 * 1024 /* logits that do not pay for waking a thread */
};

typedef struct route_run {
    const moe_route_args *args;
    const moe_simd *simd;
    atomic_llong next;
} route_run;

/* A row of logits as f32; a loop for each dtype, which the compiler turns into vectors. Returns whether there is a NaN. */
static bool load_logits(const moe_route_args *args, int64_t token, float *logits)
{
    const int32_t num_experts = args->num_experts;
    const char *row = (const char *)args->router_logits +
                      token * args->logits_stride * moe_dtype_bytes(args->logits_dtype);
    if (args->logits_dtype == MOE_F32) {
        memcpy(logits, row, (size_t)num_experts * sizeof *logits);
    } else {
        uint16_t bits[MOE_MAX_EXPERTS];
        memcpy(bits, row, (size_t)num_experts * sizeof *bits);
        for (int32_t e = 0; args->logits_dtype == MOE_BF16 && e < num_experts; ++e)
            logits[e] = bf16_to_f32(bits[e]);
        for (int32_t e = 0; args->logits_dtype == MOE_F16 && e < num_experts; ++e)
            logits[e] = f16_to_f32(bits[e]);
    }
    int32_t nan = 0;
    for (int32_t e = 0; e < num_experts; ++e)
        nan |= logits[e] != logits[e];
    return nan;
}

/* The topk largest of logits, best first, by insertion: a later equal value stays behind. NaN, of which there is one
 * only where `nan` says so, fills what the numbers leave. */
static void select_experts(const float *logits, int32_t num_experts, int32_t topk, bool nan,
                           int32_t *ids)
{
    float value[MOE_MAX_TOPK];
    int32_t count = 0, e = 0;
    for (; e < num_experts; ++e) {
        const float x = logits[e];
        if (count == topk) {
            const float least = value[topk - 1];
            while (e < num_experts && !(logits[e] > least)) /* nearly all of them, NaN too */
                ++e;
            if (e == num_experts) break;
        } else if (nan && isnan(x)) {
            continue;
        }
        int32_t at = count < topk ? count++ : topk - 1;
        for (; at > 0 && logits[e] > value[at - 1]; --at) {
            value[at] = value[at - 1];
            ids[at] = ids[at - 1];
        }
        value[at] = logits[e];
        ids[at] = e;
    }
    for (e = 0; count < topk; ++e)
        if (isnan(logits[e])) ids[count++] = e;
}

static void route_token(const route_run *run, int64_t token)
{
    const moe_route_args *args = run->args;
    const int32_t num_experts = args->num_experts, topk = args->topk;
    float logits[MOE_MAX_EXPERTS + MOE_VECTOR_FLOATS], chosen[MOE_MAX_TOPK + MOE_VECTOR_FLOATS];
    int32_t ids[MOE_MAX_TOPK];
    const bool nan = load_logits(args, token, logits);
    select_experts(logits, num_experts, topk, nan, ids);

    const float maximum = logits[ids[0]];
    for (int32_t s = 0; s < topk; ++s)
        chosen[s] = logits[ids[s]];
    run->simd->exp_minus(chosen, maximum, topk);
    double sum = 0;
    if (!args->renormalize) {
        run->simd->exp_minus(logits, maximum, num_experts);
        for (int32_t e = 0; e < num_experts; ++e)
            sum += (double)logits[e];
    } else {
        for (int32_t s = 0; s < topk; ++s)
            sum += (double)chosen[s];
    }

    float *weights = (float *)args->topk_weights + token * args->weights_stride;
    for (int32_t s = 0; s < topk; ++s) {
        weights[s] =
            nan ? 0.0f : route_finite((float)((double)chosen[s] / sum * (double)args->scale));
        const int64_t at = token * args->ids_stride + s;
        if (args->ids_dtype == MOE_I64)
            ((int64_t *)args->topk_ids)[at] = ids[s];
        else
            ((int32_t *)args->topk_ids)[at] = ids[s];
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

GENERAL void load_row(const moe_route_args *args, int64_t token, route_row *row)
{
    uint32_t largest = 0;
    bool nan = false;
    for (int32_t e = 0; e < args->num_experts; ++e) {
        float x = route_softcap(
            load_element(args->router_logits, token * args->logits_stride + e, args->logits_dtype),
            args->softcap);
        if (args->bias == MOE_BIAS_LOGIT)
            x += load_element(args->correction_bias, e, args->bias_dtype);
        row->x[e] = x;
        const uint32_t order = route_order(x);
        if (order > largest) largest = order;
        nan |= order == 1;
    }
    row->maximum = route_unorder(largest);
    row->bad = nan || !route_is_finite(row->maximum);
    row->sum = 1.0f;
    if (!moe_route_needs_sum(args)) return;
    float lane[LANES] = {0};
    for (int32_t e = 0; e < args->num_experts; ++e)
        if (!isnan(row->x[e])) lane[e % LANES] += softmax_term(row, row->x[e]);
    row->sum = sum_lanes(lane);
}

GENERAL float row_score(const moe_route_args *args, const route_row *row, float x)
{
    if (isnan(x) && args->score != MOE_SCORE_CONSTANT) return x;
    return args->score == MOE_SCORE_SOFTMAX
               ? route_mul(softmax_term(row, x), route_reciprocal(row->sum))
               : route_score(args->score, x);
}

GENERAL void make_keys(const moe_route_args *args, int64_t token, route_row *row)
{
    for (int32_t e = 0; e < args->num_experts; ++e) {
        float key = args->key == MOE_KEY_LOGIT   ? row->x[e]
                    : args->key == MOE_KEY_SCORE ? row_score(args, row, row->x[e])
                                                 : route_random_key(args->key, token, e);
        if (args->bias == MOE_BIAS_KEY)
            key += load_element(args->correction_bias, e, args->bias_dtype);
        row->key[e] = route_order(key);
    }
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
        int32_t best = -1;
        if (args->groups == MOE_GROUPS_QUOTA) {
            for (int32_t i = 0; i < args->topk / args->num_groups; ++i)
                if ((best = largest_key(row->key, kept, begin, end)) >= 0) kept[best] = true;
            continue;
        }
        best = largest_key(row->key, NULL, begin, end);
        groups[g] = row->key[best];
        if (args->groups == MOE_GROUPS_TOP2) {
            kept[best] = true;
            const int32_t second = largest_key(row->key, kept, begin, end);
            kept[best] = false;
            groups[g] =
                route_order(route_unorder(row->key[best]) + route_unorder(row->key[second]));
        }
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

GENERAL void choose_largest(const moe_route_args *args, route_row *row)
{
    int32_t count = 0;
    for (int32_t e = 0; e < args->num_experts; ++e) {
        const uint32_t key = row->key[e];
        if (key == 0 || (count == args->topk && key <= row->key[row->ids[count - 1]])) continue;
        int32_t at = count < args->topk ? count++ : count - 1;
        for (; at > 0 && key > row->key[row->ids[at - 1]]; --at)
            row->ids[at] = row->ids[at - 1];
        row->ids[at] = e;
    }
    for (; count < args->topk; ++count)
        row->ids[count] = -1;
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
    const float score = row_score(args, row, row->x[id]);
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

GENERAL void route_general_body(const moe_route_args *args, int64_t token)
{
    const int64_t number = args->first_token + token;
    if (args->num_token_non_padded && number >= *args->num_token_non_padded) {
        for (int32_t s = 0; s < args->num_slots; ++s)
            store_slot(args, token, s, -1, 0.0f);
        return;
    }
    route_row row;
    load_row(args, token, &row);
    if (args->ids == MOE_IDS_LARGEST) {
        make_keys(args, number, &row);
        if (args->num_groups) keep_groups(args, &row);
        choose_largest(args, &row);
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

static void route_general(const moe_route_args *args, int64_t token)
{
    route_general_body(args, token);
}

#if defined(__x86_64__) && !defined(__FMA__)
__attribute__((target("avx2,fma"))) static void route_general_fma(const moe_route_args *args,
                                                                  int64_t token)
{
    route_general_body(args, token);
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
                route_general_fma(run->args, token);
            else if (run->args->general)
                route_general(run->args, token);
            else
                route_token(run, token);
        }
    }
}

int moe_cpu_route(const moe_route_args *args, moe_error *err)
{
    (void)err;
    route_run run = {.args = args, .simd = moe_get_simd()};
    const int64_t num_logits = args->num_tokens * args->num_experts;
    moe_parallel(num_logits < SMALL_LOGITS ? 1 : moe_num_threads(), route_region, &run);
    return MOE_OK;
}
