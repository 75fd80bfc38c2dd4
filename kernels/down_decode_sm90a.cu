// arch: sm_90a
/* down_decode_sm90a.cu: down and combine for a few tokens, straight from topk_ids              (stages 4 and 5 of 5)
 * In     intermediate   [num_tokens * topk, intermediate_size]  row r is slot r (gate_up_decode_sm90a.cu)
 *        w2, w2_bias, topk_weights, shared_output, topk_ids
 * Out    out            [num_tokens, hidden_size]  every element is written
 * Math   out = round(scale * sum over slots (w2 . intermediate + bias) * weight + shared_output), f32, one rounding.
 *        Experts in an order that the ids decide, stages of the ring dealt to eight warps, whose sums are added in warp
 *        order, then the biases: the same bits every time
 * Grid   a block owns kCols columns of out and goes over all active experts; at most one block per SM, where the plan
 *        says so beside one of gate_up: registers of both have to fit
 * Needs  as gate_up_decode_sm90a.cu. Weights, ids and topk_weights are read before the wait: they are complete once
 *        gate_up has waited for them
 * Cost   the weights of the active experts once: memory-bound */
#include "decode.cuh"

// kPlain: no bias, and no code of it.
template <class T, int kTiles, int kCols, bool kPlain>
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
        &rest;                   // w2: box_chunks units; K past the last whole 64, zeros behind it
    unsigned char *ring, *panel; // panel: token rows, row_at says where
    sums_buffer &sums;
    decode_state &state;
    int16_t
        *slots; // [active][kTokens]: the first slot of a token that goes to the expert, -1: none
    int32_t chunks, copies_per_expert, stage_bytes, col_tiles, panel_pitch, per_slot, active = 0;
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
        panel_pitch = (args.stage.intermediate_size + kUnitK - 1) / kUnitK * kUnitK * 2;
        per_slot = static_cast<int32_t>((0xffffu + args.slots.topk) / args.slots.topk);
    }

    // Where the row of a slot is. ldmatrix reads rows of eight neighbouring tokens, whichever of a token's slots they are, and
    // they should be in banks of their own: 16 bytes further for each token. (slot * per_slot >> 16 is slot / topk, but for a
    // topk above 128, where it only has to grow with the slot.)
    __device__ __forceinline__ uint32_t row_at(int32_t slot) const
    {
        return shared_address(panel) + slot * panel_pitch + (slot * per_slot >> 16) * 16;
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

    // One thread: every step-th stage from `first` on, of all tiles.
    __device__ __forceinline__ void produce(int32_t first, int32_t step) const
    {
        const uint32_t box_bytes = args.box_chunks * kUnitBytes;
        const int32_t num_pieces = active * copies_per_expert;
        const int32_t num_stages = (num_pieces + args.copies - 1) / args.copies;
        int32_t next = first, end = 0; // numbers of stages: the next, one past the tile's last
        int32_t stage = first;
        uint32_t parity = 0;
#pragma unroll 1
        for (int32_t tile = blockIdx.x; tile < col_tiles; tile += gridDim.x) {
            piece at = {0, 0};
            at.advance((next - end) * args.copies, copies_per_expert);
            int32_t left = num_pieces - (next - end) * args.copies;
            end += num_stages;
#pragma unroll 1
            for (; next < end; next += step) {
                const int32_t copies = min(args.copies, left);
                uint32_t bytes = copies * box_bytes, bar = shared_address(&state.landed[stage]);
                uint32_t shared = shared_address(ring + stage * stage_bytes);
                if (tail) {
                    piece p = at;
#pragma unroll 1
                    for (int32_t i = 0; i < copies; ++i) {
                        if (is_tail(p)) bytes -= box_bytes - kUnitBytes;
                        p.advance(1, copies_per_expert);
                    }
                }
                piece p = at;
                mbarrier_wait(shared_address(&state.read[stage]), parity ^ 1);
                mbarrier_arrive_expect_tx(bar, bytes);
#pragma unroll 1
                for (int32_t i = 0; i < copies; ++i) {
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
                at.advance(step * args.copies, copies_per_expert);
                left -= step * args.copies;
                stage += step;
                if (stage >= args.ring_stages) {
                    stage = first;
                    parity ^= 1;
                }
            }
        }
    }

    // The wait, then the rows of intermediate into shared memory; what is past K is zero already. The math warps do it, not
    // the copy engine: it would bring them behind the weights that it has been asked for. Rows of dropped slots come too.
    __device__ __forceinline__ void load_panel() const
    {
        const moe_down_args &stage = args.stage;
        const int32_t pieces = stage.intermediate_size / 8; // of a row, 16 bytes each
        const int32_t slots_on = kMathThreads / pieces, pieces_on = kMathThreads % pieces;
        int32_t slot = static_cast<int32_t>(threadIdx.x) / pieces;
        int32_t piece = static_cast<int32_t>(threadIdx.x) % pieces;
        const int64_t stride = stage.intermediate_stride * 2;
        const char *from =
            static_cast<const char *>(stage.intermediate) + slot * stride + piece * 16;
        uint32_t to = row_at(slot) + piece * 16;
        // Steps to this thread's next piece: in a row further on, or in the one behind that.
        const int64_t from_on = slots_on * stride + pieces_on * 16,
                      from_next = from_on + stride - pieces * 16;
        compute_now((reinterpret_cast<uint64_t>(from) | from_on | from_next) + to);
        // Before the wait: the first kernel of the next call sets itself up meanwhile.
        grid_launch_dependents();
        grid_dependency_wait();
#pragma unroll 1
        while (slot < args.slots.num_slots) {
            cp_async_16(to, from, 16);
            piece += pieces_on;
            const bool wraps = piece >= pieces;
            if (wraps) piece -= pieces;
            slot += slots_on + wraps;
            from += wraps ? from_next : from_on;
            to = row_at(slot) + piece * 16;
        }
        cp_async_commit();
        cp_async_wait<0>();
        sync_warps(kMathBarrier, kMathThreads);
    }

    // The slots whose products a lane takes part in, of one expert: of token lane % 8 (its row of the panel) and of tokens
    // 2 q, 2 q + 1, q = lane % 4 (its columns of the sums, and their weights); of eight more tokens in each tile. -1: none.
    struct lane_slots {
        int32_t row[kTiles], column[kTiles][2];
        uint32_t address[kTiles]; // of the row in the panel
        float scale[kTiles][2];
    };

    // Columns without a slot take some row and some weight: they are not added.
    __device__ __forceinline__ void look_up(lane_slots &slot) const
    {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            // Of a token without a slot, the row of one with: it is not added, but it is there.
            const uint32_t has = __ballot_sync(0xffffffffu, slot.row[tile] >= 0);
            const int32_t other =
                __shfl_sync(0xffffffffu, slot.row[tile], __ffs(static_cast<int32_t>(has)) - 1);
            slot.address[tile] = row_at(max(slot.row[tile] < 0 ? other : slot.row[tile], 0));
#pragma unroll
            for (int i = 0; i < 2; ++i)
                slot.scale[tile][i] = state.weight[max(slot.column[tile][i], 0)];
        }
    }

    __device__ __forceinline__ void load_slots(lane_slots &slot, int32_t rank) const
    {
        const int16_t *from = slots + rank * kTokens;
        const int32_t lane = threadIdx.x % 32;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            slot.row[tile] = from[tile * 8 + lane % 8];
            short2 pair = *reinterpret_cast<const short2 *>(from + tile * 8 + lane % 4 * 2);
            slot.column[tile][0] = pair.x;
            slot.column[tile][1] = pair.y;
        }
        look_up(slot);
    }

    // What a lane brings of the token rows of one copy: every by-th 16 bytes of one row, from `first` on.
    struct row_share {
        const char *from;
        uint32_t to;
        int32_t first, end, by;
    };

    // The rows of the tokens that have a slot, dealt out evenly: 32, 16, 8 or 4 lanes each. All blocks want the same rows, so
    // each begins at one of its own.
    __device__ __forceinline__ row_share share_rows(const piece &p) const
    {
        const moe_down_args &stage = args.stage;
        const bool there = p.rank < active;
        const int32_t lane = threadIdx.x % 32,
                      row = there ? slots[p.rank * kTokens + lane % 8] : -1;
        const uint32_t has = __ballot_sync(0xffffffffu, row >= 0) & 0xff;
        const int32_t count = max(__popc(has), 1), shift = __clz(count - 1) - 27;
        int32_t index = lane >> shift, token = 0; // the index-th token that has a slot
        const bool any = there && index < count;
        if (count == 8) index ^= blockIdx.x & 7;
#pragma unroll
        for (int half = 4; half; half /= 2) {
            const int32_t below = __popc(has >> token & ((1u << half) - 1));
            if (index >= below) index -= below, token += half;
        }
        const int32_t slot = max(__shfl_sync(0xffffffffu, row, token & 7), 0);
        const bool last = is_tail(p);
        const int32_t chunk = last ? chunks : p.at * args.box_chunks, at = chunk * kUnitK * 2;
        const int32_t end = last ? stage.intermediate_size % kUnitK / 8
                                 : min(args.box_chunks, chunks - chunk) * (kUnitK / 8);
        return {static_cast<const char *>(stage.intermediate) +
                    slot * stage.intermediate_stride * 2 + at,
                row_at(slot) + at, lane & ((1 << shift) - 1), any ? end : 0, 1 << shift};
    }

    __device__ __forceinline__ void ask(const row_share &share) const
    {
#pragma unroll 1
        for (int32_t i = share.first; i < share.end; i += share.by)
            cp_async_16(share.to + i * 16, share.from + i * 16, 16);
        cp_async_commit();
    }

    // The wait, then the token rows of this warp's first two stages.
    __device__ __forceinline__ void ask_first(const piece &first, const piece &second) const
    {
        const row_share one = share_rows(first), two = share_rows(second);
        compute_now(
            (reinterpret_cast<uint64_t>(one.from) | reinterpret_cast<uint64_t>(two.from)) +
            (one.to | two.to | one.first | two.first | one.end | two.end | one.by | two.by));
        grid_launch_dependents();
        grid_dependency_wait();
        ask(one);
        ask(two);
    }

    // acc += weight * (the weights of a copy times the token rows), for the tokens that have a slot, of kCopies copies of one
    // stage at once: what one waits for, the other does not. units: of 64 of K, from k on, each.
    template <int kCopies>
    __device__ __forceinline__ void multiply(float (&acc)[kParts][kTiles][4],
                                             const lane_slots (&slot)[2], uint32_t weights,
                                             const int32_t (&k)[kCopies], int32_t units) const
    {
        constexpr int kSums = kParts > 1 ? 1 : 2;
        float sum[kCopies][kParts][kTiles][kSums][4] = {};
        uint32_t rows[kCopies][kTiles];
        bool any[kCopies][kTiles];
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const lane_slots &s = slot[copy];
                any[copy][tile] = kTiles == 1 || __any_sync(0xffffffffu, s.row[tile] >= 0);
                rows[copy][tile] = s.address[tile] + k[copy] * 2;
            }
        }
        const uint32_t copy_bytes = args.box_chunks * kUnitBytes;
