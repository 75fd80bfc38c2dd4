/* gemm_wgmma.cuh: the main loop of the Hopper grouped GEMMs (gate_up_sm90a.cu, down_sm90a.cu).
 *
 * Math   sums[r, n] = token_row(r) . weight_row(n), f32, tile after tile: kRows token rows of one expert and
 *        kCols of its weight rows; K in steps of kTileK, always in the same order
 * How    one thread block per SM, which takes tiles from the list as long as there are any. A producer warpgroup
 *        fills a ring of kStages stages and runs ahead into the next tile: weights by the copy engine in two boxes of
 *        kCols / 2 rows, token rows by it too, or by 16-byte cp.async where they are gathered. Math warpgroups, two
 *        or three, multiply 64 rows each with wgmma m64n<kCols>k16, token rows on M, weight rows on N, both operands from the ring.
 *        Chunk c of row r lies at chunk c ^ (r % 8), wgmma's 128-byte swizzle, whoever writes it.
 * Out    a warp puts its 16 rows of rounded results into shared memory (stmatrix), kOutCols columns at a time, and
 *        stores them row after row: whole lines, and no other warp waits for it
 * Tails  weight rows past the last one and K past its end are zeros in shared memory and are never read from global
 *        memory. Gathered rows past the tile are zeros; rows of the intermediate past the tile may be another
 *        expert's or anything, and are not written. A warpgroup whose 64 rows all lie past the tile does no math. */
#ifndef MOE_GEMM_WGMMA_CUH
#define MOE_GEMM_WGMMA_CUH

#include "gemm_sm90a.cuh"

// kGather: token rows by cp.async from Problem::tokens, else by the map of the tokens.
template <class Type, bool kGather, int kRows_, int kCols_, int kTileK_, int kStages_>
struct gemm_wgmma {
    static constexpr int kRows = kRows_, kCols = kCols_, kTileK = kTileK_, kStages = kStages_;
    static constexpr int kOutCols = MOE_GEMM_OUT_COLS_sm90a(kRows, kCols, kTileK, kStages);
    using T = Type;
    using element = typename Type::element;

    static constexpr int kGroups = kRows / 64; // math warpgroups: one for 64 rows
    static constexpr int kMathThreads = kGroups * 128;
    static constexpr int kCopyThreads = 32 * MOE_GEMM_PRODUCERS_sm90a;
    static constexpr int kChunks = kTileK / 8; // 16-byte chunks of a row of a stage
    static constexpr int kPassRows = kCopyThreads / kChunks;
    static constexpr int kTokenBytes = kRows * kTileK * 2; // of a stage
    static constexpr int kGroupBytes = 64 * kTileK * 2;    // the rows of one math warpgroup
    static constexpr int kWeightBytes = kCols * kTileK * 2;
    static constexpr int kBoxRows = MOE_GEMM_WEIGHT_BOX_sm90a(kCols); // two boxes a stage
    static constexpr int kSums = kCols / 2;                           // of a thread
    // bytes; eight rows lie in different banks, and behind each there is room for its router weight
    static constexpr int kOutPitch = kOutCols * 2 + 16;
    // What the launch gives (65536, or what it rounds that to) goes to whoever needs it.
    static constexpr int kMathRegisters = kGroups == 2 ? 216 : 152;
    static constexpr int kCopyRegisters = kGroups == 2 ? 72 : 56;
    static_assert(kMathThreads * kMathRegisters + kCopyThreads * kCopyRegisters <= 65536);
    // Tiles in a column before the next column: neighbours in time share weights and token rows in L2.
    static constexpr uint32_t kRaster = 8;
    // Items a block knows ahead: it takes the first kAhead at fixed places, then whatever is next when it gets there.
    // Between the producer and the slowest math warp lie at most kStages + kAhead of them.
    static constexpr uint32_t kAhead = 3, kItems = 16;
    // In tiles of few steps each warpgroup starts kLag steps behind the one before: one's results leave during the
    // others' math.
    static constexpr int32_t kLag = kGroups == 2 ? 2 : 1, kLagSteps = 4;

    static_assert(kTileK == MOE_MAP_COLS, "a row of a stage is the 128 bytes of the swizzle");
    static_assert(kCols == 256 || kCols == 192 || kCols == 128, "wgmma() below");
    static_assert(kGroups == 2 || (kGroups == 3 && kCols < 256), "registers for the sums");
    static_assert(kChunks == 8 && kPassRows == 16,
                  "copy_tile: eight lanes a row, four passes for 64 rows");

