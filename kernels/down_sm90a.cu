// arch: sm_90a
/* down_sm90a.cu: down.cu with wgmma: the same arguments, formula and order of rounding (stage 4 of 5)
 * Grid   min(MOE_GEMM_GRID(max_tiles, hidden_size, cols), SMs) blocks that walk over the tiles
 * Needs  align == 16, as there; compute capability 9.0
 * Cost   as gate_up_sm90a.cu, and num_rows * hidden_size * 2 bytes written */
#include "down.cuh"
#include "gemm_wgmma.cuh"

template <class T>
struct down_problem {
    const moe_down_args &args;
    int32_t num_cols, k_size;

    __device__ __forceinline__ weight_rows rows_of(int32_t expert) const
    {
        return down_rows<T>(expert, args);
    }

    template <class Work>
    __device__ __forceinline__ const typename T::element *token_row(const Work &work,
                                                                    int32_t r) const
    {
        return r < work.num_rows ? static_cast<const typename T::element *>(args.intermediate) +
                                       (int64_t{work.row_begin} + r) * args.intermediate_stride
                                 : nullptr;
    }

    template <class Gemm>
    __device__ __forceinline__ void write(const typename Gemm::work &work,
                                          const float (&sums)[Gemm::kSums],
                                          const float (&weight)[2]) const
    {
        Gemm::template each_run<true>(
            sums, work.num_rows, [&](int half, int32_t row, int32_t col, float(&z)[8]) {
                write_outputs<T, true>(z, int64_t{work.row_begin} + row, work.col_begin + col,
                                       weight[half], work.expert, args);
            });
    }
};

template <class Gemm>
static __device__ __forceinline__ void down(const moe_down_args &args, const tensor_map &weights,
                                            const tensor_map &tokens)
{
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    typename Gemm::shared &smem = *reinterpret_cast<typename Gemm::shared *>(dynamic_shared);
    if (threadIdx.x == 0) {
        tensor_map_prefetch(&weights);
        tensor_map_prefetch(&tokens);
    }
    Gemm::run(smem, down_problem<typename Gemm::T>{args, args.hidden_size, args.intermediate_size});
}

#define MOE_KERNEL_sm90a_down(name, type, rows, cols, k, stages, wm, wn, wk)                       \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a, 1)                           \
        name(const __grid_constant__ moe_down_args args,                                           \
             const __grid_constant__ tensor_map weights,                                           \
             const __grid_constant__ tensor_map tokens)                                            \
    {                                                                                              \
        down<gemm_wgmma<type, rows, cols, k, stages>>(args, weights, tokens);                      \
    }
#define MOE_KERNEL_sm90a_gate_up(...)
#define MOE_KERNEL_sm80_gate_up(...)
#define MOE_KERNEL_sm80_down(...)
#define MOE_GEMM_VARIANT(name, arch, stage, act, weight, scale, orient, layout, rows, cols, k,     \
                         stages, wm, wn, wk, cluster, align)                                       \
    MOE_KERNEL_##arch##_##stage(name, act, rows, cols, k, stages, wm, wn, wk)
#include "gemm_variants.def"
