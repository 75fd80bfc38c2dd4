// arch: sm_90a
/* gate_up_decode_sm90a.cu: gate_up for a few tokens, straight from topk_ids                    (stages 2 and 3 of 5)
 * In     as gate_up.cu, without what align makes; topk_ids
 * Out    intermediate  [num_tokens * topk, intermediate_size]  row r is slot r; rows of dropped slots are not written
 * Math   as gate_up.cu but for the order of K: eight warps take 64 of K in turn, their sums are added in warp order
 * Grid   one block per SM: an item is 16 weight rows (8 gates, 8 ups) of one expert with all of K, and each block has
 *        an equal share of all items, neighbours of each other. Token rows are in shared memory, all of them
 * Needs  hidden_size % 8 == 0, intermediate_size % 8 == 0, 16-byte aligned rows; num_tokens <= 8 * kTiles
 * Cost   the weights of the active experts once: memory-bound */
#include "decode.cuh"
#include "gate_up.cuh"

// kPlain: gated silu without limit, bias and router weights; the code of all else is not there.
template <class T, int kTiles, bool kPlain>
struct gate_up_decode {
    static constexpr int kRows = 16; // weight rows of an item
    static constexpr int kTokens = 8 * kTiles;
    static constexpr int kPitch = kRows + 4; // sums of a token: bank conflicts
    static constexpr int kUnitBytes = kRows * kUnitK * 2;
    static_assert(kMathWarps * kUnitBytes == MOE_DECODE_STAGE_BYTES, "a unit of each warp");

    struct sums_buffer {
        float sum[kMathWarps][kTokens][kPitch];
    };
    static_assert(2 * sizeof(sums_buffer) == MOE_DECODE_UP_SUMS(kTokens), "the host asks for it");

    const moe_gate_up_decode_args &args;
    const tensor_map &body, &rest; // w13: a stage; K past the last whole 64, zeros behind it
    unsigned char *ring, *panel;
    sums_buffer *sums; // two, in turn
    decode_state &state;
    int32_t panel_pitch, chunks, row_tiles;
    divisor grid, tiles_per_expert; // for share
    bool tail;

    __device__ __forceinline__ gate_up_decode(const moe_gate_up_decode_args &args,
                                              const tensor_map &body, const tensor_map &rest,
                                              unsigned char *shared)
        : args(args), body(body), rest(rest), ring(shared),
          panel(shared + args.ring_stages * MOE_DECODE_STAGE_BYTES),
          sums(reinterpret_cast<sums_buffer *>(
              panel + args.stage.num_tokens *
                          MOE_DECODE_PANEL_PITCH(static_cast<int64_t>(args.stage.hidden_size)))),
          state(*reinterpret_cast<decode_state *>(sums + 2)), grid(gridDim.x), tiles_per_expert(1)
    {
        const moe_gate_up_args &stage = args.stage;
        panel_pitch = MOE_DECODE_PANEL_PITCH(stage.hidden_size);
        chunks = stage.hidden_size / kUnitK;
        tail = stage.hidden_size % kUnitK != 0;
        int32_t outputs = gated() ? 8 : 16;
        row_tiles = (stage.intermediate_size + outputs - 1) / outputs;
        tiles_per_expert = divisor(row_tiles);
    }

    __device__ __forceinline__ bool gated() const { return kPlain || args.stage.gated; }

    struct items {
        int32_t rank, tile, count;
    };

    // This block's share of active * row_tiles items: from total * block / grid on, the fraction cut off.
    __device__ __forceinline__ items share(int32_t active) const
    {
        const uint32_t total = active * row_tiles; // times a block below 2^32: the plan sees to it
        int32_t begin = grid.divide(total * blockIdx.x),
                end = grid.divide(total * (blockIdx.x + 1));
        int32_t rank = tiles_per_expert.divide(begin);
        return {rank, begin - rank * row_tiles, end - begin};
    }

    __device__ __forceinline__ void next(items &at) const
    {
        --at.count;
        if (++at.tile == row_tiles) {
            at.tile = 0;
            ++at.rank;
        }
    }

