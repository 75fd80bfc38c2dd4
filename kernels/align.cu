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
 *        MOE_ALIGN_THREADS each, 35 KB of static shared memory
 * Needs  num_experts 1 .. 1024, num_slots < 2^31, max_tiles tiles of room
 * Cost   at decode latency: four block barriers and three dependent loads */
#include "ptx.cuh"
#include "moe_kernels.h"

static constexpr int kThreads = MOE_ALIGN_THREADS;
static constexpr int kWarps = kThreads / 32;
static constexpr int kMaxExperts = 1024;
static constexpr int kThreadExperts = kMaxExperts / kThreads; // experts of a thread in a scan
static constexpr int kPieceSlots = 8192; // slots that a block places at a time: 16-bit counters hold
static_assert(kPieceSlots >= MOE_ALIGN_ONE_SLOTS, "moe_align_one places all slots as one piece");

struct shared {
    // Slots of expert e seen by warp w; after the scan: those of the warps before w.
    unsigned short count[kWarps][kMaxExperts];
    int32_t start[kMaxExperts]; // next row of expert e
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

// rows[i]: rows of expert threadIdx.x * kThreadExperts + i, first[i] the first of them: the tiles.
static __device__ void write_tiles(const moe_align_args &args, shared &smem,
                                   const int32_t (&rows)[kThreadExperts],
                                   const int32_t (&first)[kThreadExperts])
{
    if (!args.tiles) return;
    int64_t tiles = 0, total;
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i)
        tiles += (static_cast<int64_t>(rows[i]) + args.tile_rows - 1) / args.tile_rows;
    int64_t at = block_scan(smem, tiles, total);
    if (threadIdx.x == 0)
        *args.num_tiles = static_cast<int32_t>(total < args.max_tiles ? total : args.max_tiles);
    // Experts with few tiles: each thread its own. The rest below, a warp together.
    constexpr int kOwn = 4;
    int64_t mine = at;
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i;
        int32_t count = static_cast<int32_t>((static_cast<int64_t>(rows[i]) + args.tile_rows - 1) /
                                             args.tile_rows);
        for (int32_t t = 0; t < min(count, kOwn) && mine + t < args.max_tiles; ++t) {
            int32_t done = t * args.tile_rows;
            args.tiles[mine + t] = {expert, first[i] + done, min(rows[i] - done, args.tile_rows), 0};
        }
        uint32_t large = __ballot_sync(0xffffffffu, count > kOwn);
        while (large) {
            int32_t owner = __ffs(large) - 1;
            large &= large - 1;
            int32_t count_o = __shfl_sync(0xffffffffu, count, owner);
            int32_t rows_o = __shfl_sync(0xffffffffu, rows[i], owner);
            int32_t first_o = __shfl_sync(0xffffffffu, first[i], owner);
            int32_t expert_o = __shfl_sync(0xffffffffu, expert, owner);
            int64_t mine_o = __shfl_sync(0xffffffffu, mine, owner);
            for (int32_t t = kOwn + threadIdx.x % 32; t < count_o && mine_o + t < args.max_tiles;
                 t += 32) {
                int32_t done = t * args.tile_rows;
                args.tiles[mine_o + t] = {expert_o, first_o + done,
                                          min(rows_o - done, args.tile_rows), 0};
            }
        }
        mine += count;
    }
}

// Rows per expert (of this thread's experts) -> expert_offsets, the first row of each, the tiles.
static __device__ __forceinline__ void offsets_and_tiles(const moe_align_args &args, shared &smem,
                                                         const int32_t (&rows)[kThreadExperts],
                                                         int32_t (&first)[kThreadExperts])
{
    int64_t sum = 0, total;
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) sum += rows[i];
    int64_t at = block_scan(smem, sum, total);
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i;
        first[i] = static_cast<int32_t>(at);
        if (expert < args.num_experts) args.expert_offsets[expert] = first[i];
        at += rows[i];
    }
    if (threadIdx.x == 0) args.expert_offsets[args.num_experts] = static_cast<int32_t>(total);
    write_tiles(args, smem, rows, first);
}

// The warps that share a piece: as few as keep each at one turn of 32 slots, for the sake of the counters.
static __device__ __forceinline__ int32_t warps_of(int32_t num_slots)
{
    return min(kWarps, (num_slots + 31) / 32);
}

// This warp's slots of a piece, 32 at a time, in order: body(slot - begin, expert).
template <class Body>
static __device__ __forceinline__ void for_slots(const moe_align_args &args, int64_t begin,
                                                 int32_t num_slots, Body body)
{
    int32_t warps = warps_of(num_slots), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= warps) return;
    int32_t share = ((num_slots + warps - 1) / warps + 31) / 32 * 32;
    int32_t end = min(num_slots, (warp + 1) * share);
    for (int32_t base = warp * share; base < end; base += 32) {
        int32_t slot = base + lane;
        body(slot < end, slot, slot < end ? local_expert(args, begin + slot) : -1);
        __syncwarp();
    }
}

