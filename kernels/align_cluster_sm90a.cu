// arch: sm_90a
/* align_cluster_sm90a.cu: align.cu for more slots than each block could count by itself, in one launch (stage 2 of 5)
 * In, out  those of align.cu
 * How      the blocks of a cluster share the counting of all slots that are not the cluster's out between them; each tells
 *          all others what it has counted, and of how many of its own slots, by a word for each expert
 * Math     as there: the same rows, the same tiles
 * Grid     num_blocks, in clusters of MOE_ALIGN_CLUSTER; MOE_ALIGN_CLUSTER_SMEM_BYTES of dynamic shared memory
 * Needs    compute capability 9.0; a thread for each expert and each slot of a block; at most
 *          65535 slots, so that a count has 16 bits
 * Cost     a launch, a load, a barrier of the cluster, a scan; then the stores of sorted_token_ids */
#include "align.cuh"
#include "wgmma.cuh"

extern "C" __global__ void __launch_bounds__(MOE_ALIGN_THREADS, 1)
    moe_align_cluster(const __grid_constant__ moe_align_args args)
{
    extern __shared__ uint4 memory[];
    __shared__ uint32_t totals[3 * 32];
    int32_t first, end;
    const int32_t share = block_slots(args, blockIdx.x, first, end), num_slots = end - first;
    const int32_t num_experts = args.num_experts, threads = blockDim.x;
    const int32_t block = static_cast<int32_t>(cluster_block());
    const int32_t cluster_first =
                      first - block * share, // the cluster's slots, if there are so many
        cluster_end = cluster_first + MOE_ALIGN_CLUSTER * share;
    const bit_matrix matrix(memory, num_experts, share);
    // Slots that this block counts for the cluster, of each expert: in front of the cluster's, then behind.
    uint32_t *others = matrix.spare;
    uint32_t *inbox =
        others + 2 * num_experts; // [MOE_ALIGN_CLUSTER, num_experts]: told by each block
    const bool has = threadIdx.x < num_experts;
    cluster_arrive(); // the others have begun when theirs has come: their memory may be written
    matrix.clear();
    for (int32_t i = threadIdx.x; i < 2 * num_experts; i += threads)
        others[i] = 0;
    fetch_parameters(args);
    __syncthreads();
    grid_dependency_wait();
    grid_launch_dependents();
    const int32_t slot = threadIdx.x; // there is a thread for each of the block's
    const int64_t id = slot < num_slots ? load_id(args, first + slot) : 0;
    visit_slots<4>(args, block * threads + threadIdx.x, MOE_ALIGN_CLUSTER * threads,
                   [&](int32_t any, const int32_t(&to)[4], int32_t) {
                       // A share is a multiple of 4: of four slots all are the cluster's or none.
                       if (any >= cluster_first && any < cluster_end) return;
                       uint32_t *count = others + (any < cluster_first ? 0 : num_experts);
#pragma unroll
                       for (int j = 0; j < 4; ++j)
                           if (to[j] >= 0) atomicAdd(count + to[j], 1);
                   });
    const int32_t expert = slot < num_slots ? local_expert(args, id) : -1;
    if (expert >= 0) matrix.set(expert, slot);
    __syncthreads();
    const uint32_t own = matrix.count_rows();
    cluster_wait();
    if (has) { // rows in all and in front of theirs go to all blocks of the cluster
        const uint32_t in_front = others[threadIdx.x];
        const uint32_t all = in_front + others[num_experts + threadIdx.x] + own;
        const uint32_t at = shared_address(inbox + block * num_experts + threadIdx.x);
#pragma unroll
        for (int32_t to = 0; to < MOE_ALIGN_CLUSTER; ++to)
            store_cluster_4(cluster_address(at, to),
                            all << 16 | (in_front + (to > block ? own : 0)));
    }
    cluster_arrive();
    __syncthreads();
    const int32_t before = expert >= 0 ? matrix.before(expert, slot) : 0;
    cluster_wait();
    uint32_t rows = 0, in_front = 0;
    if (has) {
#pragma unroll
        for (int32_t from = 0; from < MOE_ALIGN_CLUSTER; ++from) {
            const uint32_t told = inbox[from * num_experts + threadIdx.x];
            rows += told >> 16;
            in_front += told & 0xffffu;
        }
    }
    const expert_places places(args, totals, rows, static_cast<int32_t>(in_front), matrix.starts);
    __syncthreads();
    if (slot < num_slots)
        place_slot(args, first + slot, expert < 0 ? -1 : matrix.starts[expert] + before);
    places.write(args);
}
