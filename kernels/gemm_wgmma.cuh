/* gemm_wgmma.cuh: the main loop of the Hopper grouped GEMMs (gate_up_sm90a.cu, down_sm90a.cu).
 *
 * Math   sums[r, n] = token_row(r) . weight_row(n), f32, tile after tile: kRows token rows of one expert and
 *        kCols of its weight rows; K in steps of kTileK, always in the same order
 * How    one thread block per SM walks over the list of tiles. A producer warpgroup fills a ring of kStages
 *        stages with 16-byte cp.async and runs ahead into the next tile; two math warpgroups multiply 64 rows
 *        each with wgmma m64n256k16, token rows on M, weight rows on N, both operands from the ring.
 *        Chunk c of row r lies at chunk c ^ (r % 8), which is wgmma's 128-byte swizzle: no tensor maps,
 *        and the gathered token rows and the weights arrive in the same way.
 * Sums   of a thread: 2 rows, 8 runs of 8 neighbouring columns of each (column_of). The weight rows are put
 *        into the ring in the order that makes it so: results leave from registers, 8 or 16 bytes at a time.
 * Tails  rows past the tile, weight rows past num_cols and K past its end are zeros in shared memory and
 *        are never read from global memory. A warpgroup whose 64 rows all lie past the tile does no math. */
#ifndef MOE_GEMM_WGMMA_CUH
#define MOE_GEMM_WGMMA_CUH

#include "gemm_common.cuh"
#include "wgmma.cuh"

template <class Type, int kRows_, int kCols_, int kTileK_, int kStages_>
struct gemm_wgmma {
    static constexpr int kRows = kRows_, kCols = kCols_, kTileK = kTileK_, kStages = kStages_;
    using T = Type;
    using element = typename Type::element;

    static constexpr int kMathThreads = kRows / 64 * 128; // a warpgroup for 64 rows
    static constexpr int kCopyThreads = 32 * MOE_GEMM_PRODUCERS_sm90a;
    static constexpr int kChunks = kTileK / 8; // 16-byte chunks of a row of a stage
    static constexpr int kPassRows = kCopyThreads / kChunks;
    static constexpr int kTokenPasses = kRows / kPassRows;
    static constexpr int kWeightPasses = kCols / kPassRows;
    static constexpr int kTokenBytes = kRows * kTileK * 2; // of a stage
    static constexpr int kWeightBytes = kCols * kTileK * 2;
    static constexpr int kSums = kCols / 2; // of a thread
    static constexpr int kRuns = kCols / 32;
    // Registers: 65536 = 2 * 128 * 216 + 128 * 72, with what the launch rounds away.
    static constexpr int kMathRegisters = 216, kCopyRegisters = 72;
    // Tiles in a column before the next column: neighbours in time share weights and token rows in L2.
    static constexpr int kRaster = 8;

    static_assert(kTileK == 64, "a row of a stage is the 128 bytes of the swizzle");
    static_assert(kRows == 128 && kCols == 256, "two warpgroups of m64n256");
    static_assert(kPassRows == 16, "copy_tile: 16 rows a pass");

    struct shared {
        alignas(1024) unsigned char token[kStages][kTokenBytes];
        alignas(1024) unsigned char weight[kStages][kWeightBytes];
        // landed: the copies of a stage, one arrival per producer thread; read: its wgmma are done, one per math warp
        alignas(8) uint64_t landed[kStages];
        uint64_t read[kStages];
    };
    static_assert(sizeof(shared) <= MOE_GEMM_SMEM_BYTES(kRows, kCols, kTileK, kStages),
                  "the host launches with the size that its macro gives");

    // Where a thread or warp is in the ring; goes on from tile to tile.
    struct position {
        uint32_t stage = 0, parity = 0;
        __device__ __forceinline__ void next()
        {
            if (++stage == kStages) {
                stage = 0;
                parity ^= 1;
            }
        }
    };

    struct work {
        int32_t expert, row_begin, num_rows, col_begin; // num_rows < 0: past the end of the list
    };

    // Item `item` of the list: all column tiles of kRaster tiles, then the next kRaster tiles.
    static __device__ __forceinline__ work find_work(uint32_t item, const moe_tile *tiles,
                                                     uint32_t num_tiles, uint32_t col_tiles,
                                                     int64_t num_slots)
    {
        uint32_t group = item / (kRaster * col_tiles);
        if (group * kRaster >= num_tiles) return {0, 0, -1, 0};
        uint32_t in_group = item - group * (kRaster * col_tiles);
        uint32_t group_tiles = min(static_cast<uint32_t>(kRaster), num_tiles - group * kRaster);
        uint32_t col = in_group / group_tiles;
        if (col >= col_tiles) return {0, 0, -1, 0}; // the last group is smaller
        uint32_t tile = group * kRaster + in_group - col * group_tiles;
        int4 found = __ldcg(reinterpret_cast<const int4 *>(tiles + tile));
        int32_t rows =
            static_cast<int32_t>(min(static_cast<int64_t>(found.z), num_slots - found.y));
        return {found.x, found.y, max(rows, 0), static_cast<int32_t>(col * kCols)};
    }

