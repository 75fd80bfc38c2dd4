/* gemm_high.cuh: gate_up and down of a layer by the loops of gemm_wgmma.cuh, one behind the other in a launch that began with
 * those of gemm_swap.cuh: for the routings in which few experts have so many rows that align makes tiles of 128 rows.
 *
 * Math   as gemm_wgmma.cuh, bit for bit what gate_up_sm90a.cu and down_sm90a.cu make of these tiles
 * How    blocks take items (a tile, kCols columns of it; all columns of a tile, then the next tile) from one counter, those
 *        of down behind those of gate_up, each shortly before it is needed: no place is fixed, so that nobody waits for a
 *        block that does not run. Token rows of down wait until all columns of their tile are there (tiles[i].done) */
#ifndef MOE_GEMM_HIGH_CUH
#define MOE_GEMM_HIGH_CUH

#include "gemm_wgmma.cuh"

template <class Gemm>
struct high_stage {
    using shared = typename Gemm::shared;
    using work = typename Gemm::work;
    static constexpr int kMathThreads = Gemm::kMathThreads;
    // Steps before a tile's end: the next item is taken, its entry of the list asked for, both told to all.
    static constexpr int32_t kTake = 10, kLook = 7, kTell = 4;

    struct list {
        const moe_tile *tiles;
        int64_t num_slots;
        uint32_t num_tiles, cols;
        int32_t *taken;     // the counter, which
        uint32_t first = 0; // stood at so many when this list began

        template <class Args>
        __device__ __forceinline__ list(const Args &args, uint32_t num_tiles, int32_t num_cols)
            : tiles(args.tiles), num_slots(args.num_slots), num_tiles(num_tiles),
              cols((static_cast<uint32_t>(num_cols) + Gemm::kCols - 1) / Gemm::kCols),
              taken(const_cast<int32_t *>(args.num_tiles) + 1)
        {
        }
        __device__ __forceinline__ uint32_t items() const { return num_tiles * cols; }
        __device__ __forceinline__ uint32_t take() const
        {
            return static_cast<uint32_t>(atomicAdd(taken, 1)) - first;
        }
        __device__ __forceinline__ int4 load(uint32_t item) const
        {
            const uint32_t tile = min(item / cols, num_tiles - 1);
            return __ldcg(reinterpret_cast<const int4 *>(tiles + tile));
        }
        // The block's item n, for all its threads.
        __device__ __forceinline__ void tell(shared &smem, uint32_t n, uint32_t item,
                                             const int4 &entry) const
        {
            const uint32_t tile = item / cols;
            const int32_t rows =
                static_cast<int32_t>(min(static_cast<int64_t>(entry.z), num_slots - entry.y));
            smem.work[n % Gemm::kItems] =
                tile < num_tiles
                    ? make_int4(entry.x | static_cast<int32_t>(tile << 10), entry.y, max(rows, 0),
                                static_cast<int32_t>((item - tile * cols) * Gemm::kCols))
                    : make_int4(0, 0, -1, 0);
        }
    };

    static __device__ __forceinline__ uint32_t tile_of(const shared &smem, uint32_t n)
    {
        return static_cast<uint32_t>(smem.work[n % Gemm::kItems].x) >> 10;
    }

    static __device__ __forceinline__ bool leads() { return threadIdx.x == kMathThreads; }

    // Barriers and the first item. Every thread; what was in shared memory has been read.
    static __device__ __forceinline__ void begin(shared &smem, const list &list, uint32_t item)
    {
        if (leads()) list.tell(smem, 0, item, list.load(item));
        Gemm::start(smem);
    }

    // What is done while a tile's copies go on, in this order.
    struct ahead {
        uint32_t item;
        int4 entry;

        // Returns whether the next item has been told.
        __device__ __forceinline__ bool step(shared &smem, uint32_t n, int32_t step,
                                             int32_t num_steps, const list &list)
        {
            const int32_t left = num_steps - step;
            if (leads()) {
                if (left == min(kTake, num_steps)) item = list.take();
                if (left == min(kLook, num_steps)) entry = list.load(item);
                if (left == min(kTell, num_steps)) list.tell(smem, n + 1, item, entry);
            }
            return left == min(kTell, num_steps);
        }
    };

