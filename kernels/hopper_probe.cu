// arch: sm_90a
/* hopper_probe.cu: c = a b^T, 64 x 64 x 64: the way tensor map, TMA, mbarrier, wgmma, proven end to end
 * In     map_a, map_b  tensor maps of a and b, bf16 [64, 64]: CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank 2,
 *                      dims {64, 64} (K first), strides {128}, box {64, 64}, element strides {1, 1},
 *                      no interleave, CU_TENSOR_MAP_SWIZZLE_128B, L2 promotion 128 B, no NaN fill
 * Out    c             [64, 64] f32, row-major
 * Math   bf16 products, f32 sums
 * Grid   one block of 128 threads (one warpgroup); static shared memory
 * Needs  compute capability 9.0 */
#include "wgmma.cuh"

static constexpr int kSize = 64;
static constexpr uint32_t kTileBytes = kSize * kSize * 2;

struct shared {
    alignas(1024) unsigned char a[kTileBytes];
    alignas(1024) unsigned char b[kTileBytes];
    alignas(8) uint64_t landed; // both tiles
};

extern "C" __global__ void __launch_bounds__(128, 1)
    moe_hopper_probe(const __grid_constant__ tensor_map map_a,
                     const __grid_constant__ tensor_map map_b, float *c)
{
    __shared__ shared smem;
    uint32_t landed = shared_address(&smem.landed);
    if (threadIdx.x == 0) {
        mbarrier_init(landed, 1);
        fence_proxy_async();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(landed, 2 * kTileBytes);
        tensor_copy_2d(shared_address(smem.a), &map_a, 0, 0, landed);
        tensor_copy_2d(shared_address(smem.b), &map_b, 0, 0, landed);
    }
    mbarrier_wait(landed, 0);

    float sums[32];
#pragma unroll
    for (int i = 0; i < 32; ++i)
        sums[i] = 0.0f;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSize; k += 16)
        wgmma_m64n64k16_bf16(sums, wgmma_descriptor(shared_address(smem.a) + k * 2),
                             wgmma_descriptor(shared_address(smem.b) + k * 2), k != 0);
    wgmma_commit();
    wgmma_wait<0>();

    int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float *at = c + (warp * 16 + lane / 4) * kSize + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        *reinterpret_cast<float2 *>(at + j * 8) = make_float2(sums[4 * j], sums[4 * j + 1]);
        *reinterpret_cast<float2 *>(at + 8 * kSize + j * 8) =
            make_float2(sums[4 * j + 2], sums[4 * j + 3]);
    }
}