    struct shared {
        alignas(1024) unsigned char token[kStages][kTokenBytes];
        alignas(1024) unsigned char weight[kStages][kWeightBytes];
        alignas(128) unsigned char out[kRows][kOutPitch];
        // landed: all bytes of a stage and every gathering thread; read: its wgmma are done, one per math warp
        alignas(8) uint64_t landed[kStages];
        uint64_t read[kStages];
        // work: of tile n at n % kItems, for the math warps, written before tile n - 1 lands; item: of tile n + 2 at
        // n % 2, for the producer warps; turn: this math warpgroup is kLag steps into a tile, one arrival per warp
        int4 work[kItems];
        uint32_t item[2];
        uint64_t turn[kGroups - 1];
    };
    static_assert(sizeof(shared) <= MOE_GEMM_SMEM_BYTES_sm90a(kRows, kCols, kTileK, kStages),
                  "the host launches with the size that its macro gives");

    // Where a thread or warp is in the ring; goes on from tile to tile.
    using position = stage_position<kStages>;

    struct work {
        int32_t expert, row_begin, num_rows, col_begin; // num_rows < 0: past the end of the list
        bool
            alone; // the only tile of its expert: no other block reads these weights (for the producer)
    };

    static __device__ __forceinline__ void put_work(shared &smem, uint32_t tile, const work &work)
    {
        smem.work[tile % kItems] =
            make_int4(work.expert, work.row_begin, work.num_rows, work.col_begin);
    }

    static __device__ __forceinline__ work get_work(const shared &smem, uint32_t tile)
    {
        int4 held = smem.work[tile % kItems];
        return {held.x, held.y, held.z, held.w, false};
    }

    // The list as items: all column tiles of kRaster entries, then of the next kRaster entries. With bands: those of the
    // first band_tiles column tiles, then of the next.
    struct list {
        const moe_tile *tiles;
        int64_t num_slots;
        uint32_t num_tiles, col_tiles, band_tiles; // band_tiles 0: all of them are one band

        template <class Args>
        __device__ __forceinline__ list(const Args &args, int32_t num_cols, uint32_t band_tiles)
            : tiles(args.tiles), num_slots(args.num_slots),
              num_tiles(min(__ldcg(args.num_tiles), args.max_tiles)),
              col_tiles((static_cast<uint32_t>(num_cols) + kCols - 1) / kCols),
              band_tiles(band_tiles)
        {
        }

        __device__ __forceinline__ work find(uint32_t item) const
        {
            uint32_t first = 0, cols = col_tiles; // of the band
            if (band_tiles) {
                uint32_t band = item / max(band_tiles * num_tiles, 1u);
                item -= band * (band_tiles * num_tiles);
                first = band * band_tiles;
                if (first >= col_tiles) return {0, 0, -1, 0, false};
                cols = min(band_tiles, col_tiles - first);
            }
            uint32_t group = item / (kRaster * cols);
            if (group * kRaster >= num_tiles) return {0, 0, -1, 0, false};
            uint32_t in_group = item - group * (kRaster * cols);
            uint32_t group_tiles = min(kRaster, num_tiles - group * kRaster);
            uint32_t col = in_group / group_tiles;
            if (col >= cols) return {0, 0, -1, 0, false}; // the last group is smaller
            uint32_t tile = group * kRaster + in_group - col * group_tiles;
            col += first;
            int4 found = __ldcg(reinterpret_cast<const int4 *>(tiles + tile));
            int32_t before = tile > 0 ? __ldcg(&tiles[tile - 1].expert) : -1;
            int32_t rows =
                static_cast<int32_t>(min(static_cast<int64_t>(found.z), num_slots - found.y));
            return {found.x, found.y, max(rows, 0), static_cast<int32_t>(col * kCols),
                    before != found.x && found.z < kRows}; // full: there may be another behind it
        }
    };

    // ---------------------------------------------------------------------------------------------
    // The producer warpgroup. Gathering, thread t copies chunk t % kChunks of rows t / kChunks + pass * kPassRows;
    // its first thread gives the copy engine its work.
    // ---------------------------------------------------------------------------------------------

