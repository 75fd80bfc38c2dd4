/* align.cuh: how a block sorts a piece of the slots by expert, stable: a matrix of bits in shared memory, bit s of row e
 * where slot s goes to expert e, and counts of the bits of every 128 slots. Both are made by atomics whose order does
 * not show; a slot's place among those of its expert is the number of bits before its own. */
#ifndef MOE_ALIGN_CUH
#define MOE_ALIGN_CUH

#include "ptx.cuh"
#include "moe_kernels.h"
#include "slots.cuh"

static constexpr int kMaxExperts = 1024;

// Views into dynamic shared memory, MOE_ALIGN_SMEM_BYTES of it.
struct bit_matrix {
    uint32_t *bits; // [num_experts, 4 * steps]
    uint32_t *
        counts; // [ceil(steps / 2), num_experts] bits of a step, 16 bits each; then those in front of it
    int32_t *starts; // [num_experts] for the kernel: the row of the block's first slot of an expert
    uint32_t *spare; // [2, num_experts] for the kernel
    int32_t num_experts, steps;

    __device__ __forceinline__ bit_matrix(void *memory, int32_t experts, int32_t num_slots)
    {
        num_experts = experts;
        steps = MOE_ALIGN_STEPS(num_slots);
        bits = static_cast<uint32_t *>(memory);
        counts = bits + 4 * steps * num_experts;
        starts = reinterpret_cast<int32_t *>(counts + (steps + 1) / 2 * num_experts);
        spare = reinterpret_cast<uint32_t *>(starts + num_experts);
    }
    __device__ __forceinline__ void clear() const
    {
        for (int32_t i = threadIdx.x; i < num_experts * steps; i += blockDim.x)
            reinterpret_cast<uint4 *>(bits)[i] = make_uint4(0, 0, 0, 0);
        for (int32_t i = threadIdx.x; i < num_experts * ((steps + 1) / 2); i += blockDim.x)
            counts[i] = 0;
    }
    // The four words of a step stand in an order that hangs on the expert, so that a warp, whose slots are in the same
    // word of different rows, finds them in 32 banks and not in 8.
    static __device__ __forceinline__ int32_t swap(int32_t expert) { return expert / 8 % 4; }
    __device__ __forceinline__ void set(int32_t expert, int32_t slot) const
    {
        atomicOr(bits + 4 * steps * expert + (slot / 32 ^ swap(expert)), 1u << slot % 32);
        atomicAdd(counts + slot / 256 * num_experts + expert, slot & 128 ? 1u << 16 : 1u);
    }
    // The rows of the thread's expert, of a matrix that is complete; counts become those in front of each step.
    __device__ __forceinline__ int32_t count_rows() const
    {
        if (threadIdx.x >= num_experts) return 0;
        uint32_t sum = 0, *of = counts + threadIdx.x;
#pragma unroll 4
        for (int32_t i = 0; i < steps; i += 2, of += num_experts) {
            uint32_t two = *of, through = sum + (two & 0xffffu);
            *of = sum | through << 16;
            sum = through + (two >> 16);
        }
        return static_cast<int32_t>(sum);
    }
    // How many bits of the expert's row are in front of the slot's. After count_rows.
    __device__ __forceinline__ int32_t before(int32_t expert, int32_t slot) const
    {
        uint4 words = reinterpret_cast<const uint4 *>(bits)[expert * steps + slot / 128];
        uint32_t held[4] = {words.x, words.y, words.z, words.w};
        int32_t word = slot / 32 % 4;
        uint32_t two = counts[slot / 256 * num_experts + expert];
        int32_t sum = static_cast<int32_t>(slot & 128 ? two >> 16 : two & 0xffffu);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int32_t which = i ^ swap(expert);
            uint32_t mask = which < word ? ~0u : which == word ? (1u << slot % 32) - 1 : 0;
            sum += __popc(held[i] & mask);
        }
        return sum;
    }
};

