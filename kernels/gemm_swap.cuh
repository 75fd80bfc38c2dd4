/* gemm_swap.cuh: the main loop of the Hopper grouped GEMMs for up to some dozens of rows an expert
 * (gate_up_swap_sm90a.cu, down_swap_sm90a.cu): a stream of weights with the math behind it.
 *
 * Math   sums[n, r] = weight_row(n) . token_row(r), f32, tile after tile: kCols weight rows of one expert by up to kRows
 *        of its token rows; K in steps of kTileK, always in the same order
 * How    one thread block per SM, which takes items (a tile of the list, kCols columns of it) as long as there are any.
 *        A warp keeps a ring of kStages stages full by the copy engine and runs ahead into the next items: weights in
 *        two boxes of kCols / 2 rows, token rows in boxes of 16 too, or by two warps with 16-byte cp.async where they
 *        are gathered. Two math warpgroups take the items in turn, so that one's results leave during the other's
 *        math: wgmma m64n<kRows>k16, weight rows on M, token rows on N. (Padding costs nothing: the tensor cores wait.)
 *        Chunk c of row r lies at chunk c ^ (r % 8), wgmma's 128-byte swizzle, whoever writes it.
 * Out    a warp transposes 16 weight rows by 16 token rows of rounded results at a time (stmatrix) and stores 32 bytes
 *        of each token row
 * Tails  weight rows past the last one and K past its end are zeros in shared memory and are never read from global
 *        memory. Token rows past the tile are whatever was there: they are columns of the product that nobody reads. */
#ifndef MOE_GEMM_SWAP_CUH
#define MOE_GEMM_SWAP_CUH

#include "gemm_sm90a.cuh"

// kGather: token rows by cp.async from where Problem::token_row says, else by the map of the tokens.
template <class Type, bool kGather, int kRows_, int kCols_, int kTileK_, int kStages_>
struct gemm_swap {
    static constexpr int kRows = kRows_, kCols = kCols_, kTileK = kTileK_, kStages = kStages_;
    using T = Type;
    using element = typename Type::element;

    static constexpr int kBlocks = kCols / 64; // of 64 weight rows, the M of wgmma
    static constexpr int kSums = kRows / 2;    // of a thread and block
    static constexpr int kMathThreads = 256;   // two warpgroups
    static constexpr int kGatherThreads = 64;  // behind the warp that feeds the copy engine
    static constexpr int kCopyThreads = 32 * MOE_GEMM_PRODUCERS_sm90a_swap;
    static constexpr int kPieces = kTileK / MOE_MAP_COLS; // of a stage: 128 bytes of K of every row
    static constexpr int kWeightBytes = kCols * 128;      // of a piece
    static constexpr int kTokenBytes = kRows * 128;
    static constexpr int kBoxRows = MOE_GEMM_WEIGHT_BOX_sm90a_swap(kCols);
    static constexpr int kTokenBox = MOE_GEMM_TOKEN_BOX_sm90a_swap(kRows);
    static constexpr int kChunks = 8; // 16-byte chunks of a row of a piece
    static constexpr int kPassRows = kGatherThreads / kChunks;
    static constexpr int kPasses = kGather ? kRows / kPassRows : 1;
    static constexpr int kOutPitch = 48; // bytes of 16 results; eight rows lie in different banks
    // Registers: 384 * 168 = 2 * 128 * 208 + 128 * 88.
    static constexpr int kMathRegisters = 208, kCopyRegisters = 88;
    // Items a block knows ahead: it takes the first kAhead at fixed places, then whatever is next when it gets there.
    static constexpr uint32_t kAhead = 3, kItems = 16;

    static_assert(kTileK % MOE_MAP_COLS == 0, "a piece of a row is the 128 bytes of the swizzle");
    static_assert(kRows == 32 || kRows == 64 || kRows == 96, "N of wgmma");
    static_assert(kCols % 128 == 0 && kBlocks * kRows <= 256, "sums of a thread");
    static_assert(kStages + kAhead <= kItems, "items between the copies and the slowest math");

    struct shared {
        alignas(1024) unsigned char weight[kStages][kPieces * kWeightBytes];
        alignas(1024) unsigned char token[kStages][kPieces * kTokenBytes];
        alignas(16) unsigned char out[kMathThreads / 32][16 * kOutPitch];
        alignas(16) float row_weight[kMathThreads / 32][kRows];
        // landed: all bytes of a stage and every gathering thread; read: its wgmma are done, one per warp of a group;
        // turn: the other group's warps have seen the last stage of their item land
        alignas(8) uint64_t landed[kStages];
        uint64_t read[kStages], turn[2];
        // of this block's item n at n % kItems: written before item n - 2 lands
        uint32_t item[kItems];
    };
    static_assert(sizeof(shared) <= MOE_GEMM_SMEM_BYTES_sm90a_swap(kRows, kCols, kTileK, kStages),
                  "the host launches with the size that its macro gives");