    // Token rows into shared memory, asked for by one thread, which has announced them before the wait. What is past K was
    // made zero before. All blocks want the same rows: each begins at one of its own, `first`.
    __device__ __forceinline__ void load_panel(int32_t first) const
    {
        const moe_gate_up_args &stage = args.stage;
        const int32_t num_tokens = static_cast<int32_t>(stage.num_tokens);
        const uint32_t bar = shared_address(&state.panel), to = shared_address(panel);
        auto from = static_cast<const typename T::element *>(stage.hidden_states);
        int32_t token = first;
#pragma unroll 1
        do {
            bulk_copy(to + token * panel_pitch, from + token * stage.hidden_stride,
                      static_cast<uint32_t>(stage.hidden_size * 2), bar);
            if (++token == num_tokens) token = 0;
        } while (token != first);
    }

    __device__ __forceinline__ void clear_panel_tail() const
    {
        const int32_t num_tokens = static_cast<int32_t>(args.stage.num_tokens);
        const int32_t k = args.stage.hidden_size, past = (kUnitK - k % kUnitK) / 8;
#pragma unroll 1
        for (int32_t i = threadIdx.x; i < num_tokens * past; i += kThreads) {
            int32_t token = i / past, at = k + (i - token * past) * 8;
            *reinterpret_cast<uint4 *>(panel + token * panel_pitch + at * 2) =
                make_uint4(0, 0, 0, 0);
        }
    }

    // The bytes of the first stages, long before it is known what they are: a round of wait and expect takes one thread
    // 0.15 us. Who has fewer stages never waits for the others. With a tail, whose bytes are others, not at all.
    __device__ __forceinline__ int32_t announced() const { return tail ? 0 : args.ring_stages; }

    __device__ __forceinline__ void announce() const
    {
#pragma unroll 1
        for (int32_t stage = 0; stage < announced(); ++stage)
            mbarrier_arrive_expect_tx(shared_address(&state.landed[stage]), MOE_DECODE_STAGE_BYTES);
    }

    // All stages of all items: one thread, which looks the experts up (kListed), or a warp, whose lane of an item's rank knows
    // the expert. A stage is a unit for each warp; the tail is a stage with one unit.
    static constexpr int32_t kListed = -2;

    __device__ __forceinline__ void produce(items at, int32_t expert, int32_t rank) const
    {
        const int32_t row_step = args.stage.gated ? 8 : 16;
        ring_position to;
        bool asks = true;
        int32_t ready = announced();
        int32_t left = at.count * ((chunks + kMathWarps - 1) / kMathWarps + tail);
        if (left <= args.stages_left) grid_launch_dependents();
        auto stage = [&](uint32_t bytes, auto copy) {
            uint32_t bar = shared_address(&state.landed[to.stage]);
            const bool refill = --ready < 0;
            if (refill) mbarrier_wait(shared_address(&state.read[to.stage]), to.parity ^ 1);
            if (refill && asks) mbarrier_arrive_expect_tx(bar, bytes);
            if (asks) copy(shared_address(ring + to.stage * MOE_DECODE_STAGE_BYTES), bar);
            to.next(args.ring_stages);
            if (--left == args.stages_left) grid_launch_dependents();
        };
#pragma unroll 1
        for (; at.count > 0; next(at)) {
            const int32_t row = at.tile * row_step;
            if (rank == kListed)
                expert = state.active[at.rank];
            else
                asks = rank == at.rank;
#pragma unroll 1
            for (int32_t chunk = 0; chunk < chunks; chunk += kMathWarps)
                stage(MOE_DECODE_STAGE_BYTES, [&](uint32_t shared, uint32_t bar) {
                    tensor_copy_5d(shared, &body, 0, row, 0, chunk, expert, bar);
                });
            if (tail)
                stage(kUnitBytes, [&](uint32_t shared, uint32_t bar) {
                    tensor_copy_4d(shared, &rest, chunks * kUnitK, row, 0, expert, bar);
                });
        }
    }

    // Which groups of eight tokens have slots of this expert, a bit each.
    __device__ __forceinline__ uint32_t token_tiles(int32_t expert) const
    {
        if (kTiles == 1) return 1;
        uint32_t tiles = 0;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
            tiles |= (state.seen[tile][expert / 32] >> expert % 32 & 1) << tile;
        return tiles;
    }

