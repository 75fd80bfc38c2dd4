/* decode.cuh: what the kernels for a few tokens share (gate_up_decode_sm90a.cu, down_decode_sm90a.cu).
 *
 * No align: every thread block reads topk_ids, a few hundred slots at most, and finds the experts that have any,
 * in ascending order. Tokens are the columns of mma m16n8k16, all of them for every expert (tensor cores have
 * nothing else to do while the weights stream by); what a token has no slot for is not stored or not added.
 *
 * Weights come through a ring that the copy engine fills, one thread asking for it: a unit is 64 of K, 128-byte
 * rows in the 128-byte swizzle, and each math warp multiplies its own units of a stage. */
#ifndef MOE_DECODE_CUH
#define MOE_DECODE_CUH

#include "gemm_common.cuh"
#include "slots.cuh"
#include "wgmma.cuh"

static constexpr int kMathWarps = MOE_DECODE_MATH_WARPS;
static constexpr int kMathThreads = 32 * kMathWarps;
static constexpr int kThreads = kMathThreads + 32 * MOE_GEMM_PRODUCERS_sm90a_decode;
static constexpr int kUnitK = 64;
static constexpr int kFinders = kThreads - 32; // threads that find experts, all warps but one
static constexpr int kMathBarrier = 1;         // of bar.sync: the math warps
static constexpr int kFindBarrier = 2;
static constexpr int kMaxTiles = 2; // of eight tokens

struct decode_state {
    // landed: a stage's copies; read: its units are multiplied, one arrival per reading warp; panel: token rows (gate_up);
    // summed, written: of the two buffers of sums between the math warps and the warp that writes
    alignas(16) uint64_t landed[MOE_DECODE_MAX_STAGES];
    uint64_t read[MOE_DECODE_MAX_STAGES];
    uint64_t panel, summed[2], written[2];
    int32_t num_active, duplicates;   // duplicates: some token has two slots of one expert (down)
    uint32_t seen[kMaxTiles][32];     // experts that have slots of these eight tokens, one bit each
    int16_t expert[MOE_DECODE_SLOTS]; // of a slot, -1: dropped
    int16_t active[MOE_DECODE_SLOTS]; // experts that have slots, ascending
    int16_t
        rank[MOE_DECODE_SLOTS]; // of a slot: where its expert is in `active`, -1: dropped (down)
    float weight[MOE_DECODE_SLOTS]; // of a slot (down)
};
static_assert(sizeof(decode_state) <= MOE_DECODE_SLOT_BYTES, "the host asks for so much");

// Division by the same number again and again, made ready long before: n / d = 2 n * (2^63 / d + 1) / 2^64, n * d < 2^63.
struct divisor {
    uint64_t reciprocal;
    __device__ __forceinline__ explicit divisor(uint32_t d) : reciprocal((1ull << 63) / d + 1)
    {
        asm volatile("" : "+l"(reciprocal)); // here, not where it is needed first
    }
    __device__ __forceinline__ int32_t divide(uint64_t n) const
    {
        return static_cast<int32_t>(__umul64hi(2 * n, reciprocal));
    }
};

