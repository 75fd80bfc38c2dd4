/* gemm_mma.cuh: the main loop of the portable grouped GEMMs (gate_up.cu, down.cu).
 *
 * Math   sums[r, n] = token_row(r) . weight_row(n), f32, for one tile: up to kRows token rows of one expert
 *        and kCols of its weight rows; K in steps of kTileK, always in the same order
 * How    token rows are the M of mma.sync m16n8k16, weight rows its N. A ring of kStages stages in shared
 *        memory is filled by 16-byte cp.async (kVector) or, for rows of any alignment, through registers;
 *        chunk c of row r lies at chunk c ^ (r % 8), so neither the copies nor ldmatrix meet a bank twice.
 *        kWarpsK > 1 splits each stage's K over warps: short dependent chains for tiles of few rows; the
 *        partial sums meet in the epilogue, in warp order.
 * Tails  rows past the tile, weight rows past num_cols and K past its end are zeros in shared memory and
 *        are never read from global memory. */
#ifndef MOE_GEMM_MMA_CUH
#define MOE_GEMM_MMA_CUH

#include "numeric.cuh"

// Where the weight rows of a tile lie. Column n of a gated gate_up is gate n / 2 where n is even, else up
// n / 2, whatever the order in memory: one thread then holds both.
struct weight_rows {
    const void *base; // of the expert
    int64_t stride;   // from row to row, elements
    int32_t num_cols; // columns there are: n < num_cols
    int32_t split; // 0: column n is row n. I: gate i is row i + gate_first, up i row i + up_first
    int32_t gate_first;
    int32_t up_first;

    __device__ __forceinline__ int64_t row(int32_t n) const
    {
        if (split == 0) return n;
        return (n >> 1) + ((n & 1) ? up_first : gate_first);
    }
};

template <class Type, int kRows_, int kCols_, int kTileK_, int kStages_, int kWarpsM_, int kWarpsN_,
          int kWarpsK_, bool kVector_>
struct gemm_mma {
    static constexpr int kRows = kRows_, kCols = kCols_, kTileK = kTileK_, kStages = kStages_;
    static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
    static constexpr bool kVector = kVector_;
    using T = Type;
    using element = typename Type::element;

    static constexpr int kThreads = MOE_GEMM_THREADS(kWarpsM, kWarpsN, kWarpsK);
    static constexpr int kChunks = kTileK / 8;           // 16-byte chunks of a row of a stage
    static constexpr int kPassRows = kThreads / kChunks; // rows that all threads copy at once
    static constexpr int kTokenPasses = kRows / kPassRows;
    static constexpr int kWeightPasses = kCols / kPassRows;
    static constexpr int kSteps = kTileK / 16 / kWarpsK;   // k16 steps of a warp in a stage
    static constexpr int kSumsStride = kCols + 8;          // f32; rows 8 banks apart
    static constexpr int kTokenBytes = kRows * kTileK * 2; // of a stage
    static constexpr int kWeightBytes = kCols * kTileK * 2;
    // Tiles in a column before the next column: neighbours in time share weights and token rows in L2.
    static constexpr int kRaster = kRows >= 64 ? 8 : 1;

    static_assert(kChunks % 8 == 0, "the swizzle permutes eight chunks");
    static_assert(kPassRows % 8 == 0, "a thread's rows have the same swizzle");
    static_assert(kTokenPasses * kPassRows == kRows, "all threads copy token rows");
    static_assert(kWeightPasses * kPassRows == kCols, "all threads copy weight rows");
    static_assert(kWeightPasses <= 32 && kTokenPasses <= 32, "one bit per pass");
    static_assert(kSteps >= 1 && kSteps * 16 * kWarpsK == kTileK, "warps share the K of a stage");
    static_assert(kStages >= 2, "a ring");
    static_assert(kRows <= kThreads, "thread r looks up row r");
    static_assert(kVector || kStages == 2, "registers are the third stage");

    struct shared {
        union {
            struct {
                alignas(128) unsigned char token[kStages][kTokenBytes];
                alignas(128) unsigned char weight[kStages][kWeightBytes];
            } ring;
            float sums[kWarpsK][kRows][kSumsStride];
        };
        int32_t row_token[kRows];
        float row_weight[kRows];
    };
    static_assert(sizeof(shared) == MOE_GEMM_SMEM_BYTES(kRows, kCols, kTileK, kStages),
                  "the host launches with the size that its macro gives");

    // One tile of one thread block, or nothing to do (num_rows == 0).
    struct work {
        int32_t expert, row_begin, num_rows, col_begin;
    };

