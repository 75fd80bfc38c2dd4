/* gemm_joined.cuh: gate_up and down of a layer by the loops of gemm_wgmma.cuh, one behind the other in one launch.
 *
 * Math   as gemm_wgmma.cuh, bit for bit what gate_up_sm90a.cu and down_sm90a.cu make of the same tiles
 * How    blocks take items (a tile, kCols columns of it; all columns of a tile, then the next tile) from one counter, those of
 *        down behind those of gate_up, two items ahead: no place is fixed, so that nobody waits for a block that does not
 *        run. Token rows of down wait until all columns of their tile are there (tiles[i].done) */
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

    // Of who leads: the numbers of the two items behind the one that was told last (shared.item[0]), and what the list says of
    // the first of them.
    struct ahead {
        uint32_t next, after;
        int4 entry;

        __device__ __forceinline__ void tell(shared &smem, uint32_t n, const list &list)
        {
            list.tell(smem, n + 1, next, entry);
            smem.item[0] = next;
            next = after;
            entry = list.load(next);
            after = list.take();
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
            Gemm::copy_tile(smem, at, work, slot, next, there, problem);
            there = 0;
            work = next;
        }
    }

    // All copies, of rows that lie behind each other, by who leads. ready(tile) waits for them.
    template <class Problem, class Ready>
    static __device__ __forceinline__ void copy(shared &smem, const list &list, ahead &numbers,
                                                const Problem &problem, Ready ready)
    {
        typename Gemm::position at;
        int32_t there = Gemm::copy_ahead(smem, Gemm::get_work(smem, 0), problem);
        int32_t num_rows = Gemm::get_work(smem, 0).num_rows;
        for (uint32_t n = 0; num_rows >= 0; ++n) {
            numbers.tell(smem, n, list);
            ready(tile_of(smem, n));
            int32_t none[Gemm::kHeld];
            const auto work = Gemm::get_work(smem, n);
            Gemm::copy_tile(smem, at, work, none, work, there, problem);
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
            Gemm::multiply(
                sums, smem, at, num_rows, num_steps, turn,
                [&] {
                    rows.after_first(smem, n, args);
                    if (n > 0) done(tile_of(smem, n - 1));
                },
                [&] { rows.after_last(smem, n, args); });
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
        __syncthreads();
    };

    grid_dependency_wait();
    grid_launch_dependents();
    const uint32_t tiles = min(__ldcg(up.args.num_tiles), up.args.max_tiles);
    const typename up_stage::list first(up.args, tiles, up.num_cols);
    typename low_stage::list second(low.args, tiles, low.num_cols);
    second.first = first.items();
    if (tiles == 0) return;
    typename up_stage::ahead numbers = {0, 0, {0, 0, 0, 0}};
    if (leads) {
        const uint32_t item = first.take();
        const int4 entry = first.load(item);
        numbers.next = first.take();
        first.tell(up_memory, 0, item, entry);
        up_memory.item[0] = item;
        numbers.entry = first.load(numbers.next);
        numbers.after = first.take();
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
        typename low_stage::ahead behind = {0, 0, {0, 0, 0, 0}};
        if (leads) {
            const uint32_t now = past - second.first;
            behind.next = numbers.next - second.first;
            behind.after = numbers.after - second.first;
            second.tell(low_memory, 0, now, second.load(now));
            behind.entry = second.load(behind.next);
        }
        Low::start(low_memory);
        if (leads)
            low_stage::copy(low_memory, second, behind, low, [&](uint32_t tile) {
                const int32_t *done = &low.args.tiles[tile].done;
                const int32_t all = kSignals * static_cast<int32_t>(first.cols);
                constexpr int32_t kMostPolls = 1 << 23; // gemm_swap.cuh says why
                for (int32_t polls = 0; polls < kMostPolls && load_acquire(done) < all; ++polls) {
                }
                fence_proxy_async_global();
            });
    }
}

#endif
