// arch: sm_90a
/* down_decode_sm90a.cu: down and combine for a few tokens, straight from topk_ids              (stages 4 and 5 of 5)
 * In     intermediate   [num_tokens * topk, intermediate_size]  row r is slot r (gate_up_decode_sm90a.cu)
 *        w2, w2_bias, topk_weights, shared_output, topk_ids
 * Out    out            [num_tokens, hidden_size]  every element is written
 * Math   out = round(scale * sum over slots (w2 . intermediate + bias) * weight + shared_output), f32, one rounding.
 *        Experts in ascending order, stages of the ring dealt to eight warps, whose sums are added in warp order, then
 *        the biases: the same bits every time
 * Grid   a block owns kCols columns of out and goes over all active experts; at most one block per SM
 * Needs  as gate_up_decode_sm90a.cu. Weights, ids and topk_weights are read before the wait: they are complete once
 *        gate_up has waited for them
 * Cost   the weights of the active experts once: memory-bound */
#include "decode.cuh"

template <class T, int kTiles, int kCols>
struct down_decode {
    static constexpr int kParts = kCols / 16; // of 16 columns, M of the mma
    static constexpr int kTokens = 8 * kTiles;
    static constexpr int kUnitBytes = kCols * kUnitK * 2;
    static constexpr int kPitch = kCols + 4;

    struct sums_buffer {
        float sum[kMathWarps][kTokens][kPitch];
    };
    static_assert(sizeof(sums_buffer) == MOE_DECODE_DOWN_SUMS(kTokens, kCols),
                  "the host asks for it");

    const moe_down_decode_args &args;
    const tensor_map &body,
        &rest; // w2: box_chunks units; K past the last whole 64, zeros behind it
    unsigned char *ring, *panel;
    sums_buffer &sums;
    decode_state &state;
    int16_t
        *slots; // [active][kTokens]: the first slot of a token that goes to the expert, -1: none
    int32_t chunks, copies_per_expert, stage_bytes, col_tiles, panel_pitch, active = 0;
    bool tail, duplicates = false;

    __device__ __forceinline__ down_decode(const moe_down_decode_args &args, const tensor_map &body,
                                           const tensor_map &rest, unsigned char *shared)
        : args(args), body(body), rest(rest), ring(shared),
          panel(shared + args.ring_stages * args.copies * args.box_chunks * kUnitBytes),
          sums(*reinterpret_cast<sums_buffer *>(
              panel + args.slots.num_slots * MOE_DECODE_PANEL_PITCH(args.stage.intermediate_size))),
          state(*reinterpret_cast<decode_state *>(&sums + 1)),
          slots(reinterpret_cast<int16_t *>(&state + 1))
    {
        chunks = args.stage.intermediate_size / kUnitK;
        tail = args.stage.intermediate_size % kUnitK != 0;
        copies_per_expert = (chunks + args.box_chunks - 1) / args.box_chunks + tail;
        stage_bytes = args.copies * args.box_chunks * kUnitBytes;
        col_tiles = (args.stage.hidden_size + kCols - 1) / kCols;
        panel_pitch = MOE_DECODE_PANEL_PITCH(args.stage.intermediate_size);
    }

    // A copy: box_chunks units of an expert, or its tail.
    struct piece {
        int32_t rank, at;
        __device__ __forceinline__ void advance(int32_t by, int32_t copies_per_expert)
        {
            for (at += by; at >= copies_per_expert; at -= copies_per_expert)
                ++rank;
        }
    };

    __device__ __forceinline__ bool is_tail(const piece &p) const
    {
        return tail && p.at == copies_per_expert - 1;
    }

    // One thread.
    __device__ __forceinline__ void produce() const
    {
        ring_position to;
        const uint32_t box_bytes = args.box_chunks * kUnitBytes;
        for (int32_t tile = blockIdx.x; tile < col_tiles; tile += gridDim.x) {
            for (piece p = {0, 0}; p.rank < active;) {
                uint32_t bytes = 0, bar = shared_address(&state.landed[to.stage]);
                uint32_t shared = shared_address(ring + to.stage * stage_bytes);
                piece q = p;
                for (int32_t i = 0; i < args.copies && q.rank < active; ++i) {
                    bytes += is_tail(q) ? kUnitBytes : box_bytes;
                    q.advance(1, copies_per_expert);
                }
                mbarrier_wait(shared_address(&state.read[to.stage]), to.parity ^ 1);
                mbarrier_arrive_expect_tx(bar, bytes);
                for (int32_t i = 0; i < args.copies && p.rank < active; ++i) {
                    int32_t expert = state.active[p.rank];
                    if (is_tail(p))
                        tensor_copy_4d(shared, &rest, chunks * kUnitK, tile * kCols, 0, expert,
                                       bar);
                    else
                        tensor_copy_5d(shared, &body, 0, tile * kCols, 0, p.at * args.box_chunks,
                                       expert, bar);
                    shared += box_bytes;
                    p.advance(1, copies_per_expert);
                }
                to.next(args.ring_stages);
            }
        }
    }

