/* decode.cuh: what the kernels for a few tokens share (gate_up_decode_sm90a.cu, down_decode_sm90a.cu).
 *
 * No align: every thread block reads topk_ids, a few hundred slots at most, and finds the experts that have any,
 * each once. Tokens are the columns of mma m16n8k16, all of them for every expert (tensor cores have
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
static constexpr int kFindBarrier = 2, kFoundBarrier = 3;
static constexpr int kMaxTiles = 2; // of eight tokens
static constexpr int kEach = 2;     // slots a lane of a warp that finds the experts alone

struct decode_state {
    // landed: a stage's copies; read: its units are multiplied, one arrival per reading warp; panel: token rows (gate_up);
    // summed, written: of the two buffers of sums between the math warps and the warp that writes
    alignas(16) uint64_t landed[MOE_DECODE_MAX_STAGES];
    uint64_t read[MOE_DECODE_MAX_STAGES];
    uint64_t panel, summed[2], written[2];
    int32_t num_active, duplicates;   // duplicates: some token has two slots of one expert (down)
    uint32_t seen[kMaxTiles][32];     // experts that have slots of these eight tokens, one bit each
    int16_t before[32];               // experts that have slots in the words of `seen` before
    int16_t expert[MOE_DECODE_SLOTS]; // of a slot, -1: dropped
    int16_t active[MOE_DECODE_SLOTS]; // experts that have slots, ascending where they are not few
    float weight[MOE_DECODE_SLOTS];   // of a slot (down)
};
static_assert(sizeof(decode_state) <= MOE_DECODE_SLOT_BYTES, "the host asks for so much");

// Division by the same number again and again, made ready before: a division is a tenth of a microsecond, of 64 bits more.
struct divisor {
    uint32_t by, reciprocal; // the quotient of 2^32 - 1
    __device__ __forceinline__ explicit divisor(uint32_t by) : by(by), reciprocal(0xffffffffu / by)
    {
    }
    __device__ __forceinline__ int32_t divide(uint32_t n) const
    {
        uint32_t quotient = __umulhi(n, reciprocal), left = n - quotient * by; // up to 2 too small
        if (left >= by) ++quotient, left -= by;
        return static_cast<int32_t>(quotient + (left >= by));
    }
};

// Whole warps: lanes that left a loop before the others would arrive at the barrier apart from them.
static __device__ __forceinline__ void sync_warps(uint32_t barrier, uint32_t threads)
{
    __syncwarp();
    named_barrier_sync(barrier, threads);
}

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

// What topk_ids says of a slot; past L1, because other kernels may just have written it.
static __device__ __forceinline__ int64_t load_id(const moe_slot_args &args, int32_t slot)
{
    int64_t at = slot;
    if (args.ids_stride != args.topk) { // a division is a tenth of a microsecond
        int32_t token = slot / args.topk;
        at = token * args.ids_stride + (slot - token * args.topk);
    }
    return args.ids_dtype == MOE_I64 ? __ldcg(static_cast<const long long *>(args.topk_ids) + at)
                                     : __ldcg(static_cast<const int *>(args.topk_ids) + at);
}

// The expert that a slot goes to, or -1.
static __device__ __forceinline__ int32_t local_expert(const moe_slot_args &args, int64_t id)
{
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

// What one warp knows of at most 32 slots, one a lane.
struct lane_slot {
    int32_t expert, rank; // -1: dropped; where it is in `active`
    uint32_t same;        // the lanes of this expert
};

// What a warp makes of the ids of at most 32 slots, one a lane. Experts in the order of their first slots; first: the lane's
// slot is one of them.
static __device__ __forceinline__ lane_slot rank_few_slots(const moe_slot_args &args, int64_t id,
                                                           bool &first, int32_t &active)
{
    const int32_t lane = threadIdx.x % 32;
    const int32_t expert = lane < args.num_slots ? local_expert(args, id) : -1;
    const uint32_t same = __match_any_sync(0xffffffffu, expert);
    const int32_t leader = __ffs(static_cast<int32_t>(same)) - 1;
    first = expert >= 0 && leader == lane;
    const uint32_t firsts = __ballot_sync(0xffffffffu, first);
    const int32_t rank = expert >= 0 ? __popc(firsts & ((1u << leader) - 1)) : -1;
    active = __popc(firsts);
    return {expert, rank, same};
}

// The same as find_experts for at most 32 slots, in one warp: what it takes is the way of the ids from memory. id: of the
// lane's slot.
static __device__ __forceinline__ lane_slot find_few_experts(decode_state &state,
                                                             const moe_slot_args &args, int64_t id)
{
    const int32_t lane = threadIdx.x % 32;
    bool first;
    int32_t active;
    const lane_slot mine = rank_few_slots(args, id, first, active);
    if (lane < args.num_slots) {
        state.expert[lane] = static_cast<int16_t>(mine.expert);
        if (first) state.active[mine.rank] = static_cast<int16_t>(mine.expert);
    }
    if (lane == 0) state.num_active = active;
    return mine;
}

// The words of `seen`, one a lane: how many experts are in those before the lane's, whose bits it fills in. The first warp
// writes it down.
template <int kTiles>
static __device__ __forceinline__ int32_t count_before(decode_state &state, uint32_t &bits)
{
    const int32_t lane = threadIdx.x % 32;
    bits = 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
        bits |= state.seen[tile][lane];
    int32_t before = __popc(bits);
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        int32_t below = __shfl_up_sync(0xffffffffu, before, offset);
        if (lane >= offset) before += below;
    }
    if (threadIdx.x == 31) state.num_active = before;
    before -= __popc(bits);
    if (threadIdx.x < 32) state.before[lane] = static_cast<int16_t>(before);
    return before;
}

// The same for at most 32 * kEach slots, still one warp: barriers between warps take longer. Experts in ascending order. (Four
// slots a lane were slower than all warps.)
static __device__ __forceinline__ void find_some_experts(decode_state &state,
                                                         const moe_slot_args &args)
{
    const int32_t lane = threadIdx.x;
    int64_t id[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
        id[i] = load_id(args, min(lane + 32 * i, args.num_slots - 1));
    __syncwarp(); // this warp's words of `seen` are zero
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        if (lane + 32 * i >= args.num_slots) break;
        const int32_t expert = local_expert(args, id[i]);
        state.expert[lane + 32 * i] = static_cast<int16_t>(expert);
        if (expert >= 0) atomicOr(&state.seen[0][expert / 32], 1u << expert % 32);
    }
    __syncwarp();
    uint32_t bits;
    int32_t at = count_before<1>(state, bits);
#pragma unroll 1
    for (; bits; bits &= bits - 1)
        state.active[at++] =
            static_cast<int16_t>(lane * 32 + __ffs(static_cast<int32_t>(bits)) - 1);
}

// The same for any number: all warps but the last.
template <int kTiles>
static __device__ __forceinline__ void find_many_experts(decode_state &state,
                                                         const moe_slot_args &args)
{
    const int32_t thread = threadIdx.x, lane = thread % 32, words = (args.num_experts + 31) / 32;
    int32_t slot = thread;
    int32_t expert = slot < args.num_slots ? local_expert(args, load_id(args, slot)) : -1;
    sync_warps(kFindBarrier, kFinders); // `seen` is zero
#pragma unroll 1
    for (; slot < args.num_slots; slot += kFinders) {
        if (slot != thread) expert = local_expert(args, load_id(args, slot));
        state.expert[slot] = static_cast<int16_t>(expert);
        int32_t tile = kTiles > 1 && slot >= 8 * args.topk;
        if (expert >= 0) atomicOr(&state.seen[tile][expert / 32], 1u << expert % 32);
    }
    sync_warps(kFindBarrier, kFinders);
    // Every warp scans the words and lists the experts of its own.
    uint32_t bits;
    const int32_t before = count_before<kTiles>(state, bits);
#pragma unroll 1
    for (int32_t word = thread / 32; word < words; word += kFinders / 32) {
        uint32_t experts = __shfl_sync(0xffffffffu, bits, word);
        int32_t first = __shfl_sync(0xffffffffu, before, word);
        if (experts >> lane & 1)
            state.active[first + __popc(experts & ((1u << lane) - 1))] =
                static_cast<int16_t>(word * 32 + lane);
    }
}

// Fills expert and active; returns how many experts are active. All threads of the block, after start_ring, whose barriers
// then are there. apart: the warp that asks for weights has found them by itself (gate_up).
template <int kTiles>
static __device__ __forceinline__ int32_t find_experts(decode_state &state,
                                                       const moe_slot_args &args, bool apart)
{
    static_assert(kTiles <= kMaxTiles, "a bit for each expert and tile");
    const int32_t thread = threadIdx.x;
    if (few_slots<kTiles>(args)) {
        if (thread < 32)
            find_few_experts(state, args, thread < args.num_slots ? load_id(args, thread) : 0);
    } else if (kTiles == 1 && args.num_slots <= 32 * kEach) {
        if (thread < 32) find_some_experts(state, args);
    } else if (thread < kFinders) {
        find_many_experts<kTiles>(state, args);
    }
    sync_warps(kFoundBarrier, apart ? kFinders : kThreads);
    return state.num_active;
}

// Where an active expert is in `active`; not where find_few_experts filled it.
template <int kTiles>
static __device__ __forceinline__ int32_t rank_of(const decode_state &state, int32_t expert)
{
    const int32_t word = expert / 32;
    uint32_t bits = 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
        bits |= state.seen[tile][word];
    return state.before[word] + __popc(bits & ((1u << expert % 32) - 1));
}

// One unit of 16 weight rows, rows 0 .. 7 at `rows` and 8 .. 15 1024 bytes on, as operands of four mma.
struct weight_fragments {
    uint32_t k16[4][4];
};

static __device__ __forceinline__ void load_weights(weight_fragments &w, uint32_t rows)
{
    const uint32_t lane = threadIdx.x % 32, row = lane % 8, piece = lane / 16;
    rows += lane / 8 % 2 * 1024 + row * 128 + ((piece ^ row) << 4);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        ldmatrix_x4(w.k16[i], rows ^ i << 5); // two 16-byte pieces on, in the swizzle
}

// The same unit of eight token rows; row: that of token lane % 8, where the unit begins.
struct token_fragments {
    uint32_t k32[2][4];
};

static __device__ __forceinline__ void load_tokens(token_fragments &t, uint32_t row)
{
#pragma unroll
    for (int i = 0; i < 2; ++i)
        ldmatrix_x4(t.k32[i], row + threadIdx.x % 32 / 8 * 16 + i * 64);
}

// The sums together [token][row] += weights . tokens over the unit's 64 of K. An mma waits for the one before that adds
// to the same: two sums where nothing else lies between.
template <class T, int kSums>
static __device__ __forceinline__ void
multiply_unit(float (&sum)[kSums][4], const weight_fragments &w, const token_fragments &t)
{
#pragma unroll
    for (int i = 0; i < 4; ++i)
        T::mma(sum[i % kSums], w.k16[i], t.k32[i / 2][i % 2 * 2], t.k32[i / 2][i % 2 * 2 + 1]);
}

static __device__ __forceinline__ void release(decode_state &state, int32_t stage)
{
    __syncwarp(); // a lane left behind would miss the phase once the stage is filled again
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&state.read[stage]));
}

#endif
