/* align.cu: rows grouped by expert, stable by slot, and the list of tiles                  (stage 2 of 5)
 * In     topk_ids          [num_tokens, topk]  int32, int64, any bit pattern
 *        expert_map        [expert_map_size] int32 or NULL; else local id = id - expert_start
 * Out    expert_offsets    [num_experts + 1]   exclusive scan of rows per expert
 *        sorted_token_ids  [num_rows]          row -> token * topk + slot; ascending within an expert
 *        row_of_slot       [num_slots]         slot -> row, -1 where dropped
 *        tiles, num_tiles                      each expert's rows in pieces of tile_rows, experts in order
 * Scratch counts           [count_blocks, num_experts]  rows of what a block of moe_align_count counts; then
 *                          [num_blocks, num_experts]    those in front of each of its parts
 * Math   integers; a slot's row is the number of slots before it in (expert, slot) order: the same every run
 * Grid   num_blocks. Without tiles, while slots are few (plan.c), moe_align_few, where every block holds all of them
 *        and a warp compares one with all; then moe_align_whole, where every block counts all of them (on Hopper soon
 *        align_cluster_sm90a.cu); else moe_align_count (count_blocks, of MOE_ALIGN_THREADS), where each counts those of
 *        several blocks of moe_align_place, which adds up the counts of all.
 *        moe_align_tiles (one): the tiles of given expert_offsets.
 *        moe_align_pad (any): counts, and the rows padded to blocks, from given offsets and rows.
 *        A thread for each expert at least, MOE_ALIGN_SMEM_BYTES of dynamic shared memory where slots are placed,
 *        MOE_ALIGN_PIECE_SMEM_BYTES for moe_align_place
 * Needs  num_experts 1 .. 1024, num_slots < 2^31, max_tiles tiles of room; moe_align_whole: a thread for each slot of a
 *        block
 * Cost   latency: a launch, a load, three barriers, a scan; then the stores of sorted_token_ids, which an SM does one
 *        by one (6 cycles each): so many blocks, although each counts all slots */
#include "align.cuh"

static constexpr int kThreads = MOE_ALIGN_THREADS;
static_assert(kThreads >= kMaxExperts, "a thread for each expert");
static_assert(kThreads >= MOE_ALIGN_ONE_SLOTS, "a thread for each slot of a block that is alone");