    // Which part of the panel holds the rows of an active expert.
    __device__ __forceinline__ int32_t part_of(int32_t rank) const
    {
        return rank * kPanelParts / active;
    }

    // The rows of intermediate into shared memory, those of the first experts first. One warp, a lane for an expert
    // and a token. What is past K is zero already.
    __device__ __forceinline__ void load_panel() const
    {
        const moe_down_args &stage = args.stage;
        int32_t lane = threadIdx.x % 32, bytes = stage.intermediate_size * 2;
        for (int32_t part = 0; part < kPanelParts; ++part) {
            int32_t rows = 0;
            int32_t begin = (part * active + kPanelParts - 1) / kPanelParts;
            int32_t end = ((part + 1) * active + kPanelParts - 1) / kPanelParts;
            uint32_t bar = shared_address(&state.panel[part]);
            for (int32_t slot = lane; slot < args.slots.num_slots; slot += 32) {
                int32_t rank = state.rank[slot];
                rows += rank >= begin && rank < end;
            }
            rows = __reduce_add_sync(0xffffffffu, rows);
            if (lane == 0) mbarrier_arrive_expect_tx(bar, static_cast<uint32_t>(rows * bytes));
            __syncwarp();
            for (int32_t slot = lane; slot < args.slots.num_slots; slot += 32) {
                int32_t rank = state.rank[slot];
                if (rank >= begin && rank < end)
                    bulk_copy(shared_address(panel + slot * panel_pitch),
                              static_cast<const typename T::element *>(stage.intermediate) +
                                  slot * stage.intermediate_stride,
                              static_cast<uint32_t>(bytes), bar);
            }
        }
    }

