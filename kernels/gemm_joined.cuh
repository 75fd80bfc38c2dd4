/* gemm_joined.cuh: gate_up and down of a layer by the loops of gemm_wgmma.cuh, one behind the other in one launch.
 *
 * Math   as gemm_wgmma.cuh, bit for bit what gate_up_sm90a.cu and down_sm90a.cu make of the same tiles
 * How    blocks take items (a tile, kCols columns of it; all columns of a tile, then the next tile) from one counter, those of
 *        down behind those of gate_up, shortly before they are needed: no place is fixed, so that nobody waits for a block that
 *        does not run. Token rows of down wait until all columns of their tile are there (tiles[i].done) */
#ifndef MOE_GEMM_JOINED_CUH
#define MOE_GEMM_JOINED_CUH

#include "gemm_high.cuh"

template <class Gemm>
struct joined_stage : high_stage<Gemm> {
    static_assert(!Gemm::kFewRegisters,
                  "what a tile is fits registers, where math() and gather() go on");
    using typename high_stage<Gemm>::shared;
    using typename high_stage<Gemm>::list;
    using high_stage<Gemm>::leads;
    using high_stage<Gemm>::tile_of;

    // Steps before the end of a tile's copies: the item behind the next is taken, its entry of the list asked for. Before, a
    // block would hold what another could begin; items of down of fewer than kShort steps leave no time for it.
    static constexpr int32_t kTake = 10, kLook = 7, kShort = 16;

    // Of who leads: the next item, which all are told when the tile before it begins.
    struct ahead {
        uint32_t next; // its number
        int4 entry;    // what the list says of it

        __device__ __forceinline__ void take(const list &list)
        {
            next = list.take();
            entry = list.load(next);
        }

        __device__ __forceinline__ void tell(shared &smem, uint32_t n, const list &list) const
        {
            list.tell(smem, n + 1, next, entry);
            smem.item[0] = next;
        }

        // Steps of tile n in which weights will be asked for, where one of them takes an item; or 0.
        __device__ __forceinline__ int32_t steps(const shared &smem, uint32_t n, int32_t k_size,
                                                 int32_t there, const list &list)
        {
            if (!leads() || Gemm::get_work(smem, n + 1).num_rows < 0) return 0;
            const int32_t left = (k_size + Gemm::kTileK - 1) / Gemm::kTileK - there;
            if (left > kTake) return left;
            take(list);
            return 0;
        }

        __device__ __forceinline__ void step(int32_t left, const list &list)
        {
            if (left == kTake) next = list.take();
            if (left == kLook) entry = list.load(next);
        }
    };

    // A problem, of whose weights a step's first box is asked for once: then is the time to take an item.
    template <class Problem>
    struct taking : Problem {
        ahead &numbers;
        const list &items;
        int32_t &left; // steps

        __device__ __forceinline__ int2 box(int32_t col, int32_t part, int32_t rows) const
        {
            if (part == 0) numbers.step(--left, items);
            return Problem::box(col, part, rows);
        }
    };

    // All copies, of gathered rows; the first item is known to all.
    template <class Problem>
    static __device__ __forceinline__ void gather(shared &smem, const list &list, ahead &numbers,
                                                  const Problem &problem)
    {
        typename Gemm::position at;
        typename Gemm::work work = Gemm::get_work(smem, 0);
        int32_t slot[Gemm::kHeld];
        int32_t there = leads() ? Gemm::copy_ahead(smem, work, problem) : 0;
        __syncwarp();
        Gemm::load_slots(slot, work, problem);
        for (uint32_t n = 0; work.num_rows >= 0; ++n) {
            if (leads()) numbers.tell(smem, n, list);
            Gemm::producer_sync();
            const typename Gemm::work next = Gemm::get_work(smem, n + 1);
            int32_t left = numbers.steps(smem, n, problem.k_size, there, list);
            Gemm::copy_tile(smem, at, work, slot, next, there,
                            taking<Problem>{problem, numbers, list, left});
            there = 0;
            work = next;
        }
    }

    template <class Problem>
    static __device__ __forceinline__ void copy_step(shared &smem, typename Gemm::position &at,
                                                     uint32_t n, int32_t k, int32_t &there,
                                                     const Problem &problem)
    {
        mbarrier_wait(shared_address(&smem.read[at.stage]), at.parity ^ 1);
        Gemm::copy_stage(smem, at.stage, Gemm::get_work(smem, n), k, there, problem);
        at.next();
    }

