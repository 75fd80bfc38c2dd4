/* route_align.cu: route and align of a few tokens in one launch                      (stages 1 and 2 of 5)
 * In, out  those of route.cu and align.cu
 * Grid     one block of up to MOE_ROUTE_ALIGN_THREADS: a warp per token, a thread for each expert
 * Needs    a row of route_variants.def that says so; at most MOE_ROUTE_ALIGN_SLOTS slots, num_experts at most
 *          MOE_ROUTE_ALIGN_THREADS
 * Cost     what route and align take less one launch and one read of topk_ids: 0.2 to 0.4 us. From 4 or 8 tokens on one
 *          SM routes longer than that, and a second launch is sooner done than a cluster of blocks */
#include "align.cuh"
#include "route.cuh"

static constexpr int kWarps = MOE_ROUTE_ALIGN_THREADS / 32;

template <int kHeld, bool kPacked>
static __device__ __forceinline__ void route_align(const moe_route_args &route,
                                                   const moe_align_args &align)
{
    extern __shared__ uint4 memory[];
    __shared__ warp_scratch scratch[kWarps];
    __shared__ int16_t expert_of[MOE_ROUTE_ALIGN_SLOTS];
    const int32_t num_tokens = static_cast<int32_t>(route.num_tokens), warp = threadIdx.x / 32;
    const bit_matrix matrix(memory, align.num_experts, num_tokens * align.topk);
    matrix.clear();
    __syncthreads();
    grid_dependency_wait();
    grid_launch_dependents();
    for (int32_t token = warp; token < num_tokens; token += blockDim.x / 32) {
        const int32_t first_slot = token * align.topk;
        route_row<kHeld, kPacked, true>(route, token, scratch[warp], [&](int32_t lane, int64_t id) {
            int32_t expert = local_expert(align, id);
            expert_of[first_slot + lane] = static_cast<int16_t>(expert);
            if (expert >= 0) matrix.set(expert, first_slot + lane);
        });
    }
    __syncthreads();
    place_experts(align, matrix, matrix.count_rows(), 0);
    __syncthreads();
    for (int32_t slot = threadIdx.x; slot < num_tokens * align.topk; slot += blockDim.x)
        place_slot(align, matrix, slot, slot, expert_of[slot]);
}

#define MOE_ROUTE_ALIGN_VARIANT(name, held, packed, score, key, groups)                            \
    extern "C" __global__ void __launch_bounds__(MOE_ROUTE_ALIGN_THREADS, 1)                       \
        moe_route_align_##name(const __grid_constant__ moe_route_align_args args)                  \
    {                                                                                              \
        fetch_parameters(args);                                                                    \
        const moe_route_args route =                                                               \
            unpack<held, packed, MOE_SCORE_##score, MOE_KEY_##key, groups>(args.route);            \
        route_align<held, packed>(route, args.align);                                              \
    }
#include "route_variants.def"