    // All copies, of gathered rows. Returns, to who leads, the first number past the list.
    template <class Problem>
    static __device__ __forceinline__ uint32_t gather(shared &smem, const list &list,
                                                      const Problem &problem)
    {
        const int32_t thread = threadIdx.x - kMathThreads;
        const int32_t row = thread / Gemm::kChunks, chunk = thread % Gemm::kChunks * 8;
        const uint32_t offset =
            row * (Gemm::kTileK * 2) + ((thread % Gemm::kChunks ^ (row & 7)) << 4);
        const int32_t num_steps = (problem.k_size + Gemm::kTileK - 1) / Gemm::kTileK;
        typename Gemm::position at;
        ahead next = {0, {0, 0, 0, 0}};
        work work = Gemm::get_work(smem, 0);
        int32_t slot[Gemm::kHeld];
        Gemm::load_slots(slot, work, problem);
        for (uint32_t n = 0; work.num_rows >= 0; ++n) {
            const unsigned char *token[Gemm::kPasses];
            uint32_t valid = 0;
#pragma unroll
            for (int held = 0; held < Gemm::kHeld; ++held)
                slot[held] = token_of(slot[held], problem.args);
#pragma unroll
            for (int pass = 0; pass < Gemm::kPasses; ++pass) {
                int32_t of = __shfl_sync(0xffffffffu, slot[pass / Gemm::kChunks],
                                         pass % Gemm::kChunks, Gemm::kChunks);
                token[pass] = reinterpret_cast<const unsigned char *>(
                    problem.tokens() + max(of, 0) * problem.token_stride() + chunk);
                if (of >= 0) valid |= 1u << pass;
            }
            typename Gemm::work after = work;
            for (int32_t step = 0; step < num_steps; ++step, at.next()) {
                if (next.step(smem, n, step, num_steps, list)) {
                    Gemm::producer_sync();
                    after = Gemm::get_work(smem, n + 1);
                    Gemm::load_slots(slot, after, problem);
                }
                const int32_t k = step * Gemm::kTileK;
                mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
                int32_t none = 0;
                if (leads()) Gemm::copy_stage(smem, at.stage, work, k, none, problem);
                const uint32_t to = shared_address(smem.token[at.stage]) + offset;
                const bool inside = k + chunk < problem.k_size;
#pragma unroll
                for (int group = 0; group < Gemm::kGroups; ++group) {
                    if (work.num_rows <= group * 64) break;
#pragma unroll
                    for (int pass = group * 4; pass < group * 4 + 4; ++pass) {
                        Gemm::copy_piece(to + pass * (Gemm::kPassRows * Gemm::kTileK * 2),
                                         token[pass], inside && (valid >> pass & 1));
                        token[pass] += Gemm::kTileK * 2;
                    }
                }
                cp_async_arrive(shared_address(&smem.landed[at.stage]));
            }
            work = after;
        }
        return next.item;
    }

    // All copies, of rows that lie behind each other, by who leads. ready(tile) waits for them.
    template <class Problem, class Ready>
    static __device__ __forceinline__ void copy(shared &smem, const list &list,
                                                const Problem &problem, Ready ready)
    {
        const int32_t num_steps = (problem.k_size + Gemm::kTileK - 1) / Gemm::kTileK;
        typename Gemm::position at;
        ahead next = {0, {0, 0, 0, 0}};
        work work = Gemm::get_work(smem, 0);
        int32_t there = Gemm::copy_ahead(smem, work, problem);
        for (uint32_t n = 0; work.num_rows >= 0; ++n) {
            ready(tile_of(smem, n));
            for (int32_t step = 0; step < num_steps; ++step, at.next()) {
                next.step(smem, n, step, num_steps, list);
                mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
                Gemm::copy_stage(smem, at.stage, work, step * Gemm::kTileK, there, problem);
            }
            there = 0;
            work = Gemm::get_work(smem, n + 1);
        }
    }

