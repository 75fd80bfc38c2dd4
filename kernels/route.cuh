/* route.cuh: the choice of one token's experts by one warp; route.cu says what it computes.
 *
 * One body, route_row, does every method. The rows of route_variants.def call it with the knobs as constants, so
 * that nothing is left of what they do not need; moe_route_general_* call it with the knobs as they come. */
#ifndef MOE_ROUTE_CUH
#define MOE_ROUTE_CUH

#include "numeric.cuh"
#include "route_math.h"

static constexpr uint32_t kWarp = 0xffffffffu;
static constexpr int kCandidates = 64;

// What a warp notes while it chooses.
struct alignas(16) warp_scratch { // read 16 bytes at a time
    union {
        uint64_t wide[kCandidates];   // a key, below it the id reversed: the larger comes first
        uint32_t narrow[kCandidates]; // the same of 16-bit logits, in 32 bits
    } candidate;
    float carried[kCandidates];
    uint32_t largest[32]; // key of a lane, or of two or four
    int32_t chosen[32];   // id by slot
    float value[32];      // its score, or the logit where that is the key; NaN weighs nothing
};

// A sum over the slots in the order of the CPU backend: halves onto each other, of 32 lanes of which those from
// num_slots on hold 0. Lanes below num_slots get it.
static __device__ __forceinline__ float sum_slots(float x, int32_t num_slots)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        if (num_slots > offset) x = route_add(x, __shfl_xor_sync(kWarp, x, offset));
    return x;
}

static __device__ __forceinline__ float sum_lanes(float x)
{
    return sum_slots(x, 32);
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
    if (args.packed)
        args.packed[token * args.packed_stride + slot] = static_cast<int32_t>(
            static_cast<uint32_t>(id) << 16 | __bfloat16_as_ushort(bf16::round(weight)));
}

// ---- logits ------------------------------------------------------------------------------------

// Called, not inlined: rare, and long where it stands 32 times.
static __device__ __noinline__ float softcap(float x, float cap)
{
    return route_softcap(x, cap);
}

static __device__ __noinline__ float random_key(int32_t key, int64_t token, int32_t expert)
{
    return route_random_key(key, token, expert);
}

static __device__ __forceinline__ float load_logit(const moe_route_args &args, int64_t token,
                                                   int32_t expert)
{
    float x = load_f32(args.router_logits, token * args.logits_stride + expert, args.logits_dtype);
    if (args.softcap > 0) x = softcap(x, args.softcap);
    return args.bias == MOE_BIAS_LOGIT
               ? route_add(x, load_f32(args.correction_bias, expert, args.bias_dtype))
               : x;
}

// All bits where the lane's i-th expert is one, else none. A mask and no condition, since the compiler makes a
// condition a branch for each i.
static __device__ __forceinline__ uint32_t exists(const moe_route_args &args, int i)
{
    int32_t lane = threadIdx.x % 32;
    return static_cast<uint32_t>((lane + 32 * i - args.num_experts) >> 31);
}

// values[i] = array[lane + 32 i], as f32, 0 from `count` on. One branch for all of them, not one each.
template <int kHeld>
static __device__ __forceinline__ void load_held(float (&values)[kHeld], const void *array,
                                                 int64_t begin, int32_t count, int32_t dtype)
{
    int32_t lane = threadIdx.x % 32;
    auto load = [&](auto *from, auto widen) {
        from += begin + lane;
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            values[i] = lane + 32 * i < count ? widen(from[32 * i]) : 0.0f;
    };
    if (dtype == MOE_F32)
        load(static_cast<const float *>(array), [](float x) { return x; });
    else if (dtype == MOE_BF16)
        load(static_cast<const __nv_bfloat16 *>(array), bf16::to_f32);
    else
        load(static_cast<const __half *>(array), f16::to_f32);
}