// The slots of a block: a contiguous part, equal but for the last. How many, at most: a multiple of 4.
static __device__ __forceinline__ int32_t block_slots(const moe_align_args &args, int32_t block,
                                                      int32_t &begin, int32_t &end)
{
    // unsigned: a share for every block may come to a little more than 2^31
    const uint32_t num_slots = static_cast<uint32_t>(args.num_tokens * args.topk);
    const uint32_t blocks = 4u * static_cast<uint32_t>(args.num_blocks);
    const uint32_t share = (num_slots + blocks - 1) / blocks * 4;
    const uint32_t first = min(share * static_cast<uint32_t>(block), num_slots);
    begin = static_cast<int32_t>(first);
    end = static_cast<int32_t>(min(first + share, num_slots));
    return static_cast<int32_t>(share);
}

// The expert that an id goes to, or -1. Past L1, as load_id: moe_align_place asks before its wait.
static __device__ __forceinline__ int32_t local_expert(const moe_align_args &args, int64_t id)
{
    return expert_of_id(args, id, [](const int32_t *entry) { return __ldcg(entry); });
}

// Apart from local_expert, whose branches would make of several loads one after the other.
static __device__ __forceinline__ int64_t load_id(const moe_align_args &args, int64_t slot)
{
    int64_t at = slot;
    if (args.ids_stride != args.topk) {
        int32_t token = static_cast<int32_t>(slot) / args.topk;
        at = token * args.ids_stride + (static_cast<int32_t>(slot) - token * args.topk);
    }
    return args.ids_dtype == MOE_I64 ? __ldcg(static_cast<const long long *>(args.topk_ids) + at)
                                     : __ldcg(static_cast<const int32_t *>(args.topk_ids) + at);
}

// visit(slot, experts, n) for all slots, four at a time, the last of them one at a time (n), in any order, by so many threads
// of which this is number `thread`; an expert is -1 where the slot is dropped. kAhead: loads of a thread that are under
// way together.
template <int kAhead, class Visit>
static __device__ __forceinline__ void visit_slots(const moe_align_args &args, int32_t thread,
                                                   int32_t threads, Visit visit)
{
    const int32_t num_slots = static_cast<int32_t>(args.num_tokens * args.topk);
    const int4 *ids = static_cast<const int4 *>(args.topk_ids);
    const bool whole = args.ids_dtype == MOE_I32 && args.ids_stride == args.topk &&
                       reinterpret_cast<uintptr_t>(ids) % 16 == 0;
    const bool plain = !args.expert_map && args.expert_start == 0; // the id is the expert
    const int32_t whole_end = whole ? num_slots / 4 * 4 : 0;
    auto local = [&](int32_t id) {
        return static_cast<uint32_t>(id) < static_cast<uint32_t>(args.num_experts) ? id : -1;
    };
    for (int32_t first = 4 * thread; first < whole_end; first += 4 * kAhead * threads) {
        int4 four[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            int32_t slot = first + 4 * i * threads;
            if (slot < whole_end) four[i] = ids[slot / 4];
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            int32_t slot = first + 4 * i * threads;
            if (slot >= whole_end) break;
            int32_t expert[4] = {four[i].x, four[i].y, four[i].z, four[i].w};
#pragma unroll
            for (int j = 0; j < 4; ++j)
                expert[j] = plain ? local(expert[j]) : local_expert(args, expert[j]);
            visit(slot, expert, 4);
        }
    }
    for (int32_t slot = whole_end + thread; slot < num_slots; slot += threads) {
        int32_t expert[4] = {local_expert(args, load_id(args, slot)), -1, -1, -1};
        visit(slot, expert, 1);
    }
}

// Slots as keys, in whose order their rows stand. A row is the number of keys that are less, and so is the first row of
// an expert: no scan, and no barrier behind the last put. For few slots: each is compared with all.
struct slot_keys {
    uint4 *
        keys; // [num_slots] of shared memory, 32 bits each: expert, slot; all bits where it is dropped
    int32_t num_slots;