    // All products and results; done(tile) behind a warp's part of each.
    template <class Problem, class Done>
    static __device__ __forceinline__ void math(shared &smem, const Problem &problem, Done done)
    {
        const int32_t num_steps = (problem.k_size + Gemm::kTileK - 1) / Gemm::kTileK;
        typename Gemm::position at;
        typename Gemm::own_weights rows;
        uint32_t turn = 0;
        int32_t num_rows = Gemm::get_work(smem, 0).num_rows;
        for (uint32_t n = 0; num_rows >= 0; ++n) {
            float sums[Gemm::kSums];
            rows.weight[0] = rows.weight[1] = 1.0f;
            Gemm::multiply(
                sums, smem, at, num_rows, num_steps, turn,
                [&] { rows.after_first(smem, n, problem.args); },
                [&] { rows.after_last(smem, n, problem.args); });
            if (static_cast<int32_t>(threadIdx.x / 128 * 64) < Gemm::get_work(smem, n).num_rows) {
                const uint32_t last = (at.stage + Gemm::kStages - 1) % Gemm::kStages;
                problem.template write<Gemm>(typename Gemm::results{smem, n, last}, sums,
                                             rows.weight);
            }
            done(tile_of(smem, n));
            num_rows = Gemm::get_work(smem, n + 1).num_rows;
        }
    }
};

// Up, Low: gemm_wgmma of both GEMMs, with the same number of threads.
template <class Up, class Low, class UpProblem, class LowProblem>
struct gemm_high {
    static constexpr bool kThere = true;
    static constexpr int32_t kSignals = Up::kMathThreads / 32; // of an item of gate_up
    using up_stage = high_stage<Up>;
    using low_stage = high_stage<Low>;
    const UpProblem &up;
    const LowProblem &low;

    unsigned char *shared_memory;

    template <class Gemm>
    __device__ __forceinline__ typename Gemm::shared &memory() const
    {
        return *reinterpret_cast<typename Gemm::shared *>(shared_memory);
    }

    // What was in shared memory has been read; what was written there is visible to the copy engine.
    static __device__ __forceinline__ void change()
    {
        fence_proxy_async();
        sync_block(Up::kThreads);
    }

    __device__ __forceinline__ void math(uint32_t tiles, uint32_t item) const
    {
        const typename up_stage::list first(up.args, tiles, up.num_cols);
        const typename low_stage::list second(low.args, tiles, low.num_cols);
        change();
        up_stage::begin(memory<Up>(), first, item);
        up_stage::math(memory<Up>(), up, [&](uint32_t tile) {
            fence_proxy_async_global(); // the copy engine brings them to down
            __syncwarp();
            if (threadIdx.x % 32 == 0)
                add_release(&const_cast<moe_tile *>(up.args.tiles)[tile].done, 1);
        });
        change();
        Up::stop(memory<Up>());
        change();
        low_stage::begin(memory<Low>(), second, item);
        low_stage::math(memory<Low>(), low, [](uint32_t) {});
    }

    __device__ __forceinline__ void copy(uint32_t tiles, uint32_t item) const
    {
        const typename up_stage::list first(up.args, tiles, up.num_cols);
        typename low_stage::list second(low.args, tiles, low.num_cols);
        second.first = first.items();
        change();
        up_stage::begin(memory<Up>(), first, item);
        const bool any = item < first.items(); // else the number taken is still unused
        const uint32_t next = up_stage::gather(memory<Up>(), first, up);
        if (any) item = next;
        __syncwarp();
        change();
        change(); // the barriers of gate_up are gone
        low_stage::begin(memory<Low>(), second, item - first.items());
        if (low_stage::leads())
            low_stage::copy(memory<Low>(), second, low, [&](uint32_t tile) {
                const int32_t *done = &low.args.tiles[tile].done;
                const int32_t all = kSignals * static_cast<int32_t>(first.cols);
                constexpr int32_t kMostPolls = 1 << 23; // gemm_swap.cuh says why
                for (int32_t polls = 0; polls < kMostPolls && load_acquire(done) < all; ++polls) {
                }
                fence_proxy_async_global();
            });
    }
};

#endif