    static __device__ __forceinline__ work find_work(const moe_tile *tiles,
                                                     const int32_t *num_tiles, int32_t max_tiles,
                                                     int32_t num_cols, int64_t num_slots)
    {
        uint32_t col_tiles = (static_cast<uint32_t>(num_cols) + kCols - 1) / kCols;
        uint32_t tile, col;
        if (kRaster == 1) {
            tile = blockIdx.x / col_tiles;
            col = blockIdx.x - tile * col_tiles;
        } else {
            uint32_t group = blockIdx.x / (kRaster * col_tiles);
            uint32_t in_group = blockIdx.x - group * (kRaster * col_tiles);
            uint32_t group_tiles = min(static_cast<uint32_t>(kRaster), max_tiles - group * kRaster);
            col = in_group / group_tiles;
            tile = group * kRaster + in_group - col * group_tiles;
        }
        // Both at once, and past L1: down reads them before it has waited for gate_up (align is done).
        int32_t count = __ldcg(num_tiles);
        int4 found = __ldcg(reinterpret_cast<const int4 *>(tiles + tile));
        if (static_cast<int64_t>(tile) >= count) return {0, 0, 0, 0};
        int32_t rows =
            static_cast<int32_t>(min(static_cast<int64_t>(found.z), num_slots - found.y));
        return {found.x, found.y, max(rows, 0), static_cast<int32_t>(col * kCols)};
    }

    // ---------------------------------------------------------------------------------------------
    // Copies into the ring. Thread t copies chunk t % kChunks of rows t / kChunks + pass * kPassRows.
    // ---------------------------------------------------------------------------------------------

    // Compute x once: with few registers free the compiler would redo its arithmetic in every step.
    template <class X>
    static __device__ __forceinline__ void keep(X &x)
    {
        if constexpr (sizeof(X) == 8)
            asm volatile("" : "+l"(x));
        else
            asm volatile("" : "+r"(x));
    }

    struct copier {
        const unsigned char *token[kTokenPasses]; // this thread's chunk at k = 0
        const unsigned char *weight;
        int64_t weight_step;  // from pass to pass, bytes
        uint32_t token_valid; // bit pass: the row exists
        uint32_t weight_valid;
        uint32_t offset; // of the chunk within a stage, bytes
        int32_t k_end;   // K less this chunk's k

        __device__ __forceinline__ void set_weights(const weight_rows &rows, int32_t col_begin,
                                                    int32_t k_size)
        {
            int32_t row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks, k = chunk * 8;
            k_end = k_size - k;
            offset = row * (kTileK * 2) + ((chunk ^ (row & 7)) << 4);
            weight = reinterpret_cast<const unsigned char *>(
                static_cast<const element *>(rows.base) + rows.row(col_begin + row) * rows.stride +
                k);
            weight_step = (rows.split ? kPassRows / 2 : kPassRows) * rows.stride;
            weight_valid = 0;
#pragma unroll
            for (int pass = 0; pass < kWeightPasses; ++pass)
                if (col_begin + row + pass * kPassRows < rows.num_cols) weight_valid |= 1u << pass;
            weight_step *= sizeof(element);
            keep(weight);
            keep(weight_step);
            keep(weight_valid);
            keep(offset);
            keep(k_end);
        }

        // row_of(r): pointer to token row r of the tile, r < num_rows; NULL: a row of zeros.
        template <class RowOf>
        __device__ __forceinline__ void set_tokens(int32_t num_rows, RowOf row_of)
        {
            int32_t row = threadIdx.x / kChunks, k = threadIdx.x % kChunks * 8;
            token_valid = 0;
#pragma unroll
            for (int pass = 0; pass < kTokenPasses; ++pass) {
                int32_t r = row + pass * kPassRows;
                const element *from = r < num_rows ? row_of(r) : nullptr;
                token[pass] = reinterpret_cast<const unsigned char *>(from + k);
                if (from) token_valid |= 1u << pass;
                keep(token[pass]);
            }
            keep(token_valid);
        }

        // Part `part` of kParts of a stage; the main loop spreads them over its steps.
        template <int kParts = 1>
        __device__ __forceinline__ void copy_weights(shared &smem, int32_t step, int stage,
                                                     int part = 0) const
        {
            uint32_t to = shared_address(smem.ring.weight[stage]) + offset;
            int32_t at = step * kTileK;
            uint32_t valid = at < k_end ? weight_valid : 0;
            const unsigned char *from = weight + at * int64_t{sizeof(element)};
#pragma unroll
            for (int pass = part * kWeightPasses / kParts;
                 pass < (part + 1) * kWeightPasses / kParts; ++pass)
                cp_async_16(to + pass * (kPassRows * kTileK * 2), from + pass * weight_step,
                            (valid >> pass & 1) << 4);
        }