    // Before the first put, by the whole block; a barrier lies between, if only that behind the last put.
    __device__ __forceinline__ void fill_up() const
    {
        if (threadIdx.x < (-num_slots & 3))
            reinterpret_cast<uint32_t *>(keys)[num_slots + threadIdx.x] = ~0u;
    }
    __device__ __forceinline__ void put(int32_t slot, int32_t expert) const
    {
        reinterpret_cast<uint32_t *>(keys)[slot] =
            expert < 0 ? ~0u : first_of(expert) | static_cast<uint32_t>(slot);
    }
    __device__ __forceinline__ uint32_t of(int32_t slot) const
    {
        return reinterpret_cast<const uint32_t *>(keys)[slot];
    }
    static __device__ __forceinline__ uint32_t first_of(int32_t expert)
    {
        return static_cast<uint32_t>(expert) << 16;
    }
    // How many keys are less: among those of the lane, of kLanes.
    template <int kLanes>
    __device__ __forceinline__ int32_t less_than(uint32_t key) const
    {
        uint32_t less[4] = {0, 0, 0, 0}; // side by side
#pragma unroll 4
        for (int32_t i = threadIdx.x % kLanes; i < (num_slots + 3) / 4; i += kLanes) {
            const uint4 four = keys[i];
            count_if_greater(less[0], key, four.x);
            count_if_greater(less[1], key, four.y);
            count_if_greater(less[2], key, four.z);
            count_if_greater(less[3], key, four.w);
        }
        return static_cast<int32_t>(less[0] + less[1] + less[2] + less[3]);
    }
    // Number `which` of the slots, then of the num_experts + 1 first rows, by one thread or a warp.
    template <int kLanes>
    __device__ __forceinline__ void place(const moe_align_args &args, int32_t which) const
    {
        const bool is_slot = which < num_slots;
        const uint32_t key = is_slot ? of(which) : first_of(which - num_slots);
        int32_t row = less_than<kLanes>(key);
        if (kLanes == 32) row = __reduce_add_sync(0xffffffffu, row);
        if (threadIdx.x % kLanes != 0) return;
        if (!is_slot) {
            args.expert_offsets[which - num_slots] = row;
            return;
        }
        if (key != ~0u) args.sorted_token_ids[row] = which;
        args.row_of_slot[which] = key != ~0u ? row : -1;
    }
};

// A thread for each expert: the number of rows in front of its own, and of tiles; the sums. Two barriers around it
// are the caller's, one is inside.
struct expert_scan {
    int32_t first_row, first_tile, num_rows, num_tiles;
};

static __device__ __forceinline__ expert_scan scan_experts(int32_t num_experts, uint32_t rows,
                                                           uint32_t tiles)
{
    __shared__ uint32_t row_totals[32], tile_totals[32];
    int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t row_sum = rows, tile_sum = tiles;
    if (warp * 32 < num_experts) {
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            uint32_t row_below = __shfl_up_sync(0xffffffffu, row_sum, offset);
            uint32_t tile_below = __shfl_up_sync(0xffffffffu, tile_sum, offset);
            if (lane >= offset) {
                row_sum += row_below;
                tile_sum += tile_below;
            }
        }
        if (lane == 31) {
            row_totals[warp] = row_sum;
            tile_totals[warp] = tile_sum;
        }
    }
    __syncthreads();
    bool used = lane * 32 < num_experts;
    uint32_t row_total = used ? row_totals[lane] : 0, tile_total = used ? tile_totals[lane] : 0;
    expert_scan scan;
    scan.num_rows = __reduce_add_sync(0xffffffffu, row_total);
    scan.num_tiles = __reduce_add_sync(0xffffffffu, tile_total);
    scan.first_row = __reduce_add_sync(0xffffffffu, lane < warp ? row_total : 0) + row_sum - rows;
    scan.first_tile =
        __reduce_add_sync(0xffffffffu, lane < warp ? tile_total : 0) + tile_sum - tiles;
    return scan;
}

