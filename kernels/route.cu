/* route.cu: topk_weights, topk_ids = select(router_logits)                                  (stage 1 of 5)
 * In     router_logits  [num_tokens, num_experts]  f32, bf16, f16  any row stride
 * Out    topk_weights   [num_tokens, topk]         f32
 *        topk_ids       [num_tokens, topk]         int32, int64    distinct, in order of the logits
 * Math   f32. Order: descending logit, equal logits (+0 and -0 too) by ascending id, NaN after every number.
 *        softmax_topk: exp(x - max) / sum over all experts; topk_softmax: the same over the topk.
 *        A row that holds NaN or +inf, or only -inf, has NaN weights, as the formula says. scale comes last
 * Grid   one warp per token: ceil(num_tokens / 4) blocks of MOE_ROUTE_THREADS. No shared memory
 * Needs  num_experts 1 .. 1024, topk 1 .. min(32, num_experts)
 * Cost   at decode a launch; from 4096 tokens the issue of topk rounds over num_experts / 32 values a lane */
#include "numeric.cuh"

// Unsigned order of a logit: 0 taken or past the end, 1 NaN, above it the numbers from -inf to +inf.
static __device__ __forceinline__ uint32_t logit_key(float x)
{
    if (isnan(x)) return 1;
    uint32_t bits = __float_as_uint(x + 0.0f); // -0 becomes +0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ float key_logit(uint32_t key)
{
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

static __device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Lane l holds experts l, l + 32, ...: kHeld of them.
template <int kHeld>
static __device__ __forceinline__ void route(const moe_route_args &args, int64_t token)
{
    int32_t lane = threadIdx.x % 32;
    uint32_t key[kHeld];
    uint32_t largest = 0;
    bool nan = false;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        int32_t expert = lane + 32 * i;
        key[i] = expert < args.num_experts
                     ? logit_key(load_f32(args.router_logits, token * args.logits_stride + expert,
                                          args.logits_dtype))
                     : 0;
        largest = max(largest, key[i]);
        nan |= key[i] == 1;
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    float top = __any_sync(0xffffffffu, nan) ? __uint_as_float(0x7fc00000u) : key_logit(largest);
    float sum = 0.0f;
    if (args.method == MOE_ROUTE_SOFTMAX_TOPK) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (key[i] != 0) sum += __expf(key_logit(key[i]) - top);
        sum = warp_sum(sum);
    }

    // Round s: the largest key left, the lowest expert that has it; lane s keeps the result.
    float chosen_exp = 0.0f;
    int32_t chosen = 0;
    for (int32_t s = 0; s < args.topk; ++s) {
        uint32_t best = 0;
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            best = max(best, key[i]);
        best = __reduce_max_sync(0xffffffffu, best);
        uint32_t expert = 0xffffffffu;
#pragma unroll
        for (int i = kHeld - 1; i >= 0; --i)
            if (key[i] == best) expert = lane + 32 * i;
        expert = __reduce_min_sync(0xffffffffu, expert);
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (lane + 32 * i == expert) key[i] = 0;
        if (lane == s) {
            chosen = static_cast<int32_t>(expert);
            chosen_exp = __expf(key_logit(best) - top);
        }
    }
    if (args.method == MOE_ROUTE_TOPK_SOFTMAX) sum = warp_sum(chosen_exp);
    if (lane < args.topk) {
        float *weights = static_cast<float *>(args.topk_weights);
        weights[token * args.weights_stride + lane] = chosen_exp / sum * args.scale;
        int64_t at = token * args.ids_stride + lane;
        if (args.ids_dtype == MOE_I64)
            static_cast<int64_t *>(args.topk_ids)[at] = chosen;
        else
            static_cast<int32_t *>(args.topk_ids)[at] = chosen;
    }
}

extern "C" __global__ void __launch_bounds__(MOE_ROUTE_THREADS, 1)
    moe_route(const __grid_constant__ moe_route_args args)
{
    grid_dependency_wait();
    grid_launch_dependents();
    int64_t token = static_cast<int64_t>(blockIdx.x) * (MOE_ROUTE_THREADS / 32) + threadIdx.x / 32;
    if (token >= args.num_tokens) return;
    if (args.num_experts <= 128)
        route<4>(args, token);
    else if (args.num_experts <= 256)
        route<8>(args, token);
    else if (args.num_experts <= 512)
        route<16>(args, token);
    else
        route<32>(args, token);
}
