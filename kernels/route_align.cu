/* route_align.cu: route and align of few tokens in one launch                        (stages 1 and 2 of 5)
 * In, out  those of route.cu and align.cu
 * Grid     num_blocks blocks of MOE_ROUTE_ALIGN_THREADS, one cluster; one warp per token, tokens dealt out to the
 *          blocks in turn. Each notes the ids in the first block's shared memory, which then aligns
 * Needs    a row of route_variants.def that says so; num_slots at most MOE_ROUTE_ALIGN_SLOTS, num_experts at most
 *          MOE_ROUTE_ALIGN_THREADS; below sm_90 one block
 * Cost     what route and align take less one launch and one read of topk_ids */
#include "align.cuh"
#include "route.cuh"

static constexpr int kWarps = MOE_ROUTE_ALIGN_THREADS / 32;

template <int kHeld, bool kPacked>
static __device__ __forceinline__ void route_align(const moe_route_args &route,
                                                   const moe_align_args &align)
{
    extern __shared__ uint4 memory[];
    __shared__ warp_scratch scratch[kWarps];
    __shared__ int32_t rows[MOE_ROUTE_ALIGN_THREADS], expert_of[MOE_ROUTE_ALIGN_SLOTS];
    int32_t num_slots = static_cast<int32_t>(align.num_tokens * align.topk),
            warp = threadIdx.x / 32;
    const bit_matrix matrix(memory, align.num_experts, num_slots);
    if (blockIdx.x == 0) matrix.clear();
    cluster_arrive();
    cluster_wait(); // the first block's matrix is cleared
    grid_dependency_wait();
    grid_launch_dependents();
    // A block that is alone goes the shorter way to its own memory.
    const bool alone = gridDim.x == 1;
    bit_matrix noted = matrix;
    noted.bits = cluster_map(matrix.bits, 0);
    int32_t *expert_noted = cluster_map(expert_of, 0);
    for (int64_t token = warp * gridDim.x + blockIdx.x; token < route.num_tokens;
         token += kWarps * gridDim.x) {
        int32_t first_slot = static_cast<int32_t>(token) * align.topk;
        route_row<kHeld, kPacked, true>(route, token, scratch[warp], [&](int32_t lane, int64_t id) {
            int32_t expert = local_expert(align, id), slot = first_slot + lane;
            if (alone) {
                expert_of[slot] = expert;
                if (expert >= 0) matrix.set(expert, slot);
            } else {
                expert_noted[slot] = expert;
                if (expert >= 0) noted.set(expert, slot);
            }
        });
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    if (blockIdx.x > 0) return;
    place_experts(align, matrix, count_rows(matrix, rows));
    __syncthreads();
    for (int32_t slot = threadIdx.x; slot < num_slots; slot += MOE_ROUTE_ALIGN_THREADS)
        place_slot(align, matrix, 0, slot, expert_of[slot]);
}

#define MOE_ROUTE_ALIGN_VARIANT(name, held, packed, score, key, groups)                            \
    extern "C" __global__ void __launch_bounds__(MOE_ROUTE_ALIGN_THREADS, 1)                       \
        moe_route_align_##name(const __grid_constant__ moe_route_align_args args)                  \
    {                                                                                              \
        const moe_route_args route =                                                               \
            unpack<held, packed, MOE_SCORE_##score, MOE_KEY_##key, groups>(args.route);            \
        route_align<held, packed>(route, args.align);                                              \
    }
#include "route_variants.def"