    // ---------------------------------------------------------------------------------------------
    // The producer warpgroup. Thread t copies chunk t % kChunks of rows t / kChunks + pass * kPassRows.
    // ---------------------------------------------------------------------------------------------

    // The column of the tile whose weight row lies at row n of the ring. wgmma gives a thread columns
    // 8 j + 2 q and + 1 (q = lane % 4): four j in a row become 8 neighbouring columns.
    static __device__ __forceinline__ int32_t column_of(int32_t n)
    {
        return (n & ~31) + ((n & 6) << 2) + ((n >> 3 & 3) << 1) + (n & 1);
    }

    template <class RowOf>
    static __device__ __forceinline__ void copy_tile(shared &smem, position &at, const work &work,
                                                     const weight_rows &rows, int32_t k_size,
                                                     RowOf row_of)
    {
        int32_t thread = threadIdx.x - kMathThreads;
        int32_t row = thread / kChunks, k = thread % kChunks * 8;
        uint32_t offset = row * (kTileK * 2) + ((thread % kChunks ^ (row & 7)) << 4);

        const unsigned char *token[kTokenPasses];
        uint32_t token_valid = 0;
#pragma unroll
        for (int pass = 0; pass < kTokenPasses; ++pass) {
            const element *from = row_of(row + pass * kPassRows);
            token[pass] = reinterpret_cast<const unsigned char *>(from + k);
            if (from) token_valid |= 1u << pass;
        }

        int32_t col = work.col_begin + column_of(row);
        const unsigned char *weight = reinterpret_cast<const unsigned char *>(
            static_cast<const element *>(rows.base) + rows.row(col) * rows.stride + k);
        // Pass 2 p + 1 is 4 columns after pass 2 p, pass 2 p + 2 another 28.
        int64_t row_bytes = (rows.split ? 2 : 4) * rows.stride * int64_t{sizeof(element)};
        uint32_t weight_valid = 0;
#pragma unroll
        for (int pass = 0; pass < kWeightPasses; ++pass)
            if (col + pass / 2 * 32 + pass % 2 * 4 < rows.num_cols) weight_valid |= 1u << pass;

        for (int32_t left = k_size - k, end = -k; left > end; left -= kTileK) {
            mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
            uint32_t tokens_to = shared_address(smem.token[at.stage]) + offset;
            uint32_t weights_to = shared_address(smem.weight[at.stage]) + offset;
            uint32_t tokens_valid = left > 0 ? token_valid : 0;
            uint32_t weights_valid = left > 0 ? weight_valid : 0;
#pragma unroll
            for (int pass = 0; pass < kTokenPasses; ++pass) {
                cp_async_16_wide(tokens_to + pass * (kPassRows * kTileK * 2), token[pass],
                                 (tokens_valid >> pass & 1) << 4);
                token[pass] += kTileK * 2;
            }
            const unsigned char *from = weight;
#pragma unroll
            for (int pass = 0; pass < kWeightPasses; ++pass) {
                cp_async_16_wide(weights_to + pass * (kPassRows * kTileK * 2), from,
                                 (weights_valid >> pass & 1) << 4);
                from += pass % 2 ? 7 * row_bytes : row_bytes;
            }
            weight += kTileK * 2;
            cp_async_arrive(shared_address(&smem.landed[at.stage]));
            at.next();
        }
    }

    // ---------------------------------------------------------------------------------------------
    // The math warpgroups
    // ---------------------------------------------------------------------------------------------

    static __device__ __forceinline__ void wgmma(float (&sums)[kSums], uint64_t token,
                                                 uint64_t weight, int32_t scale_d)
    {
        if constexpr (Type::kDtype == MOE_BF16)
            wgmma_m64n256k16_bf16(sums, token, weight, scale_d);
        else
            wgmma_m64n256k16_f16(sums, token, weight, scale_d);
    }

