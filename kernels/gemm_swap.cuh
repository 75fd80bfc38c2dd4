/* gemm_swap.cuh: the main loop of the Hopper grouped GEMMs for up to some dozens of rows an expert
 * (gate_up_swap_sm90a.cu, down_swap_sm90a.cu, experts_swap_sm90a.cu): a stream of weights with the math behind it.
 *
 * Math   sums[n, r] = weight_row(n) . token_row(r), f32, tile after tile: kCols weight rows of one expert by up to kRows
 *        of its token rows; K in steps of kTileK, always in the same order
 * How    one thread block per SM, which takes items (a tile of the list, kCols columns of it) as long as there are any.
 *        A thread keeps a ring of kStages stages full of weights by the copy engine and runs ahead into the next items;
 *        two warps bring their token rows by 16-byte cp.async. Two math warpgroups take the items in turn, so that one's
 *        results leave during the other's math: wgmma m64n<kRows>k16, weight rows on M, token rows on N. (Padding costs
 *        nothing: the tensor cores wait.) Chunk c of row r lies at chunk c ^ (r % 8), wgmma's 128-byte swizzle.
 * Two    of a layer's GEMMs in one launch: the items of the second behind those of the first in one list. Token rows of
 *        the second are the results of the first: whoever brings them waits until all columns of their tile are there.
 *        Its weights wait for nothing, so that their stream goes on. Items are taken in order, by blocks that run: those
 *        of the first that somebody waits for are under way, however many blocks there are room for.
 * Out    a warp transposes 16 weight rows by 16 token rows of rounded results at a time (stmatrix) and stores 32 bytes
 *        of each token row
 * L2     what is read once makes room first (evict_first), results stay until the next kernel has read them (evict_last)
 * Tails  weight rows past the last one and K past its end are zeros in shared memory and are never read from global
 *        memory. Token rows past the tile are whatever was there: they are columns of the product that nobody reads. */
#ifndef MOE_GEMM_SWAP_CUH
#define MOE_GEMM_SWAP_CUH

#include "gemm_sm90a.cuh"

template <class Type, int kRows_, int kCols_, int kTileK_, int kStages_>
struct gemm_swap {
    static constexpr int kRows = kRows_, kCols = kCols_, kTileK = kTileK_, kStages = kStages_;
    using T = Type;
    using element = typename Type::element;

    static constexpr int kBlocks = kCols / 64; // of 64 weight rows, the M of wgmma
    static constexpr int kSums = kRows / 2;    // of a thread and block
    static constexpr int kMathThreads = 256;   // two warpgroups
    static constexpr int kGatherThreads = 64;  // behind the warp that feeds the copy engine
    static constexpr int kCopyThreads = 32 * MOE_GEMM_PRODUCERS_sm90a_swap;
    static constexpr int kThreads = kMathThreads + kCopyThreads;
    static constexpr int kPieces = kTileK / MOE_MAP_COLS; // of a stage: 128 bytes of K of every row
    static constexpr int kWeightBytes = kCols * 128;      // of a piece
    static constexpr int kTokenBytes = kRows * 128;
    static constexpr int kBoxRows = MOE_GEMM_WEIGHT_BOX_sm90a_swap(kCols);
    static constexpr int kChunks = 8; // 16-byte chunks of a row of a piece
    static constexpr int kPassRows = kGatherThreads / kChunks;
    static constexpr int kPasses = kRows / kPassRows;
    static constexpr int kOutPitch = 48; // bytes of 16 results; eight rows lie in different banks
    // Registers: 384 * 168 = 2 * 128 * 208 + 128 * 88.
    static constexpr int kMathRegisters = 208, kCopyRegisters = 88;
    // A block takes neighbouring items of a tile together, of about so many bytes: what is asked of memory for each of
    // them (the counter, the list) then does not show.
    static constexpr int32_t kTakenBytes = 128 * 1024;
    // Stages before its end that it takes the next ones: who takes early leaves the others less to share.
    static constexpr uint32_t kAhead = 4;
    static constexpr uint32_t kItems = 16;
    static constexpr uint32_t kSignals = 4; // of an item of the first GEMM: the warps of a group

    static_assert(kTileK == MOE_MAP_COLS || kTileK == 2 * MOE_MAP_COLS,
                  "a piece of a row is the 128 bytes of the swizzle");
    static_assert(kRows == 32 || kRows == 64 || kRows == 96, "N of wgmma");
    static_assert(kCols % 128 == 0 && kBlocks * kRows <= 256, "sums of a thread");
    static_assert(kStages + 4 <= kItems, "items between the copies and the slowest math");