template <int kHeld>
static __device__ __forceinline__ void load_logits(float (&x)[kHeld], const moe_route_args &args,
                                                   int64_t token)
{
    load_held(x, args.router_logits, token * args.logits_stride, args.num_experts,
              args.logits_dtype);
    if (args.softcap > 0) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            x[i] = softcap(x[i], args.softcap);
    }
    if (args.bias != MOE_BIAS_LOGIT) return;
    float bias[kHeld];
    load_held(bias, args.correction_bias, 0, args.num_experts, args.bias_dtype);
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
        x[i] = route_add(x[i], bias[i]);
}

// 16-bit logits that are keys themselves fit one register with the id: the order of the logit above, the id
// reversed below. Such keys are never equal, and one comparison does for both.
static __device__ __forceinline__ uint32_t pack_logit(uint32_t bits, uint32_t expert,
                                                      uint32_t largest_number)
{
    uint32_t high = bits << 16;
    // -0 becomes +0; the addition is exact for any 16 bits, whatever they stand for
    uint32_t number = __float_as_uint(__fadd_rn(__uint_as_float(high), 0.0f));
    uint32_t order =
        number ^ (static_cast<uint32_t>(static_cast<int32_t>(number) >> 31) | 1u << 31);
    if ((high & 0x7fffffffu) > largest_number) order = 1u << 16; // NaN
    return (order & 0xffff0000u) | (0xffffu - expert);
}

static __device__ __forceinline__ float unpack_logit(uint32_t key, int32_t dtype)
{
    uint32_t order = key >> 16;
    unsigned short bits =
        static_cast<unsigned short>(order & 0x8000u ? order & 0x7fffu : ~order & 0xffffu);
    if (order <= 1) return __uint_as_float(0x7fc00000u);
    return dtype == MOE_BF16 ? __bfloat162float(__ushort_as_bfloat16(bits))
                             : __half2float(__ushort_as_half(bits));
}

template <int kHeld>
static __device__ __forceinline__ void load_packed(uint32_t (&key)[kHeld],
                                                   const moe_route_args &args, int64_t token)
{
    int32_t lane = threadIdx.x % 32;
    const unsigned short *row =
        static_cast<const unsigned short *>(args.router_logits) + token * args.logits_stride + lane;
    uint32_t largest_number = args.logits_dtype == MOE_BF16 ? 0x7f800000u : 0x7c000000u;
    uint32_t bits[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
        bits[i] = lane + 32 * i < args.num_experts ? row[32 * i] : 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
        key[i] = pack_logit(bits[i], lane + 32 * i, largest_number) & exists(args, i);
}

// ---- scores and keys ---------------------------------------------------------------------------

// One row's softmax: what the scores of its experts hang on.
struct softmax_row {
    float maximum, sum;
    bool bad; // NaN or +inf in the row, or only -inf

    __device__ __forceinline__ float term(float x) const { return route_term(x, maximum); }
    // The sum is at least 1, the term of the maximum, but of a row of NaN.
    __device__ __forceinline__ float score(float x) const
    {
        return route_mul(term(x), route_reciprocal(sum));
    }
};

template <int kHeld>
static __device__ __forceinline__ softmax_row make_softmax(const moe_route_args &args,
                                                           const float (&x)[kHeld],
                                                           const uint32_t (&order)[kHeld])
{
    uint32_t largest = 0;
    bool nan = false;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        largest = max(largest, order[i]);
        nan |= order[i] == 1;
    }
    softmax_row row;
    row.maximum = route_unorder(__reduce_max_sync(kWarp, largest));
    row.bad = __any_sync(kWarp, nan) || !route_is_finite(row.maximum);
    row.sum = 1.0f;
    if (!moe_route_needs_sum(&args)) return row;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
        sum = route_add(sum, order[i] > 1 ? row.term(x[i]) : 0.0f);
    row.sum = sum_lanes(sum);
    return row;
}