    // Where a thread or warp is in the ring; goes on from item to item.
    using position = stage_position<kStages>;

    struct work {
        int32_t expert, row_begin, num_rows, col_begin; // num_rows < 0: past the end of the list
    };

    // The list as items: all columns of a tile, then the next tile. An expert's next tile finds its weights in L2.
    struct list {
        const moe_tile *tiles;
        int64_t num_slots;
        uint32_t max_tiles, num_tiles, col_tiles;

        template <class Args>
        __device__ __forceinline__ list(const Args &args, int32_t num_cols)
            : tiles(args.tiles), num_slots(args.num_slots), max_tiles(args.max_tiles),
              num_tiles(min(__ldcg(args.num_tiles), args.max_tiles)),
              col_tiles((static_cast<uint32_t>(num_cols) + kCols - 1) / kCols)
        {
        }

        // The entry of an item: asked for before num_tiles has come, and what it says taken only below that.
        __device__ __forceinline__ int4 load(uint32_t item) const
        {
            uint32_t tile = min(item / col_tiles, max_tiles - 1);
            return __ldcg(reinterpret_cast<const int4 *>(tiles + tile));
        }

        __device__ __forceinline__ work read(uint32_t item, const int4 &entry) const
        {
            uint32_t tile = item / col_tiles;
            if (tile >= num_tiles) return {0, 0, -1, 0};
            int32_t rows =
                static_cast<int32_t>(min(static_cast<int64_t>(entry.z), num_slots - entry.y));
            return {entry.x, entry.y, min(max(rows, 0), kRows),
                    static_cast<int32_t>((item - tile * col_tiles) * kCols)};
        }

        __device__ __forceinline__ work find(uint32_t item) const { return read(item, load(item)); }
    };

    // ---------------------------------------------------------------------------------------------
    // Copies
    // ---------------------------------------------------------------------------------------------

    static __device__ __forceinline__ uint32_t token_boxes(const work &work)
    {
        return static_cast<uint32_t>(work.num_rows + kTokenBox - 1) / kTokenBox;
    }

