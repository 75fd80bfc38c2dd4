/* align.cu: rows grouped by expert, stable by slot, and the list of tiles                  (stage 2 of 5)
 * In     topk_ids          [num_tokens, topk]  int32, int64, any bit pattern
 *        expert_map        [expert_map_size] int32 or NULL; else local id = id - expert_start
 * Out    expert_offsets    [num_experts + 1]   exclusive scan of rows per expert
 *        sorted_token_ids  [num_rows]          row -> token * topk + slot; ascending within an expert
 *        row_of_slot       [num_slots]         slot -> row, -1 where dropped
 *        tiles, num_tiles                      each expert's rows in pieces of tile_rows, experts in order
 * Scratch counts           [num_blocks, num_experts]  rows of a block's slots
 * Math   integers; a slot's row is the number of slots before it in (expert, slot) order: the same every run
 * Grid   num_blocks == 1: moe_align_one, one block. Else moe_align_count and moe_align_place, num_blocks each.
 *        moe_align_tiles (one): the tiles of given expert_offsets.
 *        moe_align_pad (any): counts, and the rows padded to blocks, from given offsets and rows.
 *        A thread for each expert at least, MOE_ALIGN_SMEM_BYTES of dynamic shared memory where slots are placed
 * Needs  num_experts 1 .. 1024, num_slots < 2^31, max_tiles tiles of room
 * Cost   at decode latency: a load, five block barriers, a scan. From 4096 slots two launches, of which the second reads
 *        the counts of all blocks in each */
#include "align.cuh"

static constexpr int kThreads = MOE_ALIGN_THREADS;
static_assert(kThreads >= kMaxExperts, "a thread for each expert");
static_assert(kThreads >= MOE_ALIGN_ONE_SLOTS, "a thread for each slot of moe_align_one");

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
    extern __shared__ uint4 memory[];
    __shared__ int32_t rows[kMaxExperts];
    int32_t num_slots = static_cast<int32_t>(args.num_tokens * args.topk);
    const bit_matrix matrix(memory, args.num_experts, num_slots);
    matrix.clear();
    grid_dependency_wait();
    grid_launch_dependents();
    int32_t slot = threadIdx.x; // there is a thread for each
    int32_t expert = slot < num_slots ? load_expert(args, slot) : -1;
    __syncthreads(); // cleared
    if (expert >= 0) matrix.set(expert, slot);
    __syncthreads();
    place_experts(args, matrix, count_rows(matrix, rows));
    __syncthreads();
    if (slot < num_slots) place_slot(args, matrix, 0, slot, expert);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_count(const __grid_constant__ moe_align_args args)
{
    __shared__ int32_t count[kMaxExperts];
    constexpr int kAhead = 4;
    const int32_t threads = blockDim.x;
    if (threadIdx.x < args.num_experts) count[threadIdx.x] = 0;
    int64_t begin, end;
    block_slots(args, begin, end);
    __syncthreads();
    grid_dependency_wait();
    grid_launch_dependents();
    for (; begin < end; begin += kAhead * threads) {
        int32_t expert[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            int64_t slot = begin + i * threads + threadIdx.x;
            expert[i] = slot < end ? load_expert(args, slot) : -1;
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            if (expert[i] >= 0)
                atomicAdd(&count[expert[i]], 1); // a count: any order gives the same
    }
    __syncthreads();
    int32_t *out = args.counts + static_cast<int64_t>(blockIdx.x) * args.num_experts;
    if (threadIdx.x < args.num_experts) out[threadIdx.x] = count[threadIdx.x];
}

// Every block adds up the counts of all and makes all starts again: that is shorter than a launch that does it once.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_place(const __grid_constant__ moe_align_args args)
{
    extern __shared__ uint4 memory[];
    __shared__ int32_t rows[kMaxExperts],
        mine[kMaxExperts]; // of all blocks; of those before this one
    constexpr int kAhead = 8;
    const int32_t num_experts = args.num_experts, threads = blockDim.x;
    int64_t begin, end;
    block_slots(args, begin, end);
    // no more slots at a time than the block has threads, either
    const int32_t piece = min(threads, MOE_ALIGN_PIECE_SLOTS(num_experts));
    const bit_matrix matrix(memory, num_experts, piece);
    matrix.clear();
    rows[threadIdx.x] = mine[threadIdx.x] = 0;
    __syncthreads();
    grid_dependency_wait();
    grid_launch_dependents();
    const int32_t lot = threads / num_experts, part = threadIdx.x / num_experts;
    const int32_t expert = threadIdx.x - part * num_experts;
    int32_t to =
        begin + threadIdx.x < min(end, begin + piece) ? load_expert(args, begin + threadIdx.x) : -1;
    if (part < lot) {
        int32_t all = 0, before = 0;
        for (int32_t b = part; b < args.num_blocks; b += kAhead * lot) {
            int32_t count[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i)
                count[i] = b + i * lot < args.num_blocks
                               ? args.counts[(b + i * lot) * num_experts + expert]
                               : 0;
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                all += count[i];
                if (b + i * lot < static_cast<int32_t>(blockIdx.x)) before += count[i];
            }
        }
        if (all) atomicAdd(&rows[expert], all);
        if (before) atomicAdd(&mine[expert], before);
    }
    __syncthreads();
    {
        int32_t own = threadIdx.x < num_experts ? rows[threadIdx.x] : 0;
        int32_t tiles = tiles_of(args, own);
        expert_scan scan = scan_experts(num_experts, own, tiles);
        if (threadIdx.x < num_experts)
            matrix.start[threadIdx.x] = scan.first_row + mine[threadIdx.x];
        if (blockIdx.x == gridDim.x - 1) { // has the fewest slots
            if (threadIdx.x < num_experts) args.expert_offsets[threadIdx.x] = scan.first_row;
            if (threadIdx.x == 0) args.expert_offsets[num_experts] = scan.num_rows;
            write_tiles(args, threadIdx.x, own, tiles, scan.first_row, scan);
        }
    }
    for (; begin < end; begin += piece) {
        int32_t num_slots = static_cast<int32_t>(min(end - begin, static_cast<int64_t>(piece)));
        int32_t slot = threadIdx.x;
        if (to >= 0) matrix.set(to, slot);
        __syncthreads();
        int32_t counted = count_rows(matrix, rows);
        __syncthreads();
        if (slot < num_slots) place_slot(args, matrix, begin, slot, to);
        if (begin + piece >= end) break;
        to = begin + piece + slot < min(end, begin + 2 * piece)
                 ? load_expert(args, begin + piece + slot)
                 : -1;
        __syncthreads();
        if (threadIdx.x < num_experts) matrix.start[threadIdx.x] += counted;
        matrix.clear();
        __syncthreads();
    }
}

