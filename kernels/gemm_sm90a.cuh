/* gemm_sm90a.cuh: what the two kinds of wgmma kernels, gemm_wgmma.cuh and gemm_swap.cuh, share: where a thread is in the
 * ring, how a warp gives a stage back, how a kernel begins. */
#ifndef MOE_GEMM_SM90A_CUH
#define MOE_GEMM_SM90A_CUH

#include "gemm_common.cuh"
#include "wgmma.cuh"

template <int kStages>
struct stage_position {
    uint32_t stage = 0, parity = 0;
    __device__ __forceinline__ void next()
    {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ void skip(uint32_t steps)
    {
        uint32_t to = stage + steps;
        parity ^= to / kStages & 1;
        stage = to % kStages;
    }
};

// A warp has read a stage. All its lanes: one left behind would miss the phase once the stage is filled again.
static __device__ __forceinline__ void release_stage(uint64_t &read)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&read));
}

// All threads of the block, whichever branch they come from: __syncthreads() would have to be one place for all of them.
static __device__ __forceinline__ void sync_block(uint32_t threads)
{
    named_barrier_sync(5, threads); // 1 to 4: parts of a block
}

// The memory of barriers that nobody uses any more is free again. One thread.
template <int kBarriers>
static __device__ __forceinline__ void invalidate(uint64_t (&barriers)[kBarriers])
{
    for (uint64_t &barrier : barriers)
        mbarrier_invalidate(shared_address(&barrier));
}

template <class... Maps>
static __device__ __forceinline__ void prefetch_maps(const Maps &...maps)
{
    if (threadIdx.x == 0) (tensor_map_prefetch(&maps), ...);
}

// The rest of a kernel. Problems: their rows, weights and epilogues.
template <class Gemm, class... Problems>
static __device__ __forceinline__ void run_gemm(const Problems &...problems)
{
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    Gemm::run(*reinterpret_cast<typename Gemm::shared *>(dynamic_shared), problems...);
}

#endif
