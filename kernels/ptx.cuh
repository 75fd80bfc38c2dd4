/* ptx.cuh: every inline PTX instruction of the portable kernels, one wrapper each, named by its words.
 *
 * Shared-memory addresses are 32-bit (shared_address). Above each: what, the section of the PTX ISA,
 * who calls. wgmma.cuh holds the instructions that only sm_90a has. */
#ifndef MOE_PTX_CUH
#define MOE_PTX_CUH

#include <stdint.h>

// A generic pointer into shared memory as the 32-bit address the instructions below take.
__device__ __forceinline__ uint32_t shared_address(const void *pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// clang-format off

// cp.async, "cp.async": 16 bytes global -> shared past L1; only the first `bytes` (0 or 16) are read,
// the rest of the 16 is zero. Each thread for itself.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void *global, uint32_t bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(shared), "l"(global), "r"(bytes) : "memory");
}

// cp.async, "cp.async": the same, and L2 fetches 256 bytes where it has to ask memory.
__device__ __forceinline__ void cp_async_16_wide(uint32_t shared, const void *global, uint32_t bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;"
                 :: "r"(shared), "l"(global), "r"(bytes) : "memory");
}

// cp.async.commit_group, "cp.async.commit_group": close this thread's group of copies.
__device__ __forceinline__ void cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// cp.async.wait_group, "cp.async.wait_group": until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" :: "n"(kPending) : "memory");
}

// ldmatrix .x4, "ldmatrix": four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8
// of matrix l / 8. All lanes of a warp.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared) : "memory");
}

// prefetch.global.L2, "prefetch": the line of this address comes into L2. Nothing is read: the data may still change.
__device__ __forceinline__ void prefetch_l2(const void *global)
{
    asm volatile("prefetch.global.L2 [%0];" :: "l"(global));
}

// ld.shared.v4, "ld": 16 bytes of shared memory. Each thread for itself.
__device__ __forceinline__ uint4 load_shared_16(uint32_t shared)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared) : "memory");
    return v;
}

// ld.shared.v2, "ld": two floats of shared memory. Each thread for itself.
__device__ __forceinline__ float2 load_shared_8(uint32_t shared)
{
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(shared) : "memory");
    return v;
}

// st.shared, "st": a float to shared memory. Each thread for itself.
__device__ __forceinline__ void store_shared_4(uint32_t shared, float v)
{
    asm volatile("st.shared.f32 [%0], %1;" :: "r"(shared), "f"(v) : "memory");
}

// mma.m16n8k16, "mma": d += a b^T, bf16 operands, f32 sums. All lanes of a warp.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// mma.m16n8k16, "mma": the same with f16 operands.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ex2.approx.ftz, "ex2": 2^x; 0 where that is below 2^-126. Each thread for itself.
__device__ __forceinline__ float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// min.NaN, max.NaN, "min", "max": NaN where one of both is. Each thread for itself.
__device__ __forceinline__ float min_nan(float a, float b)
{
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
__device__ __forceinline__ float max_nan(float a, float b)
{
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// barrier.sync, "barrier": named barrier `id` (1 .. 15) of `threads` threads, whole warps. Their lanes come together first:
// behind waits for an mbarrier, which lanes leave one by one, two barriers in a row without that let a warp read too early.
__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads)
{
    __syncwarp();
    asm volatile("barrier.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// rcp.approx.ftz.f32, "rcp": 1 / x to 1 ulp. Each thread for itself.
__device__ __forceinline__ float reciprocal_approximate(float x)
{
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// setp.gt and a predicated add, "setp", "add": count + 1 where a > b. What the compiler makes of `count += a > b` is one
// instruction more, each waiting for the one before. Each thread for itself.
__device__ __forceinline__ void count_if_greater(uint32_t &count, uint32_t a, uint32_t b)
{
    asm("{ .reg .pred p; setp.gt.u32 p, %1, %2; @p add.u32 %0, %0, 1; }"
        : "+r"(count) : "r"(a), "r"(b));
}

__device__ __forceinline__ void count_if_greater(uint32_t &count, uint64_t a, uint64_t b)
{
    asm("{ .reg .pred p; setp.gt.u64 p, %1, %2; @p add.u32 %0, %0, 1; }"
        : "+r"(count) : "l"(a), "l"(b));
}

// st.global, "st", "cache eviction priority hints": 16 bytes that leave L2 last (evict_last). Each thread for itself.
__device__ __forceinline__ void store_16_kept(void *global, uint4 v)
{
    asm volatile("{\n"
                 ".reg .b64 kept;\n"
                 "createpolicy.fractional.L2::evict_last.b64 kept, 1.0;\n"
                 "st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, kept;\n"
                 "}"
                 :: "l"(global), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ld.global.nc.L1::no_allocate, "ld.global.nc", "cache eviction priority hints": 16 bytes that nobody writes meanwhile and
// that leave L2 first (evict_first). They are asked for in the order of the calls, before anything is done with the first
// of them. Each thread for itself.
__device__ __forceinline__ uint4 load_16_once(const void *global)
{
    uint4 v;
    asm volatile("{\n"
                 ".reg .b64 once;\n"
                 "createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
                 "ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], once;\n"
                 "}"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(global));
    return v;
}

// ld.acquire.gpu, "ld": what its writer released before is visible behind it. Each thread for itself.
__device__ __forceinline__ int32_t load_acquire(const int32_t *global)
{
    int32_t v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(global) : "memory");
    return v;
}

// red.release.gpu.add, "red": what this thread wrote, or saw written behind a barrier, is visible to whoever acquires the
// sum. Each thread for itself.
__device__ __forceinline__ void add_release(int32_t *global, int32_t add)
{
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" :: "l"(global), "r"(add) : "memory");
}

// The parameters of a kernel in the constant cache: every launch misses it anew, each 64 bytes of them, which is best
// waited for while there is nothing else to do. nanosleep.u32, "nanosleep": never; it keeps the reads. Each thread for itself.
template <class Args>
__device__ __forceinline__ void fetch_parameters(const Args &args)
{
    constexpr size_t kWords = sizeof(Args) / 8;
    const unsigned long long *words = reinterpret_cast<const unsigned long long *>(&args);
    unsigned long long any = words[kWords - 1];
#pragma unroll
    for (size_t i = 0; i < kWords; i += 4)
        any |= words[i];
    asm volatile("{ .reg .pred p; setp.eq.u64 p, %0, 0; @p nanosleep.u32 0; }" :: "l"(any));
}

// nanosleep.u32, "nanosleep": never, as no value is -1; but it is computed by now, not behind the next wait, where the
// compiler would put it. Each thread for itself.
__device__ __forceinline__ void compute_now(uint64_t value)
{
    asm volatile("{ .reg .pred p; setp.eq.u64 p, %0, -1; @p nanosleep.u32 0; }" :: "l"(value) : "memory");
}

// griddepcontrol.wait, "griddepcontrol": until the grids before this one are complete and their writes
// visible. Every thread, before it reads what they wrote and before it writes anything. Without
// programmatic dependent launch (and below sm_90) there is nothing to wait for.
__device__ __forceinline__ void grid_dependency_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// griddepcontrol.launch_dependents, "griddepcontrol": the next grid may start (it waits by itself). Every kernel inside of a
// call calls it after its own wait, so that a later grid may rely on all but its direct predecessor. The last one (decode's
// down) may do so before: the first grid of a call relies on none.
__device__ __forceinline__ void grid_launch_dependents()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// clang-format on

#endif
