/* gemm_split.cuh: the grouped GEMMs of few tiles of long K (gate_up_split_sm90a.cu, down_split_sm90a.cu): gemm_wgmma.cuh's
 * loop over a part of K, in clusters of thread blocks.
 *
 * Math   sums[r, n] = (partial sums of block 0) + (of block 1) + ..., f32, always in that order
 * How    one cluster for each tile, its blocks multiply a part of K each. Then every block owns some columns of the
 *        tile: all send it their sums of these, into its shared memory, where the ring was, and it adds them up and
 *        writes results. The thread that adds sums up is the one that holds them in every block: nothing is transposed.
 * Grid   a cluster for each tile there may be; those past the end of the list leave at once. Blocks of a cluster run
 *        at the same time, so they may wait for each other */
#ifndef MOE_GEMM_SPLIT_CUH
#define MOE_GEMM_SPLIT_CUH

#include "gemm_wgmma.cuh"

// A problem's part of K.
template <class Problem>
struct part_of : Problem {
    int32_t k_begin;
};

template <class Type, bool kGather, int kRows, int kCols, int kTileK, int kStages>
struct gemm_split : gemm_wgmma<Type, kGather, kRows, kCols, kTileK, kStages> {
    using loop = gemm_wgmma<Type, kGather, kRows, kCols, kTileK, kStages>;
    using shared = typename loop::shared;
    using work = typename loop::work;
    using position = typename loop::position;
    static constexpr int kUnits = kCols / 16; // each 8 columns of either half of the tile
    static constexpr uint32_t kPieceBytes = loop::kMathThreads * 16; // four sums of every thread
    static_assert(!loop::kFewRegisters && !loop::kOutInRing, "one tile, all in registers");
    // The blocks' pieces of the units of one of them.
    static constexpr bool fits(int blocks)
    {
        return (kUnits + blocks - 1) / blocks * blocks * 2 * kPieceBytes <=
               MOE_GEMM_RING_sm90a(kRows, kCols, kTileK, kStages);
    }
    static_assert(fits(1) && fits(2) && fits(3) && fits(4) && fits(5) && fits(6) && fits(7) &&
                      fits(MOE_SPLIT_BLOCKS),
                  "sums lie where the ring was");

    // The first unit of a block.
    static __device__ __forceinline__ uint32_t first_unit(uint32_t block, uint32_t blocks)
    {
        return (block * kUnits + blocks - 1) / blocks;
    }

    // A thread's sums to the blocks that add them up.
    static __device__ __forceinline__ void send(uint32_t own, const float (&sums)[loop::kSums],
                                                uint32_t block, uint32_t blocks)
    {
        uint32_t to = 0, share = 0, at = cluster_address(own, 0) + block * 2 * kPieceBytes;
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
            constexpr int kHalf = loop::kSums / 2;
            store_cluster_16(at, sums[unit * 4], sums[unit * 4 + 1], sums[unit * 4 + 2],
                             sums[unit * 4 + 3]);
            store_cluster_16(at + kPieceBytes, sums[unit * 4 + kHalf], sums[unit * 4 + kHalf + 1],
                             sums[unit * 4 + kHalf + 2], sums[unit * 4 + kHalf + 3]);
            at += blocks * 2 * kPieceBytes;
            share += blocks;
            if (share >= kUnits && unit + 1 < kUnits) {
                share -= kUnits;
                at = cluster_address(own, ++to) + block * 2 * kPieceBytes;
            }
        }
    }

    // Problem: as for gemm_wgmma, but write_unit(work, unit, sums of its columns in either half, router weights of the
    // thread's two rows).
    template <class Problem>
    static __device__ __forceinline__ void run(shared &smem, const Problem &whole)
    {
        const auto &args = whole.args;
        const uint32_t block = cluster_block(), blocks = cluster_blocks();
        loop::start(smem);
        if constexpr (kGather) { // as there: down waits behind its first weights
            grid_dependency_wait();
            grid_launch_dependents();
        }
        const typename loop::list list(args, whole.num_cols, 0);
        const work work = list.find(blockIdx.x / blocks);
        const uint32_t steps = (whole.k_size + kTileK - 1) / kTileK, begin = steps * block / blocks,
                       end = steps * (block + 1) / blocks;
        part_of<Problem> problem{whole, static_cast<int32_t>(begin * kTileK)};
        problem.k_size = min(whole.k_size, static_cast<int32_t>(end * kTileK));
        const bool leads = threadIdx.x == loop::kMathThreads;
        const int32_t ahead = leads ? loop::copy_ahead(smem, work, problem) : 0;
        __syncwarp();
        if constexpr (!kGather) {
            grid_dependency_wait();
            grid_launch_dependents();
        }
        if (work.num_rows < 0) return; // all blocks of the cluster
        position at;
        if (threadIdx.x >= loop::kMathThreads) {
            int32_t slot[loop::kHeld];
            loop::load_slots(slot, work, problem);
            if (kGather || leads)
                loop::copy_tile(smem, at, work, slot, {0, 0, -1, 0, false}, ahead, problem);
            return;
        }
        const int32_t own_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        int32_t slot[2];
        float weight[2] = {1.0f, 1.0f}, sums[loop::kSums];
        uint32_t turn = 0;
        loop::multiply(
            sums, smem, at, work.num_rows, static_cast<int32_t>(end - begin), turn,
            [&] {
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    slot[half] = args.topk_weights && own_row + half * 8 < work.num_rows
                                     ? args.sorted_token_ids[work.row_begin + own_row + half * 8]
                                     : -1;
            },
            [&] {
                if (!args.topk_weights) return;
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    weight[half] = weight_of(slot[half], args);
            });
        cluster_arrive(); // nobody reads this ring any more
        const bool rows = static_cast<int32_t>(threadIdx.x / 128 * 64) < work.num_rows;
        const uint32_t own = shared_address(&smem) + threadIdx.x * 16;
        cluster_wait();
        if (rows) send(own, sums, block, blocks);
        cluster_arrive();
        cluster_wait();
        if (!rows) return;
        const uint32_t last = first_unit(block + 1, blocks);
        uint32_t from = own;
        for (uint32_t unit = first_unit(block, blocks); unit < last; ++unit) {
            float low[4], high[4];
            for (uint32_t of = 0; of < blocks; ++of, from += 2 * kPieceBytes) {
                const uint4 a = load_shared_16(from), b = load_shared_16(from + kPieceBytes);
                const float x[4] = {__uint_as_float(a.x), __uint_as_float(a.y),
                                    __uint_as_float(a.z), __uint_as_float(a.w)};
                const float y[4] = {__uint_as_float(b.x), __uint_as_float(b.y),
                                    __uint_as_float(b.z), __uint_as_float(b.w)};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    low[i] = of ? low[i] + x[i] : x[i];
                    high[i] = of ? high[i] + y[i] : y[i];
                }
            }
            problem.write_unit(work, own_row, unit * 8, kCols / 2, low, high, weight);
        }
    }
};

#endif
