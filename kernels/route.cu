/* route.cu: topk_weights, topk_ids = select(router_logits)                                  (stage 1 of 5)
 * In     router_logits  [num_tokens, num_experts]  f32, bf16, f16  any row stride; for some methods a bias, maps,
 *                       a table of ids (moe_route_args)
 * Out    topk_weights   [num_tokens, num_slots]    f32, bf16, f16  finite
 *        topk_ids       [num_tokens, num_slots]    int32, int64    distinct, in order of the keys; -1: dropped
 * Math   f32. Order: descending key, equal keys (+0 and -0 too) by ascending id, NaN after every number.
 *        moe_route: softmax over all experts, perhaps divided by the sum of the topk. moe_route_general: every
 *        row of route_methods.def, with the bits of the CPU backend (route_math.h).
 *        NaN weighs 0, and so does every expert of a softmax over NaN, +inf or only -inf. scale comes last
 * Grid   one warp per token: ceil(num_tokens / 4) blocks of MOE_ROUTE_THREADS. No shared memory
 * Needs  num_experts 1 .. 1024, topk 1 .. min(32, num_experts), num_slots 1 .. 32, num_groups 0 .. 32
 * Cost   at decode a launch; from 4096 tokens the issue of topk rounds over num_experts / 32 values a lane */
#include "numeric.cuh"
#include "route_math.h"

static __device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Lane l holds experts l, l + 32, ...: kHeld of them.
template <int kHeld>
static __device__ __forceinline__ void route(const moe_route_softmax_args &args, int64_t token)
{
    int32_t lane = threadIdx.x % 32;
    uint32_t key[kHeld];
    uint32_t largest = 0;
    bool nan = false;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        int32_t expert = lane + 32 * i;
        key[i] = expert < args.num_experts
                     ? route_order(load_f32(args.router_logits, token * args.logits_stride + expert,
                                            args.logits_dtype))
                     : 0;
        largest = max(largest, key[i]);
        nan |= key[i] == 1;
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    float top =
        __any_sync(0xffffffffu, nan) ? __uint_as_float(0x7fc00000u) : route_unorder(largest);
    float sum = 0.0f;
    if (!args.renormalize) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (key[i] != 0) sum += __expf(route_unorder(key[i]) - top);
        sum = warp_sum(sum);
    }

    // Round s: the largest key left, the lowest expert that has it; lane s keeps the result.
    float chosen_exp = 0.0f;
    int32_t chosen = 0;
    for (int32_t s = 0; s < args.topk; ++s) {
        uint32_t best = 0;
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            best = max(best, key[i]);
        best = __reduce_max_sync(0xffffffffu, best);
        uint32_t expert = 0xffffffffu;
#pragma unroll
        for (int i = kHeld - 1; i >= 0; --i)
            if (key[i] == best) expert = lane + 32 * i;
        expert = __reduce_min_sync(0xffffffffu, expert);
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (lane + 32 * i == expert) key[i] = 0;
        if (lane == s) {
            chosen = static_cast<int32_t>(expert);
            chosen_exp = __expf(route_unorder(best) - top);
        }
    }
    if (args.renormalize) sum = warp_sum(chosen_exp);
    if (lane < args.topk) {
        float *weights = static_cast<float *>(args.topk_weights);
        weights[token * args.weights_stride + lane] = route_finite(chosen_exp / sum * args.scale);
        int64_t at = token * args.ids_stride + lane;
        if (args.ids_dtype == MOE_I64)
            static_cast<int64_t *>(args.topk_ids)[at] = chosen;
        else
            static_cast<int32_t *>(args.topk_ids)[at] = chosen;
    }
}

// ---- all methods --------------------------------------------------------------------------------

static constexpr uint32_t kWarp = 0xffffffffu;

// A sum in the order of the CPU backend: halves onto each other. Every lane gets it.
static __device__ __forceinline__ float sum_lanes(float x)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        x = route_add(x, __shfl_xor_sync(kWarp, x, offset));
    return x;
}

