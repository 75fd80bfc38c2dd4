/* align.cu: rows grouped by expert, stable by slot, and the list of tiles                  (stage 2 of 5)
 * In     topk_ids          [num_tokens, topk]  int32, int64, any bit pattern
 *        expert_map        [expert_map_size] int32 or NULL; else local id = id - expert_start
 * Out    expert_offsets    [num_experts + 1]   exclusive scan of rows per expert
 *        sorted_token_ids  [num_rows]          row -> token * topk + slot; ascending within an expert
 *        row_of_slot       [num_slots]         slot -> row, -1 where dropped
 *        tiles, num_tiles                      each expert's rows in pieces of tile_rows, experts in order
 * Scratch counts           [num_blocks, num_experts]  rows of a block's slots, then where they start
 * Math   integers; a slot's row is the number of slots before it in (expert, slot) order: the same every run
 * Grid   num_blocks == 1: moe_align_one, one block. Else moe_align_count (num_blocks), moe_align_scan (one),
 *        moe_align_place (num_blocks). moe_align_tiles (one): the tiles of given expert_offsets.
 *        moe_align_pad (any): counts, and the rows padded to blocks, from given offsets and rows.
 *        MOE_ALIGN_THREADS each, at most 48 KB of static shared memory
 * Needs  num_experts 1 .. 1024, num_slots < 2^31, max_tiles tiles of room
 * Cost   at decode latency: four block barriers and three dependent loads */
#include "ptx.cuh"
#include "moe_kernels.h"

static constexpr int kThreads = MOE_ALIGN_THREADS;
static constexpr int kWarps = kThreads / 32;
static constexpr int kMaxExperts = 1024;
static constexpr int kThreadExperts = kMaxExperts / kThreads; // experts of a thread in a scan
// A block places its slots in pieces; a thread holds kTurns slots of a piece.
static constexpr int kTurnsOne = 4, kTurnsPlace = 8;
static_assert(kTurnsPlace * kThreads < 65536, "16-bit counters hold a piece");
static_assert(kTurnsOne * kThreads >= MOE_ALIGN_ONE_SLOTS, "moe_align_one has one piece");

struct shared {
    // Slots of expert e seen by warp w; after the scan: those of the warps before w.
    unsigned short count[kWarps][kMaxExperts];
    int32_t start[kMaxExperts];      // next row of expert e
    int32_t tile_start[kMaxExperts]; // first tile of expert e
    int32_t rows[kMaxExperts];
    int64_t warp_total[kWarps];
};

// The expert that a slot goes to, or -1.
static __device__ __forceinline__ int32_t local_expert(const moe_align_args &args, int64_t slot)
{
    int32_t token = static_cast<int32_t>(slot) / args.topk;
    int64_t at = token * args.ids_stride + (static_cast<int32_t>(slot) - token * args.topk);
    int64_t id = args.ids_dtype == MOE_I64 ? static_cast<const int64_t *>(args.topk_ids)[at]
                                           : static_cast<const int32_t *>(args.topk_ids)[at];
    uint64_t local;
    if (args.expert_map) {
        if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(args.expert_map_size)) return -1;
        local = static_cast<uint64_t>(static_cast<int64_t>(args.expert_map[id]));
    } else {
        // Modulo 2^64: a difference that does not fit wraps to something far outside.
        local = static_cast<uint64_t>(id) - static_cast<uint64_t>(args.expert_start);
    }
    return local < static_cast<uint64_t>(args.num_experts) ? static_cast<int32_t>(local) : -1;
}

// Exclusive scan over all threads; total is the sum. Three barriers, the first before anything is written.
static __device__ __forceinline__ int64_t block_scan(shared &smem, int64_t x, int64_t &total)
{
    int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t sum = x;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        int64_t below = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += below;
    }
    __syncthreads();
    if (lane == 31) smem.warp_total[warp] = sum;
    __syncthreads();
    int64_t before = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += smem.warp_total[w];
        total += smem.warp_total[w];
    }
    return before + sum - x;
}

