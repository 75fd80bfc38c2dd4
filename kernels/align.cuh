/* align.cuh: how a block sorts a piece of the slots by expert, stable: a matrix of bits in shared memory, bit s of row e
 * where slot s goes to expert e, and counts of the bits of every 128 slots. Both are made by atomics whose order does
 * not show; a slot's place among those of its expert is the number of bits before its own. */
#ifndef MOE_ALIGN_CUH
#define MOE_ALIGN_CUH

#include "ptx.cuh"
#include "moe_kernels.h"
#include "slots.cuh"

static constexpr int kMaxExperts = 1024;

// What a block has to know of an expert to place its slots.
struct alignas(16) expert_place {
    int32_t start;            // row of the block's first slot
    int32_t before;           // rows of the expert in front of it
    int32_t rows, first_tile; // of the expert; ~first_tile of tiles of high_rows
};

// Views into dynamic shared memory, MOE_ALIGN_SMEM_BYTES of it.
struct bit_matrix {
    expert_place *places; // [num_experts]
    uint32_t *bits;       // [num_experts, 4 * steps]
    uint32_t *
        counts; // [ceil(steps / 2), num_experts] bits of a step, 16 bits each; then those in front of it
    void *spare; // 16 bytes an expert, for the kernel
    int32_t num_experts, steps;