    static __device__ __forceinline__ void release(shared &smem, uint32_t stage)
    {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&smem.read[stage]));
    }

    // All of K. after_first: what to ask memory for while the first products are under way.
    template <class AfterFirst>
    static __device__ __forceinline__ void multiply(float (&sums)[kSums], shared &smem,
                                                    position &at, int32_t num_rows,
                                                    int32_t num_steps, AfterFirst after_first)
    {
        uint32_t group = threadIdx.x / 128;
        if (static_cast<int32_t>(group * 64) >= num_rows) { // nothing but padding
            for (int32_t step = 0; step < num_steps; ++step) {
                mbarrier_wait(shared_address(&smem.landed[at.stage]), at.parity);
                release(smem, at.stage);
                at.next();
            }
            return;
        }
        uint32_t before = 0;
        for (int32_t step = 0; step < num_steps; ++step) {
            mbarrier_wait(shared_address(&smem.landed[at.stage]), at.parity);
            fence_proxy_async(); // cp.async writes through the generic proxy, wgmma reads through the other
            uint64_t token =
                wgmma_descriptor(shared_address(smem.token[at.stage]) + group * (64 * kTileK * 2));
            uint64_t weight = wgmma_descriptor(shared_address(smem.weight[at.stage]));
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kTileK / 16; ++k)
                wgmma(sums, token + k * 2, weight + k * 2, step + k);
            wgmma_commit();
            if (step == 0) {
                after_first();
            } else {
                wgmma_wait<1>();
                release(smem, before);
            }
            before = at.stage;
            at.next();
        }
        wgmma_wait<0>();
        release(smem, before);
    }

    // write(half, row, col, z): columns col .. col + 7 of row `row` of the tile, this thread's alone.
    // kUnroll: straight from the registers; else one copy of write's code, and moves.
    template <bool kUnroll, class Write>
    static __device__ __forceinline__ void each_run(const float (&sums)[kSums], int32_t num_rows,
                                                    Write write)
    {
        int32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll(kUnroll ? 2 * kRuns : 1)
        for (int item = 0; item < 2 * kRuns; ++item) {
            int half = item / kRuns, run = item % kRuns;
            if (row + half * 8 >= num_rows) break;
            float z[8];
#pragma unroll
            for (int from = 0; from < 2 * kRuns; ++from)
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    if (from == item)
                        z[i] = sums[from % kRuns * 16 + i / 2 * 4 + from / kRuns * 2 + i % 2];
            write(half, row + half * 8, run * 32 + lane % 4 * 8, z);
        }
    }

    static __device__ __forceinline__ void start(shared &smem)
    {
        if (threadIdx.x == 0) {
#pragma unroll
            for (int stage = 0; stage < kStages; ++stage) {
                mbarrier_init(shared_address(&smem.landed[stage]), kCopyThreads);
                mbarrier_init(shared_address(&smem.read[stage]), kMathThreads / 32);
            }
            fence_proxy_async();
        }
        __syncthreads();
    }

    // All tiles of this block. Problem: rows_of(expert) -> weight_rows; token_row(work, r) -> pointer to token
    // row r of the tile, NULL: zeros; write(work, sums, weight of this thread's two rows); args, num_cols, k_size.
    template <class Problem>
    static __device__ __forceinline__ void run(shared &smem, const Problem &problem)
    {
        const auto &args = problem.args;
        start(smem);
        grid_dependency_wait();
        grid_launch_dependents();
        uint32_t num_tiles = min(__ldcg(args.num_tiles), args.max_tiles);
        uint32_t col_tiles = (static_cast<uint32_t>(problem.num_cols) + kCols - 1) / kCols;
        int32_t num_steps = (problem.k_size + kTileK - 1) / kTileK;
        position at;
        uint32_t item = blockIdx.x;
        auto find = [&] {
            return find_work(item, args.tiles, num_tiles, col_tiles, args.num_slots);
        };
        work work = find();

        if (threadIdx.x >= kMathThreads) {
            set_registers_fewer<kCopyRegisters>();
            while (work.num_rows >= 0) {
                item += gridDim.x;
                auto next = find();
                copy_tile(smem, at, work, problem.rows_of(work.expert), problem.k_size,
                          [&](int32_t r) { return problem.token_row(work, r); });
                work = next;
            }
            return;
        }
        set_registers_more<kMathRegisters>();
        int32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
        while (work.num_rows >= 0) {
            item += gridDim.x;
            auto next = find();
            int32_t slot[2];
            float weight[2] = {1.0f, 1.0f}, sums[kSums];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                slot[half] = args.topk_weights && row + half * 8 < work.num_rows
                                 ? args.sorted_token_ids[work.row_begin + row + half * 8]
                                 : -1;
            multiply(sums, smem, at, work.num_rows, num_steps, [&] {
                if (!args.topk_weights) return;
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    weight[half] = weight_of(slot[half], args);
            });
            problem.template write<gemm_wgmma>(work, sums, weight);
            work = next;
        }
    }
};

#endif
