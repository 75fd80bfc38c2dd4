/* align.cuh: how a block sorts a piece of the slots by expert, stable: a matrix of bits in shared memory, bit s of row e
 * where slot s goes to expert e. Bits are set in any order and give the same matrix; a slot's place among those of
 * its expert is the number of bits before its own. */
#ifndef MOE_ALIGN_CUH
#define MOE_ALIGN_CUH

#include "ptx.cuh"
#include "moe_kernels.h"
#include "slots.cuh"

static constexpr int kMaxExperts = 1024;

// Views into dynamic shared memory, MOE_ALIGN_SMEM_BYTES of it.
struct bit_matrix {
    uint32_t *bits;         // [num_experts, 4 * steps]
    int32_t *start;         // [num_experts] row of the expert's first slot of this piece
    unsigned short *before; // [num_experts, steps] bits of the row in front of the step
    int32_t num_experts, steps;

    __device__ __forceinline__ bit_matrix(void *memory, int32_t experts, int32_t num_slots)
    {
        num_experts = experts;
        steps = MOE_ALIGN_STEPS(num_slots);
        bits = static_cast<uint32_t *>(memory);
        start = reinterpret_cast<int32_t *>(bits + 4 * steps * num_experts);
        before = reinterpret_cast<unsigned short *>(start + num_experts);
    }
    __device__ __forceinline__ uint4 *step(int32_t expert, int32_t at) const
    {
        return reinterpret_cast<uint4 *>(bits) + expert * steps + at;
    }
    __device__ __forceinline__ void clear() const
    {
        for (int32_t i = threadIdx.x; i < num_experts * steps; i += blockDim.x)
            *step(0, i) = make_uint4(0, 0, 0, 0);
    }
    // The four words of a step stand in an order that hangs on the expert, so that a warp, whose slots are in the same
    // word of different rows, finds them in 32 banks and not in 8.
    static __device__ __forceinline__ int32_t swap(int32_t expert) { return expert / 8 % 4; }
    __device__ __forceinline__ void set(int32_t expert, int32_t slot) const
    {
        atomicOr(bits + 4 * steps * expert + (slot / 32 ^ swap(expert)), 1u << slot % 32);
    }
    // The row of a slot, of a piece whose bits and counts are complete.
    __device__ __forceinline__ int32_t row(int32_t expert, int32_t slot) const
    {
        uint4 words = *step(expert, slot / 128);
        uint32_t held[4] = {words.x, words.y, words.z, words.w};
        int32_t row = start[expert] + before[expert * steps + slot / 128], word = slot / 32 % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int32_t which = i ^ swap(expert);
            uint32_t mask = which < word ? ~0u : which == word ? (1u << slot % 32) - 1 : 0;
            row += __popc(held[i] & mask);
        }
        return row;
    }
};

static __device__ __forceinline__ int32_t count_bits(const uint4 &words)
{
    return __popc(words.x) + __popc(words.y) + __popc(words.z) + __popc(words.w);
}

// The rows of the thread's expert, and `before`. A thread for each expert; rows is scratch for num_experts of them.
static __device__ __forceinline__ int32_t count_rows(const bit_matrix &matrix, int32_t *rows)
{
    constexpr int kAhead = 5; // steps of a thread that are under way together
    const int32_t steps = matrix.steps, num_experts = matrix.num_experts;
    int32_t expert = threadIdx.x, sum = 0;
    if (steps <= kAhead) {
        if (expert >= num_experts) return 0;
        int32_t count[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            count[i] = i < steps ? count_bits(*matrix.step(expert, i)) : 0;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (i < steps) matrix.before[expert * steps + i] = static_cast<unsigned short>(sum);
            sum += count[i];
        }
        return sum;
    }
    // Neighbouring threads share a row where there are more of them than rows. Shifts: a division takes longer.
    int32_t log2_parts = 0, lane = threadIdx.x % 32;
    while (num_experts << (log2_parts + 1) <= static_cast<int32_t>(blockDim.x) && log2_parts < 4 &&
           kAhead << log2_parts < steps)
        ++log2_parts;
    int32_t parts = 1 << log2_parts, part = lane & (parts - 1);
    int32_t share = (steps + parts - 1) >> log2_parts;
    int32_t begin = part * share, end = min(begin + share, steps);
    int32_t first = (threadIdx.x - lane) >> log2_parts, of = first + (lane >> log2_parts);
    if (first < num_experts) {
        bool mine = of < num_experts, once = share <= kAhead;
        int32_t count[kAhead];
        for (int32_t at = begin; mine && at < end; at += kAhead) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                count[i] = at + i < end ? count_bits(*matrix.step(of, at + i)) : 0;
                sum += count[i];
            }
        }
        int32_t through = sum;
        for (int32_t offset = 1; offset < parts; offset *= 2) {
            int32_t below = __shfl_up_sync(0xffffffffu, through, offset, parts);
            if (part >= offset) through += below;
        }
        int32_t before = through - sum;
        for (int32_t at = begin; mine && at < end; at += kAhead) {
            // Counting is the slowest of it, 16 words a cycle: not again where the counts are still here.
            if (!once) {
#pragma unroll
                for (int i = 0; i < kAhead; ++i)
                    count[i] = at + i < end ? count_bits(*matrix.step(of, at + i)) : 0;
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (at + i < end)
                    matrix.before[of * steps + at + i] = static_cast<unsigned short>(before);
                before += count[i];
            }
        }
        if (mine && part == parts - 1) rows[of] = through;
    }
    __syncthreads();
    return expert < num_experts ? rows[expert] : 0;
}