// x: logits, afterwards the scores where these are the keys. key: 0 past the end.
template <int kHeld>
static __device__ __forceinline__ void make_keys(const moe_route_args &args, int64_t number,
                                                 const softmax_row &row, float (&x)[kHeld],
                                                 uint32_t (&key)[kHeld])
{
    int32_t lane = threadIdx.x % 32;
    float bias[kHeld];
    if (args.bias == MOE_BIAS_KEY)
        load_held(bias, args.correction_bias, 0, args.num_experts, args.bias_dtype);
    auto each = [&](auto score) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            int32_t expert = lane + 32 * i;
            float s = score(x[i], expert), k = s;
            if (args.bias == MOE_BIAS_KEY) k = route_add(s, bias[i]);
            const float logit = args.key == MOE_KEY_SCORE ? x[i] : k;
            bool nan = !(k < logit) & !(k >= logit); // one of them is NaN: a single comparison
            key[i] = route_order_or(k, nan) & exists(args, i);
            if (args.key == MOE_KEY_SCORE) x[i] = s;
        }
    };
    if (args.key == MOE_KEY_LOGIT)
        each([](float logit, int32_t) { return logit; });
    else if (args.key != MOE_KEY_SCORE)
        each([&](float, int32_t expert) { return random_key(args.key, number, expert); });
    else if (args.score == MOE_SCORE_SIGMOID)
        each([](float logit, int32_t) { return route_score(MOE_SCORE_SIGMOID, logit); });
    else if (args.score == MOE_SCORE_SQRT_SOFTPLUS)
        each([](float logit, int32_t) { return route_score(MOE_SCORE_SQRT_SOFTPLUS, logit); });
    else
        each([&](float logit, int32_t) { return row.score(logit); });
}

// ---- groups ------------------------------------------------------------------------------------

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

static __device__ __forceinline__ uint32_t sum_of_two(uint32_t first, uint32_t second)
{
    return route_order(route_add(route_unorder(first), route_unorder(second)));
}

// Drops the keys outside the best groups of 32 experts: group i is what the lanes hold at i.
template <int kHeld>
static __device__ __forceinline__ void keep_groups_of_32(const moe_route_args &args,
                                                         uint32_t (&key)[kHeld])
{
    int32_t lane = threadIdx.x % 32;
    uint32_t largest[kHeld], second[kHeld];
    // One kind of work after the other: the reductions of all groups are under way together.
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
        largest[i] = __reduce_max_sync(kWarp, key[i]);
    if (args.groups == MOE_GROUPS_TOP2) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            second[i] = __reduce_max_sync(kWarp, key[i] == largest[i] ? 0 : key[i]);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            uint32_t holders = __ballot_sync(kWarp, key[i] == largest[i]);
            if (holders & (holders - 1)) second[i] = largest[i];
        }
    }
    uint32_t mine = 0, other = 0; // of group `lane`
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        if (lane != i || i >= args.num_groups) continue;
        mine = largest[i];
        if (args.groups == MOE_GROUPS_TOP2) other = second[i];
    }
    if (args.groups == MOE_GROUPS_TOP2 && lane < args.num_groups) mine = sum_of_two(mine, other);
    int32_t rank = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        uint32_t theirs = __shfl_sync(kWarp, mine, i);
        rank += theirs > mine || (theirs == mine && i < lane);
    }
    uint32_t kept = __ballot_sync(kWarp, mine != 0 && rank < args.topk_groups);
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
        if (!(kept >> i & 1)) key[i] = 0;
}