// Where a thread is in the ring.
struct ring_position {
    int32_t stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next(int32_t stages)
    {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Before the first barrier of the block. readers: warps that read each stage.
static __device__ __forceinline__ void start_ring(decode_state &state, int32_t stages,
                                                  uint32_t readers, const tensor_map *body,
                                                  const tensor_map *tail)
{
    if (threadIdx.x < 32 * kMaxTiles) state.seen[threadIdx.x / 32][threadIdx.x % 32] = 0;
    if (threadIdx.x != kFinders) return; // not a thread of a warp that finds experts next
#pragma unroll 1
    for (int32_t stage = 0; stage < stages; ++stage) {
        mbarrier_init(shared_address(&state.landed[stage]), 1);
        mbarrier_init(shared_address(&state.read[stage]), readers);
    }
    mbarrier_init(shared_address(&state.panel), 1);
    for (int buffer = 0; buffer < 2; ++buffer) {
        mbarrier_init(shared_address(&state.summed[buffer]), 32 * kMathWarps);
        mbarrier_init(shared_address(&state.written[buffer]), 32);
    }
    fence_proxy_async();
    tensor_map_prefetch(body);
    tensor_map_prefetch(tail);
}

// The expert that a slot goes to, or -1; ids past L1, because other kernels may just have written them.
static __device__ __forceinline__ int32_t local_expert(const moe_slot_args &args, int32_t slot)
{
    int64_t at = slot;
    if (args.ids_stride != args.topk) { // a division is a tenth of a microsecond
        int32_t token = slot / args.topk;
        at = token * args.ids_stride + (slot - token * args.topk);
    }
    int64_t id = args.ids_dtype == MOE_I64
                     ? __ldcg(static_cast<const long long *>(args.topk_ids) + at)
                     : __ldcg(static_cast<const int *>(args.topk_ids) + at);
    return expert_of_id(args, id, [](const int32_t *entry) { return __ldcg(entry); });
}

// What find_experts will read, on its way from memory while the kernels before this one still run.
static __device__ __forceinline__ void prefetch_slots(const moe_slot_args &args)
{
    int32_t bytes = args.ids_dtype == MOE_I64 ? 8 : 4;
#pragma unroll 1
    for (int32_t slot = threadIdx.x; slot < args.num_slots; slot += kThreads) {
        int32_t token = slot / args.topk, s = slot - token * args.topk;
        if (s % 8 != 0) continue;
        prefetch_l2(static_cast<const char *>(args.topk_ids) +
                    (token * args.ids_stride + s) * bytes);
        if (args.topk_weights)
            prefetch_l2(static_cast<const char *>(args.topk_weights) +
                        token * args.weights_stride_bytes);
    }
}

template <int kTiles>
static __device__ __forceinline__ bool few_slots(const moe_slot_args &args)
{
    return kTiles == 1 && args.num_slots <= 32;
}

// The same as find_experts for at most 32 slots, in one warp: what it takes is the way of the ids from memory.
static __device__ __forceinline__ void find_few_experts(decode_state &state,
                                                        const moe_slot_args &args)
{
    int32_t lane = threadIdx.x % 32, rank = 0;
    int32_t expert = lane < args.num_slots ? local_expert(args, lane) : -1;
    uint32_t same = __match_any_sync(0xffffffffu, expert);
    bool first = expert >= 0 && (same & ((1u << lane) - 1)) == 0;
    uint32_t firsts = __ballot_sync(0xffffffffu, first);
    // Those that are not the first of an expert count for nothing.
    int32_t counted = first ? expert : INT32_MAX;
#pragma unroll 1
    for (int32_t slot = 0; slot < args.num_slots; slot += 8) {
#pragma unroll
        for (int32_t i = 0; i < 8; ++i)
            rank += __shfl_sync(0xffffffffu, counted, slot + i) < expert;
    }
    if (lane < args.num_slots) {
        state.expert[lane] = static_cast<int16_t>(expert);
        state.rank[lane] = static_cast<int16_t>(expert >= 0 ? rank : -1);
        if (first) state.active[rank] = static_cast<int16_t>(expert);
    }
    if (lane == 0) state.num_active = __popc(firsts);
}

// The same for any number: all warps but the last.
template <int kTiles>
static __device__ __forceinline__ void find_many_experts(decode_state &state,
                                                         const moe_slot_args &args)
{
    const int32_t thread = threadIdx.x, lane = thread % 32, words = (args.num_experts + 31) / 32;
    int32_t slot = thread, expert = slot < args.num_slots ? local_expert(args, slot) : -1;
    named_barrier_sync(kFindBarrier, kFinders); // `seen` is zero
#pragma unroll 1
    for (; slot < args.num_slots; slot += kFinders) {
        if (slot != thread) expert = local_expert(args, slot);
        state.expert[slot] = static_cast<int16_t>(expert);
        int32_t tile = kTiles > 1 && slot >= 8 * args.topk;
        if (expert >= 0) atomicOr(&state.seen[tile][expert / 32], 1u << expert % 32);
    }
    named_barrier_sync(kFindBarrier, kFinders);
    // Every warp scans the words, one a lane, and lists the experts of its own.
    uint32_t bits = 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
        bits |= state.seen[tile][lane];
    int32_t before = __popc(bits);
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        int32_t below = __shfl_up_sync(0xffffffffu, before, offset);
        if (lane >= offset) before += below;
    }
    if (thread == 31) state.num_active = before;
    before -= __popc(bits);
#pragma unroll 1
    for (int32_t word = thread / 32; word < words; word += kFinders / 32) {
        uint32_t experts = __shfl_sync(0xffffffffu, bits, word);
        int32_t first = __shfl_sync(0xffffffffu, before, word);
        if (experts >> lane & 1)
            state.active[first + __popc(experts & ((1u << lane) - 1))] =
                static_cast<int16_t>(word * 32 + lane);
    }
}

// Fills expert and active, with few slots and tokens rank as well; returns how many experts are active. All threads of the
// block, of which the last warp only waits in the end; after start_ring, whose barriers then are there.
template <int kTiles>
static __device__ __forceinline__ int32_t find_experts(decode_state &state,
                                                       const moe_slot_args &args)
{
    static_assert(kTiles <= kMaxTiles, "a bit for each expert and tile");
    if (few_slots<kTiles>(args)) {
        if (threadIdx.x < 32) find_few_experts(state, args);
    } else if (threadIdx.x < kFinders) {
        find_many_experts<kTiles>(state, args);
    }
    __syncthreads();
    return state.num_active;
}

// How many experts before `expert` are active, for an active one: where it is in `active`.
template <int kTiles>
static __device__ __forceinline__ int32_t rank_of(const decode_state &state, int32_t expert)
{
    int32_t rank = 0;
#pragma unroll 1
    for (int32_t word = 0; word <= expert / 32; ++word) {
        uint32_t bits = 0;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
            bits |= state.seen[tile][word];
        rank += __popc(word < expert / 32 ? bits : bits & ((1u << expert % 32) - 1));
    }
    return rank;
}

// The products of one unit: 16 weight rows, rows 0 .. 7 at `rows` and 8 .. 15 1024 bytes on. Of a row's eight 16-byte
// pieces lane 4 g + q reads pieces 2 q and 2 q + 1, and of its token row the same: which of K an mma gets does not
// matter as long as both sides agree.
struct weight_fragments {
    uint4 low[2], high[2]; // rows g, g + 8: pieces 2 q, 2 q + 1
};

static __device__ __forceinline__ void load_weights(weight_fragments &w, uint32_t rows)
{
    uint32_t lane = threadIdx.x % 32, row = lane / 4, piece = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint32_t at = rows + row * 128 + (((piece + i) ^ row) << 4);
        w.low[i] = load_shared_16(at);
        w.high[i] = load_shared_16(at + 1024);
    }
}

// The sums together [token][row] += weights . tokens over the unit's 64 of K. An mma waits for the one before that adds
// to the same: two sums where nothing else lies between.
template <class T, int kSums>
static __device__ __forceinline__ void
multiply_unit(float (&sum)[kSums][4], const weight_fragments &w, const uint4 (&tokens)[2])
{
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint32_t first[4] = {w.low[i].x, w.high[i].x, w.low[i].y, w.high[i].y};
        uint32_t second[4] = {w.low[i].z, w.high[i].z, w.low[i].w, w.high[i].w};
        T::mma(sum[0], first, tokens[i].x, tokens[i].y);
        T::mma(sum[kSums - 1], second, tokens[i].z, tokens[i].w);
    }
}

static __device__ __forceinline__ void release(decode_state &state, int32_t stage)
{
    __syncwarp(); // a lane left behind would miss the phase once the stage is filled again
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&state.read[stage]));
}

#endif