    // sums[token][weight row] += weights of one unit times the token rows' 64 of K from `k` on.
    __device__ __forceinline__ void multiply(float (&acc)[kTiles][2][4], uint32_t tiles,
                                             const unsigned char *unit, int32_t k) const
    {
        int32_t lane = threadIdx.x % 32, last = static_cast<int32_t>(args.stage.num_tokens) - 1;
        weight_fragments weights;
        load_weights(weights, shared_address(unit));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            if (kTiles > 1 && !(tiles >> tile & 1)) continue;
            // columns past the last are not stored
            int32_t token = min(tile * 8 + lane % 8, last);
            token_fragments tokens;
            load_tokens(tokens, shared_address(panel) + token * panel_pitch + k * 2);
            multiply_unit<T>(acc[tile], weights, tokens);
        }
    }

    __device__ __forceinline__ void store_sums(const float (&acc)[kTiles][2][4], uint32_t tiles,
                                               sums_buffer &to) const
    {
        int32_t lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            if (kTiles > 1 && !(tiles >> tile & 1)) continue;
            float(*sum)[kPitch] = &to.sum[threadIdx.x / 32][tile * 8 + column];
            sum[0][row] = acc[tile][0][0] + acc[tile][1][0];
            sum[1][row] = acc[tile][0][1] + acc[tile][1][1];
            sum[0][row + 8] = acc[tile][0][2] + acc[tile][1][2];
            sum[1][row + 8] = acc[tile][0][3] + acc[tile][1][3];
        }
    }

    // Weight rows row .. row + 3 of a token, all warps, in their order.
    static __device__ __forceinline__ float4 add_sums(const sums_buffer &from, int32_t token,
                                                      int32_t row)
    {
        float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int warp = 0; warp < kMathWarps; ++warp) {
            float4 part = *reinterpret_cast<const float4 *>(&from.sum[warp][token][row]);
            total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
        }
        return total;
    }

    // The first of slots [slot, end) that goes to this expert, or end. Four loads at a time, those past the end wasted.
    __device__ __forceinline__ int32_t first_slot(int32_t slot, int32_t end, int32_t expert) const
    {
#pragma unroll 1
        for (; slot < end; slot += 4) {
            int32_t found = end;
#pragma unroll
            for (int i = 3; i >= 0; --i)
                if (state.expert[min(slot + i, end - 1)] == expert) found = min(slot + i, end - 1);
            if (found < end) return found;
        }
        return end;
    }

    // The same for gates and ups of one token or two: a weight row a lane, 16 lanes a token, then an output each for half of
    // them. Four times the lanes, and a quarter of the instructions behind the last sums.
    __device__ __forceinline__ void write_few(const ring_position &from, int32_t expert,
                                              int32_t tile) const
    {
        const moe_gate_up_args &stage = args.stage;
        const int32_t topk = args.slots.topk, lane = threadIdx.x % 32, row = lane % 16;
        const int32_t token = min(lane / 16, static_cast<int32_t>(stage.num_tokens) - 1);
        const int32_t out = tile * 8 + row % 8, end = token * topk + topk;
        int32_t slot = first_slot(token * topk, end, expert);
        const bool first_is_up = stage.w13_order == MOE_ORDER_UP_GATE;
        const bool writes = row < 8 && lane / 16 == token && out < stage.intermediate_size;
        const int32_t slots = slot < end ? slot : 0;
        typename T::element *to = static_cast<typename T::element *>(stage.intermediate) +
                                  slots * stage.intermediate_stride + out;
        const float *sum = &sums[from.stage].sum[0][token][row];
        int32_t others = slot < end ? first_slot(slot + 1, end, expert) : end; // seldom any
        float bias[1] = {0.0f}, weight = 1.0f;
        if (!kPlain && stage.w13_bias) {
            const int64_t at[1] = {bias_at(expert, out, (row >= 8) != first_is_up)};
            load_f32(bias, stage.w13_bias, at, stage.w13_bias_dtype);
        }
        if (!kPlain && stage.topk_weights) weight = weight_of(slots, stage);
        compute_now(reinterpret_cast<uint64_t>(to) + reinterpret_cast<uint64_t>(sum) + others);
        mbarrier_wait(shared_address(&state.summed[from.stage]), from.parity);
        float total = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kMathWarps; ++warp)
            total += sum[warp * kTokens * kPitch];
        if constexpr (!kPlain) total += bias[0];
        const float other = __shfl_down_sync(0xffffffffu, total, 8);
        const float gate = first_is_up ? other : total, up = first_is_up ? total : other;
        typename T::element result;
        if constexpr (kPlain)
            result = T::round(swish(gate, 1.0f) * up);
        else
            result = output(gate, up, weight);
        if (!writes || slot == end) return;
        *to = result;
