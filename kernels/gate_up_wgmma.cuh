/* gate_up_wgmma.cuh: what gate_up_sm90a.cu and gate_up_split_sm90a.cu share: where token rows and w13's rows lie. */
#ifndef MOE_GATE_UP_WGMMA_CUH
#define MOE_GATE_UP_WGMMA_CUH

#include "gate_up.cuh"
#include "gemm_wgmma.cuh"

template <class T>
struct gate_up_operands {
    const moe_gate_up_args &args;
    const tensor_map *weights;
    int32_t num_cols, k_size;
    static constexpr int kTaken = 1;
    static constexpr int32_t k_begin = 0;
    static constexpr uint32_t band_tiles = 0;

    __device__ __forceinline__ int2 box(int32_t col, int32_t part, int32_t rows) const
    {
        return args.gated
                   ? make_int2(col / 2, args.w13_order == MOE_ORDER_UP_GATE ? 1 - part : part)
                   : make_int2(col + part * rows, 0);
    }

    __device__ __forceinline__ const typename T::element *tokens() const
    {
        return static_cast<const typename T::element *>(args.hidden_states);
    }

    __device__ __forceinline__ int64_t token_stride() const { return args.hidden_stride; }
};

#endif
