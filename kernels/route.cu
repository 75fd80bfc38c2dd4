/* route.cu: topk_weights, topk_ids = select(router_logits)                                  (stage 1 of 5)
 * In     router_logits  [num_tokens, num_experts]  f32, bf16, f16  any row stride; for some methods a bias, maps,
 *                       a table of ids (moe_route_args)
 * Out    topk_weights   [num_tokens, num_slots]    f32, bf16, f16  finite
 *        topk_ids       [num_tokens, num_slots]    int32, int64    distinct, in order of the keys; -1: dropped
 * Math   f32. Order: descending key, equal keys (+0 and -0 too) by ascending id, NaN after every number.
 *        The bits of the CPU backend (route_math.h)
 * Grid   one warp per token: blocks of any number of warps. 1 KB of shared memory a warp
 * Needs  num_experts 1 .. 1024, topk 1 .. min(32, num_experts), num_slots 1 .. 32, num_groups 0 .. 32
 * Cost   at decode latency: a launch, a load from L2, then about 1 us of dependent instructions; from 4096 tokens
 *        their issue, about 530 a token for topk_softmax of 128 experts and 1100 for sigmoid_bias_grouped of 256 */
#include "route.cuh"

static constexpr int kWarps = MOE_ROUTE_MAX_THREADS / 32;

template <int kHeld, bool kPacked, bool kGroupsOf32>
static __device__ __forceinline__ void route_tokens(const moe_route_args &args)
{
    __shared__ warp_scratch scratch[kWarps];
    grid_dependency_wait();
    grid_launch_dependents();
    int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (token < args.num_tokens)
        route_row<kHeld, kPacked, kGroupsOf32>(args, token, scratch[threadIdx.x / 32],
                                               [](int32_t, int64_t) {});
}

#define MOE_ROUTE_VARIANT(name, held, packed, score, key, groups)                                  \
    extern "C" __global__ void __launch_bounds__(MOE_ROUTE_MAX_THREADS, held > 16 ? 1 : 2)         \
        moe_route_##name(const __grid_constant__ moe_route_plain_args plain)                       \
    {                                                                                              \
        fetch_parameters(plain);                                                                   \
        const moe_route_args args =                                                                \
            unpack<held, packed, MOE_SCORE_##score, MOE_KEY_##key, groups>(plain);                 \
        route_tokens<held, packed, true>(args);                                                    \
    }
#include "route_variants.def"

#define MOE_ROUTE_GENERAL(held)                                                                    \
    extern "C" __global__ void __launch_bounds__(MOE_ROUTE_MAX_THREADS, 1)                         \
        moe_route_general_##held(const __grid_constant__ moe_route_args args)                      \
    {                                                                                              \
        fetch_parameters(args);                                                                    \
        route_tokens<held, false, false>(args);                                                    \
    }
MOE_ROUTE_GENERAL(4)
MOE_ROUTE_GENERAL(8)
MOE_ROUTE_GENERAL(16)
MOE_ROUTE_GENERAL(32)