    // All copies, of rows that lie behind each other, by who leads, who knows the first item. ready(tile) waits for them.
    template <class Problem, class Ready>
    static __device__ __forceinline__ void copy(shared &smem, const list &list,
                                                const Problem &problem, Ready ready)
    {
        typename Gemm::position at;
        int32_t there = Gemm::copy_ahead(smem, Gemm::get_work(smem, 0), problem);
        int32_t num_rows = Gemm::get_work(smem, 0).num_rows;
        if (num_rows < 0) return;
        ready(tile_of(smem, 0)); // before another is taken
        uint32_t next = list.take();
        list.tell(smem, 1, next, list.load(next));
        for (uint32_t n = 0; num_rows >= 0; ++n) {
            num_rows = Gemm::get_work(smem, n + 1).num_rows;
            if (n > 0) ready(tile_of(smem, n));
            int32_t left = (problem.k_size + Gemm::kTileK - 1) / Gemm::kTileK;
            for (int32_t k = 0; k < problem.k_size; k += Gemm::kTileK, --left) {
                copy_step(smem, at, n, k, there, problem);
                if (num_rows < 0) continue;
                if (left == kTake) next = list.take();
                if (left == kLook) list.tell(smem, n + 2, next, list.load(next));
            }
            there = 0;
        }
    }

    // The same of short items: two of them are known ahead.
    template <class Problem, class Ready>
    static __device__ __forceinline__ void copy_short(shared &smem, const list &list,
                                                      const Problem &problem, Ready ready)
    {
        typename Gemm::position at;
        uint32_t next = list.take(), after = list.take();
        int32_t there = Gemm::copy_ahead(smem, Gemm::get_work(smem, 0), problem);
        int4 entry = list.load(next);
        int32_t num_rows = Gemm::get_work(smem, 0).num_rows;
        for (uint32_t n = 0; num_rows >= 0; ++n) {
            list.tell(smem, n + 1, next, entry);
            next = after;
            entry = list.load(next);
            after = list.take();
            ready(tile_of(smem, n));
            for (int32_t k = 0; k < problem.k_size; k += Gemm::kTileK)
                copy_step(smem, at, n, k, there, problem);
            there = 0;
            num_rows = Gemm::get_work(smem, n + 1).num_rows;
        }
    }

    // All products and results; done(tile) for a warp's part of each, while the next one's first products are under way: the
    // results need a while to where all can see them.
    template <class Problem, class Done>
    static __device__ __forceinline__ void math(shared &smem, const Problem &problem, Done done)
    {
        const auto &args = problem.args;
        const int32_t num_steps = (problem.k_size + Gemm::kTileK - 1) / Gemm::kTileK;
        typename Gemm::position at;
        auto rows = Gemm::router_weights();
        uint32_t turn = 0, n = 0;
        rows.begin(smem, Gemm::get_work(smem, 0), args);
        for (int32_t num_rows = Gemm::get_work(smem, 0).num_rows; num_rows >= 0; ++n) {
            float sums[Gemm::kSums];
            Gemm::template begin_sums<Problem>(sums);
            Gemm::multiply(
                sums, smem, at, num_rows, num_steps, turn,
                [&] {
                    rows.after_first(smem, n, args);
                    if (n > 0) done(tile_of(smem, n - 1));
                },
                [&] {
                    rows.after_last(smem, n, args);
                    problem.template bring_bias<Gemm>(smem, n);
                });
            if (static_cast<int32_t>(threadIdx.x / 128 * 64) < Gemm::get_work(smem, n).num_rows) {
                const uint32_t last = (at.stage + Gemm::kStages - 1) % Gemm::kStages;
                rows.get(smem, n, args);
                problem.template write<Gemm>(typename Gemm::results{smem, n, last}, sums,
                                             rows.weight);
            } else {
                if (n > 0) done(tile_of(smem, n - 1));
                rows.pass(smem, n, args);
            }
            num_rows = Gemm::get_work(smem, n + 1).num_rows;
        }
        if (n > 0) done(tile_of(smem, n - 1));
    }
};