// rows[i]: rows of expert threadIdx.x * kThreadExperts + i, start[e] the first of expert e: the tiles.
static __device__ __forceinline__ void write_tiles(const moe_align_args &args, shared &smem,
                                                   const int32_t (&rows)[kThreadExperts])
{
    if (!args.tiles) return;
    int32_t tile_rows = args.tile_rows;
    int64_t tiles = 0, total;
    int32_t count[kThreadExperts];
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        count[i] = rows[i] / tile_rows + (rows[i] % tile_rows != 0);
        tiles += count[i];
    }
    int64_t at = block_scan(smem, tiles, total);
    int32_t num_tiles = static_cast<int32_t>(min(total, static_cast<int64_t>(args.max_tiles)));
    if (threadIdx.x == 0) {
        args.num_tiles[0] = num_tiles;
        args.num_tiles[1] = args.num_tiles[2] = 0; // taken by gate_up, by down (gemm_wgmma.cuh)
    }
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i;
        smem.tile_start[expert] = static_cast<int32_t>(min(at, static_cast<int64_t>(num_tiles)));
        smem.rows[expert] = rows[i];
        at += count[i];
    }
    __syncthreads();
    for (int32_t tile = threadIdx.x; tile < num_tiles; tile += kThreads) {
        // The last expert whose tiles start at or before this one.
        int32_t expert = 0;
#pragma unroll
        for (int32_t bit = kMaxExperts / 2; bit > 0; bit /= 2)
            if (smem.tile_start[expert + bit] <= tile) expert += bit;
        int32_t done = (tile - smem.tile_start[expert]) * tile_rows;
        args.tiles[tile] = {expert, smem.start[expert] + done,
                            min(smem.rows[expert] - done, tile_rows), 0};
    }
}

// Rows per expert (of this thread's experts) -> expert_offsets, start[e], the tiles. first: as start.
static __device__ __forceinline__ void offsets_and_tiles(const moe_align_args &args, shared &smem,
                                                         const int32_t (&rows)[kThreadExperts],
                                                         int32_t (&first)[kThreadExperts])
{
    int64_t sum = 0, total;
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i)
        sum += rows[i];
    int64_t at = block_scan(smem, sum, total);
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i;
        first[i] = static_cast<int32_t>(at);
        smem.start[expert] = first[i];
        if (expert < args.num_experts) args.expert_offsets[expert] = first[i];
        at += rows[i];
    }
    if (threadIdx.x == 0) args.expert_offsets[args.num_experts] = static_cast<int32_t>(total);
    write_tiles(args, smem, rows);
}

// The warps that share a piece: as few as keep each at one turn of 32 slots, for the sake of the counters.
static __device__ __forceinline__ int32_t warps_of(int32_t num_slots)
{
    return min(kWarps, (num_slots + 31) / 32);
}

// What a thread holds of a piece: the experts of slots first, first + 32, ...; all asked for at once.
template <int kTurns_>
struct held_slots {
    static constexpr int kTurns = kTurns_;
    int32_t first, turns; // turns is the same for the whole warp
    int32_t expert[kTurns];
    uint32_t same[kTurns]; // lanes with the same expert in this turn
};

// The lanes that hold the same x as this one, x < 2^bits. Ballots beat match.any, which takes its time over
// every distinct value.
static __device__ __forceinline__ uint32_t same_lanes(int32_t x, int32_t bits)
{
    uint32_t same = 0xffffffffu;
    for (int32_t bit = 0; bit < bits; ++bit) {
        bool mine = x >> bit & 1;
        uint32_t set = __ballot_sync(0xffffffffu, mine);
        same &= mine ? set : ~set;
    }
    return same;
}