static __device__ __forceinline__ int64_t load_integer(const void *base, int64_t at, int32_t dtype)
{
    return dtype == MOE_I64 ? static_cast<const int64_t *>(base)[at]
                            : static_cast<const int32_t *>(base)[at];
}

static __device__ __forceinline__ void store_slot(const moe_route_args &args, int64_t token,
                                                  int32_t slot, int64_t id, float weight)
{
    int64_t weight_at = token * args.weights_stride + slot, id_at = token * args.ids_stride + slot;
    if (args.weights_dtype == MOE_F32)
        static_cast<float *>(args.topk_weights)[weight_at] = weight;
    else if (args.weights_dtype == MOE_BF16)
        static_cast<__nv_bfloat16 *>(args.topk_weights)[weight_at] = bf16::round(weight);
    else
        static_cast<__half *>(args.topk_weights)[weight_at] = f16::round(weight);
    if (args.ids_dtype == MOE_I64)
        static_cast<int64_t *>(args.topk_ids)[id_at] = id;
    else
        static_cast<int32_t *>(args.topk_ids)[id_at] = static_cast<int32_t>(id);
}

static __device__ __forceinline__ float load_logit(const moe_route_args &args, int64_t token,
                                                   int32_t expert)
{
    float x = route_softcap(
        load_f32(args.router_logits, token * args.logits_stride + expert, args.logits_dtype),
        args.softcap);
    return args.bias == MOE_BIAS_LOGIT
               ? route_add(x, load_f32(args.correction_bias, expert, args.bias_dtype))
               : x;
}

// One row's softmax: what the scores of its experts hang on.
struct softmax_row {
    float maximum, sum;
    bool bad; // NaN or +inf in the row, or only -inf

    __device__ __forceinline__ float term(float x) const
    {
        return x == maximum ? 1.0f : route_exp(route_add(x, -maximum));
    }
    __device__ __forceinline__ float score(const moe_route_args &args, float x) const
    {
        return args.score == MOE_SCORE_SOFTMAX ? route_div(term(x), sum)
                                               : route_score(args.score, x);
    }
};

struct best_key {
    uint32_t key, expert; // key 0: there is none
};

// The largest of the keys whose bit in `among` is set, the lowest expert that has it. Lane l holds l, l + 32, ...
template <int kHeld>
static __device__ __forceinline__ best_key largest_key(const uint32_t (&key)[kHeld], uint32_t among)
{
    int32_t lane = threadIdx.x % 32;
    uint32_t best = 0, expert = kWarp;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
        if (among >> i & 1) best = max(best, key[i]);
    best = __reduce_max_sync(kWarp, best);
#pragma unroll
    for (int i = kHeld - 1; i >= 0; --i)
        if ((among >> i & 1) && key[i] == best) expert = lane + 32 * i;
    return {best, __reduce_min_sync(kWarp, expert)};
}

// Bit i: the lane's i-th expert is in [begin, end).
template <int kHeld>
static __device__ __forceinline__ uint32_t held_in(int32_t begin, int32_t end)
{
    int32_t lane = threadIdx.x % 32;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
        bits |= (lane + 32 * i >= begin && lane + 32 * i < end ? 1u : 0u) << i;
    return bits;
}

static __device__ __forceinline__ uint32_t held_bit(uint32_t expert)
{
    return expert % 32 == threadIdx.x % 32 && expert != kWarp ? 1u << (expert / 32) : 0u;
}