        template <int kParts = 1>
        __device__ __forceinline__ void copy_tokens(shared &smem, int32_t step, int stage,
                                                    int part = 0) const
        {
            uint32_t to = shared_address(smem.ring.token[stage]) + offset;
            int32_t at = step * kTileK;
            uint32_t valid = at < k_end ? token_valid : 0;
#pragma unroll
            for (int pass = part * kTokenPasses / kParts; pass < (part + 1) * kTokenPasses / kParts;
                 ++pass)
                cp_async_16(to + pass * (kPassRows * kTileK * 2),
                            token[pass] + at * int64_t{sizeof(element)}, (valid >> pass & 1) << 4);
        }

        // The way through registers: eight elements, wherever they start and however many there are.
        static __device__ __forceinline__ uint4 load_chunk(const unsigned char *from, int32_t count)
        {
            if (count >= 8 && (reinterpret_cast<uintptr_t>(from) & 15) == 0)
                return *reinterpret_cast<const uint4 *>(from);
            const unsigned short *bits = reinterpret_cast<const unsigned short *>(from);
            uint32_t e[8];
#pragma unroll
            for (int i = 0; i < 8; ++i)
                e[i] = i < count ? bits[i] : 0u;
            return make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16,
                              e[6] | e[7] << 16);
        }

        __device__ __forceinline__ void load(uint4 (&held)[kTokenPasses + kWeightPasses],
                                             int32_t step) const
        {
            int32_t at = step * kTileK;
            int32_t left = k_end - at;
#pragma unroll
            for (int pass = 0; pass < kTokenPasses; ++pass)
                held[pass] = load_chunk(token[pass] + at * int64_t{sizeof(element)},
                                        token_valid >> pass & 1 ? left : 0);
#pragma unroll
            for (int pass = 0; pass < kWeightPasses; ++pass)
                held[kTokenPasses + pass] =
                    load_chunk(weight + at * int64_t{sizeof(element)} + pass * weight_step,
                               weight_valid >> pass & 1 ? left : 0);
        }

