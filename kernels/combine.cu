/* combine.cu: out[t] = scale * sum over slots s of rows[row_of_slot[t, s]] + shared_output[t]   (stage 5 of 5)
 * In     rows           [num_rows, hidden_size]    bf16, f16  output of down, weighted, grouped by expert
 *        row_of_slot    [num_tokens, topk]         int32      row of that slot; outside [0, num_rows): dropped, adds nothing
 *        shared_output  [num_tokens, hidden_size]  as rows, or NULL
 * Out    out            [num_tokens, hidden_size]  as rows    every element is written
 * Math   f32, slots in order 0 .. topk - 1, one rounding: bitwise repeatable. no_combine is topk = 1
 * Grid   one thread per eight columns of a token (_2, _4: of four and two tokens, for topk up to 2 and 4; _5: five slots
 *        at a time, for topk 9 and 10), MOE_COMBINE_THREADS per block; any number of blocks is correct,
 *        MOE_COMBINE_BLOCKS is one item each. No shared memory
 * Needs  hidden_size % 8 == 0 and 16-byte aligned rows of all tensors; `any` needs neither
 * Cost   (num_rows + num_tokens) * hidden_size * 2 bytes: memory-bound, 4.0 to 4.35 TB/s on an H200 from 2048 tokens */
#include "numeric.cuh"

static constexpr int kInFlight = MOE_COMBINE_IN_FLIGHT;
// An out of more elements leaves L2 before anybody reads it: it makes room first.
static constexpr int64_t kKeptElements = 1 << 23;

// Eight columns, `count` of which exist. kOnce: nobody writes them meanwhile.
template <bool kVector, bool kOnce>
static __device__ __forceinline__ uint4 load_columns(const void *base, int64_t at, int32_t count)
{
    if constexpr (kVector && kOnce) {
        return load_16_once(static_cast<const unsigned short *>(base) + at);
    } else if constexpr (kVector) {
        return *reinterpret_cast<const uint4 *>(static_cast<const unsigned short *>(base) + at);
    } else {
        const unsigned short *bits = static_cast<const unsigned short *>(base) + at;
        uint32_t e[8];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            e[i] = i < count ? bits[i] : 0u;
        return make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16,
                          e[6] | e[7] << 16);
    }
}

template <class T>
static __device__ __forceinline__ void add(float (&sum)[8], uint4 v)
{
    uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 pair = T::to_f32x2(pairs[i]);
        sum[2 * i] += pair.x;
        sum[2 * i + 1] += pair.y;
    }
}

// Columns col .. col + 7 of kTokens tokens, kSlots slots of each at a time: with few slots, too, kInFlight rows are
// under way for a thread.
template <class T, bool kVector, int kSlots>
static __device__ __forceinline__ void combine_columns(const moe_combine_args &args, int64_t token,
                                                       int32_t col)
{
    using element = typename T::element;
    constexpr int kTokens = kInFlight / kSlots, kRows = kTokens * kSlots;
    int32_t count = min(8, args.hidden_size - col);
    int32_t tokens = static_cast<int32_t>(min(int64_t{kTokens}, args.num_tokens - token));
    const int32_t *row_of_slot = args.row_of_slot + token * args.topk;
    float sum[kTokens][8] = {};
    for (int32_t first = 0; first < args.topk; first += kSlots) {
        int32_t row[kRows];
        uint4 held[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            int32_t t = i / kSlots, slot = first + i % kSlots;
            row[i] = t < tokens && slot < args.topk ? row_of_slot[t * args.topk + slot] : -1;
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            if (row[i] >= args.num_rows) row[i] = -1;
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            if (row[i] >= 0)
                held[i] =
                    load_columns<kVector, true>(args.rows, row[i] * args.rows_stride + col, count);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            if (row[i] >= 0) add<T>(sum[i / kSlots], held[i]);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        if (t >= tokens) break;
        float(&s)[8] = sum[t];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            s[i] *= args.scale;
        if (args.shared_output) // it may be out
            add<T>(s, load_columns<kVector, false>(args.shared_output,
                                                   (token + t) * args.shared_stride + col, count));
        element *to = static_cast<element *>(args.out) + (token + t) * args.out_stride + col;
        if constexpr (kVector) {
            uint4 eight = make_uint4(T::round2(s[0], s[1]), T::round2(s[2], s[3]),
                                     T::round2(s[4], s[5]), T::round2(s[6], s[7]));
            if (args.num_tokens * args.hidden_size <= kKeptElements)
                *reinterpret_cast<uint4 *>(to) = eight;
            else
                __stcs(reinterpret_cast<uint4 *>(to), eight);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < count) to[i] = T::round(s[i]);
        }
    }
}