// The bits of the experts that the groups allow.
template <int kHeld>
static __device__ __forceinline__ uint32_t keep_groups(const moe_route_args &args,
                                                       const uint32_t (&key)[kHeld])
{
    int32_t lane = threadIdx.x % 32;
    int32_t size = args.num_experts / args.num_groups;
    uint32_t kept = 0, group[1] = {0}; // lane g holds the key of group g
    for (int32_t g = 0; g < args.num_groups; ++g) {
        uint32_t members = held_in<kHeld>(g * size, (g + 1) * size);
        if (args.groups == MOE_GROUPS_QUOTA) {
            for (int32_t i = 0; i < args.topk / args.num_groups; ++i)
                kept |= held_bit(largest_key(key, members & ~kept).expert);
            continue;
        }
        best_key best = largest_key(key, members);
        uint32_t order = best.key;
        if (args.groups == MOE_GROUPS_TOP2) {
            best_key second = largest_key(key, members & ~held_bit(best.expert));
            order = route_order(route_add(route_unorder(best.key), route_unorder(second.key)));
        }
        if (lane == g) group[0] = order;
    }
    if (args.groups == MOE_GROUPS_QUOTA) return kept;
    for (int32_t i = 0; i < args.topk_groups; ++i) {
        int32_t g = static_cast<int32_t>(largest_key(group, 1).expert);
        if (lane == g) group[0] = 0;
        kept |= held_in<kHeld>(g * size, (g + 1) * size);
    }
    return kept;
}

// The id of slot `slot` where it does not hang on the logits.
static __device__ __forceinline__ int32_t given_id(const moe_route_args &args, int64_t token,
                                                   int64_t number, int32_t slot)
{
    int64_t id = -1;
    if (args.ids == MOE_IDS_ROUND_ROBIN) {
        id = (number * args.topk + slot) % args.num_experts;
    } else {
        int64_t at =
            args.token_ids ? load_integer(args.token_ids, token, args.token_ids_dtype) : token;
        if (at >= 0 && at < args.tid_rows)
            id = load_integer(args.tid2eid, at * args.tid_stride + slot, args.tid_dtype);
    }
    return id >= 0 && id < args.num_experts ? static_cast<int32_t>(id) : -1;
}

// Lane l is slot l; `chosen` and `weight` are those of its slot.
template <int kHeld>
static __device__ __forceinline__ float sparsemixer_score(const moe_route_args &args, int64_t token,
                                                          int32_t chosen)
{
    int32_t lane = threadIdx.x % 32;
    float score = 0.0f;
    uint32_t before = 0; // bits of the experts that earlier slots took
    for (int32_t s = 0; s < args.topk; ++s) {
        int32_t id = __shfl_sync(kWarp, chosen, s);
        if (id < 0) continue;
        float x = load_logit(args, token, id), sum = 0.0f;
#pragma unroll 1
        for (int i = 0; i < kHeld; ++i) {
            int32_t expert = lane + 32 * i;
            if (expert >= args.num_experts || (before >> i & 1)) continue;
            float other = load_logit(args, token, expert);
            if (route_within_jitter(other, x))
                sum = route_add(sum, route_exp(route_add(other, -x)));
        }
        sum = sum_lanes(sum);
        if (lane == s) score = route_div(1.0f, sum);
        before |= held_bit(static_cast<uint32_t>(id));
    }
    return score;
}

