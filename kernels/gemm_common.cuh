/* gemm_common.cuh: what both main loops of the grouped GEMMs share (gemm_mma.cuh, gemm_wgmma.cuh): where
 * weight rows lie, and what a slot says about its row. */
#ifndef MOE_GEMM_COMMON_CUH
#define MOE_GEMM_COMMON_CUH

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

// The compiler knows nothing of x from here on: what follows from it is not computed ahead and kept in registers.
template <class T>
static __device__ __forceinline__ void forget(T &x)
{
    asm volatile("" : "+r"(x) : : "memory");
}

// The token of a slot, -1 for none. What sorted_token_ids says is not trusted: stages can be called alone.
template <class Args>
static __device__ __forceinline__ int32_t token_of(int32_t slot, const Args &args)
{
    int32_t token = slot / args.topk;
    return slot >= 0 && token < args.num_tokens ? token : -1;
}

// The weight of a slot's row, 0 where there is no token.
template <class Args>
static __device__ __forceinline__ float weight_of(int32_t slot, const Args &args)
{
    int32_t token = token_of(slot, args);
    return token >= 0 ? load_f32(args.topk_weights,
                                 token * args.weights_stride + (slot - token * args.topk),
                                 args.weights_dtype)
                      : 0.0f;
}

#endif