// The expert that an id goes to, or -1.
static __device__ __forceinline__ int32_t local_expert(const moe_align_args &args, int64_t id)
{
    return expert_of_id(args, id, [](const int32_t *entry) { return *entry; });
}

static __device__ __forceinline__ int32_t load_expert(const moe_align_args &args, int64_t slot)
{
    int64_t at = slot;
    if (args.ids_stride != args.topk) {
        int32_t token = static_cast<int32_t>(slot) / args.topk;
        at = token * args.ids_stride + (static_cast<int32_t>(slot) - token * args.topk);
    }
    return local_expert(args, args.ids_dtype == MOE_I64
                                  ? static_cast<const int64_t *>(args.topk_ids)[at]
                                  : static_cast<const int32_t *>(args.topk_ids)[at]);
}

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

static __device__ __forceinline__ int32_t tiles_of(const moe_align_args &args, int32_t rows)
{
    if (!args.tiles) return 0;
    if (rows <= args.tile_rows) return rows > 0; // at decode all of them: no division
    return static_cast<int32_t>((static_cast<uint32_t>(rows) + args.tile_rows - 1) /
                                static_cast<uint32_t>(args.tile_rows));
}

// The tiles of the thread's expert: it writes up to kOwnTiles, its warp what is more.
static __device__ __forceinline__ void write_tiles(const moe_align_args &args, int32_t expert,
                                                   int32_t rows, int32_t tiles, int32_t first_row,
                                                   const expert_scan &scan)
{
    constexpr int kOwnTiles = 8;
    if (!args.tiles) return;
    int32_t lane = threadIdx.x % 32;
    auto write = [&](int32_t at, int32_t to, int32_t begin, int32_t left) {
        if (at < args.max_tiles) args.tiles[at] = {to, begin, min(left, args.tile_rows), 0};
    };
    if (threadIdx.x == 0) {
        args.num_tiles[0] = min(scan.num_tiles, args.max_tiles);
        args.num_tiles[1] = args.num_tiles[2] = 0; // taken by gate_up, by down (gemm_wgmma.cuh)
    }
    for (int32_t i = 0; i < min(tiles, kOwnTiles); ++i)
        write(scan.first_tile + i, expert, first_row + i * args.tile_rows,
              rows - i * args.tile_rows);
    uint32_t more = __ballot_sync(0xffffffffu, tiles > kOwnTiles);
    for (; more; more &= more - 1) {
        int32_t from = __ffs(more) - 1;
        int32_t their_tiles = __shfl_sync(0xffffffffu, tiles, from);
        int32_t their_rows = __shfl_sync(0xffffffffu, rows, from);
        int32_t their_row = __shfl_sync(0xffffffffu, first_row, from);
        int32_t their_tile = __shfl_sync(0xffffffffu, scan.first_tile, from);
        for (int32_t i = kOwnTiles + lane; i < their_tiles; i += 32)
            write(their_tile + i, expert - lane + from, their_row + i * args.tile_rows,
                  their_rows - i * args.tile_rows);
    }
}

// Rows of the thread's expert -> start[e], expert_offsets, tiles. A barrier behind it is the caller's.
static __device__ __forceinline__ void place_experts(const moe_align_args &args,
                                                     const bit_matrix &matrix, int32_t rows)
{
    int32_t expert = threadIdx.x, tiles = tiles_of(args, rows);
    expert_scan scan = scan_experts(args.num_experts, rows, tiles);
    if (expert < args.num_experts) {
        matrix.start[expert] = scan.first_row;
        args.expert_offsets[expert] = scan.first_row;
    }
    if (expert == 0) args.expert_offsets[args.num_experts] = scan.num_rows;
    write_tiles(args, expert, rows, tiles, scan.first_row, scan);
}

static __device__ __forceinline__ void place_slot(const moe_align_args &args,
                                                  const bit_matrix &matrix, int64_t begin,
                                                  int32_t slot, int32_t expert)
{
    int32_t row = expert >= 0 ? matrix.row(expert, slot) : -1;
    args.row_of_slot[begin + slot] = row;
    if (row >= 0) args.sorted_token_ids[row] = static_cast<int32_t>(begin + slot);
}

#endif