// For gate_up and down called alone: expert_offsets come from the caller and may be anything.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_tiles(const __grid_constant__ moe_align_args args)
{
    grid_dependency_wait();
    grid_launch_dependents();
    int32_t num_slots = static_cast<int32_t>(args.num_tokens * args.topk), expert = threadIdx.x;
    int32_t first = 0, rows = 0;
    if (expert < args.num_experts) {
        first = min(max(args.expert_offsets[expert], 0), num_slots);
        rows = min(max(args.expert_offsets[expert + 1], first), num_slots) - first;
    }
    int32_t tiles = tiles_of(args, rows);
    expert_scan scan = scan_experts(args.num_experts, 0, tiles);
    write_tiles(args, expert, rows, tiles, first, scan);
}

// Every block makes all starts again: a scan of a few hundred counts is shorter than a launch.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_pad(const __grid_constant__ moe_pad_args args)
{
    // of an expert: its first row, how many, its first place; no expert there: where nothing is
    __shared__ int32_t start[kMaxExperts], rows[kMaxExperts], place[kMaxExperts];
    grid_dependency_wait();
    grid_launch_dependents();
    int32_t mine = threadIdx.x, count = 0;
    if (mine < args.num_experts) {
        int32_t first = args.expert_offsets[mine];
        count = args.expert_offsets[mine + 1] - first;
        start[mine] = first;
        if (args.counts && blockIdx.x == 0) args.counts[mine] = count;
    }
    uint32_t blocks = count / args.block_size + (count % args.block_size != 0);
    expert_scan scan = scan_experts(args.num_experts, blocks * args.block_size, 0);
    rows[mine] = count;
    place[mine] = scan.first_row;
    if (mine >= args.num_experts) place[mine] = scan.num_rows;
    __syncthreads();
    if (!args.num_tokens_post_padded) return;
    int64_t total = scan.num_rows;
    if (threadIdx.x == 0 && blockIdx.x == 0) *args.num_tokens_post_padded = scan.num_rows;
    int64_t end = args.fill ? args.capacity : min(total, args.capacity);
    int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    // The last expert whose places start at or before p; those without rows start where the next one does.
    auto expert_at = [&](int64_t p) {
        int32_t expert = 0;
#pragma unroll
        for (int32_t bit = kMaxExperts / 2; bit > 0; bit /= 2)
            if (place[expert + bit] <= p) expert += bit;
        return expert;
    };
    for (int64_t p = first; p < end; p += stride) {
        int32_t slot = static_cast<int32_t>(args.num_slots);
        if (p < total) {
            int32_t expert = expert_at(p);
            int64_t within = p - place[expert];
            if (within < rows[expert]) slot = args.rows[start[expert] + within];
        }
        args.sorted_token_ids[p] = slot;
    }
    for (int64_t b = first; b < args.num_blocks; b += stride)
        args.expert_ids[b] = b * args.block_size < total ? expert_at(b * args.block_size) : -1;
}