    // Math warpgroups with rows; one where the tile has none.
    static __device__ __forceinline__ int32_t groups_of(const work &work)
    {
        return max(work.num_rows + 63, 64) / 64;
    }

    template <class Problem>
    static __device__ __forceinline__ void
    copy_boxes(shared &smem, uint32_t stage, const work &work, int32_t k, const Problem &problem)
    {
        uint32_t landed = shared_address(&smem.landed[stage]);
        uint32_t bytes = kWeightBytes;
        if constexpr (!kGather) bytes += groups_of(work) * kGroupBytes;
        mbarrier_arrive_expect_tx(landed, bytes);
        if constexpr (!kGather) {
            uint32_t to = shared_address(smem.token[stage]);
#pragma unroll
            for (int group = 0; group < kGroups; ++group)
                if (group < groups_of(work))
                    tensor_copy_4d(to + group * kGroupBytes, problem.tokens, k,
                                   work.row_begin + group * 64, 0, 0, landed);
        }
        uint32_t to = shared_address(smem.weight[stage]);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            int2 at = problem.box(work.col_begin, part, kBoxRows);
            uint32_t half = to + part * (kWeightBytes / 2);
            if (kGather && work.alone) // gathered rows are asked for again: they stay longer
                tensor_copy_4d_once(half, problem.weights, k, at.x, at.y, work.expert, landed);
            else
                tensor_copy_4d(half, problem.weights, k, at.x, at.y, work.expert, landed);
        }
    }

    // Pass p brings row t / kChunks + p * kPassRows. Its slot, asked for a tile ahead, is held by one of the eight threads
    // of the row, p % 8 of them, at p / 8: the addresses of this tile's rows need the registers.
    static constexpr int kPasses = kRows / kPassRows, kHeld = (kPasses + 7) / 8;

    // The slots of a tile's rows, asked for a tile ahead.
    template <class Problem>
    static __device__ __forceinline__ void load_slots(int32_t (&slot)[kHeld], const work &work,
                                                      const Problem &problem)
    {
        if constexpr (kGather) {
            int32_t thread = threadIdx.x - kMathThreads;
            int32_t row = thread / kChunks + thread % kChunks * kPassRows;
#pragma unroll
            for (int held = 0; held < kHeld; ++held, row += 8 * kPassRows)
                slot[held] =
                    row < work.num_rows ? problem.args.sorted_token_ids[work.row_begin + row] : -1;
        }
    }

    template <class Problem>
    static __device__ __forceinline__ void
    copy_tile(shared &smem, position &at, const work &work, int32_t (&slot)[kHeld],
              const typename gemm_wgmma::work &next, const Problem &problem)
    {
        int32_t thread = threadIdx.x - kMathThreads;
        if constexpr (!kGather) {
            for (int32_t k = 0; k < problem.k_size; k += kTileK, at.next()) {
                mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
                copy_boxes(smem, at.stage, work, k, problem);
            }
        } else {
            int32_t row = thread / kChunks, chunk = thread % kChunks * 8;
            uint32_t offset = row * (kTileK * 2) + ((thread % kChunks ^ (row & 7)) << 4);
            const unsigned char *token[kPasses];
            uint32_t token_valid = 0;
#pragma unroll
            for (int held = 0; held < kHeld; ++held)
                slot[held] = token_of(slot[held], problem.args);
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                int32_t of =
                    __shfl_sync(0xffffffffu, slot[pass / kChunks], pass % kChunks, kChunks);
                token[pass] = reinterpret_cast<const unsigned char *>(
                    problem.tokens() + max(of, 0) * problem.token_stride() + chunk);
                if (of >= 0) token_valid |= 1u << pass;
            }
            load_slots(slot, next, problem);
            for (int32_t k = 0; k < problem.k_size; k += kTileK, at.next()) {
                mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
                if (thread == 0) copy_boxes(smem, at.stage, work, k, problem);
                uint32_t to = shared_address(smem.token[at.stage]) + offset;
                uint32_t valid = k + chunk < problem.k_size ? token_valid : 0;
#pragma unroll
                for (int group = 0; group < kGroups; ++group) {
                    if (work.num_rows <= group * 64) break;
#pragma unroll
                    for (int pass = group * 4; pass < group * 4 + 4; ++pass) {
                        cp_async_16_wide(to + pass * (kPassRows * kTileK * 2), token[pass],
                                         (valid >> pass & 1) << 4);
                        token[pass] += kTileK * 2;
                    }
                }
                cp_async_arrive(shared_address(&smem.landed[at.stage]));
            }
        }
    }

    // ---------------------------------------------------------------------------------------------
    // The math warpgroups
    // ---------------------------------------------------------------------------------------------

    static __device__ __forceinline__ void wgmma(float (&sums)[kSums], uint64_t token,
                                                 uint64_t weight, int32_t scale_d)
    {
        constexpr bool kBf16 = Type::kDtype == MOE_BF16;
        if constexpr (kCols == 256 && kBf16) wgmma_m64n256k16_bf16(sums, token, weight, scale_d);
        if constexpr (kCols == 256 && !kBf16) wgmma_m64n256k16_f16(sums, token, weight, scale_d);
        if constexpr (kCols == 192 && kBf16) wgmma_m64n192k16_bf16(sums, token, weight, scale_d);
        if constexpr (kCols == 192 && !kBf16) wgmma_m64n192k16_f16(sums, token, weight, scale_d);
        if constexpr (kCols == 128 && kBf16) wgmma_m64n128k16_bf16(sums, token, weight, scale_d);
        if constexpr (kCols == 128 && !kBf16) wgmma_m64n128k16_f16(sums, token, weight, scale_d);
    }

    // All of K. after_first, after_last: to be done while the products of a tile's first step are under way, of its last.
    template <class AfterFirst, class AfterLast>
    static __device__ __forceinline__ void
    multiply(float (&sums)[kSums], shared &smem, position &at, int32_t num_rows, int32_t num_steps,
             uint32_t &turn, AfterFirst after_first, AfterLast after_last)
    {
        uint32_t group = threadIdx.x / 128;
        // The ring does not hold so much that one could be two turns ahead of the next.
        bool staggered = num_rows > 64 && num_steps <= kLagSteps && num_steps + kLag > kStages;
        if (staggered && group > 0) {
            mbarrier_wait(shared_address(&smem.turn[group - 1]), turn);
            turn ^= 1;
        }
        if (static_cast<int32_t>(group * 64) >= num_rows) { // nothing but padding
            for (int32_t step = 0; step < num_steps; ++step) {
                mbarrier_wait(shared_address(&smem.landed[at.stage]), at.parity);
                release_stage(smem.read[at.stage]);
                at.next();
            }
            return;
        }
        uint32_t before = 0;
        for (int32_t step = 0; step < num_steps; ++step) {
            mbarrier_wait(shared_address(&smem.landed[at.stage]), at.parity);
            // cp.async writes through the generic proxy, wgmma reads through the other
            if constexpr (kGather) fence_proxy_async();
            uint64_t token =
                wgmma_descriptor(shared_address(smem.token[at.stage]) + group * kGroupBytes);
            uint64_t weight = wgmma_descriptor(shared_address(smem.weight[at.stage]));
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kTileK / 16; ++k)
                wgmma(sums, token + k * 2, weight + k * 2, step + k);
            wgmma_commit();
            if (staggered && group < kGroups - 1 && step == kLag - 1 && threadIdx.x % 32 == 0)
                mbarrier_arrive(shared_address(&smem.turn[group]));
            if (step == 0) {
                after_first();
            } else {
                wgmma_wait<1>();
                release_stage(smem.read[before]);
            }
            before = at.stage;
            at.next();
        }
        after_last();
        wgmma_wait<0>();
        release_stage(smem.read[before]);
    }

    // ---------------------------------------------------------------------------------------------
    // Results. wgmma gives lane l of warp w rows 16 w + l / 4 and + 8 ("half" 0 and 1) and of each block j of 8
    // columns 2 (l % 4) and + 1: sums[4 j + 2 half] and the next.
    // ---------------------------------------------------------------------------------------------

    // The column of a lane's first sum of block j.
    static __device__ __forceinline__ int32_t lane_col(int32_t j)
    {
        return j * 8 + threadIdx.x % 4 * 2;
    }

    // Blocks j and j + 1 of the warp's 16 rows, of the kOutCols / 8 that shared memory holds:
    // pairs[2 (j' - j) + half] is two rounded neighbours.
    static __device__ __forceinline__ void out_put(shared &smem, int32_t j,
                                                   const uint32_t (&pairs)[4])
    {
        int32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
        stmatrix_x4(shared_address(smem.out[row]) + (j + lane / 16) * 16, pairs);
    }

    // The warp's rows go to base + (row_begin + row) * stride + col, those columns below num_cols: rows in one piece,
    // 16 bytes a lane.
    static __device__ __forceinline__ void out_copy(shared &smem, const work &work, void *base,
                                                    int64_t stride, int32_t col, int32_t num_cols)
    {
        constexpr int kLanes = kOutCols / 8, kAtOnce = 32 / kLanes; // lanes for a row; rows at once
        int32_t lane = threadIdx.x % 32, chunk = lane % kLanes * 8;
        int32_t begin = threadIdx.x / 32 * 16, row = begin + lane / kLanes;
        int32_t end = min(work.num_rows, begin + 16);
        if (lane >= kLanes * kAtOnce || chunk >= num_cols - col) end = 0;
        element *to =
            static_cast<element *>(base) + (int64_t{work.row_begin} + row) * stride + col + chunk;
        __syncwarp();
#pragma unroll
        for (int r = 0; r < 16; r += kAtOnce) {
            if (row + r < end) {
                uint4 held = *reinterpret_cast<const uint4 *>(&smem.out[row + r][chunk * 2]);
                if constexpr (kGather)
                    *reinterpret_cast<uint4 *>(to) = held; // down reads it soon
                else
                    __stcs(reinterpret_cast<uint4 *>(to), held); // more than L2 holds
            }
            to += kAtOnce * stride;
        }
        __syncwarp(); // before the next put
    }

    // Router weights where they are rare (gate_up): a thread has those of its two rows.
    struct own_weights {
        int32_t slot[2];
        float weight[2] = {1.0f, 1.0f};

        static __device__ __forceinline__ int32_t row()
        {
            return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        }

        template <class Args>
        __device__ __forceinline__ void after_first(const shared &smem, uint32_t tile,
                                                    const Args &args)
        {
            if (!args.topk_weights) return;
            const auto own = get_work(smem, tile);
#pragma unroll
            for (int half = 0; half < 2; ++half)
                slot[half] = row() + half * 8 < own.num_rows
                                 ? args.sorted_token_ids[own.row_begin + row() + half * 8]
                                 : -1;
        }

        template <class Args>
        __device__ __forceinline__ void after_last(shared &, const Args &args)
        {
            if (!args.topk_weights) return;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                weight[half] = weight_of(slot[half], args);
        }

        template <class Args>
        __device__ __forceinline__ void next(const work &, const Args &)
        {
        }

        template <class Args>
        __device__ __forceinline__ void get(const shared &, const Args &)
        {
        }
    };

    // Where they are the rule (down): a load that waits for another at the end of a tile is time in which nothing
    // multiplies, so lane l asks for the slot of the warp's row l a tile ahead and has the weight copied during the first
    // step, to behind the row's results in shared memory.
    struct copied_weights {
        int32_t slot;
        float weight[2];

        static __device__ __forceinline__ int32_t row()
        {
            return threadIdx.x / 32 * 16 + threadIdx.x % 16;
        }

        static __device__ __forceinline__ float *at(shared &smem, int32_t row)
        {
            return reinterpret_cast<float *>(&smem.out[row][kOutCols * 2]);
        }

        // Outside of multiply: a warpgroup of padding alone has no first step.
        template <class Args>
        __device__ __forceinline__ void next(const work &work, const Args &args)
        {
            if (!args.topk_weights) return;
            slot = row() < work.num_rows ? args.sorted_token_ids[work.row_begin + row()] : -1;
        }

        template <class Args>
        __device__ __forceinline__ void after_first(shared &smem, uint32_t, const Args &args) const
        {
            if (!args.topk_weights || args.weights_dtype != MOE_F32) return;
            int32_t token = token_of(slot, args);
            const float *from = static_cast<const float *>(args.topk_weights);
            if (token >= 0) from += token * args.weights_stride + (slot - token * args.topk);
            if (threadIdx.x % 32 < 16)
                cp_async_4(shared_address(at(smem, row())), from, token >= 0 ? 4 : 0);
            cp_async_commit();
        }

        // No copy converts.
        template <class Args>
        __device__ __forceinline__ void after_last(shared &smem, const Args &args) const
        {
            if (!args.topk_weights || args.weights_dtype == MOE_F32) return;
            float of_row = weight_of(slot, args);
            if (threadIdx.x % 32 < 16) *at(smem, row()) = of_row;
        }

        template <class Args>
        __device__ __forceinline__ void get(shared &smem, const Args &args)
        {
            weight[0] = weight[1] = 1.0f;
            if (!args.topk_weights) return;
            cp_async_wait<0>();
            __syncwarp();
            int32_t own = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
            weight[0] = *at(smem, own);
            weight[1] = *at(smem, own + 8);
        }
    };

    static __device__ __forceinline__ auto router_weights()
    {
        if constexpr (kGather)
            return own_weights{};
        else
            return copied_weights{};
    }

    static __device__ __forceinline__ void producer_sync() { named_barrier_sync(1, kCopyThreads); }

    static __device__ __forceinline__ void start(shared &smem)
    {
        if (threadIdx.x == 0) {
#pragma unroll
            for (int stage = 0; stage < kStages; ++stage) {
                mbarrier_init(shared_address(&smem.landed[stage]), kGather ? kCopyThreads + 1 : 1);
                mbarrier_init(shared_address(&smem.read[stage]), kMathThreads / 32);
            }
#pragma unroll
            for (uint64_t &turn : smem.turn)
                mbarrier_init(shared_address(&turn), 4);
            fence_proxy_async();
        }
        __syncthreads();
    }

    // All tiles of this block. Problem: weights, tokens: the maps; box(col, part, rows) -> coordinates of half the
    // weights of a tile; tokens(), token_stride(): of gathered rows;
    // write(smem, work, sums, weight of this thread's two rows); args, num_cols, k_size; band_tiles: of the
    // list; kTaken: which number behind num_tiles counts the items taken.
    template <class Problem>
    static __device__ __forceinline__ void run(shared &smem, const Problem &problem)
    {
        const auto &args = problem.args;
        start(smem);
        grid_dependency_wait();
        grid_launch_dependents();
        int32_t num_steps = (problem.k_size + kTileK - 1) / kTileK;
        position at;
        const list list(args, problem.num_cols, problem.band_tiles);
        uint32_t tile = 0;
        work work = list.find(blockIdx.x);

        if (threadIdx.x >= kMathThreads) {
            set_registers_fewer<kCopyRegisters>();
            const bool first = threadIdx.x == kMathThreads;
            auto next = list.find(blockIdx.x + gridDim.x);
            uint32_t item = blockIdx.x + 2 * gridDim.x;
            int32_t slot[kHeld];
            load_slots(slot, work, problem);
            // items of this stage that are taken; align has set it to 0
            int32_t *taken = const_cast<int32_t *>(args.num_tiles) + Problem::kTaken;
            if (first) put_work(smem, 0, work);
            for (; work.num_rows >= 0 && (kGather || first); ++tile) {
                if (first) {
                    put_work(smem, tile + 1, next);
                    smem.item[tile % 2] = item;
                    item = kAhead * gridDim.x + atomicAdd(taken, 1);
                }
                if constexpr (kGather) producer_sync();
                auto after = list.find(smem.item[tile % 2]);
                copy_tile(smem, at, work, slot, next, problem);
                work = next;
                next = after;
            }
        } else {
            set_registers_more<kMathRegisters>();
            uint32_t turn = 0;
            auto rows = router_weights();
            rows.next(work, args);
            // What a tile is stays in shared memory: the sums leave few registers.
            for (int32_t num_rows = work.num_rows; num_rows >= 0; ++tile) {
                float sums[kSums];
                multiply(
                    sums, smem, at, num_rows, num_steps, turn,
                    [&] { rows.after_first(smem, tile, args); },
                    [&] { rows.after_last(smem, args); });
                rows.next(get_work(smem, tile + 1), args);
                if (static_cast<int32_t>(threadIdx.x / 128 * 64) < num_rows) {
                    rows.get(smem, args);
                    problem.template write<gemm_wgmma>(smem, get_work(smem, tile), sums,
                                                       rows.weight);
                }
                num_rows = get_work(smem, tile + 1).num_rows;
            }
        }
    }
};

#endif