        __device__ __forceinline__ void store(const uint4 (&held)[kTokenPasses + kWeightPasses],
                                              shared &smem, int stage) const
        {
#pragma unroll
            for (int pass = 0; pass < kTokenPasses; ++pass)
                *reinterpret_cast<uint4 *>(smem.ring.token[stage] + offset +
                                           pass * (kPassRows * kTileK * 2)) = held[pass];
#pragma unroll
            for (int pass = 0; pass < kWeightPasses; ++pass)
                *reinterpret_cast<uint4 *>(smem.ring.weight[stage] + offset +
                                           pass * (kPassRows * kTileK * 2)) =
                    held[kTokenPasses + pass];
        }
    };

    // ---------------------------------------------------------------------------------------------
    // Fragments and products
    // ---------------------------------------------------------------------------------------------

    // How the warps share a tile. kHalf: the rows all lie in the tile's first part (kWarpsM parts), which
    // then all warps share by columns: a tile that is mostly padding costs accordingly less.
    template <bool kHalf>
    struct multiplier {
        static constexpr int kM = kHalf ? 1 : kWarpsM, kN = kHalf ? kWarpsM * kWarpsN : kWarpsN;
        static constexpr int kFragsM = kRows / kWarpsM / 16; // of a warp: 16 rows each
        static constexpr int kFragsN = kCols / kN / 8;       // 8 columns each
        static_assert(kFragsM * 16 * kWarpsM == kRows, "warps share the rows in m16 fragments");
        static_assert(kFragsN * 8 * kN == kCols && kFragsN % 2 == 0,
                      "ldmatrix loads n16 at a time");

        struct fragments {
            uint32_t token[kFragsM][4];
            uint32_t weight[kFragsN / 2][4]; // two n8 fragments each
        };

        float sums[kFragsM][kFragsN][4];
        uint32_t token_at, weight_at; // this lane's ldmatrix row in stage 0
        uint32_t token_chunk, weight_chunk;
        int32_t warp_m, warp_n, warp_k;

        __device__ __forceinline__ void start(const shared &smem)
        {
            int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
            warp_m = warp % kM;
            warp_n = warp / kM % kN;
            warp_k = warp / (kM * kN);
            int32_t token_row = warp_m * (kFragsM * 16) + (lane & 15);
            int32_t weight_row = warp_n * (kFragsN * 8) + (lane & 7) + ((lane >> 4) << 3);
            token_at = shared_address(smem.ring.token[0]) + token_row * (kTileK * 2);
            weight_at = shared_address(smem.ring.weight[0]) + weight_row * (kTileK * 2);
            token_chunk = ((lane >> 4) ^ (lane & 7)) << 4;
            weight_chunk = ((lane >> 3 & 1) ^ (lane & 7)) << 4;
#pragma unroll
            for (int m = 0; m < kFragsM; ++m)
#pragma unroll
                for (int n = 0; n < kFragsN; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        sums[m][n][i] = 0.0f;
        }

        __device__ __forceinline__ void load(fragments &f, int stage, int step) const
        {
            uint32_t k = static_cast<uint32_t>(warp_k * kSteps + step) << 5;
            uint32_t token = token_at + stage * kTokenBytes + (token_chunk ^ k);
            uint32_t weight = weight_at + stage * kWeightBytes + (weight_chunk ^ k);
#pragma unroll
            for (int m = 0; m < kFragsM; ++m)
                ldmatrix_x4(f.token[m], token + m * (16 * kTileK * 2));
#pragma unroll
            for (int n = 0; n < kFragsN / 2; ++n)
                ldmatrix_x4(f.weight[n], weight + n * (16 * kTileK * 2));
        }

        __device__ __forceinline__ void multiply(const fragments &f)
        {
#pragma unroll
            for (int m = 0; m < kFragsM; ++m)
#pragma unroll
                for (int n = 0; n < kFragsN; ++n)
                    T::mma(sums[m][n], f.token[m], f.weight[n / 2][n % 2 * 2],
                           f.weight[n / 2][n % 2 * 2 + 1]);
        }

        // All sums into shared memory, over the ring: every thread is past its last ldmatrix.
        __device__ __forceinline__ void stage_sums(shared &smem) const
        {
            int32_t lane = threadIdx.x % 32;
            float *at = &smem.sums[warp_k][warp_m * (kFragsM * 16) + lane / 4]
                                  [warp_n * (kFragsN * 8) + lane % 4 * 2];
#pragma unroll
            for (int m = 0; m < kFragsM; ++m)
#pragma unroll
                for (int n = 0; n < kFragsN; ++n) {
                    float *to = at + m * 16 * kSumsStride + n * 8;
                    *reinterpret_cast<float2 *>(to) = make_float2(sums[m][n][0], sums[m][n][1]);
                    *reinterpret_cast<float2 *>(to + 8 * kSumsStride) =
                        make_float2(sums[m][n][2], sums[m][n][3]);
                }
        }
    };

    // Thread r knows row r of the tile: its slot, -1 where there is none. Asked for early, used late.
    template <class Args>
    static __device__ __forceinline__ int32_t load_slot(const work &work, const Args &args)
    {
        int32_t r = threadIdx.x;
        // Past L1, as the tiles: down asks before it has waited for gate_up.
        return r < work.num_rows ? __ldcg(args.sorted_token_ids + work.row_begin + r) : -1;
    }

    // The token of a slot, -1 for none. What sorted_token_ids says is not trusted: stages can be called alone.
    template <class Args>
    static __device__ __forceinline__ int32_t token_of(int32_t slot, const Args &args)
    {
        int32_t token = slot / args.topk;
        return slot >= 0 && token < args.num_tokens ? token : -1;
    }

    // The weight of each row, 0 where there is no token. Visible after the next barrier.
    template <class Args>
    static __device__ __forceinline__ void store_weight(shared &smem, int32_t slot,
                                                        const Args &args)
    {
        if (!args.topk_weights || threadIdx.x >= kRows) return;
        int32_t token = token_of(slot, args);
        smem.row_weight[threadIdx.x] =
            token >= 0 ? load_f32(args.topk_weights,
                                  token * args.weights_stride + (slot - token * args.topk),
                                  args.weights_dtype)
                       : 0.0f;
    }

    // Four neighbouring sums of a row, kWarpsK parts in order. After a __syncthreads.
    static __device__ __forceinline__ float4 read_sums(const shared &smem, int32_t row, int32_t col)
    {
        float4 total = *reinterpret_cast<const float4 *>(&smem.sums[0][row][col]);
#pragma unroll
        for (int part = 1; part < kWarpsK; ++part) {
            float4 more = *reinterpret_cast<const float4 *>(&smem.sums[part][row][col]);
            total.x += more.x;
            total.y += more.y;
            total.z += more.z;
            total.w += more.w;
        }
        return total;
    }

    // ---------------------------------------------------------------------------------------------
    // The ring
    // ---------------------------------------------------------------------------------------------

    // Start the weights of the first stages (kVector; else nothing): may run ahead of the token rows.
    static __device__ __forceinline__ void prefetch_weights(shared &smem, const copier &copy,
                                                            int32_t num_steps)
    {
        if constexpr (kVector) {
#pragma unroll
            for (int s = 0; s < kStages - 1; ++s)
                if (s < num_steps) copy.copy_weights(smem, s, s);
        }
    }

    // After it the token rows of these stages; group s of a thread's copies is then stage s.
    static __device__ __forceinline__ void prefetch_tokens(shared &smem, const copier &copy,
                                                           int32_t num_steps)
    {
        if constexpr (kVector) {
#pragma unroll
            for (int s = 0; s < kStages - 1; ++s) {
                if (s < num_steps) copy.copy_tokens(smem, s, s);
                cp_async_commit();
            }
        }
    }

    // After prefetch_weights and prefetch_tokens: all of K, then the sums in shared memory, visible to all.
    static __device__ __forceinline__ void run(shared &smem, const copier &copy, int32_t num_rows,
                                               int32_t num_steps)
    {
        if (kWarpsM > 1 && num_rows <= kRows / kWarpsM)
            run<kWarpsM != 1>(smem, copy, num_steps);
        else
            run<false>(smem, copy, num_steps);
    }

    template <bool kHalf>
    static __device__ __forceinline__ void run(shared &smem, const copier &copy, int32_t num_steps)
    {
        multiplier<kHalf> math;
        math.start(smem);
        if constexpr (kVector)
            run_async(smem, copy, math, num_steps);
        else
            run_registers(smem, copy, math, num_steps);
        math.stage_sums(smem);
        __syncthreads();
    }

    template <class Multiplier>
    static __device__ __forceinline__ void run_async(shared &smem, const copier &copy,
                                                     Multiplier &math, int32_t num_steps)
    {
        typename Multiplier::fragments f[2];
        cp_async_wait<kStages - 2>();
        __syncthreads();
        math.load(f[0], 0, 0);

        int stage = 0, fill = kStages - 1; // where step kt is, where step kt + kStages - 1 goes
        for (int32_t kt = 0; kt < num_steps; ++kt) {
            int next = stage + 1 == kStages ? 0 : stage + 1;
            bool more = kt + kStages - 1 < num_steps;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                // Every warp has left the stage to fill: its last ldmatrix came before the last barrier.
                if (more) {
                    copy.template copy_weights<kSteps>(smem, kt + kStages - 1, fill, step);
                    copy.template copy_tokens<kSteps>(smem, kt + kStages - 1, fill, step);
                }
                if (step == kSteps - 1) {
                    cp_async_commit();
                    cp_async_wait<kStages - 2>(); // step kt + 1 has landed
                    __syncthreads();
                }
                // The next fragments are under way while these multiply.
                if constexpr (kSteps == 1) {
                    math.load(f[1], next, 0);
                    math.multiply(f[0]);
                    f[0] = f[1];
                } else {
                    static_assert(kSteps % 2 == 0 || kSteps == 1, "fragment buffers alternate");
                    if (step == kSteps - 1)
                        math.load(f[(step + 1) & 1], next, 0);
                    else
                        math.load(f[(step + 1) & 1], stage, step + 1);
                    math.multiply(f[step & 1]);
                }
            }
            stage = next;
            fill = fill + 1 == kStages ? 0 : fill + 1;
        }
        cp_async_wait<0>();
        __syncthreads();
    }

    template <class Multiplier>
    static __device__ __forceinline__ void run_registers(shared &smem, const copier &copy,
                                                         Multiplier &math, int32_t num_steps)
    {
        uint4 held[kTokenPasses + kWeightPasses];
        copy.load(held, 0);
        copy.store(held, smem, 0);
        __syncthreads();
        for (int32_t kt = 0; kt < num_steps; ++kt) {
            if (kt + 1 < num_steps) copy.load(held, kt + 1);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                typename Multiplier::fragments f;
                math.load(f, kt & 1, step);
                math.multiply(f);
            }
            if (kt + 1 < num_steps) copy.store(held, smem, (kt + 1) & 1);
            __syncthreads();
        }
    }
};

#endif