// Tiles are as high as a power of two, but need not be: a division takes longer than all else about them.
static __device__ __forceinline__ uint32_t divide_by_height(uint32_t height, uint32_t x)
{
    return height & (height - 1) ? x / height : x >> (31 - __clz(height));
}

static __device__ __forceinline__ int32_t tiles_of(const moe_align_args &args, int32_t height,
                                                   int32_t rows)
{
    return static_cast<int32_t>(divide_by_height(height, static_cast<uint32_t>(rows) + height - 1));
}

// The tiles of the thread's expert: it writes up to kOwnTiles, its warp what is more.
static __device__ __forceinline__ void write_tiles(const moe_align_args &args, int32_t height,
                                                   int32_t first_row, int32_t rows, int32_t tiles,
                                                   int32_t first_tile)
{
    constexpr int kOwnTiles = 8;
    int32_t lane = threadIdx.x % 32, expert = threadIdx.x;
    // unsigned: a caller's own expert_offsets may overlap so often that the count of tiles goes round
    auto write = [&](int32_t at, int32_t to, int32_t begin, int32_t left) {
        if (static_cast<uint32_t>(at) < static_cast<uint32_t>(args.max_tiles))
            args.tiles[at] = {to, begin, min(left, height), 0};
    };
    for (int32_t i = 0; i < min(tiles, kOwnTiles); ++i)
        write(first_tile + i, expert, first_row + i * height, rows - i * height);
    uint32_t more = __ballot_sync(0xffffffffu, tiles > kOwnTiles);
    for (; more; more &= more - 1) {
        int32_t from = __ffs(more) - 1;
        int32_t their_tiles = __shfl_sync(0xffffffffu, tiles, from);
        int32_t their_rows = __shfl_sync(0xffffffffu, rows, from);
        int32_t their_row = __shfl_sync(0xffffffffu, first_row, from);
        int32_t their_tile = __shfl_sync(0xffffffffu, first_tile, from);
        for (int32_t i = kOwnTiles + lane; i < their_tiles; i += 32)
            write(their_tile + i, expert - lane + from, their_row + i * height,
                  their_rows - i * height);
    }
}

static __device__ __forceinline__ void write_num_tiles(const moe_align_args &args, int32_t tiles,
                                                       bool high = false)
{
    const int32_t written = static_cast<int32_t>(
        min(static_cast<uint32_t>(tiles), static_cast<uint32_t>(args.max_tiles)));
    args.num_tiles[0] = high ? 0 : written;
    args.num_tiles[1] = args.num_tiles[2] = 0; // taken by gate_up, by down (gemm_wgmma.cuh)
    args.num_tiles[3] = high ? written : 0;
}

// The rows and the tiles of each expert, of which a thread each knows how many: where they begin. In two steps, because the
// slots of a block need no more than the first.
struct expert_places {
    uint32_t rows, tiles, high; // of the thread's expert; tiles as high as tile_rows, as high_rows
    uint32_t first_row, tile_sum, high_sum; // sums: to the end of the thread's in its warp
    uint32_t *totals;                       // [3, 32] of shared memory, of each warp