#pragma unroll 1
        for (; others < end; others = first_slot(others + 1, end, expert)) {
            if (!kPlain && stage.topk_weights) result = output(gate, up, weight_of(others, stage));
            to[(others - slot) * stage.intermediate_stride] = result;
        }
    }

    __device__ __forceinline__ typename T::element output(float gate, float up, float weight) const
    {
        const float g[1] = {gate * weight}, u[1] = {up * weight};
        float y[1];
        activate(y, g, u, args.stage);
        return T::round(y[0]);
    }

    // Where the bias of gate or up of output `out` lies, -1 where there is none.
    __device__ __forceinline__ int64_t bias_at(int32_t expert, int32_t out, bool up) const
    {
        const moe_gate_up_args &stage = args.stage;
        if (out >= stage.intermediate_size) return -1;
        return expert * stage.w13_bias_stride +
               gate_up_rows<T>(expert, stage).row(stage.gated ? 2 * out + up : out);
    }

    // Four outputs of a token a thread, for each of its slots that goes to this expert. One warp, all others wait for it in
    // the end: what does not need the sums is done before they are there.
    __device__ __forceinline__ void write(const ring_position &from, int32_t expert,
                                          int32_t tile) const
    {
        const moe_gate_up_args &stage = args.stage;
        const int32_t topk = args.slots.topk, shift = gated() ? 1 : 2; // 2, 4 threads a token
        const int32_t num_items = static_cast<int32_t>(stage.num_tokens) << shift;
#pragma unroll 1
        for (int32_t item = threadIdx.x % 32; item < num_items; item += 32) {
            int32_t token = item >> shift, four = item - (token << shift);
            int32_t slot = token * topk, end = slot + topk;
            slot = first_slot(slot, end, expert);
            if (slot == end) continue;
            int32_t others = first_slot(slot + 1, end, expert); // of the token, seldom any
            int32_t out = ((tile << shift) + four) * 4; // intermediate_size is a multiple of 8
            typename T::element *to = static_cast<typename T::element *>(stage.intermediate) + out;
            float bias[8] = {}, weight = 1.0f;
            if (!kPlain && stage.w13_bias) {
                int64_t at[8];
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    at[i] = i < 4 || gated() ? bias_at(expert, out + i % 4, i >= 4) : -1;
                load_f32(bias, stage.w13_bias, at, stage.w13_bias_dtype);
            }
            if (!kPlain && stage.topk_weights) weight = weight_of(slot, stage);
            mbarrier_wait(shared_address(&state.summed[from.stage]), from.parity);
            const sums_buffer &sum = sums[from.stage];
            float4 first = add_sums(sum, token, four * 4), second = make_float4(1, 1, 1, 1);
            if (gated()) second = add_sums(sum, token, four * 4 + 8);
            if (out >= stage.intermediate_size) continue;
            if (stage.w13_order == MOE_ORDER_UP_GATE) {
                float4 up = first;
                first = second;
                second = up;
            }
            const float gates[4] = {first.x + bias[0], first.y + bias[1], first.z + bias[2],
                                    first.w + bias[3]},
                        ups[4] = {second.x + bias[4], second.y + bias[5], second.z + bias[6],
                                  second.w + bias[7]};
#pragma unroll 1
            while (slot < end) {
                float g[4], u[4], y[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    g[i] = gates[i] * weight;
                    u[i] = gated() ? ups[i] * weight : 1.0f;
                    if constexpr (kPlain) y[i] = swish(g[i], 1.0f) * u[i];
                }
                if constexpr (!kPlain) activate(y, g, u, stage);
                *reinterpret_cast<uint2 *>(to + slot * stage.intermediate_stride) =
                    make_uint2(T::round2(y[0], y[1]), T::round2(y[2], y[3]));
                slot = others;
                if (slot == end) break;
                others = first_slot(slot + 1, end, expert);
                if (!kPlain && stage.topk_weights) weight = weight_of(slot, stage);
            }
        }
    }

    // The math warps.
    __device__ __forceinline__ void consume(items at) const
    {
        const int32_t warp = threadIdx.x / 32;
        ring_position from, to;
        mbarrier_wait(shared_address(&state.panel), 0);
#pragma unroll 1
        for (; at.count > 0; next(at)) {
            uint32_t tiles = token_tiles(state.active[at.rank]);
            float acc[kTiles][2][4] = {};
#pragma unroll 1
            for (int32_t chunk = warp; chunk < chunks + warp; chunk += kMathWarps) {
                mbarrier_wait(shared_address(&state.landed[from.stage]), from.parity);
                if (chunk < chunks)
                    multiply(acc, tiles,
                             ring + from.stage * MOE_DECODE_STAGE_BYTES + warp * kUnitBytes,
                             chunk * kUnitK);
                release(state, from.stage);
                from.next(args.ring_stages);
            }
            if (tail) {
                mbarrier_wait(shared_address(&state.landed[from.stage]), from.parity);
                if (warp == 0)
                    multiply(acc, tiles, ring + from.stage * MOE_DECODE_STAGE_BYTES,
                             chunks * kUnitK);
                release(state, from.stage);
                from.next(args.ring_stages);
            }
            mbarrier_wait(shared_address(&state.written[to.stage]), to.parity ^ 1);
            store_sums(acc, tiles, sums[to.stage]);
            mbarrier_arrive(shared_address(&state.summed[to.stage]));
            to.next(2);
        }
    }

    // The warp that writes, behind the math warps.
    __device__ __forceinline__ void write_all(items at) const
    {
        ring_position from;
        const bool few = kTiles == 1 && gated() && args.stage.num_tokens <= 2;
#pragma unroll 1
        for (; at.count > 0; next(at)) {
            if (few)
                write_few(from, state.active[at.rank], at.tile);
            else
                write(from, state.active[at.rank], at.tile);
            mbarrier_wait(shared_address(&state.summed[from.stage]), from.parity);
            mbarrier_arrive(shared_address(&state.written[from.stage]));
            from.next(2);
        }
    }

    __device__ __forceinline__ void run()
    {
        start_ring(state, args.ring_stages, kMathWarps, &body, &rest);
        if (tail) clear_panel_tail();
        prefetch_slots(args.slots);
        // One token's slots nearly always go to as many experts: then this block's share is known already.
        items mine = share(args.slots.num_slots);
        compute_now(mine.rank + mine.tile + mine.count);
        __syncthreads();
        const uint32_t num_tokens = static_cast<uint32_t>(args.stage.num_tokens);
        const int32_t first = static_cast<int32_t>(blockIdx.x % kTokens * num_tokens / kTokens);
        if (threadIdx.x == kMathThreads) announce();
        if (threadIdx.x == kFinders) {
            mbarrier_arrive_expect_tx(shared_address(&state.panel),
                                      num_tokens * static_cast<uint32_t>(args.stage.hidden_size) *
                                          2);
            compute_now(first);
        }
        grid_dependency_wait();
        if (args.stages_left == MOE_DECODE_AT_ONCE) grid_launch_dependents();
        // The warp that asks for weights finds few experts by itself: no shared memory and no barrier in between.
        const bool apart = few_slots<kTiles>(args.slots);
        if (apart && threadIdx.x / 32 == kMathWarps) {
            const int32_t lane = threadIdx.x % 32;
            bool leads;
            int32_t active;
            const lane_slot slot = rank_few_slots(
                args.slots, lane < args.slots.num_slots ? load_id(args.slots, lane) : 0, leads,
                active);
            if (active != args.slots.num_slots) mine = share(active);
            produce(mine, slot.expert, leads ? slot.rank : -1);
            return;
        }
        if (threadIdx.x == kFinders) load_panel(first);
        const int32_t active = find_experts<kTiles>(state, args.slots, apart);
        if (active != args.slots.num_slots) mine = share(active);
        if (threadIdx.x < kMathThreads)
            consume(mine);
        else if (threadIdx.x == kMathThreads)
            produce(mine, 0, kListed);
        else if (threadIdx.x >= kMathThreads + 32)
            write_all(mine);
    }
};

#define MOE_KERNEL_decode(plain, name, type, rows)                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads, rows > 8 ? 1 : 2)                       \
        name(const __grid_constant__ moe_gate_up_decode_args args,                                 \
             const __grid_constant__ tensor_map body, const __grid_constant__ tensor_map rest)     \
    {                                                                                              \
        extern __shared__ __align__(1024) unsigned char dynamic_shared[];                          \
        fetch_parameters(args);                                                                    \
        gate_up_decode<type, rows / 8, plain>(args, body, rest, dynamic_shared).run();             \
    }
#define MOE_KERNEL_sm90a_decode_gate_up(name, type, rows, ...)                                     \
    MOE_KERNEL_decode(false, name, type, rows)
#define MOE_KERNEL_sm90a_decode_bare_gate_up(name, type, rows, ...)                                \
    MOE_KERNEL_decode(true, name, type, rows)
#include "gemm_instances.cuh"