template <class Held>
static __device__ __forceinline__ void load_slots(const moe_align_args &args, int64_t begin,
                                                  int32_t num_slots, Held &held)
{
    int32_t warps = warps_of(num_slots), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int32_t share = ((num_slots + warps - 1) / max(warps, 1) + 31) / 32 * 32;
    int32_t end = min(num_slots, (warp + 1) * share);
    held.first = warp * share + lane;
    held.turns = warp < warps ? max(0, end - warp * share + 31) / 32 : 0;
#pragma unroll
    for (int t = 0; t < Held::kTurns; ++t) {
        int32_t slot = held.first + t * 32;
        held.expert[t] = slot < end ? local_expert(args, begin + slot) : -1;
    }
}

// Count a piece: count[w][e]. Barriers: before (counters free) is the caller's, none after.
template <class Held>
static __device__ __forceinline__ void count_piece(const moe_align_args &args, shared &smem,
                                                   Held &held)
{
    int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int32_t bits = 32 - __clz(args.num_experts); // num_experts itself stands for dropped
    for (int32_t e = lane; e < args.num_experts; e += 32)
        smem.count[warp][e] = 0;
    __syncwarp();
#pragma unroll
    for (int t = 0; t < Held::kTurns; ++t) {
        if (t >= held.turns) break;
        int32_t expert = held.expert[t];
        uint32_t same = same_lanes(expert >= 0 ? expert : args.num_experts, bits);
        held.same[t] = same;
        if (expert >= 0 && lane == __ffs(same) - 1)
            smem.count[warp][expert] += static_cast<unsigned short>(__popc(same));
        __syncwarp();
    }
}

// count[w][e] -> slots of expert e in the warps before w; returns all of them.
static __device__ __forceinline__ int32_t scan_warps(shared &smem, int32_t expert, int32_t warps)
{
    int32_t sum = 0;
    for (int32_t w = 0; w < warps; ++w) {
        int32_t here = smem.count[w][expert];
        smem.count[w][expert] = static_cast<unsigned short>(sum);
        sum += here;
    }
    return sum;
}

// start[e], count[w][e] -> row_of_slot and sorted_token_ids of the piece.
template <class Held>
static __device__ __forceinline__ void place_piece(const moe_align_args &args, shared &smem,
                                                   int64_t begin, int32_t num_slots,
                                                   const Held &held)
{
    int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int t = 0; t < Held::kTurns; ++t) {
        if (t >= held.turns) break;
        int32_t expert = held.expert[t], slot = held.first + t * 32;
        uint32_t same = held.same[t];
        int32_t row = -1;
        if (expert >= 0)
            row = smem.start[expert] + smem.count[warp][expert] + __popc(same & ((1u << lane) - 1));
        __syncwarp();
        if (expert >= 0) {
            if (lane == __ffs(same) - 1)
                smem.count[warp][expert] += static_cast<unsigned short>(__popc(same));
            args.sorted_token_ids[row] = static_cast<int32_t>(begin + slot);
        }
        if (slot < num_slots) args.row_of_slot[begin + slot] = row;
        __syncwarp();
    }
}