template <class T, bool kVector, int kSlots>
static __device__ __forceinline__ void combine(const moe_combine_args &args)
{
    fetch_parameters(args);
    grid_dependency_wait();
    grid_launch_dependents();
    constexpr int kTokens = kInFlight / kSlots;
    int64_t groups = (args.num_tokens + kTokens - 1) / kTokens;
    int32_t chunks = static_cast<int32_t>(MOE_COMBINE_CHUNKS(args.hidden_size));
    if (MOE_COMBINE_APART(args.hidden_size)) { // each block one group: the same for all its threads
        int32_t col_blocks = static_cast<int32_t>(MOE_COMBINE_COL_BLOCKS(args.hidden_size));
        for (int64_t item = blockIdx.x; item < groups * col_blocks; item += gridDim.x) {
            int64_t group = item / col_blocks;
            int32_t chunk =
                static_cast<int32_t>(item - group * col_blocks) * MOE_COMBINE_THREADS + threadIdx.x;
            if (chunk < chunks)
                combine_columns<T, kVector, kSlots>(args, group * kTokens, chunk * 8);
        }
    } else {
        int64_t step = int64_t{gridDim.x} * MOE_COMBINE_THREADS;
        for (int64_t item = int64_t{blockIdx.x} * MOE_COMBINE_THREADS + threadIdx.x;
             item < groups * chunks; item += step) {
            bool small = item <= 0xffffffff; // a division of 64 bits is a loop
            int64_t group =
                small ? static_cast<uint32_t>(item) / static_cast<uint32_t>(chunks) : item / chunks;
            int32_t chunk = static_cast<int32_t>(item - group * chunks);
            combine_columns<T, kVector, kSlots>(args, group * kTokens, chunk * 8);
        }
    }
}

// blocks: on an SM at a time: bytes under way count, and without the bound registers leave room for 5.
#define MOE_COMBINE(name, type, vector, slots, blocks)                                             \
    extern "C" __global__ void __launch_bounds__(MOE_COMBINE_THREADS, blocks)                      \
        name(const __grid_constant__ moe_combine_args args)                                        \
    {                                                                                              \
        combine<type, vector, slots>(args);                                                        \
    }
MOE_COMBINE(moe_combine_bf16, bf16, true, kInFlight, 7)
MOE_COMBINE(moe_combine_f16, f16, true, kInFlight, 7)
MOE_COMBINE(moe_combine_bf16_2, bf16, true, 2, 5)
MOE_COMBINE(moe_combine_f16_2, f16, true, 2, 5)
MOE_COMBINE(moe_combine_bf16_4, bf16, true, 4, 6)
MOE_COMBINE(moe_combine_f16_4, f16, true, 4, 6)
MOE_COMBINE(moe_combine_bf16_5, bf16, true, 5, 9)
MOE_COMBINE(moe_combine_f16_5, f16, true, 5, 9)
MOE_COMBINE(moe_combine_bf16_any, bf16, false, kInFlight, 1)
MOE_COMBINE(moe_combine_f16_any, f16, false, kInFlight, 1)