template <int kHeld>
static __device__ __forceinline__ void route_general(const moe_route_args &args, int64_t token)
{
    int32_t lane = threadIdx.x % 32;
    int64_t number = args.first_token + token;
    if (args.num_token_non_padded && number >= *args.num_token_non_padded) {
        if (lane < args.num_slots) store_slot(args, token, lane, -1, 0.0f);
        return;
    }
    float x[kHeld];
    uint32_t key[kHeld];
    uint32_t largest = 0;
    bool nan = false;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        int32_t expert = lane + 32 * i;
        x[i] = expert < args.num_experts ? load_logit(args, token, expert) : 0.0f;
        key[i] = expert < args.num_experts ? route_order(x[i]) : 0;
        largest = max(largest, key[i]);
        nan |= key[i] == 1;
    }
    softmax_row row;
    row.maximum = route_unorder(__reduce_max_sync(kWarp, largest));
    row.bad = __any_sync(kWarp, nan) || !route_is_finite(row.maximum);
    row.sum = 1.0f;
    if (args.score == MOE_SCORE_SOFTMAX) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (key[i] > 1) sum = route_add(sum, row.term(x[i]));
        row.sum = sum_lanes(sum);
    }

    int32_t chosen = -1;
    bool number_key = true;
    if (args.ids == MOE_IDS_LARGEST) {
        if (args.key != MOE_KEY_LOGIT || args.bias == MOE_BIAS_KEY) {
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                int32_t expert = lane + 32 * i;
                if (expert >= args.num_experts) continue;
                float k = args.key == MOE_KEY_LOGIT   ? x[i]
                          : args.key == MOE_KEY_SCORE ? row.score(args, x[i])
                                                      : route_random_key(args.key, number, expert);
                if (args.bias == MOE_BIAS_KEY)
                    k = route_add(k, load_f32(args.correction_bias, expert, args.bias_dtype));
                key[i] = route_order(k);
            }
        }
        uint32_t left = args.num_groups ? keep_groups(args, key) : kWarp;
        for (int32_t s = 0; s < args.topk; ++s) {
            best_key best = largest_key(key, left);
            left &= ~held_bit(best.expert);
            if (lane == s && best.key != 0) {
                chosen = static_cast<int32_t>(best.expert);
                number_key = best.key != 1;
            }
        }
    } else if (lane < args.topk) {
        chosen = given_id(args, token, number, lane);
    }

    // Lane l is slot l from here on.
    bool routed = lane < args.topk, shared = !routed && lane < args.num_slots;
    float weight = 0.0f;
    if (args.score == MOE_SCORE_SPARSEMIXER)
        weight = sparsemixer_score<kHeld>(args, token, chosen);
    else if (chosen >= 0 && !(args.score == MOE_SCORE_SOFTMAX && row.bad))
        weight = row.score(args, load_logit(args, token, chosen));
    if (shared && args.shared >= MOE_SHARED_GATE)
        weight = route_score(MOE_SCORE_SIGMOID, load_f32(args.router_logits,
                                                         token * args.logits_stride +
                                                             args.num_experts + lane - args.topk,
                                                         args.logits_dtype));
    if (!number_key || isnan(weight)) weight = 0.0f;
    float routed_sum = sum_lanes(routed ? weight : 0.0f);
    float sum = args.shared == MOE_SHARED_SINK ? sum_lanes(weight) : routed_sum;
    if (shared && args.shared == MOE_SHARED_SUM)
        weight = args.renormalize ? 1.0f : routed_sum;
    else if (shared && args.shared == MOE_SHARED_CONSTANT)
        weight = args.shared_weight;
    else if (!shared || args.shared == MOE_SHARED_SINK) {
        if (args.renormalize)
            weight = sum > 0 && route_is_finite(sum) ? route_div(weight, sum) : 0.0f;
        if (args.expert_scale && chosen >= 0) weight = route_mul(weight, args.expert_scale[chosen]);
        weight = route_mul(weight, args.scale);
    }
    if (lane < args.num_slots)
        store_slot(args, token, lane,
                   routed ? route_map_id(&args, number, chosen)
                          : args.num_experts + lane - args.topk,
                   route_finite(weight));
}

// ---- kernels ------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(MOE_ROUTE_THREADS, 1)
    moe_route(const __grid_constant__ moe_route_softmax_args args)
{
    grid_dependency_wait();
    grid_launch_dependents();
    int64_t token = static_cast<int64_t>(blockIdx.x) * (MOE_ROUTE_THREADS / 32) + threadIdx.x / 32;
    if (token >= args.num_tokens) return;
    if (args.num_experts <= 128)
        route<4>(args, token);
    else if (args.num_experts <= 256)
        route<8>(args, token);
    else if (args.num_experts <= 512)
        route<16>(args, token);
    else
        route<32>(args, token);
}

extern "C" __global__ void __launch_bounds__(MOE_ROUTE_THREADS, 1)
    moe_route_general(const __grid_constant__ moe_route_args args)
{
    grid_dependency_wait();
    grid_launch_dependents();
    int64_t token = static_cast<int64_t>(blockIdx.x) * (MOE_ROUTE_THREADS / 32) + threadIdx.x / 32;
    if (token >= args.num_tokens) return;
    if (args.num_experts <= 128)
        route_general<4>(args, token);
    else if (args.num_experts <= 256)
        route_general<8>(args, token);
    else if (args.num_experts <= 512)
        route_general<16>(args, token);
    else
        route_general<32>(args, token);
}