extern "C" __global__ void __launch_bounds__(MOE_ALIGN_FEW_THREADS, 1)
    moe_align_few(const __grid_constant__ moe_align_args args)
{
    __shared__ uint4 keys[MOE_ALIGN_FEW_SLOTS / 4];
    const slot_keys slots = {keys, static_cast<int32_t>(args.num_tokens * args.topk)};
    slots.fill_up();
    // What is to be done with an id is known before there is one.
    const int32_t *ids = static_cast<const int32_t *>(args.topk_ids);
    const uint32_t start = static_cast<uint32_t>(args.expert_start);
    const bool plain = args.ids_dtype == MOE_I32 && !args.expert_map &&
                       args.expert_start >= 0 && // no id below 0 comes round into the range
                       args.expert_start + args.num_experts <= INT32_MAX &&
                       (args.ids_stride == args.topk || args.num_tokens == 1);
    fetch_parameters(args);
    grid_dependency_wait();
    grid_launch_dependents();
    for (int32_t slot = threadIdx.x; slot < slots.num_slots; slot += blockDim.x) {
        if (plain) {
            const uint32_t local = static_cast<uint32_t>(__ldcg(ids + slot)) - start;
            const bool here = local < static_cast<uint32_t>(args.num_experts);
            slots.put(slot, here ? static_cast<int32_t>(local) : -1);
        } else {
            slots.put(slot, local_expert(args, load_id(args, slot)));
        }
    }
    __syncthreads();
    const int32_t warps = blockDim.x / 32;
    for (int32_t which = blockIdx.x * warps + threadIdx.x / 32;
         which <= slots.num_slots + args.num_experts; which += gridDim.x * warps)
        slots.place<32>(args, which);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_whole(const __grid_constant__ moe_align_args args)
{
    extern __shared__ uint4 memory[];
    __shared__ int16_t
        expert_of[2 * MOE_ALIGN_SHARE_SLOTS]; // of the block's slots, where it is not alone
    __shared__ uint32_t totals[3 * 32];
    int32_t first, end;
    const int32_t share = block_slots(args, blockIdx.x, first, end), num_slots = end - first;
    const int32_t num_experts = args.num_experts;
    const bit_matrix matrix(memory, num_experts, share);
    // Slots of other blocks, of each expert: in front of this block's, then behind.
    uint32_t *others = matrix.spare;
    const bool alone = gridDim.x == 1, has = threadIdx.x < num_experts;
    matrix.clear();
    for (int32_t i = threadIdx.x; !alone && i < 2 * num_experts; i += blockDim.x)
        others[i] = 0;
    fetch_parameters(args);
    __syncthreads();
    grid_dependency_wait();
    grid_launch_dependents();
    const int32_t slot = threadIdx.x; // there is a thread for each of the block's
    int32_t expert = -1, before = 0;
    if (alone) {
        if (slot < num_slots) expert = local_expert(args, load_id(args, slot));
        if (expert >= 0) matrix.set(expert, slot);
    } else {
        // A share is a multiple of 4: of four slots all are the block's or none.
        visit_slots<2>(args, threadIdx.x, blockDim.x,
                       [&](int32_t any, const int32_t(&to)[4], int32_t n) {
                           const int32_t at = any - first;
                           uint32_t *count = others + (at < 0 ? 0 : num_experts);
                           if (at < 0 || at >= num_slots) {
#pragma unroll
                               for (int j = 0; j < 4; ++j)
                                   if (to[j] >= 0) atomicAdd(count + to[j], 1);
                           } else {
#pragma unroll
                               for (int j = 0; j < 4; ++j) {
                                   if (j < n) expert_of[at + j] = static_cast<int16_t>(to[j]);
                                   if (to[j] >= 0) matrix.set(to[j], at + j);
                               }
                           }
                       });
    }
    __syncthreads();
    int32_t rows = matrix.count_rows();
    if (!alone) {
        if (has) before = others[threadIdx.x];
        if (has) rows += before + others[num_experts + threadIdx.x];
        if (slot < num_slots) expert = expert_of[slot];
    }
    const expert_places places(args, totals, rows, before, matrix.starts);
    __syncthreads();
    if (slot < num_slots)
        place_slot(args, first + slot,
                   expert < 0 ? -1 : matrix.starts[expert] + matrix.before(expert, slot));
    places.write(args);
}

// A block counts the slots of several blocks of moe_align_place, apart: what each of these has to add up is short then.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_count(const __grid_constant__ moe_align_args args)
{
    extern __shared__ uint4 memory[];
    int32_t *counts = reinterpret_cast<int32_t *>(memory); // [parts, num_experts]
    constexpr int kAhead = 8;
    const int32_t num_experts = args.num_experts;
    const int32_t parts = args.num_blocks / args.count_blocks, first_part = blockIdx.x * parts;
    const int32_t threads = blockDim.x / parts, part = threadIdx.x / threads,
                  thread = threadIdx.x - part * threads;
    for (int32_t i = threadIdx.x; i < parts * num_experts; i += blockDim.x)
        counts[i] = 0;
    int32_t begin, end;
    block_slots(args, first_part + part, begin, end);
    if (part >= parts) end = begin; // threads left over
    int32_t *count = counts + part * num_experts;
    fetch_parameters(args);
    __syncthreads();
    grid_dependency_wait();
    grid_launch_dependents();
    const int32_t num_slots = end - begin;
    for (int32_t first = thread; first < num_slots; first += kAhead * threads) {
        int64_t id[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int32_t at = first + i * threads;
            id[i] = at < num_slots ? load_id(args, begin + at) : 0;
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (first + i * threads >= num_slots) break;
            const int32_t expert = local_expert(args, id[i]);
            if (expert >= 0) atomicAdd(count + expert, 1); // a count: any order gives the same
        }
    }
    __syncthreads();
    if (threadIdx.x >= num_experts) return;
    int32_t sum = 0, *sums = args.counts + threadIdx.x,
            *in_front = sums + int64_t{args.count_blocks + first_part} * num_experts;
    for (int32_t i = 0; i < parts; ++i) {
        in_front[i * num_experts] = sum;
        sum += counts[i * num_experts + threadIdx.x];
    }
    sums[blockIdx.x * num_experts] = sum;
}

// A piece of a block's slots, up to kPer for each thread, by expert: neighbouring threads then write neighbouring rows.
template <int kPer>
struct sorted_piece {
    int64_t id[kPer]; // of slot begin + i * blockDim.x + threadIdx.x
    int32_t expert[kPer],
        place[kPer];       // of the same: -1 where it is dropped; its place among the sorted ones
    uint32_t sorted[kPer]; // at place i * blockDim.x + threadIdx.x: expert << 16 | slot - begin
    int32_t begin, num_slots;
    int32_t counted, first; // of the thread's expert: how many, the place of the first

    __device__ __forceinline__ void load(const moe_align_args &args, int32_t from, int32_t end)
    {
        begin = from;
        num_slots = min(end - from, static_cast<int32_t>(args.piece_slots));
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
            const int32_t at = i * blockDim.x + threadIdx.x;
            id[i] = at < num_slots ? load_id(args, begin + at) : 0;
        }
    }
    // What is loaded, into a matrix that is clear. order: [piece_slots] of shared memory, firsts: [num_experts].
    __device__ __forceinline__ void sort(const moe_align_args &args, const bit_matrix &matrix,
                                         uint32_t *order, int32_t *firsts)
    {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
            const int32_t at = i * blockDim.x + threadIdx.x;
            expert[i] = at < num_slots ? local_expert(args, id[i]) : -1;
            if (expert[i] >= 0) matrix.set(expert[i], at);
        }
        __syncthreads();
        counted = matrix.count_rows();
        const expert_scan scan = scan_experts(args.num_experts, counted, 0);
        first = scan.first_row;
        if (threadIdx.x < args.num_experts) firsts[threadIdx.x] = first;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
            if (expert[i] < 0) continue;
            const int32_t at = i * blockDim.x + threadIdx.x;
            place[i] = firsts[expert[i]] + matrix.before(expert[i], at);
            order[place[i]] = static_cast<uint32_t>(expert[i] << 16 | at);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
            const int32_t at = i * blockDim.x + threadIdx.x;
            sorted[i] = at < scan.num_rows ? order[at] : ~0u;
        }
    }
    // shifts: of each expert, from place to row.
    __device__ __forceinline__ void write(const moe_align_args &args, const int32_t *shifts) const
    {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
            const int32_t at = i * blockDim.x + threadIdx.x;
            if (at < num_slots)
                args.row_of_slot[begin + at] = expert[i] < 0 ? -1 : shifts[expert[i]] + place[i];
            if (sorted[i] != ~0u)
                args.sorted_token_ids[shifts[sorted[i] >> 16] + at] =
                    begin + static_cast<int32_t>(sorted[i] & 0xffffu);
        }
    }
};