// The same for groups of any size, and for quotas.
template <int kHeld>
static __device__ __forceinline__ uint32_t kept_by_groups(const moe_route_args &args,
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
        if (args.groups == MOE_GROUPS_TOP2)
            order = sum_of_two(best.key, largest_key(key, members & ~held_bit(best.expert)).key);
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

// ---- choice ------------------------------------------------------------------------------------

// Slots whose keys are too many to be sorted at once, one after the other.
template <bool kPacked, int kHeld>
static __device__ __forceinline__ void
choose_in_rounds(const moe_route_args &args, const uint32_t (&key)[kHeld],
                 const float (&value)[kHeld], warp_scratch &scratch)
{
    uint32_t left = kWarp;
#pragma unroll 1
    for (int32_t s = 0; s < args.topk; ++s) {
        best_key best = largest_key(key, left);
        uint32_t mine = best.key ? held_bit(best.expert) : 0;
        left &= ~mine;
        if (!mine) continue;
        scratch.chosen[s] = static_cast<int32_t>(best.expert);
        float v = kPacked ? unpack_logit(best.key, args.logits_dtype) : 0.0f;
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (!kPacked && mine == 1u << i) v = value[i];
        scratch.value[s] = !kPacked && best.key == 1 ? __uint_as_float(0x7fc00000u) : v;
    }
}

// chosen[s], value[s] of the topk largest keys. Without rounds: the topk-th largest of the lanes' largest keys is a
// bound below which nothing is chosen, and few keys are above it (11 on average for 8 of 256). These are put side
// by side, and each counts how many come before it.
template <bool kPacked, int kHeld>
static __device__ __forceinline__ void choose(const moe_route_args &args,
                                              const uint32_t (&key)[kHeld],
                                              const float (&value)[kHeld], warp_scratch &scratch)
{
    uint32_t lane = threadIdx.x % 32, head = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
        head = max(head, key[i]);
    // For few slots the largest of two or four lanes: half the work here, few candidates more.
    const uint32_t log2_width = args.topk <= 6 ? 2 : args.topk <= 10 ? 1 : 0;
    if (log2_width > 0) head = max(head, __shfl_xor_sync(kWarp, head, 1));
    if (log2_width > 1) head = max(head, __shfl_xor_sync(kWarp, head, 2));
    scratch.largest[lane >> log2_width] = head; // the same from all that share it
    scratch.candidate.wide[lane] = 0;
    if (!kPacked) scratch.candidate.wide[lane + 32] = 0;
    scratch.chosen[lane] = -1;
    __syncwarp();
    uint32_t before[4] = {0, 0, 0, 0}; // four counts side by side
    const uint4 *heads = reinterpret_cast<const uint4 *>(scratch.largest);
    auto count_before = [&](int begin, int end) {
#pragma unroll
        for (int j = begin; j < end; ++j) {
            uint4 h = heads[j];
            count_if_greater(before[0], h.x, head);
            count_if_greater(before[1], h.y, head);
            count_if_greater(before[2], h.z, head);
            count_if_greater(before[3], h.w, head);
        }
    };
    count_before(0, 2);
    if (log2_width < 2) count_before(2, 4);
    if (log2_width == 0) count_before(4, 8);
    // not below 1: 0 is what has been dropped
    const uint32_t all_before = before[0] + before[1] + before[2] + before[3],
                   topk = static_cast<uint32_t>(args.topk);
    uint32_t least = max(__reduce_min_sync(kWarp, all_before < topk ? head : kWarp), 1u);

    uint32_t counts[2] = {0, 0}, at = 0, total = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
        count_if_greater(counts[i % 2], key[i], least - 1);
    const uint32_t count = counts[0] + counts[1];
#pragma unroll
    for (int bit = 0; 1 << bit <= kHeld; ++bit) {
        uint32_t has = __ballot_sync(kWarp, count >> bit & 1);
        at += __popc(has & ((1u << lane) - 1)) << bit;
        total += __popc(has) << bit;
    }
    if (total > kCandidates) {
        choose_in_rounds<kPacked>(args, key, value, scratch);
        __syncwarp();
        return;
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        if (key[i] < least) continue;
        if (kPacked) {
            scratch.candidate.narrow[at++] = key[i];
        } else {
            scratch.carried[at] = value[i];
            scratch.candidate.wide[at++] =
                static_cast<uint64_t>(key[i]) << 32 | (0xffffu - (lane + 32 * i));
        }
    }
    __syncwarp();
    constexpr int kAhead = 16;
#pragma unroll 1
    for (uint32_t first = 0; first < total; first += 32) {
        uint32_t ranks[4] = {0, 0, 0, 0}, high, low;
        if (kPacked) {
            uint32_t mine = scratch.candidate.narrow[first + lane];
#pragma unroll 1
            for (uint32_t b = 0; b < total; b += kAhead) {
#pragma unroll
                for (int j = 0; j < kAhead; j += 4) {
                    uint4 c = *reinterpret_cast<const uint4 *>(&scratch.candidate.narrow[b + j]);
                    count_if_greater(ranks[0], c.x, mine);
                    count_if_greater(ranks[1], c.y, mine);
                    count_if_greater(ranks[2], c.z, mine);
                    count_if_greater(ranks[3], c.w, mine);
                }
            }
            high = low = mine;
        } else {
            uint64_t mine = scratch.candidate.wide[first + lane];
#pragma unroll 1
            for (uint32_t b = 0; b < total; b += kAhead) {
#pragma unroll
                for (int j = 0; j < kAhead; j += 2) {
                    ulonglong2 c =
                        *reinterpret_cast<const ulonglong2 *>(&scratch.candidate.wide[b + j]);
                    count_if_greater(ranks[j % 4], uint64_t{c.x}, mine);
                    count_if_greater(ranks[j % 4 + 1], uint64_t{c.y}, mine);
                }
            }
            high = static_cast<uint32_t>(mine >> 32);
            low = static_cast<uint32_t>(mine);
        }
        const uint32_t rank = ranks[0] + ranks[1] + ranks[2] + ranks[3];
        if (high == 0 || rank >= topk) continue;
        scratch.chosen[rank] = static_cast<int32_t>(0xffffu - (low & 0xffffu));
        scratch.value[rank] = kPacked     ? unpack_logit(high, args.logits_dtype)
                              : high == 1 ? __uint_as_float(0x7fc00000u)
                                          : scratch.carried[first + lane];
    }
    __syncwarp();
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
                sum = route_add(sum, route_is_nan(other) ? other : route_exp(route_add(other, -x)));
        }
        sum = sum_lanes(sum);
        if (lane == s) score = route_div(1.0f, sum);
        before |= held_bit(static_cast<uint32_t>(id));
    }
    return score;
}