    // Asks for the weights of a stage and says how many bytes it will hold.
    template <class Problem>
    static __device__ __forceinline__ void
    copy_weights(shared &smem, uint32_t stage, const work &work, int32_t k, const Problem &problem)
    {
        uint32_t landed = shared_address(&smem.landed[stage]);
        uint32_t bytes = kPieces * kWeightBytes;
        if constexpr (!kGather) bytes += kPieces * token_boxes(work) * (kTokenBox * 128);
        mbarrier_arrive_expect_tx(landed, bytes);
        uint32_t to = shared_address(smem.weight[stage]);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            int2 at = problem.box(work.col_begin, part, kBoxRows);
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece)
                tensor_copy_4d(to + piece * kWeightBytes + part * (kWeightBytes / 2),
                               problem.weights, k + piece * MOE_MAP_COLS, at.x, at.y, work.expert,
                               landed);
        }
    }

    template <class Problem>
    static __device__ __forceinline__ void
    copy_tokens(shared &smem, uint32_t stage, const work &work, int32_t k, const Problem &problem)
    {
        uint32_t landed = shared_address(&smem.landed[stage]);
        for (uint32_t box = 0; box < token_boxes(work); ++box) {
            uint32_t to = shared_address(smem.token[stage]) + box * (kTokenBox * 128);
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece)
                tensor_copy_4d(to + piece * kTokenBytes, problem.tokens, k + piece * MOE_MAP_COLS,
                               work.row_begin + static_cast<int32_t>(box * kTokenBox), 0, 0,
                               landed);
        }
    }

    static __device__ __forceinline__ void producer_sync()
    {
        named_barrier_sync(1, 32 + kGatherThreads);
    }

    // The warp of the copy engine. Weights are constants: asked for before what is waited for.
    template <class Problem>
    static __device__ __forceinline__ void feed(shared &smem, const list &list, work work,
                                                typename gemm_swap::work next,
                                                const Problem &problem)
    {
        bool leader = threadIdx.x % 32 == 0;
        int32_t num_steps = (problem.k_size + kTileK - 1) / kTileK;
        uint32_t item = blockIdx.x + 2 * gridDim.x, known = 0;
        auto take = [&] { // the counters of the stages behind num_tiles are zeroed by align
            int32_t *taken = const_cast<int32_t *>(problem.args.num_tiles) + Problem::kTaken;
            return kAhead * gridDim.x + atomicAdd(taken, 1);
        };
        uint32_t early = 0; // stages whose weights were asked for before the wait
        if constexpr (!kGather) {
            known = 2;
            uint32_t steps = num_steps, all = next.num_rows < 0 ? steps : 2 * steps;
            early = work.num_rows < 0 ? 0 : min(all, static_cast<uint32_t>(kStages));
            auto each = [&](uint32_t begin, uint32_t end, auto copy) {
                for (uint32_t step = begin; step < end; ++step) {
                    bool second = step >= steps;
                    copy(step, second ? next : work, (step - (second ? steps : 0)) * kTileK);
                }
            };
            auto weights = [&](uint32_t stage, const auto &of, int32_t k) {
                copy_weights(smem, stage, of, k, problem);
            };
            if (leader) {
                smem.item[2] = item;
                item = take(); // comes while the first weights are asked for
                each(0, min(early, steps), weights);
                smem.item[3] = item;
                each(min(early, steps), early, weights);
                item = take();
            }
            grid_dependency_wait();
            if (leader)
                each(0, early, [&](uint32_t stage, const auto &of, int32_t k) {
                    copy_tokens(smem, stage, of, k, problem);
                });
        }
        position at;
        uint32_t issued = 0;
        for (uint32_t n = 0; work.num_rows >= 0; ++n) {
            if (leader && n >= known) {
                smem.item[(n + 2) % kItems] = item;
                item = take();
            }
            if constexpr (kGather)
                producer_sync();
            else
                __syncwarp();
            auto after = list.find(smem.item[(n + 2) % kItems]);
            if (leader)
                for (int32_t k = 0; k < problem.k_size; k += kTileK, at.next(), ++issued) {
                    if (issued < early) continue;
                    mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
                    copy_weights(smem, at.stage, work, k, problem);
                    if constexpr (!kGather) copy_tokens(smem, at.stage, work, k, problem);
                }
            __syncwarp();
            work = next;
            next = after;
        }
    }

    // The slots of the rows that a gathering thread copies: asked for an item ahead.
    template <class Problem>
    static __device__ __forceinline__ void load_slots(int32_t (&slot)[kPasses], const work &work,
                                                      int32_t row, const Problem &problem)
    {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass, row += kPassRows)
            slot[pass] =
                row < work.num_rows ? problem.args.sorted_token_ids[work.row_begin + row] : -1;
    }

    // The warps that gather: thread t copies chunk t % kChunks of rows t / kChunks + pass * kPassRows.
    template <class Problem>
    static __device__ __forceinline__ void gather(shared &smem, const list &list, work work,
                                                  typename gemm_swap::work next,
                                                  const Problem &problem)
    {
        int32_t thread = threadIdx.x - kMathThreads - 32;
        int32_t row = thread / kChunks, chunk = thread % kChunks;
        uint32_t offset = row * 128 + ((chunk ^ (row & 7)) << 4);
        int32_t slot[kPasses];
        load_slots(slot, work, row, problem);
        position at;
        for (uint32_t n = 0; work.num_rows >= 0; ++n) {
            producer_sync();
            auto after = list.find(smem.item[(n + 2) % kItems]);
            const unsigned char *token[kPasses];
            uint32_t valid = 0;
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                const element *from = problem.token_row(slot[pass]);
                if (from) valid |= 1u << pass;
                token[pass] = reinterpret_cast<const unsigned char *>(from + chunk * 8);
            }
            load_slots(slot, next, row, problem);
            for (int32_t k = 0; k < problem.k_size; k += kTileK, at.next()) {
                mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
                uint32_t to = shared_address(smem.token[at.stage]) + offset;
#pragma unroll
                for (int pass = 0; pass < kPasses; ++pass) {
                    if (pass * kPassRows >= work.num_rows) break;
#pragma unroll
                    for (int piece = 0; piece < kPieces; ++piece) {
                        bool inside = k + piece * MOE_MAP_COLS + chunk * 8 < problem.k_size;
                        cp_async_16_wide(to + piece * kTokenBytes + pass * (kPassRows * 128),
                                         token[pass] + piece * 128,
                                         inside ? (valid >> pass & 1) << 4 : 0);
                    }
                    token[pass] += kPieces * 128;
                }
                cp_async_arrive(shared_address(&smem.landed[at.stage]));
            }
            work = next;
            next = after;
        }
    }

    // ---------------------------------------------------------------------------------------------
    // Math
    // ---------------------------------------------------------------------------------------------

    static __device__ __forceinline__ void wgmma(float (&sums)[kSums], uint64_t weight,
                                                 uint64_t token, int32_t scale_d)
    {
        constexpr bool kBf16 = Type::kDtype == MOE_BF16;
        if constexpr (kRows == 32 && kBf16) wgmma_m64n32k16_bf16(sums, weight, token, scale_d);
        if constexpr (kRows == 32 && !kBf16) wgmma_m64n32k16_f16(sums, weight, token, scale_d);
        if constexpr (kRows == 64 && kBf16) wgmma_m64n64k16_bf16(sums, weight, token, scale_d);
        if constexpr (kRows == 64 && !kBf16) wgmma_m64n64k16_f16(sums, weight, token, scale_d);
        if constexpr (kRows == 96 && kBf16) wgmma_m64n96k16_bf16(sums, weight, token, scale_d);
        if constexpr (kRows == 96 && !kBf16) wgmma_m64n96k16_f16(sums, weight, token, scale_d);
    }

    // All of K. The groups wait for stages in turn: a parity tells this phase of a stage from the next only to whoever
    // knows that the one before has passed, and that one may be the other group's.
    static __device__ __forceinline__ void multiply(float (&sums)[kBlocks][kSums], shared &smem,
                                                    position &at, int32_t num_steps)
    {
        uint32_t before = 0;
        for (int32_t step = 0; step < num_steps; ++step) {
            mbarrier_wait(shared_address(&smem.landed[at.stage]), at.parity);
            if (step == num_steps - 1) {
                __syncwarp(); // a lane left behind in the wait for its own turn would miss that phase
                if (threadIdx.x % 32 == 0)
                    mbarrier_arrive(shared_address(&smem.turn[1 - threadIdx.x / 128]));
            }
            // cp.async writes through the generic proxy, wgmma reads through the other
            if constexpr (kGather) fence_proxy_async();
            uint64_t weight = wgmma_descriptor(shared_address(smem.weight[at.stage]));
            uint64_t token = wgmma_descriptor(shared_address(smem.token[at.stage]));
            wgmma_fence();
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
                for (int k = 0; k < MOE_MAP_COLS / 16; ++k)
#pragma unroll
                    for (int block = 0; block < kBlocks; ++block)
                        wgmma(sums[block],
                              weight + (piece * kWeightBytes + block * 8192 + k * 32) / 16,
                              token + (piece * kTokenBytes + k * 32) / 16, step + piece + k);
            wgmma_commit();
            if (step > 0) {
                wgmma_wait<1>();
                release_stage(smem.read[before]);
            }
            before = at.stage;
            at.next();
        }
        wgmma_wait<0>();
        release_stage(smem.read[before]);
    }

    // ---------------------------------------------------------------------------------------------
    // Results. wgmma gives lane l of warp w of the warpgroup weight rows 16 w + l / 4 and + 8 ("half" 0 and 1) of a block
    // of 64 and of each 8 token rows 2 (l % 4) and + 1: sums[4 j + 2 half] and the next.
    // ---------------------------------------------------------------------------------------------

    // The weight row of a lane's first sum in a block.
    static __device__ __forceinline__ int32_t lane_col()
    {
        return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    }

    // Router weights of the token rows of a lane's y[4 j + 2 half + i] in two neighbouring j: weight[2 j + i].
    static __device__ __forceinline__ void lane_weights(float (&weight)[4], const shared &smem,
                                                        int32_t row)
    {
        const float *from = smem.row_weight[threadIdx.x / 32] + row + threadIdx.x % 4 * 2;
        float2 low = *reinterpret_cast<const float2 *>(from),
               high = *reinterpret_cast<const float2 *>(from + 8);
        weight[0] = low.x, weight[1] = low.y, weight[2] = high.x, weight[3] = high.y;
    }

    // y: 16 columns (those of the warp, from `col`) of token rows row .. row + 15 of the tile, as the sums lie. They go to
    // base + (row_begin + row) * stride + col, rounded, those of rows and columns that there are.
    static __device__ __forceinline__ void write_block(shared &smem, const work &work,
                                                       const float (&y)[8], int32_t row, void *base,
                                                       int64_t stride, int32_t col,
                                                       int32_t num_cols)
    {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            pairs[i] = T::round2(y[2 * i], y[2 * i + 1]);
        int32_t lane = threadIdx.x % 32;
        unsigned char *out = smem.out[threadIdx.x / 32];
        stmatrix_x4_trans(shared_address(out) + (lane / 16 * 8 + lane % 8) * kOutPitch +
                              lane / 8 % 2 * 16,
                          pairs);
        __syncwarp();
        row += lane / 2;
        col += threadIdx.x % 128 / 32 * 16 + lane % 2 * 8;
        if (row < work.num_rows && col < num_cols)
            *reinterpret_cast<uint4 *>(static_cast<element *>(base) +
                                       (int64_t{work.row_begin} + row) * stride + col) =
                *reinterpret_cast<const uint4 *>(out + lane / 2 * kOutPitch + lane % 2 * 16);
        __syncwarp(); // before the next
    }

    // Every warp knows the router weights of all rows of its tile: lane l those of l, l + 32 and so on.
    static constexpr int kLaneRows = (kRows + 31) / 32;

    template <class Problem>
    static __device__ __forceinline__ void
    compute(shared &smem, const work &work, position &at, int32_t num_steps,
            const float (&row_weight)[kLaneRows], const Problem &problem)
    {
        float sums[kBlocks][kSums];
        multiply(sums, smem, at, num_steps);
        if (problem.args.topk_weights) {
#pragma unroll
            for (int i = 0; i < kLaneRows; ++i) {
                int32_t row = threadIdx.x % 32 + i * 32;
                if (row < kRows) smem.row_weight[threadIdx.x / 32][row] = row_weight[i];
            }
            __syncwarp();
        }
        problem.template write<gemm_swap>(smem, work, sums);
    }

    template <class Problem>
    static __device__ __forceinline__ void math(shared &smem, const list &list, work work,
                                                const Problem &problem)
    {
        const auto &args = problem.args;
        uint32_t group = threadIdx.x / 128;
        int32_t lane = threadIdx.x % 32, num_steps = (problem.k_size + kTileK - 1) / kTileK;
        position at;
        uint32_t turn = 1 - group; // the first group's first turn is there
        if (group == 1) at.skip(num_steps);
        for (uint32_t n = group; work.num_rows >= 0; n += 2) {
            float row_weight[kLaneRows] = {};
            if (args.topk_weights)
#pragma unroll
                for (int i = 0; i < kLaneRows; ++i)
                    if (lane + i * 32 < work.num_rows)
                        row_weight[i] =
                            weight_of(args.sorted_token_ids[work.row_begin + lane + i * 32], args);
            mbarrier_wait(shared_address(&smem.turn[group]), turn);
            turn ^= 1;
            mbarrier_wait(shared_address(&smem.landed[at.stage]), at.parity);
            auto next = list.find(smem.item[(n + 2) % kItems]);
            compute(smem, work, at, num_steps, row_weight, problem);
            at.skip(num_steps);
            work = next;
        }
    }

    static __device__ __forceinline__ void start(shared &smem)
    {
        if (threadIdx.x == 0) {
#pragma unroll
            for (int stage = 0; stage < kStages; ++stage) {
                mbarrier_init(shared_address(&smem.landed[stage]),
                              kGather ? kGatherThreads + 1 : 1);
                mbarrier_init(shared_address(&smem.read[stage]), 4);
            }
            mbarrier_init(shared_address(&smem.turn[0]), 4);
            mbarrier_init(shared_address(&smem.turn[1]), 4);
            fence_proxy_async();
        }
        __syncthreads();
    }

    // All items of this block. Problem: weights, tokens: the maps; box(col, part, rows) -> coordinates of half the
    // weights of an item; token_row(slot) -> pointer to the token row of a slot, NULL: zeros;
    // write(smem, work, sums); args, num_cols, k_size; kTaken: which number behind num_tiles counts the items taken.
    template <class Problem>
    static __device__ __forceinline__ void run(shared &smem, const Problem &problem)
    {
        start(smem);
        // down's list is older than the kernel in front of it, which has waited for it
        if (kGather) grid_dependency_wait();
        const list list(problem.args, problem.num_cols);
        if (threadIdx.x < kMathThreads) {
            set_registers_more<kMathRegisters>();
            if (!kGather) grid_dependency_wait();
            grid_launch_dependents();
            math(smem, list, list.find(blockIdx.x + threadIdx.x / 128 * gridDim.x), problem);
        } else {
            set_registers_fewer<kCopyRegisters>();
            uint32_t at = blockIdx.x, then = blockIdx.x + gridDim.x;
            int4 entry = list.load(at), next_entry = list.load(then);
            work first = list.read(at, entry), second = list.read(then, next_entry);
            uint32_t warp = (threadIdx.x - kMathThreads) / 32;
            if (warp == 0) feed(smem, list, first, second, problem);
            if constexpr (kGather)
                if (warp >= 1 && warp <= kGatherThreads / 32)
                    gather(smem, list, first, second, problem);
        }
    }
};

#endif