// Up, Low: gemm_wgmma of both GEMMs, with the same number of threads.
template <class Up, class Low, class UpProblem, class LowProblem>
static __device__ __forceinline__ void run_joined(const UpProblem &up, const LowProblem &low)
{
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    using up_stage = joined_stage<Up>;
    using low_stage = joined_stage<Low>;
    constexpr int32_t kSignals = Up::kMathThreads / 32; // of an item of gate_up
    // Three math warpgroups: gate_up's copies hold the addresses of 192 rows and the next items, down's hardly anything.
    constexpr bool kMoves = Up::kGroups == 3; // registers from copies to math in between
    constexpr int32_t kMathRegisters = kMoves ? 144 : Up::kMathRegisters,
                      kCopyRegisters = kMoves ? 80 : Up::kCopyRegisters, kLowMathRegisters = 160,
                      kLowCopyRegisters = 32;
    static_assert(3 * (kLowMathRegisters - 144) == 80 - kLowCopyRegisters, "a sum of 512");
    static_assert(sizeof(typename Up::shared) <= MOE_JOINED_SMEM_BYTES &&
                      sizeof(typename Low::shared) <= MOE_JOINED_SMEM_BYTES,
                  "one after the other in the same memory");
    auto &up_memory = *reinterpret_cast<typename Up::shared *>(dynamic_shared);
    auto &low_memory = *reinterpret_cast<typename Low::shared *>(dynamic_shared);
    const bool leads = up_stage::leads();
    // What was in shared memory has been read; what was written there is visible to the copy engine.
    auto change = [] {
        fence_proxy_async();
        sync_block(Up::kThreads);
    };

    grid_dependency_wait();
    grid_launch_dependents();
    const uint32_t tiles = min(__ldcg(up.args.num_tiles), up.args.max_tiles);
    const typename up_stage::list first(up.args, tiles, up.num_cols);
    typename low_stage::list second(low.args, tiles, low.num_cols);
    second.first = first.items();
    if (tiles == 0) return;
    typename up_stage::ahead numbers = {0, {0, 0, 0, 0}};
    if (leads) {
        const uint32_t item = first.take();
        first.tell(up_memory, 0, item, first.load(item));
        up_memory.item[0] = item;
        if (item < first.items()) {
            // a first item for every block that runs before any takes its second
            constexpr int32_t kPolls = 8;
            for (int32_t polls = 0; polls < kPolls; ++polls)
                if (load_acquire(first.taken) >= static_cast<int32_t>(gridDim.x)) break;
            numbers.take(first);
        }
    }
    Up::start(up_memory);
    if (threadIdx.x < Up::kMathThreads) {
        set_registers_more<kMathRegisters>();
        up_stage::math(up_memory, up, [&](uint32_t tile) {
            fence_proxy_async_global(); // the copy engine brings them to down
            __syncwarp();
            if (threadIdx.x % 32 == 0)
                add_release(&const_cast<moe_tile *>(up.args.tiles)[tile].done, 1);
        });
        change();
        Up::stop(up_memory);
        change();
        if constexpr (kMoves) set_registers_more<kLowMathRegisters>();
        Low::start(low_memory);
        low_stage::math(low_memory, low, [](uint32_t) {});
    } else {
        set_registers_fewer<kCopyRegisters>();
        up_stage::gather(up_memory, first, numbers, up);
        const uint32_t past = up_memory.item[0]; // the first number that is not gate_up's
        change();
        change(); // the barriers of gate_up are gone
        if constexpr (kMoves) set_registers_fewer<kLowCopyRegisters>();
        if (leads) {
            const uint32_t now = past - second.first;
            second.tell(low_memory, 0, now, second.load(now));
        }
        Low::start(low_memory);
        if (!leads) return;
        auto ready = [&](uint32_t tile) {
            const int32_t *done = &low.args.tiles[tile].done;
            const int32_t all = kSignals * static_cast<int32_t>(first.cols);
            constexpr int32_t kMostPolls = 1 << 23; // gemm_swap.cuh says why
            for (int32_t polls = 0; polls < kMostPolls && load_acquire(done) < all; ++polls) {
            }
            fence_proxy_async_global();
        };
        if (low.k_size <= low_stage::kShort * Low::kTileK)
            low_stage::copy_short(low_memory, second, low, ready);
        else
            low_stage::copy(low_memory, second, low, ready);
    }
}

#endif