// ---- a token -----------------------------------------------------------------------------------

// What a slot weighs before it is divided and scaled; NaN: nothing. Lane l is slot l.
template <int kHeld>
static __device__ __forceinline__ float slot_score(const moe_route_args &args, int64_t token,
                                                   const softmax_row &row, int32_t chosen,
                                                   float value)
{
    if (args.score == MOE_SCORE_SPARSEMIXER) return sparsemixer_score<kHeld>(args, token, chosen);
    if (chosen < 0 || (args.score == MOE_SCORE_SOFTMAX && row.bad)) return 0.0f;
    if (args.ids != MOE_IDS_LARGEST) value = load_logit(args, token, chosen);
    if (args.ids == MOE_IDS_LARGEST && args.key == MOE_KEY_SCORE) return value;
    if (args.score != MOE_SCORE_SOFTMAX) return route_score_or_nan(args.score, value);
    if (route_is_nan(value)) return 0.0f;
    return moe_route_needs_sum(&args) ? row.score(value) : row.term(value);
}

// kGroupsOf32: there are no other groups. written(slot, id) hears of every slot, from its lane.
template <int kHeld, bool kPacked, bool kGroupsOf32, class Written>
static __device__ __forceinline__ void route_row(const moe_route_args &args, int64_t token,
                                                 warp_scratch &scratch, Written written)
{
    int32_t lane = threadIdx.x % 32;
    int64_t number = args.first_token + token;
    if (args.num_token_non_padded && number >= *args.num_token_non_padded) {
        if (lane < args.num_slots) {
            store_slot(args, token, lane, -1, 0.0f);
            written(lane, int64_t{-1});
        }
        return;
    }
    float x[kHeld];
    uint32_t key[kHeld];
    softmax_row row = {0.0f, 1.0f, false};
    if (kPacked) {
        load_packed(key, args, token);
        if (args.score == MOE_SCORE_SOFTMAX) { // renormalised: no sum over the row
            uint32_t largest = 0;
            bool nan = false;
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                largest = max(largest, key[i]);
                nan |= key[i] >> 16 == 1;
            }
            row.maximum = unpack_logit(__reduce_max_sync(kWarp, largest), args.logits_dtype);
            row.bad = __any_sync(kWarp, nan) || !route_is_finite(row.maximum);
        }
    } else {
        load_logits(x, args, token);
        if (args.score == MOE_SCORE_SOFTMAX) {
#pragma unroll
            for (int i = 0; i < kHeld; ++i)
                key[i] = route_order(x[i]) & exists(args, i);
            row = make_softmax(args, x, key);
        }
    }
    int32_t chosen = -1;
    float value = 0.0f;
    if (args.ids == MOE_IDS_LARGEST) {
        if (!kPacked) {
            make_keys(args, number, row, x, key);
            if (args.num_groups && (kGroupsOf32 || (args.num_experts == 32 * args.num_groups &&
                                                    args.groups != MOE_GROUPS_QUOTA))) {
                keep_groups_of_32(args, key);
            } else if (!kGroupsOf32 && args.num_groups) {
                uint32_t kept = kept_by_groups(args, key);
#pragma unroll
                for (int i = 0; i < kHeld; ++i)
                    if (!(kept >> i & 1)) key[i] = 0;
            }
        }
        choose<kPacked>(args, key, x, scratch);
        if (lane < args.topk) {
            chosen = scratch.chosen[lane];
            value = scratch.value[lane];
        }
    } else if (lane < args.topk) {
        chosen = given_id(args, token, number, lane);
    }

    // Lane l is slot l from here on.
    bool routed = lane < args.topk, shared = !routed && lane < args.num_slots;
    float weight = slot_score<kHeld>(args, token, row, chosen, value);
    if (shared)
        weight = args.shared >= MOE_SHARED_GATE
                     ? route_score_or_nan(MOE_SCORE_SIGMOID,
                                          load_f32(args.router_logits,
                                                   token * args.logits_stride + args.num_experts +
                                                       lane - args.topk,
                                                   args.logits_dtype))
                     : 0.0f;
    if (isnan(weight)) weight = 0.0f;
    float routed_sum = sum_slots(routed ? weight : 0.0f, args.num_slots);
    float sum = args.shared == MOE_SHARED_SINK ? sum_slots(weight, args.num_slots) : routed_sum;
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
    if (lane >= args.num_slots) return;
    if (args.counts && routed && chosen >= 0) atomicAdd(&args.counts[chosen], 1);
    int64_t id = routed ? route_map_id(&args, number, chosen) : args.shared_id + lane - args.topk;
    store_slot(args, token, lane, id, route_finite(weight));
    written(lane, id);
}