    struct alignas(16) work {
        int32_t expert, row_begin, num_rows, col_begin; // num_rows < 0: past the end of the list
        int32_t tile, gemm;                             // gemm: 0 or 1, the second of two
    };

    struct shared {
        alignas(1024) unsigned char weight[kStages][kPieces * kWeightBytes];
        alignas(1024) unsigned char token[kStages][kPieces * kTokenBytes];
        alignas(16) unsigned char out[kMathThreads / 32][16 * kOutPitch];
        alignas(16) float row_weight[kMathThreads / 32][kRows];
        work item[kItems]; // of this block's item n at n % kItems
        // landed: all bytes of a stage and every gathering thread; read: its wgmma are done, one per warp of a group;
        // turn: the other group's warps have seen the last stage of their item land; posted: item n is written
        uint64_t landed[kStages], read[kStages], turn[2], posted[kItems];
        uint32_t high_tiles, high_item; // where there are no items: what follows (gemm_high.cuh)
    };
    static_assert(sizeof(shared) <= MOE_GEMM_SMEM_BYTES_sm90a_swap(kRows, kCols, kTileK, kStages),
                  "the host launches with the size that its macro gives");

    // Where a thread or warp is in the ring; goes on from item to item.
    using position = stage_position<kStages>;

    // f(problem): of the one, or of the two.
    template <class F, class First>
    static __device__ __forceinline__ void with(int32_t, F f, const First &first)
    {
        f(first);
    }
    template <class F, class First, class Second>
    static __device__ __forceinline__ void with(int32_t gemm, F f, const First &first,
                                                const Second &second)
    {
        if (gemm == 0)
            f(first);
        else
            f(second);
    }

    template <class Problem>
    static __device__ __forceinline__ int32_t steps_of(const Problem &problem)
    {
        return (problem.k_size + kTileK - 1) / kTileK;
    }

    template <class Problem>
    static __device__ __forceinline__ uint32_t col_tiles(const Problem &problem)
    {
        return (static_cast<uint32_t>(problem.num_cols) + kCols - 1) / kCols;
    }

    // The list as pieces, each of neighbouring columns of a tile: all columns of a tile, then the next tile. An expert's
    // next tile finds its weights in L2.
    struct list {
        const moe_tile *tiles;
        int64_t num_slots;
        uint32_t max_tiles, num_tiles;
        uint32_t cols[2] = {0, 0}, span[2] = {1, 1},
                 pieces[2] = {0, 0}; // of a tile: items; of a piece: items; pieces

        struct piece {
            uint32_t gemm, tile, col, count;
        };

        template <class First, class... More>
        __device__ __forceinline__ list(const First &first, const More &...more)
            : tiles(first.args.tiles), num_slots(first.args.num_slots),
              max_tiles(first.args.max_tiles),
              num_tiles(min(__ldcg(first.args.num_tiles), first.args.max_tiles))
        {
            measure(0, first);
            (measure(1, more), ...);
        }

        template <class Problem>
        __device__ __forceinline__ void measure(int gemm, const Problem &problem)
        {
            cols[gemm] = col_tiles(problem);
            span[gemm] = max(kTakenBytes / (kCols * 2) / problem.k_size, 1);
            pieces[gemm] = (cols[gemm] + span[gemm] - 1) / span[gemm];
        }

        __device__ __forceinline__ piece find(uint32_t number) const
        {
            uint32_t gemm = number >= num_tiles * pieces[0];
            if (gemm) number -= num_tiles * pieces[0];
            uint32_t of = gemm ? pieces[1] : pieces[0], by = gemm ? span[1] : span[0];
            if (of == 0) return {gemm, num_tiles, 0, 0};
            uint32_t tile = number / of, col = (number - tile * of) * by;
            return {gemm, tile, col, min(by, (gemm ? cols[1] : cols[0]) - col)};
        }

        __device__ __forceinline__ int4 load(const piece &piece) const
        {
            return __ldcg(reinterpret_cast<const int4 *>(tiles + min(piece.tile, max_tiles - 1)));
        }
    };

    // ---------------------------------------------------------------------------------------------
    // Copies
    // ---------------------------------------------------------------------------------------------