    __device__ __forceinline__ bit_matrix(void *memory, int32_t experts, int32_t num_slots)
    {
        num_experts = experts;
        steps = MOE_ALIGN_STEPS(num_slots);
        places = static_cast<expert_place *>(memory);
        bits = reinterpret_cast<uint32_t *>(places + num_experts);
        counts = bits + 4 * steps * num_experts;
        spare = counts + (steps + 1) / 2 * num_experts;
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

// visit(slot, experts, n) for all slots, four at a time, the last of them one at a time (n), in any order, by all threads
// of the block; an expert is -1 where the slot is dropped.
template <class Visit>
static __device__ __forceinline__ void visit_slots(const moe_align_args &args, Visit visit)
{
    constexpr int kAhead = 2; // loads of a thread that are under way together
    const int32_t num_slots = static_cast<int32_t>(args.num_tokens * args.topk);
    const int4 *ids = static_cast<const int4 *>(args.topk_ids);
    const bool whole = args.ids_dtype == MOE_I32 && args.ids_stride == args.topk &&
                       reinterpret_cast<uintptr_t>(ids) % 16 == 0;
    const bool plain = !args.expert_map && args.expert_start == 0; // the id is the expert
    const int32_t whole_end = whole ? num_slots / 4 * 4 : 0;
    auto local = [&](int32_t id) {
        return static_cast<uint32_t>(id) < static_cast<uint32_t>(args.num_experts) ? id : -1;
    };
    for (int32_t first = 4 * threadIdx.x; first < whole_end; first += 4 * kAhead * blockDim.x) {
        int4 four[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            int32_t slot = first + 4 * i * blockDim.x;
            if (slot < whole_end) four[i] = ids[slot / 4];
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            int32_t slot = first + 4 * i * blockDim.x;
            if (slot >= whole_end) break;
            int32_t expert[4] = {four[i].x, four[i].y, four[i].z, four[i].w};
#pragma unroll
            for (int j = 0; j < 4; ++j)
                expert[j] = plain ? local(expert[j]) : local_expert(args, expert[j]);
            visit(slot, expert, 4);
        }
    }
    for (int32_t slot = whole_end + threadIdx.x; slot < num_slots; slot += blockDim.x) {
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
    int32_t first_high, num_high; // tiles of another height, where they are asked for
};

template <bool kHigh = false>
static __device__ __forceinline__ expert_scan scan_experts(int32_t num_experts, uint32_t rows,
                                                           uint32_t tiles, uint32_t high = 0)
{
    __shared__ uint32_t row_totals[32], tile_totals[32], high_totals[kHigh ? 32 : 1];
    int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t row_sum = rows, tile_sum = tiles, high_sum = high;
    if (warp * 32 < num_experts) {
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            uint32_t row_below = __shfl_up_sync(0xffffffffu, row_sum, offset);
            uint32_t tile_below = __shfl_up_sync(0xffffffffu, tile_sum, offset);
            if (lane >= offset) {
                row_sum += row_below;
                tile_sum += tile_below;
            }
            if constexpr (kHigh) {
                uint32_t high_below = __shfl_up_sync(0xffffffffu, high_sum, offset);
                if (lane >= offset) high_sum += high_below;
            }
        }
        if (lane == 31) {
            row_totals[warp] = row_sum;
            tile_totals[warp] = tile_sum;
            if constexpr (kHigh) high_totals[warp] = high_sum;
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
    scan.first_high = scan.num_high = 0;
    if constexpr (kHigh) {
        uint32_t high_total = used ? high_totals[lane] : 0;
        scan.num_high = __reduce_add_sync(0xffffffffu, high_total);
        scan.first_high =
            __reduce_add_sync(0xffffffffu, lane < warp ? high_total : 0) + high_sum - high;
    }
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
    if (!args.tiles) return 0;
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

// A block that is alone writes an expert's tiles by the expert's thread; of many blocks each those that begin with one of
// its slots, which is an even share of them wherever the slots go.
static __device__ __forceinline__ bool tiles_by_slot(const moe_align_args &args)
{
    return args.tiles && gridDim.x > 1;
}

// Rows of the thread's expert, all and in front of this block's -> its place; by one block expert_offsets, num_tiles.
// A barrier behind it is the caller's.
static __device__ __forceinline__ void
place_experts(const moe_align_args &args, const bit_matrix &matrix, int32_t rows, int32_t before)
{
    const int32_t expert = threadIdx.x, tiles = tiles_of(args, args.tile_rows, rows);
    const int32_t high_tiles = args.high_rows ? tiles_of(args, args.high_rows, rows) : 0;
    const expert_scan scan = scan_experts<true>(args.num_experts, rows, tiles, high_tiles);
    const bool high =
        args.high_rows && scan.num_tiles * 16ll >= int64_t{args.high_cost} * scan.num_high;
    const int32_t first_tile = high ? scan.first_high : scan.first_tile;
    const bool last = blockIdx.x == gridDim.x - 1; // has the fewest slots
    if (expert < args.num_experts) {
        matrix.places[expert] = {scan.first_row + before, before, rows,
                                 high ? ~first_tile : first_tile};
        if (last) args.expert_offsets[expert] = scan.first_row;
    }
    if (last && expert == 0) {
        args.expert_offsets[args.num_experts] = scan.num_rows;
        if (args.tiles) write_num_tiles(args, high ? scan.num_high : scan.num_tiles, high);
    }
    if (args.tiles && !tiles_by_slot(args))
        write_tiles(args, high ? args.high_rows : args.tile_rows, scan.first_row, rows,
                    high ? high_tiles : tiles, first_tile);
}

// A slot, the block's at-th.
static __device__ __forceinline__ void place_slot(const moe_align_args &args,
                                                  const bit_matrix &matrix, int32_t slot,
                                                  int32_t at, int32_t expert)
{
    if (expert < 0) {
        args.row_of_slot[slot] = -1;
        return;
    }
    const expert_place &place = matrix.places[expert];
    const int32_t own = matrix.before(expert, at), row = place.start + own;
    args.row_of_slot[slot] = row;
    args.sorted_token_ids[row] = slot;
    if (!tiles_by_slot(args)) return;
    const bool high = place.first_tile < 0;
    const int32_t height = high ? args.high_rows : args.tile_rows;
    const int32_t within = place.before + own;
    const int32_t tile = static_cast<int32_t>(divide_by_height(height, within));
    const int32_t number = (high ? ~place.first_tile : place.first_tile) + tile;
    if (tile * height == within && number < args.max_tiles)
        args.tiles[number] = {expert, row, min(place.rows - within, height), 0};
}

#endif