// The call without extras, with the knobs of a row of route_variants.def as constants.
template <int kHeld, bool kPacked, int kScore, int kKey, bool kGroups>
static __device__ __forceinline__ moe_route_args unpack(const moe_route_plain_args &plain)
{
    moe_route_args a = {};
    a.router_logits = plain.router_logits;
    a.topk_weights = plain.topk_weights;
    a.topk_ids = plain.topk_ids;
    a.correction_bias = plain.correction_bias;
    a.num_token_non_padded = plain.num_token_non_padded;
    a.logits_stride = plain.logits_stride;
    a.weights_stride = plain.weights_stride;
    a.ids_stride = plain.ids_stride;
    a.num_tokens = plain.num_tokens;
    a.first_token = plain.first_token;
    a.num_experts = plain.num_experts;
    a.topk = a.num_slots = plain.topk;
    a.num_groups = kGroups ? plain.num_groups : 0;
    a.topk_groups = plain.topk_groups;
    a.groups = kGroups ? plain.groups : MOE_GROUPS_NONE;
    a.logits_dtype = plain.logits_dtype;
    a.weights_dtype = MOE_F32;
    a.bias_dtype = plain.bias_dtype;
    a.ids_dtype = plain.ids_dtype;
    a.score = kScore == MOE_SCORE_ANY ? plain.score : kScore;
    a.key = kKey;
    a.bias = !kPacked && plain.correction_bias ? MOE_BIAS_KEY : MOE_BIAS_NONE;
    a.ids = MOE_IDS_LARGEST;
    a.renormalize = plain.renormalize;
    a.scale = plain.scale;
    return a;
}

#endif
