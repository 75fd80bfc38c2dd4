/* gemm_wgmma.cuh: the main loop of the Hopper grouped GEMMs (gate_up_sm90a.cu, down_sm90a.cu).
 *
 * Math   sums[r, n] = token_row(r) . weight_row(n), f32, tile after tile: kRows token rows of one expert and
 *        kCols of its weight rows; K in steps of kTileK, always in the same order
 * How    one thread block per SM, which takes tiles from the list as long as there are any. A producer warpgroup
 *        fills a ring of kStages stages and runs ahead into the next tile: weights by the copy engine in two boxes of
 *        kCols / 2 rows, token rows by it too, or by 16-byte cp.async where they are gathered. Math warpgroups, two
 *        or three, multiply 64 rows each with wgmma m64n<kCols>k16 (two of half the columns where three of them have more
 *        than 192), token rows on M, weight rows on N, both operands from the ring.
 *        Chunk c of row r lies at chunk c ^ (r % 8), wgmma's 128-byte swizzle, whoever writes it.
 * Out    gate_up: a warp puts its 16 rows of rounded results into shared memory (stmatrix), kOutCols columns at a time,
 *        and stores them row after row: whole lines, and no other warp waits for it. Where the ring leaves no room, the
 *        rows that the warp has just multiplied by make it. down: from registers (down_wgmma.cuh)
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
    using T = Type;
    using element = typename Type::element;

    static constexpr int kGroups = kRows / 64; // math warpgroups: one for 64 rows
    static constexpr int kMathThreads = kGroups * 128;
    static constexpr int kCopyThreads = 32 * MOE_GEMM_PRODUCERS_sm90a;
    static constexpr int kChunks = kTileK / 8; // 16-byte chunks of a row of a stage
    static constexpr int kPassRows = kCopyThreads / kChunks;
    static constexpr int kPasses = kRows / kPassRows;
    static constexpr int kTokenBytes = kRows * kTileK * 2; // of a stage
    static constexpr int kGroupBytes = 64 * kTileK * 2;    // the rows of one math warpgroup
    static constexpr int kWeightBytes = kCols * kTileK * 2;
    static constexpr int kBoxRows = MOE_GEMM_WEIGHT_BOX_sm90a(kCols); // two boxes a stage
    static constexpr int kSums = kCols / 2;                           // of a thread
    // gate_up: without room of their own results leave through the token rows of their tile's last stage, 64 columns at a time.
    static constexpr bool kOutInRing =
        kGather && MOE_GEMM_OUT_COLS_sm90a(kRows, kCols, kTileK, kStages) == 0;
    static constexpr int kOutCols =
        kOutInRing ? kTileK : MOE_GEMM_OUT_COLS_sm90a(kRows, kCols, kTileK, kStages);
    static constexpr bool kOutOwn = kGather && !kOutInRing;
    static constexpr int kOutPitch = kOutCols * 2 + 16; // bytes; eight rows lie in different banks
    // The sums leave few registers, for the math and for the copies: what can lies in shared memory.
    static constexpr bool kFewRegisters = kGroups == 3 && kCols > 192;
    // Biases of a tile's columns in shared memory, for each warp, asked for behind its last step: down has room of its own for
    // them, or none; gate_up puts them where the results will lie.
    static constexpr bool kColBias = !kGather && !kFewRegisters && kGroups * kCols > 384,
                          kBiasAhead = kOutOwn || kColBias;
    // All of what the launch gives goes to whoever needs it; no more, or a warp would wait for it for ever.
    static constexpr int kMathRegisters = kGroups == 2 ? 216 : kFewRegisters ? 160 : 152;
    static constexpr int kCopyRegisters = kGroups == 2 ? 72 : kFewRegisters ? 32 : 56;
    static constexpr int kThreads = kMathThreads + kCopyThreads;
    static_assert(kMathThreads * kMathRegisters + kCopyThreads * kCopyRegisters <=
                  65536 / kThreads / 8 * 8 * kThreads);
    // Token rows of a step from shared memory once, not once for each of the two instructions of its columns.
    static constexpr bool kTokenRegisters = kFewRegisters && kCols == 224;
    static constexpr bool kTokensInShared = kFewRegisters && kGather;
    // Tiles in a column before the next column: neighbours in time share weights and token rows in L2.
    static constexpr uint32_t kRaster = 8;
    // Items a block knows ahead: it takes the first kAhead at fixed places, then whatever is next when it gets there.
    // Between the producer and the slowest math warp lie at most kStages + kAhead of them.
    static constexpr uint32_t kAhead = 3, kItems = 16;
    // In tiles of few steps each warpgroup starts kLag steps behind the one before: one's results leave during the
    // others' math.
    static constexpr int32_t kLag = kGroups == 2 ? 2 : 1, kLagSteps = kFewRegisters ? 0 : 4;

    static_assert(kTileK == MOE_MAP_COLS, "a row of a stage is the 128 bytes of the swizzle");
    static_assert(kCols == 256 || kCols == 224 || kCols == 192 || kCols == 128, "wgmma() below");
    static_assert(kGroups == 2 || kGroups == 3, "registers for the sums");
    static_assert(kChunks == 8 && kPassRows == 16,
                  "copy_tile: eight lanes a row, four passes for 64 rows");

    struct shared {
        alignas(1024) unsigned char token[kStages][kTokenBytes];
        alignas(1024) unsigned char weight[kStages][kWeightBytes];
        alignas(128) unsigned char out[kOutOwn ? kRows : 1][kOutOwn ? kOutPitch : 16];
        alignas(16) float col_bias[kColBias ? kMathThreads / 32 : 1][kColBias ? kCols : 4];
        float row_weight[kGather ? 1 : 2][kGather ? 1 : kRows]; // down: of tile n at n % 2
        // landed: all bytes of a stage and every gathering thread; read: its wgmma are done, one per math warp
        alignas(8) uint64_t landed[kStages];
        uint64_t read[kStages];
        // work: of tile n at n % kItems, for the math warps, written before tile n - 1 lands; item: of tile n + 2 at
        // n % 2, for the producer warps; turn: this math warpgroup is kLag steps into a tile, one arrival per warp
        int4 work[kItems];
        uint32_t item[2];
        uint64_t turn[kGroups - 1];
        // with few registers: the token of row r of tile n at [n % 2][r % kPassRows][r / kPassRows]; where a math warp
        // is in the ring, while its results leave, and their stage and tile
        alignas(16)
            int32_t row_token[kTokensInShared ? 2 : 1][kPassRows][kTokensInShared ? kPasses : 4];
        alignas(16) uint4 kept[kFewRegisters ? kMathThreads / 32 : 1];
    };
    static_assert(sizeof(shared) <= MOE_GEMM_SMEM_BYTES_sm90a(kRows, kCols, kTileK, kStages),
                  "the host launches with the size that its macro gives");

    // Where a thread or warp is in the ring; goes on from tile to tile.
    using position = stage_position<kStages>;

    // In shared memory the number of its tile stands above an expert's, where anybody asks for it (gemm_high.cuh).
    static constexpr int32_t kExpertMask = 0x3ff;
    struct work {
        int32_t expert, row_begin, num_rows, col_begin; // num_rows < 0: past the end of the list
        bool alone; // the only tile of its expert: no other block reads these weights
    };

    static __device__ __forceinline__ void put_work(shared &smem, uint32_t tile, const work &work)
    {
        smem.work[tile % kItems] = make_int4(work.expert, work.row_begin, work.num_rows,
                                             work.col_begin | static_cast<int32_t>(work.alone));
    }

    static __device__ __forceinline__ work get_work(const shared &smem, uint32_t tile)
    {
        int4 held;
        if constexpr (kFewRegisters && !kGather) { // each time anew
            const volatile int4 &at = smem.work[tile % kItems];
            held = {at.x, at.y, at.z, at.w};
        } else {
            held = smem.work[tile % kItems];
        }
        return {held.x & kExpertMask, held.y, held.z, held.w & ~1, (held.w & 1) != 0};
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

    // A stage's weights. Its barrier has been told to expect them.
    template <class Problem>
    static __device__ __forceinline__ void
    copy_weights(shared &smem, uint32_t stage, const work &work, int32_t k, const Problem &problem)
    {
        uint32_t landed = shared_address(&smem.landed[stage]);
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

    // Token rows that lie behind each other.
    template <class Problem>
    static __device__ __forceinline__ void
    copy_tokens(shared &smem, uint32_t stage, const work &work, int32_t k, const Problem &problem)
    {
        uint32_t landed = shared_address(&smem.landed[stage]);
        uint32_t to = shared_address(smem.token[stage]);
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
            if (group < groups_of(work))
                tensor_copy_4d(to + group * kGroupBytes, problem.tokens, k,
                               work.row_begin + group * 64, 0, 0, landed);
    }

    // The weights of the first steps, before anything is known of the token rows. Returns of how many.
    template <class Problem>
    static __device__ __forceinline__ int32_t copy_ahead(shared &smem, const work &work,
                                                         const Problem &problem)
    {
        int32_t step = 0;
        if (work.num_rows < 0) return step;
        for (int32_t k = problem.k_begin; step < kStages && k < problem.k_size; k += kTileK) {
            mbarrier_expect_tx(shared_address(&smem.landed[step]), kWeightBytes);
            copy_weights(smem, step++, work, k, problem);
        }
        return step;
    }

    // What the engine brings of a stage. Behind its arrival the stage may land: what a tile is has been written before.
    template <class Problem>
    static __device__ __forceinline__ void copy_stage(shared &smem, uint32_t stage,
                                                      const work &work, int32_t k, int32_t &ahead,
                                                      const Problem &problem)
    {
        const bool there = ahead > 0; // the weights
        --ahead;
        mbarrier_arrive_expect_tx(shared_address(&smem.landed[stage]),
                                  (there ? 0 : kWeightBytes) +
                                      (kGather ? 0 : groups_of(work) * kGroupBytes));
        if (!there) copy_weights(smem, stage, work, k, problem);
        if constexpr (!kGather) copy_tokens(smem, stage, work, k, problem);
    }

    // Pass p brings row t / kChunks + p * kPassRows. Its slot, asked for a tile ahead, is held by one of the eight threads
    // of the row, p % 8 of them, at p / 8: the addresses of this tile's rows need the registers.
    static constexpr int kHeld = (kPasses + 7) / 8;

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

    // 16 bytes of a token row, or zeros. The length a constant: in a register it costs each copy two instructions and three
    // empty ones, and a step of the gather takes as long as a step of the math.
    static __device__ __forceinline__ void copy_piece(uint32_t to, const void *from, bool there)
    {
        if (there)
            cp_async_16_wide(to, from, 16);
        else
            cp_async_16_wide(to, from, 0);
    }

    template <class Problem>
    static __device__ __forceinline__ void
    copy_tile(shared &smem, position &at, const work &work, int32_t (&slot)[kHeld],
              const typename gemm_wgmma::work &next, int32_t ahead, const Problem &problem)
    {
        int32_t thread = threadIdx.x - kMathThreads;
        if constexpr (!kGather) {
            for (int32_t k = problem.k_begin; k < problem.k_size; k += kTileK, at.next()) {
                mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
                copy_stage(smem, at.stage, work, k, ahead, problem);
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
                    problem.tokens() + max(of, 0) * problem.token_stride() + problem.k_begin +
                    chunk);
                if (of >= 0) token_valid |= 1u << pass;
            }
            load_slots(slot, next, problem);
            for (int32_t k = problem.k_begin; k < problem.k_size; k += kTileK, at.next()) {
                mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
                if (thread == 0) copy_stage(smem, at.stage, work, k, ahead, problem);
                uint32_t to = shared_address(smem.token[at.stage]) + offset;
                const bool inside = k + chunk < problem.k_size;
#pragma unroll
                for (int group = 0; group < kGroups; ++group) {
                    if (work.num_rows <= group * 64) break;
#pragma unroll
                    for (int pass = group * 4; pass < group * 4 + 4; ++pass) {
                        copy_piece(to + pass * (kPassRows * kTileK * 2), token[pass],
                                   inside && (token_valid >> pass & 1));
                        token[pass] += kTileK * 2;
                    }
                }
                cp_async_arrive(shared_address(&smem.landed[at.stage]));
            }
        }
    }

    // The producer with few registers: what a tile is and which tokens its rows are lies in shared memory.

    // The slots of a tile's rows thread, thread + kCopyThreads.
    template <class Args>
    static __device__ __forceinline__ void load_own_slots(int32_t (&slot)[kHeld], const work &work,
                                                          const Args &args)
    {
        int32_t row = threadIdx.x - kMathThreads;
#pragma unroll
        for (int held = 0; held < kHeld; ++held, row += kCopyThreads)
            slot[held] = row < work.num_rows ? args.sorted_token_ids[work.row_begin + row] : -1;
    }

    template <class Args>
    static __device__ __forceinline__ void
    put_tokens(shared &smem, uint32_t tile, const int32_t (&slot)[kHeld], const Args &args)
    {
        int32_t row = threadIdx.x - kMathThreads;
#pragma unroll
        for (int held = 0; held < kHeld; ++held, row += kCopyThreads)
            if (row < kRows)
                smem.row_token[tile % 2][row % kPassRows][row / kPassRows] =
                    token_of(slot[held], args);
    }

    // A step of a tile: this thread's chunk, from column k, of four rows at a time.
    template <class Problem>
    static __device__ __forceinline__ void copy_rows(uint32_t to, uint32_t tokens, int32_t num_rows,
                                                     int32_t k, const Problem &problem)
    {
        static_assert(kPassRows * 4 == 64, "four passes for the rows of a warpgroup");
        const auto *from = problem.tokens() + k;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            if (num_rows <= group * 64) break;
            uint4 four = load_shared_16(tokens + group * 16);
            int32_t token[4] = {static_cast<int32_t>(four.x), static_cast<int32_t>(four.y),
                                static_cast<int32_t>(four.z), static_cast<int32_t>(four.w)};
#pragma unroll
            for (int i = 0; i < 4; ++i)
                copy_piece(to + (group * 4 + i) * (kPassRows * kTileK * 2),
                           from + max(token[i], 0) * problem.token_stride(),
                           token[i] >= 0 && k < problem.k_size);
        }
    }

    template <class Problem>
    static __device__ __forceinline__ void copy_tile(shared &smem, position &at, uint32_t tile,
                                                     int32_t ahead, const Problem &problem)
    {
        const int32_t thread = threadIdx.x - kMathThreads, row = thread / kChunks;
        const uint32_t offset = row * (kTileK * 2) + ((thread % kChunks ^ (row & 7)) << 4);
        const uint32_t tokens = shared_address(smem.row_token[tile % 2][row]);
        const int32_t num_rows = get_work(smem, tile).num_rows;
        for (int32_t k = 0; k < problem.k_size; k += kTileK, at.next()) {
            mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
            if (thread == 0) copy_stage(smem, at.stage, get_work(smem, tile), k, ahead, problem);
            if constexpr (kGather) {
                copy_rows(shared_address(smem.token[at.stage]) + offset, tokens, num_rows,
                          k + thread % kChunks * 8, problem);
                cp_async_arrive(shared_address(&smem.landed[at.stage]));
            }
        }
    }

    // All tiles. What comes next is looked up before a tile's copies, not during them.
    template <class Problem>
    static __device__ __forceinline__ void produce(shared &smem, position &at, const list &list,
                                                   const work &first, int32_t ahead,
                                                   const Problem &problem)
    {
        const auto &args = problem.args;
        const bool leads = threadIdx.x == kMathThreads;
        uint32_t item = blockIdx.x + gridDim.x, after = item + gridDim.x;
        int32_t *taken = const_cast<int32_t *>(args.num_tiles) + Problem::kTaken;
        int32_t slot[kHeld];
        if constexpr (kGather) load_own_slots(slot, first, args);
        if (leads) put_work(smem, 0, first);
        int32_t num_rows = first.num_rows;
        for (uint32_t tile = 0; num_rows >= 0 && (kGather || leads); ++tile) {
            if (leads) {
                put_work(smem, tile + 1, list.find(item));
                item = after;
                after = kAhead * gridDim.x + atomicAdd(taken, 1);
            }
            if constexpr (kGather) {
                put_tokens(smem, tile, slot, args);
                producer_sync();
                load_own_slots(slot, get_work(smem, tile + 1), args);
            }
            copy_tile(smem, at, tile, ahead, problem);
            ahead = 0;
            num_rows = get_work(smem, tile + 1).num_rows;
        }
    }

    // ---------------------------------------------------------------------------------------------
    // The math warpgroups
    // ---------------------------------------------------------------------------------------------

    static __device__ __forceinline__ void wgmma(float (&sums)[kSums], uint64_t token,
                                                 uint64_t weight, int32_t scale_d)
    {
        constexpr bool kBf16 = Type::kDtype == MOE_BF16;
        if constexpr (kCols == 256 && kGroups == 3) {
            // two of half the columns: one would have to fit the registers of the launch
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                auto &of = reinterpret_cast<float(&)[kSums / 2]>(sums[half * (kSums / 2)]);
                uint64_t rows = weight + half * (kWeightBytes / 2 >> 4);
                if constexpr (kBf16)
                    wgmma_m64n128k16_bf16(of, token, rows, scale_d);
                else
                    wgmma_m64n128k16_f16(of, token, rows, scale_d);
            }
        }
        if constexpr (kCols == 256 && kGroups == 2 && kBf16)
            wgmma_m64n256k16_bf16(sums, token, weight, scale_d);
        if constexpr (kCols == 256 && kGroups == 2 && !kBf16)
            wgmma_m64n256k16_f16(sums, token, weight, scale_d);
        if constexpr (kCols == 192 && kBf16) wgmma_m64n192k16_bf16(sums, token, weight, scale_d);
        if constexpr (kCols == 192 && !kBf16) wgmma_m64n192k16_f16(sums, token, weight, scale_d);
        if constexpr (kCols == 128 && kBf16) wgmma_m64n128k16_bf16(sums, token, weight, scale_d);
        if constexpr (kCols == 128 && !kBf16) wgmma_m64n128k16_f16(sums, token, weight, scale_d);
    }

    // The same with the token rows in registers, in two instructions of half the columns.
    static __device__ __forceinline__ void wgmma(float (&sums)[kSums], const uint32_t (&token)[4],
                                                 uint64_t weight, int32_t scale_d)
    {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            auto &of = reinterpret_cast<float(&)[kSums / 2]>(sums[half * (kSums / 2)]);
            uint64_t rows = weight + half * (kWeightBytes / 2 >> 4);
            if constexpr (Type::kDtype == MOE_BF16)
                wgmma_m64n112k16_bf16(of, token, rows, scale_d);
            else
                wgmma_m64n112k16_f16(of, token, rows, scale_d);
        }
    }

    // All of K that way. A warp reads its own 16 rows; while it waits, the other warpgroups multiply.
    template <class AfterFirst, class AfterLast>
    static __device__ __forceinline__ void
    multiply_registers(float (&sums)[kSums], shared &smem, position &at, int32_t num_steps,
                       AfterFirst after_first, AfterLast after_last)
    {
        const uint32_t row = threadIdx.x / 32 * 16 + threadIdx.x % 16;
        for (int32_t step = 0; step < num_steps; ++step) {
            mbarrier_wait(shared_address(&smem.landed[at.stage]), at.parity);
            uint32_t rows = shared_address(smem.token[at.stage]) + row * (kTileK * 2);
            uint32_t token[kTileK / 16][4];
#pragma unroll
            for (int k = 0; k < kTileK / 16; ++k)
                ldmatrix_x4(token[k], rows + (((k * 2 + threadIdx.x % 32 / 16) ^ (row & 7)) << 4));
            uint64_t weight = wgmma_descriptor(shared_address(smem.weight[at.stage]));
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kTileK / 16; ++k)
                wgmma(sums, token[k], weight + k * 2, step + k);
            wgmma_commit();
            if (step == 0) after_first();
            if (step == num_steps - 1) after_last();
            wgmma_wait<0>();
            if (step < num_steps - 1) release_stage(smem.read[at.stage]);
            at.next();
        }
    }

    // Where the epilogue changes the sums in place: without a first value they would be taken for those of the tile before.
    template <class Problem>
    static __device__ __forceinline__ void begin_sums(float (&sums)[kSums])
    {
        if constexpr (Problem::kInPlace)
#pragma unroll
            for (float &sum : sums)
                sum = 0.0f;
    }

    // All of K. after_first, after_last: to be done while the products of a tile's first step are under way, of its last.
    // With results in the ring the last stage stays the warp's.
    template <class AfterFirst, class AfterLast>
    static __device__ __forceinline__ void
    multiply(float (&sums)[kSums], shared &smem, position &at, int32_t num_rows, int32_t num_steps,
             uint32_t &turn, AfterFirst after_first, AfterLast after_last)
    {
        uint32_t group = threadIdx.x / 128;
        // The ring does not hold so much that one could be two turns ahead of the next.
        bool staggered =
            kLagSteps > 0 && num_rows > 64 && num_steps <= kLagSteps && num_steps + kLag > kStages;
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
        if constexpr (kTokenRegisters) {
            multiply_registers(sums, smem, at, num_steps, after_first, after_last);
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
        if constexpr (kOutInRing)
            named_barrier_sync(2 + group, 128); // every warp is done with the token rows
        else
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

    // The warp's 16 rows of results in shared memory.
    static __device__ __forceinline__ uint32_t out_rows(shared &smem, uint32_t stage)
    {
        uint32_t warp = threadIdx.x / 32;
        if constexpr (kOutInRing)
            return shared_address(smem.token[stage]) + warp * (16 * kTileK * 2);
        else
            return shared_address(smem.out) + warp * (16 * kOutPitch);
    }

    // 16 bytes of them.
    static __device__ __forceinline__ uint32_t out_chunk(uint32_t out, int32_t row, int32_t chunk)
    {
        if constexpr (kOutInRing)
            return out + row * (kTileK * 2) + ((chunk ^ (row & 7)) << 4);
        else
            return out + row * kOutPitch + chunk * 16;
    }

    static __device__ __forceinline__ uint4 load_kept(const shared &smem)
    {
        return load_shared_16(shared_address(&smem.kept[threadIdx.x / 32]));
    }

    // Where a warp's biases of a tile's columns lie.
    static __device__ __forceinline__ uint32_t bias_rows(shared &smem)
    {
        return kColBias ? shared_address(smem.col_bias[threadIdx.x / 32]) : out_rows(smem, 0);
    }

    // A warp's results: of which tile, and where they are put before they leave.
    struct results {
        shared &smem;
        uint32_t tile, stage;

        __device__ __forceinline__ struct work work() const
        {
            return get_work(smem, kFewRegisters ? load_kept(smem).w : tile);
        }
        __device__ __forceinline__ uint32_t out() const
        {
            uint32_t rows = out_rows(smem, kFewRegisters ? load_kept(smem).z : stage);
            forget(rows);
            return rows;
        }
    };

    // Blocks j and j + 1 of the warp's 16 rows, of the kOutCols / 8 that shared memory holds:
    // pairs[2 (j' - j) + half] is two rounded neighbours.
    static __device__ __forceinline__ void out_put(uint32_t out, int32_t j,
                                                   const uint32_t (&pairs)[4])
    {
        int32_t lane = threadIdx.x % 32;
        stmatrix_x4(out_chunk(out, lane % 16, j + lane / 16), pairs);
    }

    // The warp's rows go to base + (row_begin + row) * stride + col, those columns below num_cols: rows in one piece,
    // 16 bytes a lane.
    static __device__ __forceinline__ void out_copy(uint32_t out, const work &work, void *base,
                                                    int64_t stride, int32_t col, int32_t num_cols)
    {
        constexpr int kLanes = kOutCols / 8, kAtOnce = 32 / kLanes; // lanes for a row; rows at once
        int32_t lane = threadIdx.x % 32, chunk = lane % kLanes * 8;
        int32_t begin = threadIdx.x / 32 * 16, row = lane / kLanes;
        int32_t end = min(work.num_rows - begin, 16);
        if (lane >= kLanes * kAtOnce || chunk >= num_cols - col) end = 0;
        element *to = static_cast<element *>(base) +
                      (int64_t{work.row_begin} + begin + row) * stride + col + chunk;
        __syncwarp();
#pragma unroll
        for (int r = 0; r < 16; r += kAtOnce) {
            if (row + r < end) {
                uint4 held = load_shared_16(out_chunk(out, row + r, chunk / 8));
                __stwb(reinterpret_cast<uint4 *>(to), held); // down reads it soon
            }
            to += kAtOnce * stride;
        }
        __syncwarp(); // before the next put
    }

    // With few registers: where the warp is lies in shared memory while its results leave.
    static __device__ __forceinline__ void keep(shared &smem, const position &at, uint32_t last,
                                                uint32_t tile)
    {
        if constexpr (kFewRegisters) {
            if (threadIdx.x % 32 == 0)
                smem.kept[threadIdx.x / 32] = make_uint4(at.stage, at.parity, last, tile);
            __syncwarp();
        }
    }

    static __device__ __forceinline__ void take_back(const shared &smem, position &at,
                                                     uint32_t &last, uint32_t &tile)
    {
        if constexpr (kFewRegisters) {
            uint4 kept = load_kept(smem);
            at.stage = kept.x, at.parity = kept.y, last = kept.z, tile = kept.w;
        }
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
        __device__ __forceinline__ void after_last(shared &, uint32_t, const Args &args)
        {
            if (!args.topk_weights) return;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                weight[half] = weight_of(slot[half], args);
        }

        template <class Args>
        __device__ __forceinline__ void begin(const shared &, const work &, const Args &)
        {
        }

        template <class Args>
        __device__ __forceinline__ void pass(const shared &, uint32_t, const Args &)
        {
        }

        template <class Args>
        __device__ __forceinline__ void get(const shared &, uint32_t, const Args &)
        {
        }
    };

    // The same where the sums leave no registers: loaded behind the math, one after the other.
    struct late_weights : own_weights {
        using own_weights::weight;

        template <class Args>
        __device__ __forceinline__ void after_first(const shared &, uint32_t, const Args &)
        {
        }

        template <class Args>
        __device__ __forceinline__ void after_last(shared &, uint32_t, const Args &)
        {
        }

        template <class Args>
        __device__ __forceinline__ void get(shared &smem, uint32_t, const Args &args)
        {
            weight[0] = weight[1] = 1.0f;
            if (!args.topk_weights) return;
            const auto work = get_work(smem, load_kept(smem).w);
            int32_t row = own_weights::row();
#pragma unroll
            for (int half = 0; half < 2; ++half, row += 8) {
                forget(row);
                int32_t slot =
                    row < work.num_rows ? args.sorted_token_ids[work.row_begin + row] : -1;
                weight[half] = weight_of(slot, args);
            }
        }
    };

    // Where they are the rule (down): a load that waits for another at the end of a tile is time in which nothing
    // multiplies, and memory answers late while rows are written. So lane l asks for the slot of the warp's row l of the
    // next tile in this one's first step and has the weight copied to shared memory in its last.
    struct copied_weights {
        int32_t slot;
        float weight[2];

        static __device__ __forceinline__ int32_t row()
        {
            return threadIdx.x / 32 * 16 + threadIdx.x % 16;
        }

        template <class Args>
        __device__ __forceinline__ void ask(const work &work, const Args &args)
        {
            if (!args.topk_weights) return;
            slot = row() < work.num_rows ? args.sorted_token_ids[work.row_begin + row()] : -1;
        }

        template <class Args>
        __device__ __forceinline__ void copy(shared &smem, uint32_t tile, const Args &args) const
        {
            if (!args.topk_weights) return;
            float *to = &smem.row_weight[tile % 2][row()];
            const bool leads = threadIdx.x % 32 < 16;
            if (args.weights_dtype != MOE_F32) { // no copy converts
                float of_row = weight_of(slot, args);
                if (leads) *to = of_row;
                return;
            }
            int32_t token = token_of(slot, args);
            const float *from = static_cast<const float *>(args.topk_weights);
            if (token >= 0) from += token * args.weights_stride + (slot - token * args.topk);
            if (leads) cp_async_4(shared_address(to), from, token >= 0 ? 4 : 0);
            cp_async_commit();
        }

        template <class Args>
        __device__ __forceinline__ void begin(shared &smem, const work &work, const Args &args)
        {
            ask(work, args);
            copy(smem, 0, args);
        }

        // Behind these the next tile's place in the list is known: this one's data have landed.
        template <class Args>
        __device__ __forceinline__ void after_first(shared &smem, uint32_t tile, const Args &args)
        {
            ask(get_work(smem, tile + 1), args);
        }

        template <class Args>
        __device__ __forceinline__ void after_last(shared &smem, uint32_t tile, const Args &args)
        {
            copy(smem, tile + 1, args);
        }

        // A tile in which the warpgroup has no row.
        template <class Args>
        __device__ __forceinline__ void pass(shared &smem, uint32_t tile, const Args &args)
        {
            after_first(smem, tile, args);
            after_last(smem, tile, args);
        }

        template <class Args>
        __device__ __forceinline__ void get(shared &smem, uint32_t tile, const Args &args)
        {
            weight[0] = weight[1] = 1.0f;
            if (!args.topk_weights) return;
            cp_async_wait<1>(); // all but the next tile's
            __syncwarp();
            int32_t own = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
            weight[0] = smem.row_weight[tile % 2][own];
            weight[1] = smem.row_weight[tile % 2][own + 8];
        }
    };

    static __device__ __forceinline__ auto router_weights()
    {
        if constexpr (kGather && kFewRegisters)
            return late_weights{};
        else if constexpr (kGather)
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
        sync_block(kThreads);
    }

    // The memory of the barriers is free again. Every thread, when nobody uses them; a barrier of all has to follow.
    static __device__ __forceinline__ void stop(shared &smem)
    {
        if (threadIdx.x != 0) return;
        invalidate(smem.landed);
        invalidate(smem.read);
        invalidate(smem.turn);
    }

    // All tiles of this block. Problem: weights, tokens: the maps; box(col, part, rows) -> coordinates of half the
    // weights of a tile; tokens(), token_stride(): of gathered rows;
    // write(results, sums, weight of this thread's two rows), kInPlace: it changes the sums;
    // bring_bias(smem, tile) behind the products of its last step; args, num_cols, k_size; band_tiles: of the
    // list; kTaken: which number behind num_tiles counts the items taken; k_begin: 0.
    template <class Problem>
    static __device__ __forceinline__ void run(shared &smem, const Problem &problem)
    {
        const auto &args = problem.args;
        start(smem);
        // Down looks at the list and asks for weights before it waits: align, which writes the list, is what gate_up had
        // waited for before it let this grid start.
        if constexpr (kGather) {
            grid_dependency_wait();
            grid_launch_dependents();
        }
        int32_t num_steps = (problem.k_size + kTileK - 1) / kTileK;
        position at;
        const list list(args, problem.num_cols, problem.band_tiles);
        uint32_t tile = 0;
        work work = list.find(blockIdx.x);
        int32_t ahead = threadIdx.x == kMathThreads ? copy_ahead(smem, work, problem) : 0;
        __syncwarp();
        if constexpr (!kGather) {
            grid_dependency_wait();
            grid_launch_dependents();
        }

        if (threadIdx.x >= kMathThreads) {
            set_registers_fewer<kCopyRegisters>();
            if constexpr (kFewRegisters) {
                produce(smem, at, list, work, ahead, problem);
                return;
            }
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
                copy_tile(smem, at, work, slot, next, ahead, problem);
                ahead = 0;
                work = next;
                next = after;
            }
        } else {
            set_registers_more<kMathRegisters>();
            uint32_t turn = 0;
            auto rows = router_weights();
            rows.begin(smem, work, args);
            // What a tile is stays in shared memory: the sums leave few registers.
            for (int32_t num_rows = work.num_rows; num_rows >= 0; ++tile) {
                float sums[kSums];
                begin_sums<Problem>(sums);
                multiply(
                    sums, smem, at, num_rows, num_steps, turn,
                    [&] { rows.after_first(smem, tile, args); },
                    [&] {
                        rows.after_last(smem, tile, args);
                        problem.template bring_bias<gemm_wgmma>(smem, tile);
                    });
                if (static_cast<int32_t>(threadIdx.x / 128 * 64) < get_work(smem, tile).num_rows) {
                    uint32_t last = (at.stage + kStages - 1) % kStages;
                    keep(smem, at, last, tile);
                    rows.get(smem, kFewRegisters ? load_kept(smem).w : tile, args);
                    problem.template write<gemm_wgmma>(results{smem, tile, last}, sums,
                                                       rows.weight);
                    take_back(smem, at, last, tile);
                    if constexpr (kOutInRing) {
                        release_stage(smem.read[last]);
                    }
                } else {
                    rows.pass(smem, tile, args);
                }
                num_rows = get_work(smem, tile + 1).num_rows;
            }
        }
    }
};

#endif