    // Pieces of a stage that begin inside of K; what is past them is neither copied nor multiplied.
    template <class Problem>
    static __device__ __forceinline__ int32_t pieces_of(int32_t k, const Problem &problem)
    {
        return min(kPieces, (problem.k_size - k + MOE_MAP_COLS - 1) / MOE_MAP_COLS);
    }

    template <class Problem>
    static __device__ __forceinline__ void
    copy_weights(shared &smem, uint32_t stage, const work &work, int32_t k, const Problem &problem)
    {
        uint32_t landed = shared_address(&smem.landed[stage]);
        int32_t pieces = pieces_of(k, problem);
        mbarrier_arrive_expect_tx(landed, pieces * kWeightBytes);
        uint32_t to = shared_address(smem.weight[stage]);
        // a tile that is not full is its expert's last: nobody asks for its weights again
        const bool once = problem.once() && work.num_rows < kRows;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            int2 at = problem.box(work.col_begin, part, kBoxRows);
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                if (piece >= pieces) break;
                uint32_t there = to + piece * kWeightBytes + part * (kWeightBytes / 2);
                int32_t x = k + piece * MOE_MAP_COLS;
                if (once)
                    tensor_copy_4d_once(there, problem.weights, x, at.x, at.y, work.expert, landed);
                else
                    tensor_copy_4d(there, problem.weights, x, at.x, at.y, work.expert, landed);
            }
        }
    }

    static __device__ __forceinline__ void post(shared &smem, uint32_t n, const work &work)
    {
        smem.item[n % kItems] = work;
        mbarrier_arrive(shared_address(&smem.posted[n % kItems]));
    }

    // The thread of the copy engine. Behind the last item it posts one that says so: a stage without bytes.
    template <bool kHigh, class First, class... More>
    static __device__ __forceinline__ void feed(shared &smem, const First &first,
                                                const More &...more)
    {
        auto take = [&] { // the counters of the stages behind num_tiles are zeroed by align
            int32_t *taken = const_cast<int32_t *>(first.args.num_tiles) + First::kTaken;
            return static_cast<uint32_t>(atomicAdd(taken, 1));
        };
        uint32_t number = take();
        const list list(first, more...);
        auto piece = list.find(number);
        int4 entry = list.load(piece);
        position at;
        uint32_t n = 0;
        while (piece.tile < list.num_tiles) {
            auto next = piece;
            int4 next_entry = entry;
            with(
                piece.gemm,
                [&](const auto &problem) {
                    int32_t rows = static_cast<int32_t>(
                        min(static_cast<int64_t>(entry.z), list.num_slots - entry.y));
                    work work = {entry.x,
                                 entry.y,
                                 min(max(rows, 0), kRows),
                                 static_cast<int32_t>(piece.col * kCols),
                                 static_cast<int32_t>(piece.tile),
                                 static_cast<int32_t>(piece.gemm)};
                    uint32_t left = piece.count * static_cast<uint32_t>(steps_of(problem));
                    const uint32_t take_at = min(left, kAhead);
                    for (uint32_t i = 0; i < piece.count; ++i, work.col_begin += kCols) {
                        post(smem, n++, work);
                        for (int32_t k = 0; k < problem.k_size; k += kTileK, at.next(), --left) {
                            if (left == take_at) number = take();
                            if (left == 1) {
                                next = list.find(number);
                                next_entry = list.load(next);
                            }
                            mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
                            copy_weights(smem, at.stage, work, k, problem);
                        }
                    }
                },
                first, more...);
            piece = next;
            entry = next_entry;
        }
        if constexpr (kHigh) {
            smem.high_item = number;
            smem.high_tiles = list.num_tiles > 0
                                  ? 0
                                  : static_cast<uint32_t>(min(__ldcg(first.args.num_tiles + 3),
                                                              first.args.max_tiles));
        }
        post(smem, n, {0, 0, -1, 0, 0, 0});
        mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
        mbarrier_arrive(shared_address(&smem.landed[at.stage]));
    }

    // Until all columns of a tile of the first GEMM are there. Every lane of the warp.
    template <class First, class... More>
    static __device__ __forceinline__ void wait_for_tile(int32_t tile, const First &first,
                                                         const More &...)
    {
        if constexpr (sizeof...(More) > 0) {
            const int32_t *done = &first.args.tiles[tile].done;
            const int32_t all = static_cast<int32_t>(kSignals * col_tiles(first));
            // Not for ever: two calls that share a workspace at once, as none may, lose each other's counts. Wrong
            // results then, but no kernel without end. A poll takes half a microsecond or more.
            constexpr int32_t kMostPolls = 1 << 23;
            if (threadIdx.x % 32 == 0)
                for (int32_t polls = 0; polls < kMostPolls && load_acquire(done) < all; ++polls) {
                }
            __syncwarp();
        }
    }

    // The warps that gather: thread t copies chunk t % kChunks of rows t / kChunks + pass * kPassRows.
    template <class... Problems>
    static __device__ __forceinline__ void gather(shared &smem, const Problems &...problems)
    {
        int32_t thread = threadIdx.x - kMathThreads - 32;
        int32_t row = thread / kChunks, chunk = thread % kChunks;
        uint32_t offset = row * 128 + ((chunk ^ (row & 7)) << 4);
        // Of tile `tile` of GEMM `gemm`. They go along with K: an address that is made for each copy has to wait until the
        // copy that had its register has been sent.
        const unsigned char *token[kPasses];
        uint32_t valid = 0, missing = 0; // rows of a thread that are there; that are zeros
        int32_t tile = -1, gemm = 0;
        position at;
        for (uint32_t n = 0;; ++n) {
            mbarrier_wait(shared_address(&smem.posted[n % kItems]), n / kItems & 1);
            const work work = smem.item[n % kItems];
            if (work.num_rows < 0) break;
            with(
                work.gemm,
                [&](const auto &problem) {
                    if (work.tile != tile || work.gemm != gemm) {
                        tile = work.tile;
                        gemm = work.gemm;
                        if (gemm) wait_for_tile(tile, problems...);
                        valid = missing = 0;
#pragma unroll
                        for (int pass = 0; pass < kPasses; ++pass) {
                            int32_t of = row + pass * kPassRows;
                            const bool is_row = of < work.num_rows;
                            const element *from =
                                is_row ? problem.token_row(work.row_begin + of) : nullptr;
                            if (from) valid |= 1u << pass;
                            if (is_row && !from) missing |= 1u << pass;
                            token[pass] = reinterpret_cast<const unsigned char *>(from + chunk * 8);
                        }
                    }
                    for (int32_t k = 0; k < problem.k_size; k += kTileK, at.next()) {
                        mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
                        uint32_t to = shared_address(smem.token[at.stage]) + offset;
                        // Instructions are what takes time here: nothing is asked but whether there is a row.
                        const int32_t pieces = pieces_of(k, problem);
                        const int32_t full =
                            min(kPieces, (problem.k_size - k) / MOE_MAP_COLS); // inside of K
                        auto copy = [&](int pass, int piece, uint32_t bytes) {
                            cp_async_16_wide(to + piece * kTokenBytes + pass * (kPassRows * 128),
                                             token[pass] + piece * 128, bytes);
                        };
#pragma unroll
                        for (int piece = 0; piece < kPieces; ++piece) {
                            if (piece >= full) break;
#pragma unroll
                            for (int pass = 0; pass < kPasses; ++pass)
                                if (valid >> pass & 1) copy(pass, piece, 16);
                        }
                        if (full < pieces || missing) {
#pragma unroll
                            for (int piece = 0; piece < kPieces; ++piece) {
                                if (piece >= pieces) break;
                                const bool inside =
                                    k + piece * MOE_MAP_COLS + chunk * 8 < problem.k_size;
                                const uint32_t rows = piece < full ? missing : valid | missing;
#pragma unroll
                                for (int pass = 0; pass < kPasses; ++pass)
                                    if (rows >> pass & 1)
                                        copy(pass, piece, inside ? (valid >> pass & 1) << 4 : 0);
                            }
                        }
                        cp_async_arrive(shared_address(&smem.landed[at.stage]));
#pragma unroll
                        for (int pass = 0; pass < kPasses; ++pass)
                            token[pass] += kTileK * 2;
                    }
                    const int32_t back = steps_of(problem) * (kTileK * 2);
#pragma unroll
                    for (int pass = 0; pass < kPasses; ++pass)
                        token[pass] -= back;
                },
                problems...);
        }
        mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
        mbarrier_arrive(shared_address(&smem.landed[at.stage]));
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

    // A stage of the item, of which kUsed pieces hold something. The groups wait for stages in turn: a parity tells this
    // phase of a stage from the next only to whoever knows that the one before has passed, and that one may be the other
    // group's.
    template <int kUsed>
    static __device__ __forceinline__ void
    multiply_stage(float (&sums)[kBlocks][kSums], shared &smem, position &at, bool first, bool last)
    {
        mbarrier_wait(shared_address(&smem.landed[at.stage]), at.parity);
        if (last) {
            __syncwarp(); // a lane left behind in the wait for its own turn would miss that phase
            if (threadIdx.x % 32 == 0)
                mbarrier_arrive(shared_address(&smem.turn[1 - threadIdx.x / 128]));
        }
        // cp.async writes through the generic proxy, wgmma reads through the other
        fence_proxy_async();
        uint64_t weight = wgmma_descriptor(shared_address(smem.weight[at.stage]));
        uint64_t token = wgmma_descriptor(shared_address(smem.token[at.stage]));
        wgmma_fence();
#pragma unroll
        for (int piece = 0; piece < kUsed; ++piece)
#pragma unroll
            for (int k = 0; k < MOE_MAP_COLS / 16; ++k)
#pragma unroll
                for (int block = 0; block < kBlocks; ++block)
                    wgmma(sums[block], weight + (piece * kWeightBytes + block * 8192 + k * 32) / 16,
                          token + (piece * kTokenBytes + k * 32) / 16, !first + piece + k);
        wgmma_commit();
    }

    // All of K.
    static __device__ __forceinline__ void multiply(float (&sums)[kBlocks][kSums], shared &smem,
                                                    position &at, int32_t k_size)
    {
        const int32_t pieces = (k_size + MOE_MAP_COLS - 1) / MOE_MAP_COLS;
        const int32_t whole = pieces / kPieces, num_steps = (pieces + kPieces - 1) / kPieces;
        uint32_t before = 0;
        auto leave = [&](int32_t step) { // the stage before this one has been read
            if (step > 0) {
                wgmma_wait<1>();
                release_stage(smem.read[before]);
            }
            before = at.stage;
            at.next();
        };
        for (int32_t step = 0; step < whole; ++step) {
            multiply_stage<kPieces>(sums, smem, at, step == 0, step == num_steps - 1);
            leave(step);
        }
        if (whole < num_steps) {
            multiply_stage<1>(sums, smem, at, whole == 0, true);
            leave(whole);
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
            store_16_kept(
                static_cast<element *>(base) + (int64_t{work.row_begin} + row) * stride + col,
                *reinterpret_cast<const uint4 *>(out + lane / 2 * kOutPitch + lane % 2 * 16));
        __syncwarp(); // before the next
    }

    // Every warp knows the router weights of all rows of its tile: lane l those of l, l + 32 and so on.
    static constexpr int kLaneRows = (kRows + 31) / 32;

    // Router weights of the rows of a tile, for every warp: asked for before the math, whose end they wait for.
    template <class Problem>
    static __device__ __forceinline__ void load_weights(float (&row_weight)[kLaneRows],
                                                        const work &work, const Problem &problem)
    {
        if constexpr (Problem::kWeighs) {
            const auto &args = problem.args;
            if (!args.topk_weights) return;
#pragma unroll
            for (int i = 0; i < kLaneRows; ++i) {
                int32_t row = threadIdx.x % 32 + i * 32;
                row_weight[i] = row < work.num_rows
                                    ? weight_of(args.sorted_token_ids[work.row_begin + row], args)
                                    : 0.0f;
            }
        }
    }

    template <class... Problems>
    static __device__ __forceinline__ void math(shared &smem, const Problems &...problems)
    {
        const uint32_t group = threadIdx.x / 128;
        const int32_t lane = threadIdx.x % 32;
        position at;
        int32_t tile = -1, gemm = 0; // whose router weights this warp has
        uint32_t turn = 1 - group;   // the first group's first turn is there
        for (uint32_t n = group;; n += 2) {
            mbarrier_wait(shared_address(&smem.turn[group]), turn);
            turn ^= 1;
            if (n > 0) { // past the other group's item
                const work before = smem.item[(n - 1) % kItems];
                if (before.num_rows < 0) return;
                with(
                    before.gemm, [&](const auto &problem) { at.skip(steps_of(problem)); },
                    problems...);
            }
            mbarrier_wait(shared_address(&smem.landed[at.stage]), at.parity);
            const work work = smem.item[n % kItems];
            if (work.num_rows < 0) break;
            float row_weight[kLaneRows] = {}, sums[kBlocks][kSums];
            int32_t k_size = 0;
            const bool other = work.tile != tile || work.gemm != gemm;
            tile = work.tile;
            gemm = work.gemm;
            with(
                work.gemm,
                [&](const auto &problem) {
                    k_size = problem.k_size;
                    if (other) load_weights(row_weight, work, problem);
                },
                problems...);
            multiply(sums, smem, at, k_size);
            if (other) {
                __syncwarp(); // those of the tile before have been read
#pragma unroll
                for (int i = 0; i < kLaneRows; ++i)
                    if (lane + i * 32 < kRows)
                        smem.row_weight[threadIdx.x / 32][lane + i * 32] = row_weight[i];
                __syncwarp();
            }
            with(
                work.gemm,
                [&](const auto &problem) { problem.template write<gemm_swap>(smem, work, sums); },
                problems...);
            if (sizeof...(Problems) > 1 && work.gemm == 0) signal_tile(work.tile, problems...);
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared_address(&smem.turn[1 - group]));
    }

    // This warp's results of an item are there. After the last of its stores.
    template <class First, class... More>
    static __device__ __forceinline__ void signal_tile(int32_t tile, const First &first,
                                                       const More &...)
    {
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            add_release(&const_cast<moe_tile *>(first.args.tiles)[tile].done, 1);
    }

    static __device__ __forceinline__ void start(shared &smem)
    {
        if (threadIdx.x == 0) {
#pragma unroll
            for (int stage = 0; stage < kStages; ++stage) {
                mbarrier_init(shared_address(&smem.landed[stage]), kGatherThreads + 1);
                mbarrier_init(shared_address(&smem.read[stage]), 4);
            }
            mbarrier_init(shared_address(&smem.turn[0]), 4);
            mbarrier_init(shared_address(&smem.turn[1]), 4);
#pragma unroll
            for (uint32_t n = 0; n < kItems; ++n)
                mbarrier_init(shared_address(&smem.posted[n]), 1);
            fence_proxy_async();
        }
        __syncthreads();
    }

    // The memory of the barriers is free again. Every thread, when nobody uses them; a barrier of all has to follow.
    static __device__ __forceinline__ void stop(shared &smem)
    {
        if (threadIdx.x != 0) return;
        invalidate(smem.landed);
        invalidate(smem.read);
        invalidate(smem.turn);
        invalidate(smem.posted);
    }

    // All items of this block, of one GEMM or of two. Problem: weights: the map; box(col, part, rows) -> coordinates of
    // half the weights of an item; token_row(row) -> pointer to a token row by its number among all, NULL: zeros;
    // write(smem, work, sums); kWeighs: by router weights, which are then in row_weight; once(): whether its weights leave L2 first; args, num_cols, k_size; kTaken: which number behind num_tiles counts the items taken.
    template <class... Problems>
    static __device__ __forceinline__ void run(shared &smem, const Problems &...problems)
    {
        run_before(smem, nothing{}, problems...);
    }

    struct nothing {
        static constexpr bool kThere = false;
        __device__ __forceinline__ void math(uint32_t, uint32_t) const {}
        __device__ __forceinline__ void copy(uint32_t, uint32_t) const {}
    };

    // The same; behind it, where align has left the list empty and says that there are tiles of another height, what does
    // those: high.math(tiles, item), high.copy(tiles, item), item: the number that this block has taken.
    template <class High, class... Problems>
    static __device__ __forceinline__ void run_before(shared &smem, const High &high,
                                                      const Problems &...problems)
    {
        start(smem);
        grid_dependency_wait();
        if (threadIdx.x < kMathThreads) {
            set_registers_more<kMathRegisters>();
            grid_launch_dependents();
            math(smem, problems...);
            if constexpr (High::kThere) {
                sync_block(kThreads);
                const uint32_t tiles = smem.high_tiles, item = smem.high_item;
                if (tiles > 0) {
                    stop(smem);
                    high.math(tiles, item);
                }
            }
        } else {
            set_registers_fewer<kCopyRegisters>();
            uint32_t thread = threadIdx.x - kMathThreads;
            if (thread == 0) feed<High::kThere>(smem, problems...);
            if (thread / 32 >= 1 && thread / 32 <= kGatherThreads / 32) gather(smem, problems...);
            if constexpr (High::kThere) {
                sync_block(kThreads);
                const uint32_t tiles = smem.high_tiles, item = smem.high_item;
                if (tiles > 0) high.copy(tiles, item);
            }
        }
    }
};

#endif