template <int kPer>
static __device__ __forceinline__ void place(const moe_align_args &args, void *memory)
{
    __shared__ uint32_t totals[3 * 32];
    constexpr int kAhead = 16; // counts that are under way together
    const int32_t num_experts = args.num_experts;
    const bool has = threadIdx.x < num_experts;
    int32_t begin, end;
    block_slots(args, blockIdx.x, begin, end);
    const bit_matrix matrix(memory, num_experts, args.piece_slots);
    int32_t *firsts = reinterpret_cast<int32_t *>(matrix.spare), *shifts = matrix.starts;
    uint32_t *order = matrix.spare + 2 * num_experts;
    sorted_piece<kPer> piece;
    piece.load(args, begin, end);
    matrix.clear();
    fetch_parameters(args);
    __syncthreads();
    piece.sort(args, matrix, order, firsts);
    grid_dependency_wait();
    grid_launch_dependents();
    int32_t rows = 0, in_front = 0;
    if (has) {
        const int32_t *sums = args.counts + threadIdx.x;
        const int32_t mine = blockIdx.x / (args.num_blocks / args.count_blocks);
        in_front = sums[(args.count_blocks + static_cast<int32_t>(blockIdx.x)) * num_experts];
        for (int32_t b = 0; b < args.count_blocks; b += kAhead) {
            int32_t count[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i)
                count[i] = b + i < args.count_blocks ? sums[(b + i) * num_experts] : 0;
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                rows += count[i];
                if (b + i < mine) in_front += count[i];
            }
        }
    }
    const expert_places places(args, totals, rows, in_front - piece.first, shifts);
    __syncthreads();
    piece.write(args, shifts);
    places.write(args);
    while (end - begin > args.piece_slots) {
        begin += args.piece_slots;
        const int32_t behind = piece.counted + piece.first;
        piece.load(args, begin, end);
        __syncthreads();
        matrix.clear();
        __syncthreads();
        piece.sort(args, matrix, order, firsts);
        if (has) shifts[threadIdx.x] += behind - piece.first;
        __syncthreads();
        piece.write(args, shifts);
    }
}

// Every block adds up the counts of all and makes all starts again: that is shorter than a launch that does it once.
// It follows moe_align_count, which let it begin after its own wait: whatever topk_ids hold was complete then, and the
// first slots are sorted by the time the counts are there. It writes nothing before its wait.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    moe_align_place(const __grid_constant__ moe_align_args args)
{
    extern __shared__ uint4 memory[];
    if (args.piece_slots <= 2 * static_cast<int32_t>(blockDim.x))
        place<2>(args, memory);
    else
        place<MOE_ALIGN_PIECE_THREAD_SLOTS>(args, memory);
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
    int32_t tiles = tiles_of(args, args.tile_rows, rows);
    expert_scan scan = scan_experts(args.num_experts, 0, tiles);
    if (expert == 0) write_num_tiles(args, scan.num_tiles);
    write_tiles(args, args.tile_rows, first, rows, tiles, scan.first_tile);
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