// Count a piece: count[w][e]. Barriers: before (counters free) is the caller's, none after.
static __device__ __forceinline__ void count_piece(const moe_align_args &args, shared &smem,
                                                   int64_t begin, int32_t num_slots)
{
    int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp < warps_of(num_slots))
        for (int32_t e = lane; e < args.num_experts; e += 32) smem.count[warp][e] = 0;
    __syncwarp();
    for_slots(args, begin, num_slots, [&](bool, int32_t, int32_t expert) {
        uint32_t same = __match_any_sync(0xffffffffu, expert);
        if (expert >= 0 && lane == __ffs(same) - 1)
            smem.count[warp][expert] += static_cast<unsigned short>(__popc(same));
    });
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
static __device__ __forceinline__ void place_piece(const moe_align_args &args, shared &smem,
                                                   int64_t begin, int32_t num_slots)
{
    int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for_slots(args, begin, num_slots, [&](bool exists, int32_t slot, int32_t expert) {
        uint32_t same = __match_any_sync(0xffffffffu, expert);
        int32_t row = -1;
        if (expert >= 0)
            row = smem.start[expert] + smem.count[warp][expert] +
                  __popc(same & ((1u << lane) - 1));
        __syncwarp();
        if (expert >= 0) {
            if (lane == __ffs(same) - 1)
                smem.count[warp][expert] += static_cast<unsigned short>(__popc(same));
            args.sorted_token_ids[row] = static_cast<int32_t>(begin + slot);
        }
        if (exists) args.row_of_slot[begin + slot] = row;
    });
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
    count_piece(args, smem, 0, num_slots);
    __syncthreads();
    int32_t rows[kThreadExperts], first[kThreadExperts];
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i;
        rows[i] = expert < args.num_experts ? scan_warps(smem, expert, warps_of(num_slots)) : 0;
    }
    offsets_and_tiles(args, smem, rows, first);
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) smem.start[threadIdx.x * kThreadExperts + i] = first[i];
    __syncthreads();
    place_piece(args, smem, 0, num_slots);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_count(const __grid_constant__ moe_align_args args)
{
    __shared__ int32_t count[kMaxExperts];
    grid_dependency_wait();
    grid_launch_dependents();
    for (int32_t e = threadIdx.x; e < args.num_experts; e += kThreads) count[e] = 0;
    __syncthreads();
    int64_t begin, end;
    block_slots(args, begin, end);
    for (int64_t slot = begin + threadIdx.x; slot < end; slot += kThreads) {
        int32_t expert = local_expert(args, slot);
        if (expert >= 0) atomicAdd(&count[expert], 1); // a count: any order gives the same
    }
    __syncthreads();
    int32_t *out = args.counts + static_cast<int64_t>(blockIdx.x) * args.num_experts;
    for (int32_t e = threadIdx.x; e < args.num_experts; e += kThreads) out[e] = count[e];
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_scan(const __grid_constant__ moe_align_args args)
{
    __shared__ shared smem;
    constexpr int kAhead = 8;
    grid_dependency_wait();
    grid_launch_dependents();
    int32_t rows[kThreadExperts], first[kThreadExperts];
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i;
        rows[i] = 0;
        if (expert >= args.num_experts) continue;
        const int32_t *column = args.counts + expert;
        for (int32_t b = 0; b < args.num_blocks; b += kAhead) {
            int32_t held[kAhead];
#pragma unroll
            for (int j = 0; j < kAhead; ++j)
                held[j] = b + j < args.num_blocks
                              ? column[static_cast<int64_t>(b + j) * args.num_experts]
                              : 0;
#pragma unroll
            for (int j = 0; j < kAhead; ++j) rows[i] += held[j];
        }
    }
    offsets_and_tiles(args, smem, rows, first);
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i;
        if (expert >= args.num_experts) continue;
        int32_t *column = args.counts + expert;
        int32_t at = first[i];
        for (int32_t b = 0; b < args.num_blocks; b += kAhead) {
            int32_t held[kAhead];
#pragma unroll
            for (int j = 0; j < kAhead; ++j)
                held[j] = b + j < args.num_blocks
                              ? column[static_cast<int64_t>(b + j) * args.num_experts]
                              : 0;
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                if (b + j < args.num_blocks)
                    column[static_cast<int64_t>(b + j) * args.num_experts] = at;
                at += held[j];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_place(const __grid_constant__ moe_align_args args)
{
    __shared__ shared smem;
    grid_dependency_wait();
    grid_launch_dependents();
    const int32_t *starts = args.counts + static_cast<int64_t>(blockIdx.x) * args.num_experts;
    for (int32_t e = threadIdx.x; e < args.num_experts; e += kThreads) smem.start[e] = starts[e];
    int64_t begin, end;
    block_slots(args, begin, end);
    for (; begin < end; begin += kPieceSlots) {
        int32_t num_slots = static_cast<int32_t>(min(end - begin, static_cast<int64_t>(kPieceSlots)));
        count_piece(args, smem, begin, num_slots);
        __syncthreads();
        int32_t rows[kThreadExperts];
#pragma unroll
        for (int i = 0; i < kThreadExperts; ++i) {
            int32_t expert = threadIdx.x * kThreadExperts + i;
            rows[i] = expert < args.num_experts ? scan_warps(smem, expert, warps_of(num_slots)) : 0;
        }
        __syncthreads();
        place_piece(args, smem, begin, num_slots);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kThreadExperts; ++i) smem.start[threadIdx.x * kThreadExperts + i] += rows[i];
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
    int32_t rows[kThreadExperts], first[kThreadExperts];
#pragma unroll
    for (int i = 0; i < kThreadExperts; ++i) {
        int32_t expert = threadIdx.x * kThreadExperts + i;
        rows[i] = first[i] = 0;
        if (expert >= args.num_experts) continue;
        first[i] = min(max(args.expert_offsets[expert], 0), num_slots);
        rows[i] = min(max(args.expert_offsets[expert + 1], first[i]), num_slots) - first[i];
    }
    write_tiles(args, smem, rows, first);
}
