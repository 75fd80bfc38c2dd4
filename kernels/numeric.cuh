/* numeric.cuh: the element types of the kernels: loads to f32, one rounding back, MOE_F32 / BF16 / F16 at
 * run time for the small operands (biases, topk_weights, logits). */
#ifndef MOE_NUMERIC_CUH
#define MOE_NUMERIC_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "moe_kernels.h"
#include "ptx.cuh"

struct bf16 {
    using element = __nv_bfloat16;
    static constexpr int kDtype = MOE_BF16;
    static __device__ __forceinline__ float to_f32(element x) { return __bfloat162float(x); }
    static __device__ __forceinline__ element round(float x) { return __float2bfloat16_rn(x); }
    // Two neighbours in one register, `low` at the lower address.
    static __device__ __forceinline__ uint32_t round2(float low, float high)
    {
        __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<uint32_t *>(&pair);
    }
    static __device__ __forceinline__ float2 to_f32x2(uint32_t pair)
    {
        return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&pair));
    }
    static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1)
    {
        mma_m16n8k16_bf16(d, a, b0, b1);
    }
};

struct f16 {
    using element = __half;
    static constexpr int kDtype = MOE_F16;
    static __device__ __forceinline__ float to_f32(element x) { return __half2float(x); }
    static __device__ __forceinline__ element round(float x) { return __float2half_rn(x); }
    static __device__ __forceinline__ uint32_t round2(float low, float high)
    {
        __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<uint32_t *>(&pair);
    }
    static __device__ __forceinline__ float2 to_f32x2(uint32_t pair)
    {
        return __half22float2(*reinterpret_cast<__half2 *>(&pair));
    }
    static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1)
    {
        mma_m16n8k16_f16(d, a, b0, b1);
    }
};

// Element `index` of an array whose dtype is known at run time: MOE_F32, MOE_BF16 or MOE_F16.
__device__ __forceinline__ float load_f32(const void *base, int64_t index, int32_t dtype)
{
    if (dtype == MOE_F32) return static_cast<const float *>(base)[index];
    if (dtype == MOE_BF16) return bf16::to_f32(static_cast<const __nv_bfloat16 *>(base)[index]);
    return f16::to_f32(static_cast<const __half *>(base)[index]);
}

// Elements base[at[i]], 0 where at[i] < 0: all are asked for before the first is looked at.
template <int N, class Index>
__device__ __forceinline__ void load_f32(float (&v)[N], const void *base, const Index (&at)[N],
                                         int32_t dtype)
{
    if (dtype == MOE_F32) {
#pragma unroll
        for (int i = 0; i < N; ++i)
            v[i] = at[i] >= 0 ? static_cast<const float *>(base)[at[i]] : 0.0f;
        return;
    }
    uint16_t bits[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
        bits[i] = at[i] >= 0 ? static_cast<const uint16_t *>(base)[at[i]] : 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
        v[i] = dtype == MOE_BF16 ? __uint_as_float(static_cast<uint32_t>(bits[i]) << 16)
                                 : __half2float(__ushort_as_half(bits[i]));
}

// Where element `index` of such an array is.
__device__ __forceinline__ const void *element_of(const void *base, int64_t index, int32_t dtype)
{
    return static_cast<const unsigned char *>(base) + (index << (dtype == MOE_F32 ? 2 : 1));
}

#endif