// The slots of this block: a contiguous part, equal but for the last.
static __device__ __forceinline__ void block_slots(const moe_align_args &args, int64_t &begin,
                                                   int64_t &end)
{
    int64_t num_slots = args.num_tokens * args.topk;
    int64_t share = (num_slots + args.num_blocks - 1) / args.num_blocks;
    begin = min(share * static_cast<int64_t>(blockIdx.x), num_slots);
    end = min(begin + share, num_slots);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_one(const __grid_constant__ moe_align_args args)
{
    __shared__ shared smem;
    grid_dependency_wait();
    grid_launch_dependents();
    int32_t num_slots = static_cast<int32_t>(args.num_tokens * args.topk);
    held_slots<kTurnsOne> held;
    load_slots(args, 0, num_slots, held);
    count_piece(args, smem, held);
    __syncthreads();
    int32_t rows[kThreadExperts], first[kThreadExperts];
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i;
        rows[i] = expert < args.num_experts ? scan_warps(smem, expert, warps_of(num_slots)) : 0;
    }
    offsets_and_tiles(args, smem, rows, first);
    __syncthreads();
    place_piece(args, smem, 0, num_slots, held);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_count(const __grid_constant__ moe_align_args args)
{
    __shared__ int32_t count[kMaxExperts];
    constexpr int kAhead = 4;
    grid_dependency_wait();
    grid_launch_dependents();
    int64_t begin, end;
    block_slots(args, begin, end);
    for (int32_t e = threadIdx.x; e < args.num_experts; e += kThreads)
        count[e] = 0;
    __syncthreads();
    for (; begin < end; begin += kAhead * kThreads) {
        int32_t expert[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            int64_t slot = begin + i * kThreads + threadIdx.x;
            expert[i] = slot < end ? local_expert(args, slot) : -1;
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            if (expert[i] >= 0)
                atomicAdd(&count[expert[i]], 1); // a count: any order gives the same
    }
    __syncthreads();
    int32_t *out = args.counts + static_cast<int64_t>(blockIdx.x) * args.num_experts;
    for (int32_t e = threadIdx.x; e < args.num_experts; e += kThreads)
        out[e] = count[e];
}

// One warp walks one slice of the blocks for 32 neighbouring experts: body(&counts[b][e], held value).
template <class Body>
static __device__ __forceinline__ void for_slice(const moe_align_args &args, int32_t expert,
                                                 int32_t slice, int32_t slices, Body body)
{
    constexpr int kAhead = 8;
    int32_t share = (args.num_blocks + slices - 1) / slices;
    int32_t end = min(args.num_blocks, (slice + 1) * share);
    int32_t *column = args.counts + expert;
    for (int32_t b = slice * share; b < end; b += kAhead) {
        int32_t held[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            held[i] = b + i < end ? column[static_cast<int64_t>(b + i) * args.num_experts] : 0;
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            if (b + i < end) body(column + static_cast<int64_t>(b + i) * args.num_experts, held[i]);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_scan(const __grid_constant__ moe_align_args args)
{
    __shared__ shared smem;
    // [slice][expert]: slices * num_experts <= kMaxExperts
    int32_t *part = reinterpret_cast<int32_t *>(smem.count);
    grid_dependency_wait();
    grid_launch_dependents();
    // As many slices of the blocks as leave every warp one walk.
    int32_t groups = (args.num_experts + 31) / 32, slices = max(1, kWarps / groups);
    int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int32_t walk = warp; walk < groups * slices; walk += kWarps) {
        int32_t expert = walk % groups * 32 + lane, slice = walk / groups, sum = 0;
        if (expert >= args.num_experts) continue;
        for_slice(args, expert, slice, slices, [&](int32_t *, int32_t held) { sum += held; });
        part[slice * args.num_experts + expert] = sum;
    }
    __syncthreads();
    int32_t rows[kThreadExperts], first[kThreadExperts];
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i;
        rows[i] = 0;
        if (expert < args.num_experts)
            for (int32_t s = 0; s < slices; ++s)
                rows[i] += part[s * args.num_experts + expert];
    }
    offsets_and_tiles(args, smem, rows, first);
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i, at = first[i];
        if (expert < args.num_experts)
            for (int32_t s = 0; s < slices; ++s) {
                int32_t here = part[s * args.num_experts + expert];
                part[s * args.num_experts + expert] = at;
                at += here;
            }
    }
    __syncthreads();
    for (int32_t walk = warp; walk < groups * slices; walk += kWarps) {
        int32_t expert = walk % groups * 32 + lane, slice = walk / groups;
        if (expert >= args.num_experts) continue;
        int32_t at = part[slice * args.num_experts + expert];
        for_slice(args, expert, slice, slices, [&](int32_t *to, int32_t held) {
            *to = at;
            at += held;
        });
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_place(const __grid_constant__ moe_align_args args)
{
    __shared__ shared smem;
    int64_t begin, end;
    block_slots(args, begin, end);
    grid_dependency_wait();
    grid_launch_dependents();
    const int32_t *starts = args.counts + static_cast<int64_t>(blockIdx.x) * args.num_experts;
    for (int32_t e = threadIdx.x; e < args.num_experts; e += kThreads)
        smem.start[e] = starts[e];
    constexpr int64_t kPieceSlots = kTurnsPlace * kThreads;
    for (; begin < end; begin += kPieceSlots) {
        int32_t num_slots = static_cast<int32_t>(min(end - begin, kPieceSlots));
        held_slots<kTurnsPlace> held;
        load_slots(args, begin, num_slots, held);
        count_piece(args, smem, held);
        __syncthreads();
        int32_t rows[kThreadExperts];
#pragma unroll
        for (int i = 0; i < kThreadExperts; ++i) {
            int32_t expert = threadIdx.x * kThreadExperts + i;
            rows[i] = expert < args.num_experts ? scan_warps(smem, expert, warps_of(num_slots)) : 0;
        }
        __syncthreads();
        place_piece(args, smem, begin, num_slots, held);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kThreadExperts; ++i)
            smem.start[threadIdx.x * kThreadExperts + i] += rows[i];
    }
}

// For gate_up and down called alone: expert_offsets come from the caller and may be anything.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_tiles(const __grid_constant__ moe_align_args args)
{
    __shared__ shared smem;
    grid_dependency_wait();
    grid_launch_dependents();
    int32_t num_slots = static_cast<int32_t>(args.num_tokens * args.topk);
    int32_t rows[kThreadExperts];
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i;
        rows[i] = 0;
        if (expert >= args.num_experts) continue;
        int32_t first = min(max(args.expert_offsets[expert], 0), num_slots);
        rows[i] = min(max(args.expert_offsets[expert + 1], first), num_slots) - first;
        smem.start[expert] = first;
    }
    write_tiles(args, smem, rows);
}

// Every block makes all starts again: a scan of a few hundred counts is shorter than a launch.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_pad(const __grid_constant__ moe_pad_args args)
{
    __shared__ shared smem;
    grid_dependency_wait();
    grid_launch_dependents();
    int32_t padded[kThreadExperts];
    int64_t sum = 0, total;
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i, count = 0;
        if (expert < args.num_experts) {
            int32_t first = args.expert_offsets[expert];
            count = args.expert_offsets[expert + 1] - first;
            smem.start[expert] = first;
            if (args.counts && blockIdx.x == 0) args.counts[expert] = count;
        }
        smem.rows[expert] = count;
        padded[i] = (count / args.block_size + (count % args.block_size != 0)) * args.block_size;
        sum += padded[i];
    }
    int64_t at = block_scan(smem, sum, total);
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        smem.tile_start[threadIdx.x * kThreadExperts + i] = static_cast<int32_t>(at);
        at += padded[i];
    }
    __syncthreads();
    if (!args.sorted_token_ids) return;
    if (threadIdx.x == 0 && blockIdx.x == 0)
        *args.num_tokens_post_padded = static_cast<int32_t>(total);
    int64_t end = args.fill ? args.capacity : min(total, args.capacity);
    int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    // The last expert whose rows start at or before p; those without rows start where the next one does.
    auto expert_at = [&](int64_t p) {
        int32_t expert = 0;
#pragma unroll
        for (int32_t bit = kMaxExperts / 2; bit > 0; bit /= 2)
            if (smem.tile_start[expert + bit] <= p) expert += bit;
        return expert;
    };
    for (int64_t p = first; p < end; p += stride) {
        int32_t slot = static_cast<int32_t>(args.num_slots);
        if (p < total) {
            int32_t expert = expert_at(p);
            int64_t within = p - smem.tile_start[expert];
            if (within < smem.rows[expert]) slot = args.rows[smem.start[expert] + within];
        }
        args.sorted_token_ids[p] = slot;
    }
    for (int64_t b = first; b < args.num_blocks; b += stride)
        args.expert_ids[b] = b * args.block_size < total ? expert_at(b * args.block_size) : -1;
}