#pragma unroll kCopies> 1 ? 1 : 2
        for (int32_t unit = 0; unit < units; ++unit) {
#pragma unroll
            for (int copy = 0; copy < kCopies; ++copy) {
                token_fragments tokens[kTiles];
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    if (any[copy][tile]) load_tokens(tokens[tile], rows[copy][tile]);
                    rows[copy][tile] += kUnitK * 2;
                }
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    weight_fragments w;
                    load_weights(w, weights + copy * copy_bytes + part * 2048);
#pragma unroll
                    for (int tile = 0; tile < kTiles; ++tile)
                        if (any[copy][tile])
                            multiply_unit<T>(sum[copy][part][tile], w, tokens[tile]);
                }
            }
            weights += kUnitBytes;
        }
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy)
#pragma unroll
            for (int part = 0; part < kParts; ++part)
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float(&z)[kSums][4] = sum[copy][part][tile];
                        if (slot[copy].column[tile][i % 2] >= 0)
                            acc[part][tile][i] += slot[copy].scale[tile][i % 2] *
                                                  (kSums > 1 ? z[0][i] + z[kSums - 1][i] : z[0][i]);
                    }
    }

    // The next slots of the tokens that go to the same expert; false where no token has one. A warp.
    __device__ __forceinline__ bool next_slots(lane_slots &slot, int32_t expert) const
    {
        bool any = false;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            int32_t at = slot.row[tile], end = 0;
            if (at >= 0) end = at / args.slots.topk * args.slots.topk + args.slots.topk;
            do
                ++at;
            while (at < end && state.expert[at] != expert);
            slot.row[tile] = at < end ? at : -1;
            any |= at < end;
#pragma unroll
            for (int i = 0; i < 2; ++i)
                slot.column[tile][i] =
                    __shfl_sync(0xffffffffu, slot.row[tile], threadIdx.x % 4 * 2 + i);
        }
        look_up(slot);
        return __any_sync(0xffffffffu, any);
    }

    // Where a lane's sums go, and which four columns of which token a thread writes: known before the sums are.
    struct places {
        float *sum;
        int32_t token, in_tile, col;
        typename T::element *to;
        bool writes, plain; // plain: scaled sums and nothing else
        float bias[4];      // of all slots, weighted; not where plain
    };

    __device__ __forceinline__ places find_places(int32_t tile) const
    {
        static_assert(kTokens * (kCols / 4) <= kMathThreads, "one item a thread");
        const int32_t lane = threadIdx.x % 32, item = threadIdx.x;
        places at;
        at.sum = &sums.sum[threadIdx.x / 32][lane % 4 * 2][lane / 4];
        at.token = item / (kCols / 4), at.in_tile = item % (kCols / 4) * 4;
        at.col = tile * kCols + at.in_tile;
        at.to = static_cast<typename T::element *>(args.out) + at.token * args.out_stride + at.col;
        at.writes = at.token < args.stage.num_tokens && at.col < args.stage.hidden_size;
        at.plain = (kPlain || !args.stage.w2_bias) && !args.shared_output && args.vector;
        return at;
    }

    // Slots in their order, two at a time.
    __device__ __forceinline__ void find_bias(places &of) const
    {
        const moe_down_args &stage = args.stage;
        const int32_t topk = args.slots.topk, end = of.token * topk + topk;
#pragma unroll
        for (float &sum : of.bias)
            sum = 0.0f;
        if (!stage.w2_bias || !of.writes) return;
#pragma unroll 1
        for (int32_t slot = of.token * topk; slot < end; slot += 2) {
            int64_t at[8];
            float bias[8], weight[2];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int32_t expert = slot + n < end ? state.expert[slot + n] : -1;
                weight[n] = expert >= 0 ? state.weight[slot + n] : 0.0f;
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    at[n * 4 + i] = expert >= 0 ? expert * stage.w2_bias_stride + of.col + i : -1;
            }
            load_f32(bias, stage.w2_bias, at, stage.w2_bias_dtype);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (at[i] >= 0) of.bias[i % 4] += weight[i / 4] * bias[i];
        }
    }

    __device__ __forceinline__ void store_sums(const float (&acc)[kParts][kTiles][4],
                                               const places &at) const
    {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            float *sum = at.sum + tile * 8 * kPitch;
#pragma unroll
            for (int part = 0; part < kParts; ++part, sum += 16) {
                sum[0] = acc[part][tile][0];
                sum[kPitch] = acc[part][tile][1];
                sum[8] = acc[part][tile][2];
                sum[kPitch + 8] = acc[part][tile][3];
            }
        }
    }

    // The warps' sums, biases and shared output of this block's columns -> out. Four columns of a token a thread. Math warps.
    __device__ __forceinline__ void write(const places &at) const
    {
        const int32_t token = at.token, col = at.col;
        sync_warps(kMathBarrier, kMathThreads);
        if (!at.writes) return;
        float z[4] = {};
#pragma unroll
        for (int warp = 0; warp < kMathWarps; ++warp) {
            float4 part = *reinterpret_cast<const float4 *>(&sums.sum[warp][token][at.in_tile]);
            z[0] += part.x, z[1] += part.y, z[2] += part.z, z[3] += part.w;
        }
        if (at.plain) {
            *reinterpret_cast<uint2 *>(at.to) =
                make_uint2(T::round2(z[0] * args.scale, z[1] * args.scale),
                           T::round2(z[2] * args.scale, z[3] * args.scale));
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if constexpr (!kPlain) z[i] += at.bias[i];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            z[i] *= args.scale;
        if (args.shared_output) {
            int64_t shared_at = token * args.shared_stride + col;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                z[i] += load_f32(args.shared_output, shared_at + i, T::kDtype);
        }
        if (args.vector) {
            *reinterpret_cast<uint2 *>(at.to) =
                make_uint2(T::round2(z[0], z[1]), T::round2(z[2], z[3]));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                at.to[i] = T::round(z[i]);
        }
    }

    // A stage of the ring is one warp's, always the same: so several are multiplied at a time, and none waits for all. (A
    // warp that took the next stage in turn could wait for a phase two ahead, which has the parity of the one before.)
    // Stages: at most one a warp, or two. kOwn: it brings the token rows of its own stages, two stages ahead, so that the first
    // products do not wait for all rows. kOnce: at most one stage a warp and one tile a block: no ring, and what can be
    // known before the wait is.
    template <bool kOwn, bool kOnce>
    __device__ __forceinline__ void consume(int32_t num_stages) const
    {
        const int32_t warp = threadIdx.x / 32, step = min(args.ring_stages, kMathWarps);
        // Numbers of stages: this warp's next, one past the tile's last.
        int32_t next = warp, end = 0, stage = warp;
        uint32_t parity = 0;
        piece at = {0, 0};
        at.advance(warp * args.copies, copies_per_expert);
        // Two experts at a time where a copy is all of an expert's; with more sums registers would not do.
        const bool pairs = kParts * kTiles == 1 && copies_per_expert == 1 && !tail && !duplicates;
        bool waited = false;
        places place = find_places(blockIdx.x);
        if (kOnce) {
            if (!kPlain && !place.plain) find_bias(place);
            compute_now(
                (reinterpret_cast<uint64_t>(place.to) | reinterpret_cast<uint64_t>(place.sum)) +
                place.token + place.plain + place.writes);
        }
#pragma unroll 1
        for (int32_t tile = blockIdx.x; tile < col_tiles; tile += gridDim.x) {
            float acc[kParts][kTiles][4] = {};
            if (end > 0) {
                at = {0, 0};
                at.advance((next - end) * args.copies, copies_per_expert);
            }
            end += num_stages;
#pragma unroll 1
            for (; warp < step && next < end; next += step) {
                uint32_t weights = shared_address(ring + stage * stage_bytes);
                piece mine = at;
#pragma unroll 1
                for (int32_t copy = 0; copy < args.copies && mine.rank < active; ++copy) {
                    const bool two = pairs && copy + 1 < args.copies && mine.rank + 1 < active;
                    const int32_t chunk = is_tail(mine) ? chunks : mine.at * args.box_chunks;
                    const int32_t units = is_tail(mine) ? 1 : min(args.box_chunks, chunks - chunk);
                    lane_slots slot[2];
                    load_slots(slot[0], mine.rank);
                    if (two) load_slots(slot[1], mine.rank + 1);
                    if (copy == 0) {
                        if (!waited) {
                            // All that needs neither weights nor token rows is done now.
                            compute_now(weights + units + slot[0].address[0]);
                            if (kOwn) {
                                piece second = at;
                                second.advance(step, copies_per_expert);
                                ask_first(at, second);
                            } else {
                                load_panel();
                            }
                            waited = true;
                        }
                        if (kOwn) {
                            cp_async_wait<1>();
                            __syncwarp();
                        }
                        mbarrier_wait(shared_address(&state.landed[stage]), parity);
                    }
                    if (two) {
                        multiply<2>(acc, slot, weights, {0, 0}, units);
                        ++copy;
                        ++mine.rank;
                        weights += args.box_chunks * kUnitBytes;
                    } else {
                        do
                            multiply<1>(acc, slot, weights, {chunk * kUnitK}, units);
                        while (!kOnce && duplicates &&
                               next_slots(slot[0], state.active[mine.rank]));
                    }
                    weights += args.box_chunks * kUnitBytes;
                    mine.advance(1, copies_per_expert);
                }
                if (kOnce) break;
                release(state, stage);
                at.advance(step * args.copies, copies_per_expert);
                if (kOwn) {
                    piece ahead = at;
                    ahead.advance(step, copies_per_expert);
                    ask(share_rows(ahead));
                }
                stage += step;
                if (stage >= args.ring_stages) {
                    stage = warp;
                    parity ^= 1;
                }
            }
            if (!waited) load_panel(); // there was nothing for this warp
            waited = true;
            if (!kOnce) {
                place = find_places(tile);
                if (!kPlain && !place.plain) find_bias(place);
            }
            store_sums(acc, place);
            write(place);
            if (kOnce) return;
            if (tile + gridDim.x < col_tiles) sync_warps(kMathBarrier, kMathThreads);
        }
    }

    // Zeros behind K.
    __device__ __forceinline__ void clear_panel_tail() const
    {
        const int32_t num_slots = args.slots.num_slots;
        const int32_t past = (kUnitK - args.stage.intermediate_size % kUnitK) / 8;
#pragma unroll 1
        for (int32_t i = threadIdx.x; i < num_slots * past; i += kThreads) {
            int32_t slot = i / past;
            uint32_t at = row_at(slot) - shared_address(panel);
            *reinterpret_cast<uint4 *>(panel + at + args.stage.intermediate_size * 2 +
                                       (i - slot * past) * 16) = make_uint4(0, 0, 0, 0);
        }
    }

    // find_experts and read_slots for at most 32 slots: a warp.
    __device__ __forceinline__ void read_few_slots() const
    {
        const int32_t lane = threadIdx.x % 32, num_slots = args.slots.num_slots;
        const int64_t id = lane < num_slots ? load_id(args.slots, lane) : 0;
        const float weight = lane < num_slots ? slot_weight(lane) : 0.0f;
        if (lane < min(num_slots, args.slots.num_experts))
            reinterpret_cast<uint4 *>(slots)[lane] = make_uint4(~0u, ~0u, ~0u, ~0u);
        const int32_t token = lane / args.slots.topk;
        const lane_slot mine = find_few_experts(state, args.slots, id);
        // Slots of the same token and expert before this one.
        const uint32_t before = mine.same & ((1u << lane) - (1u << token * args.slots.topk));
        __syncwarp();
        if (lane < num_slots) {
            state.weight[lane] = weight;
            if (mine.expert >= 0 && before == 0)
                slots[mine.rank * kTokens + token] = static_cast<int16_t>(lane);
        }
        const bool twice = __any_sync(0xffffffffu, mine.expert >= 0 && before != 0);
        if (lane == 0) state.duplicates = twice;
    }

    // What the math warps know of the slots: weight, `slots`, and whether some token has two slots of one expert. They do it,
    // after find_experts; weight is that of this thread's first slot.
    __device__ __forceinline__ void read_slots(float weight)
    {
        const int32_t topk = args.slots.topk, num_slots = args.slots.num_slots;
        const int32_t thread = threadIdx.x;
#pragma unroll 1
        for (int32_t i = thread; i < active * kTokens / 8; i += kMathThreads)
            reinterpret_cast<uint4 *>(slots)[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
        if (thread == 0) state.duplicates = 0;
        sync_warps(kMathBarrier, kMathThreads);
#pragma unroll 1
        for (int32_t slot = thread; slot < num_slots; slot += kMathThreads) {
            state.weight[slot] = slot == thread ? weight : slot_weight(slot);
            int32_t expert = state.expert[slot], token = slot / topk, before = token * topk;
            if (expert < 0) continue;
#pragma unroll 1
            while (state.expert[before] != expert)
                ++before;
            if (before == slot)
                slots[rank_of<kTiles>(state, expert) * kTokens + token] =
                    static_cast<int16_t>(slot);
            else
                state.duplicates = 1;
        }
        sync_warps(kMathBarrier, kMathThreads);
    }

    // Past L1, as the ids: this is read before the wait, and what was here at the last call may still be in L1.
    __device__ __forceinline__ float slot_weight(int32_t slot) const
    {
        const moe_down_args &stage = args.stage;
        if (!stage.topk_weights) return 1.0f;
        int64_t at = slot;
        if (stage.weights_stride != stage.topk) {
            int32_t token = slot / stage.topk;
            at = token * stage.weights_stride + (slot - token * stage.topk);
        }
        if (stage.weights_dtype == MOE_F32)
            return __ldcg(static_cast<const float *>(stage.topk_weights) + at);
        unsigned short bits = __ldcg(static_cast<const unsigned short *>(stage.topk_weights) + at);
        return stage.weights_dtype == MOE_BF16 ? __uint_as_float(uint32_t{bits} << 16)
                                               : __half2float(__ushort_as_half(bits));
    }

    __device__ __forceinline__ void run()
    {
        start_ring(state, args.ring_stages, 1, &body, &rest);
        if (tail) clear_panel_tail();
        const bool math = threadIdx.x < kMathThreads, few = few_slots<kTiles>(args.slots);
        if (few) {
            if (threadIdx.x < 32) read_few_slots();
            __syncthreads();
            active = state.num_active;
        }
        // Asked for together with the ids: while gate_up streams, a load takes microseconds.
        float weight = 0.0f;
        if (!few) {
            if (math && threadIdx.x < args.slots.num_slots) weight = slot_weight(threadIdx.x);
            active = find_experts<kTiles>(state, args.slots, false);
        }
        if (math) {
            if (!few) read_slots(weight);
            duplicates = state.duplicates;
            const int32_t num_stages = (active * copies_per_expert + args.copies - 1) / args.copies;
            compute_now(num_stages);
            // Where every warp has many stages, the same in every tile.
            const bool own = kTiles == 1 && args.copies == 1 && !duplicates &&
                             args.ring_stages >= kMathWarps && num_stages > 2 * kMathWarps &&
                             col_tiles <= static_cast<int32_t>(gridDim.x);
            const bool once = kTiles == 1 && !duplicates && num_stages <= args.ring_stages &&
                              num_stages <= kMathWarps &&
                              col_tiles <= static_cast<int32_t>(gridDim.x);
            if (once)
                consume<false, kTiles == 1>(num_stages);
            else if (own)
                consume<kTiles == 1, false>(num_stages);
            else
                consume<false, false>(num_stages);
        } else if (threadIdx.x % 32 == 0) {
            // Two warps ask where each has stages of the ring for good, as the math warps (consume); one where it would not.
            const bool once = active * copies_per_expert <= args.ring_stages * args.copies &&
                              col_tiles <= static_cast<int32_t>(gridDim.x);
            const int32_t producers = args.ring_stages % 2 == 0 || once ? 2 : 1;
            const int32_t producer = threadIdx.x / 32 - kMathWarps;
            if (producer < producers) produce(producer, producers);
        }
    }
};

#define MOE_KERNEL_decode(plain, name, type, rows, cols)                                           \
    extern "C" __global__ void __launch_bounds__(kThreads, rows == 8 && cols == 16 ? 2 : 1)        \
        name(const __grid_constant__ moe_down_decode_args args,                                    \
             const __grid_constant__ tensor_map body, const __grid_constant__ tensor_map rest)     \
    {                                                                                              \
        extern __shared__ __align__(1024) unsigned char dynamic_shared[];                          \
        fetch_parameters(args);                                                                    \
        down_decode<type, rows / 8, cols, plain>(args, body, rest, dynamic_shared).run();          \
    }
#define MOE_KERNEL_sm90a_decode_down(name, type, rows, cols, ...)                                  \
    MOE_KERNEL_decode(false, name, type, rows, cols)
#define MOE_KERNEL_sm90a_decode_bare_down(name, type, rows, cols, ...)                             \
    MOE_KERNEL_decode(true, name, type, rows, cols)
#include "gemm_instances.cuh"