    // acc += weight * (the weights of a copy times the token rows), for the tokens that have a slot. units: of 64 of K, from
    // k on. slot: of token 8 tile + g in lane 4 g + q.
    __device__ __forceinline__ void multiply(float (&acc)[kParts][kTiles][4],
                                             const int32_t (&slot)[kTiles], uint32_t weights,
                                             int32_t k, int32_t units) const
    {
        const uint32_t lane = threadIdx.x % 32;
        constexpr int kSums = kParts > 1 ? 1 : 2;
        float sum[kParts][kTiles][kSums][4] = {};
        uint32_t rows[kTiles];
        bool any[kTiles];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            any[tile] = kTiles == 1 || __any_sync(0xffffffffu, slot[tile] >= 0);
            // Columns without a slot take some row: they are not added.
            rows[tile] =
                shared_address(panel) + max(slot[tile], 0) * panel_pitch + k * 2 + lane % 4 * 32;
        }
        for (int32_t unit = 0; unit < units; ++unit) {
            uint4 tokens[kTiles][2];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                if (any[tile]) {
                    tokens[tile][0] = load_shared_16(rows[tile]);
                    tokens[tile][1] = load_shared_16(rows[tile] + 16);
                }
                rows[tile] += kUnitK * 2;
            }
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                weight_fragments w;
                load_weights(w, weights + part * 2048);
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile)
                    if (any[tile]) multiply_unit<T>(sum[part][tile], w, tokens[tile]);
            }
            weights += kUnitBytes;
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            float weight = slot[tile] >= 0 ? state.weight[slot[tile]] : 0.0f;
#pragma unroll
            for (int column = 0; column < 2;
                 ++column) { // of this lane's two, held by lanes 8 q and 8 q + 4
                int32_t from = lane % 4 * 8 + column * 4;
                float scale = __shfl_sync(0xffffffffu, weight, from);
                bool has = __shfl_sync(0xffffffffu, slot[tile], from) >= 0;
#pragma unroll
                for (int part = 0; part < kParts; ++part)
#pragma unroll
                    for (int i = column; i < 4; i += 2)
                        if (has)
                            acc[part][tile][i] +=
                                scale * (kSums > 1
                                             ? sum[part][tile][0][i] + sum[part][tile][kSums - 1][i]
                                             : sum[part][tile][0][i]);
            }
        }
    }

    // The next slots of the tokens that go to the same expert; false where no token has one. A warp.
    __device__ __forceinline__ bool next_slots(int32_t (&slot)[kTiles], int32_t expert) const
    {
        bool any = false;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            int32_t at = slot[tile], end = 0;
            if (at >= 0) end = at / args.slots.topk * args.slots.topk + args.slots.topk;
            do
                ++at;
            while (at < end && state.expert[at] != expert);
            slot[tile] = at < end ? at : -1;
            any |= at < end;
        }
        return __any_sync(0xffffffffu, any);
    }

    __device__ __forceinline__ void store_sums(const float (&acc)[kParts][kTiles][4]) const
    {
        int32_t lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            float(*sum)[kPitch] = &sums.sum[threadIdx.x / 32][tile * 8 + column];
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                sum[0][part * 16 + row] = acc[part][tile][0];
                sum[1][part * 16 + row] = acc[part][tile][1];
                sum[0][part * 16 + row + 8] = acc[part][tile][2];
                sum[1][part * 16 + row + 8] = acc[part][tile][3];
            }
        }
    }

    // Four columns of a token a thread.
    __device__ __forceinline__ void write(int32_t tile) const
    {
        const moe_down_args &stage = args.stage;
        const int32_t topk = args.slots.topk;
        const int32_t num_items = static_cast<int32_t>(stage.num_tokens) * (kCols / 4);
        for (int32_t item = threadIdx.x; item < num_items; item += kMathThreads) {
            int32_t token = item / (kCols / 4), in_tile = item % (kCols / 4) * 4;
            int32_t col = tile * kCols + in_tile;
            if (col >= stage.hidden_size) continue;
            float z[4] = {};
#pragma unroll
            for (int warp = 0; warp < kMathWarps; ++warp) {
                float4 part = *reinterpret_cast<const float4 *>(&sums.sum[warp][token][in_tile]);
                z[0] += part.x, z[1] += part.y, z[2] += part.z, z[3] += part.w;
            }
            if (stage.w2_bias) {
                for (int32_t slot = token * topk; slot < token * topk + topk; ++slot) {
                    int32_t expert = state.expert[slot];
                    if (expert < 0) continue;
                    int64_t at = expert * stage.w2_bias_stride + col;
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        z[i] += state.weight[slot] *
                                load_f32(stage.w2_bias, at + i, stage.w2_bias_dtype);
                }
            }
            int64_t shared_at = token * args.shared_stride + col;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                z[i] *= args.scale;
                if (args.shared_output)
                    z[i] += load_f32(args.shared_output, shared_at + i, T::kDtype);
            }
            typename T::element *to =
                static_cast<typename T::element *>(args.out) + token * args.out_stride + col;
            if (args.vector) {
                *reinterpret_cast<uint2 *>(to) =
                    make_uint2(T::round2(z[0], z[1]), T::round2(z[2], z[3]));
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    to[i] = T::round(z[i]);
            }
        }
    }

    // A stage of the ring is one warp's, always the same: so several are multiplied at a time, and none waits for all. (A
    // warp that took the next stage in turn could wait for a phase two ahead, which has the parity of the one before.)
    __device__ __forceinline__ void consume() const
    {
        const int32_t warp = threadIdx.x / 32;
        const int32_t num_stages = (active * copies_per_expert + args.copies - 1) / args.copies;
        int32_t next = warp,
                end = 0; // numbers of stages: this warp's next, one past the tile's last
        uint32_t parity = 0;
        for (int32_t tile = blockIdx.x; tile < col_tiles; tile += gridDim.x) {
            float acc[kParts][kTiles][4] = {};
            piece at = {0, 0};
            at.advance((next - end) * args.copies, copies_per_expert);
            end += num_stages;
            int32_t arrived = -1; // part of the panel
            for (; warp < args.ring_stages && next < end; next += args.ring_stages, parity ^= 1) {
                mbarrier_wait(shared_address(&state.landed[warp]), parity);
                uint32_t weights = shared_address(ring + warp * stage_bytes);
                piece mine = at;
                for (int32_t copy = 0; copy < args.copies && mine.rank < active; ++copy) {
                    for (; arrived < part_of(mine.rank); ++arrived)
                        mbarrier_wait(shared_address(&state.panel[arrived + 1]), 0);
                    const int32_t chunk = is_tail(mine) ? chunks : mine.at * args.box_chunks;
                    const int32_t units = is_tail(mine) ? 1 : min(args.box_chunks, chunks - chunk);
                    int32_t slot[kTiles];
#pragma unroll
                    for (int t = 0; t < kTiles; ++t)
                        slot[t] = slots[mine.rank * kTokens + t * 8 + threadIdx.x % 32 / 4];
                    do
                        multiply(acc, slot, weights, chunk * kUnitK, units);
                    while (duplicates && next_slots(slot, state.active[mine.rank]));
                    weights += args.box_chunks * kUnitBytes;
                    mine.advance(1, copies_per_expert);
                }
                release(state, warp);
                at.advance(args.ring_stages * args.copies, copies_per_expert);
            }
            store_sums(acc);
            named_barrier_sync(kMathBarrier, kMathThreads);
            write(tile);
            named_barrier_sync(kMathBarrier, kMathThreads);
        }
    }

    // What the math warps know of the slots: weight, rank, `slots`, and whether some token has two slots of one expert.
    // All threads but the producer's warp, after find_experts; weight is that of this thread's first slot.
    __device__ __forceinline__ void read_slots(float weight)
    {
        constexpr int32_t kReaders = kThreads - 32;
        const int32_t topk = args.slots.topk, num_slots = args.slots.num_slots;
        const int32_t thread = threadIdx.x < kMathThreads ? threadIdx.x : threadIdx.x - 32;
        for (int32_t i = thread; i < active * kTokens / 8; i += kReaders)
            reinterpret_cast<uint4 *>(slots)[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
        if (tail) { // zeros behind K
            int32_t past = (kUnitK - args.stage.intermediate_size % kUnitK) / 8;
            for (int32_t i = thread; i < num_slots * past; i += kReaders) {
                int32_t slot = i / past;
                *reinterpret_cast<uint4 *>(panel + slot * panel_pitch +
                                           args.stage.intermediate_size * 2 +
                                           (i - slot * past) * 16) = make_uint4(0, 0, 0, 0);
            }
        }
        if (thread == 0) state.duplicates = 0;
        named_barrier_sync(kReadBarrier, kReaders);
        for (int32_t slot = thread; slot < num_slots; slot += kReaders) {
            state.weight[slot] = slot == thread ? weight : slot_weight(slot);
            int32_t expert = state.expert[slot], token = slot / topk, before = token * topk;
            const bool known = few_slots<kTiles>(args.slots);
            if (!known) state.rank[slot] = -1;
            if (expert < 0) continue;
            while (state.expert[before] != expert)
                ++before;
            int32_t rank = known ? state.rank[slot] : rank_of<kTiles>(state, expert);
            if (!known) state.rank[slot] = static_cast<int16_t>(rank);
            if (before == slot)
                slots[rank * kTokens + token] = static_cast<int16_t>(slot);
            else
                state.duplicates = 1;
        }
        named_barrier_sync(kReadBarrier, kReaders);
        duplicates = state.duplicates;
    }

    // Past L1, as the ids: this is read before the wait, and what was here at the last call may still be in L1.
    __device__ __forceinline__ float slot_weight(int32_t slot) const
    {
        const moe_down_args &stage = args.stage;
        if (!stage.topk_weights) return 1.0f;
        int32_t token = slot / stage.topk;
        int64_t at = token * stage.weights_stride + (slot - token * stage.topk);
        if (stage.weights_dtype == MOE_F32)
            return __ldcg(static_cast<const float *>(stage.topk_weights) + at);
        unsigned short bits = __ldcg(static_cast<const unsigned short *>(stage.topk_weights) + at);
        return stage.weights_dtype == MOE_BF16 ? __uint_as_float(uint32_t{bits} << 16)
                                               : __half2float(__ushort_as_half(bits));
    }

    __device__ __forceinline__ void run()
    {
        start_ring(state, args.ring_stages, 1, &body, &rest);
        const bool produces = threadIdx.x / 32 == kMathWarps;
        const int32_t first = threadIdx.x < kMathThreads ? threadIdx.x : threadIdx.x - 32;
        // Asked for together with the ids: while gate_up streams, a load takes microseconds.
        float weight = !produces && first < args.slots.num_slots ? slot_weight(first) : 0.0f;
        active = find_experts<kTiles>(state, args.slots);
        if (produces) {
            if (threadIdx.x == kMathThreads) produce();
            return;
        }
        read_slots(weight);
        grid_dependency_wait();
        grid_launch_dependents();
        if (threadIdx.x < kMathThreads)
            consume();
        else
            load_panel();
    }
};

#define MOE_KERNEL_sm90a_decode_down(name, type, rows, cols, k, stages, wm, wn, wk)                \
    extern "C" __global__ void __launch_bounds__(kThreads, 1)                                      \
        name(const __grid_constant__ moe_down_decode_args args,                                    \
             const __grid_constant__ tensor_map body, const __grid_constant__ tensor_map rest)     \
    {                                                                                              \
        extern __shared__ __align__(1024) unsigned char dynamic_shared[];                          \
        down_decode<type, rows / 8, cols>(args, body, rest, dynamic_shared).run();                 \
    }
#define MOE_KERNEL_sm90a_decode_gate_up(...)
#define MOE_KERNEL_sm90a_gate_up(...)
#define MOE_KERNEL_sm90a_down(...)
#define MOE_KERNEL_sm80_gate_up(...)
#define MOE_KERNEL_sm80_down(...)
#define MOE_GEMM_VARIANT(name, arch, stage, act, weight, scale, orient, layout, rows, cols, k,     \
                         stages, wm, wn, wk, cluster, align)                                       \
    MOE_KERNEL_##arch##_##stage(name, act, rows, cols, k, stages, wm, wn, wk)
#include "gemm_variants.def"