    // One barrier is inside, one behind it is the caller's, where it reads starts: rows in front of the block's own.
    __device__ __forceinline__ expert_places(const moe_align_args &args, uint32_t *memory,
                                             uint32_t all_rows, int32_t before, int32_t *starts)
    {
        totals = memory;
        rows = all_rows;
        tiles = args.tiles ? tiles_of(args, args.tile_rows, rows) : 0;
        high = args.tiles && args.high_rows ? tiles_of(args, args.high_rows, rows) : 0;
        const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        uint32_t row_sum = rows;
        tile_sum = tiles;
        high_sum = high;
        if (warp * 32 < args.num_experts) {
            add_below(row_sum);
            if (args.tiles) add_below(tile_sum);
            if (args.tiles && args.high_rows) add_below(high_sum);
            if (lane == 31) {
                totals[warp] = row_sum;
                totals[32 + warp] = tile_sum;
                totals[64 + warp] = high_sum;
            }
        }
        __syncthreads();
        if (warp * 32 >= args.num_experts) return;
        first_row = below(args, totals) + row_sum - rows;
        if (threadIdx.x < args.num_experts)
            starts[threadIdx.x] = static_cast<int32_t>(first_row) + before;
    }
    static __device__ __forceinline__ void add_below(uint32_t &sum)
    {
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const uint32_t other = __shfl_up_sync(0xffffffffu, sum, offset);
            if (threadIdx.x % 32 >= offset) sum += other;
        }
    }
    // Of all warps, of those below the thread's.
    static __device__ __forceinline__ uint32_t all(const moe_align_args &args, const uint32_t *of)
    {
        const int32_t lane = threadIdx.x % 32;
        return __reduce_add_sync(0xffffffffu, lane * 32 < args.num_experts ? of[lane] : 0);
    }
    static __device__ __forceinline__ uint32_t below(const moe_align_args &args, const uint32_t *of)
    {
        const int32_t lane = threadIdx.x % 32;
        return __reduce_add_sync(0xffffffffu, lane < threadIdx.x / 32 ? of[lane] : 0);
    }
    // expert_offsets and num_tiles by one block. A block that is alone writes all tiles, else they are dealt out by number:
    // were each written where it begins, the first block would have one of every expert.
    __device__ __forceinline__ void write(const moe_align_args &args) const
    {
        const int32_t expert = threadIdx.x;
        if (expert / 32 * 32 >= args.num_experts) return;
        const bool last = blockIdx.x == gridDim.x - 1; // has the fewest slots
        if (last) {
            if (expert < args.num_experts)
                args.expert_offsets[expert] = static_cast<int32_t>(first_row);
            const uint32_t num_rows = all(args, totals);
            if (expert == 0) args.expert_offsets[args.num_experts] = static_cast<int32_t>(num_rows);
        }
        if (!args.tiles) return;
        const int64_t num_low = all(args, totals + 32);
        const int64_t num_high = args.high_rows ? all(args, totals + 64) : 0;
        const bool is_high = args.high_rows && num_low * 16 >= args.high_cost * num_high;
        const int32_t height = is_high ? args.high_rows : args.tile_rows;
        const int32_t mine = static_cast<int32_t>(is_high ? high : tiles);
        const int32_t number = static_cast<int32_t>(below(args, totals + (is_high ? 64 : 32)) +
                                                    (is_high ? high_sum : tile_sum)) -
                               mine;
        if (last && expert == 0)
            write_num_tiles(args, static_cast<int32_t>(is_high ? num_high : num_low), is_high);
        const int32_t row = static_cast<int32_t>(first_row);
        if (gridDim.x == 1) {
            write_tiles(args, height, row, static_cast<int32_t>(rows), mine, number);
            return;
        }
        const int32_t dealt = 1 << (31 - __clz(gridDim.x)), block = blockIdx.x; // no division
        if (block >= dealt) return;
        for (int32_t i = (block - number) & (dealt - 1); i < mine; i += dealt)
            if (number + i < args.max_tiles)
                args.tiles[number + i] = {expert, row + i * height,
                                          min(static_cast<int32_t>(rows) - i * height, height), 0};
    }
};

static __device__ __forceinline__ void place_slot(const moe_align_args &args, int32_t slot,
                                                  int32_t row)
{
    args.row_of_slot[slot] = row;
    if (row >= 0) args.sorted_token_ids[row] = slot;
}

#endif
