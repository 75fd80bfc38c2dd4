// arch: sm_90a
/* gate_up_sm90a.cu: gate_up.cu with wgmma: the same arguments, formula and order of rounding (stage 3 of 5)
 * Grid   min(MOE_GEMM_GRID(max_tiles, 2 I (or I), cols), SMs) blocks that walk over the tiles
 * Needs  align == 16, as there; compute capability 9.0
 * Cost   from about a hundred rows an expert on math, else the weights once for each tile of an expert */
#include "gate_up.cuh"
#include "gemm_wgmma.cuh"

template <class T>
struct gate_up_problem {
    const moe_gate_up_args &args;
    int32_t num_cols, k_size;

    __device__ __forceinline__ weight_rows rows_of(int32_t expert) const
    {
        return gate_up_rows<T>(expert, args);
    }

    template <class Work>
    __device__ __forceinline__ const typename T::element *token_row(const Work &work,
                                                                    int32_t r) const
    {
        int32_t slot = r < work.num_rows ? args.sorted_token_ids[work.row_begin + r] : -1;
        int32_t token = token_of(slot, args);
        return token >= 0 ? static_cast<const typename T::element *>(args.hidden_states) +
                                token * args.hidden_stride
                          : nullptr;
    }

    // silu from registers; the other activations are one loop, not 32 copies of each.
    template <class Gemm>
    __device__ __forceinline__ void write(const typename Gemm::work &work,
                                          const float (&sums)[Gemm::kSums],
                                          const float (&weight)[2]) const
    {
        if (args.activation == MOE_ACT_SILU && args.gated)
            write<Gemm, true>(work, sums, weight);
        else
            write<Gemm, false>(work, sums, weight);
    }

    template <class Gemm, bool kSilu>
    __device__ __forceinline__ void write(const typename Gemm::work &work,
                                          const float (&sums)[Gemm::kSums],
                                          const float (&weight)[2]) const
    {
        weight_rows rows = rows_of(work.expert);
        Gemm::template each_run<kSilu>(
            sums, work.num_rows, [&](int half, int32_t row, int32_t col, float(&z)[8]) {
                int64_t to = int64_t{work.row_begin} + row;
                if (kSilu || args.gated) {
                    float g[4] = {z[0], z[2], z[4], z[6]}, u[4] = {z[1], z[3], z[5], z[7]};
                    write_outputs<T, true, kSilu>(g, u, to, (work.col_begin + col) / 2,
                                                  half ? weight[1] : weight[0], work.expert, rows,
                                                  args);
                } else {
#pragma unroll 1
                    for (int i = 0; i < 8; i += 4) {
                        float x[4] = {z[0], z[1], z[2], z[3]}, u[4] = {1, 1, 1, 1};
                        write_outputs<T, true, kSilu>(x, u, to, work.col_begin + col + i,
                                                      half ? weight[1] : weight[0], work.expert,
                                                      rows, args);
                        z[0] = z[4], z[1] = z[5], z[2] = z[6], z[3] = z[7];
                    }
                }
            });
    }
};

template <class Gemm>
static __device__ __forceinline__ void gate_up(const moe_gate_up_args &args,
                                               const tensor_map &weights)
{
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    typename Gemm::shared &smem = *reinterpret_cast<typename Gemm::shared *>(dynamic_shared);
    if (threadIdx.x == 0) {
        tensor_map_prefetch(&weights);
    }
    Gemm::run(smem, gate_up_problem<typename Gemm::T>{args, gate_up_cols(args), args.hidden_size});
}

#define MOE_KERNEL_sm90a_gate_up(name, type, rows, cols, k, stages, wm, wn, wk)                    \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a, 1)                           \
        name(const __grid_constant__ moe_gate_up_args args,                                        \
             const __grid_constant__ tensor_map weights)                                           \
    {                                                                                              \
        gate_up<gemm_wgmma<type, rows, cols, k, stages>>(args, weights);                           \
    }
#define MOE_KERNEL_sm90a_down(...)
#define MOE_KERNEL_sm80_gate_up(...)
#define MOE_KERNEL_sm80_down(...)
#define MOE_GEMM_VARIANT(name, arch, stage, act, weight, scale, orient, layout, rows, cols, k,     \
                         stages, wm, wn, wk, cluster, align)                                       \
    MOE_KERNEL_##arch##_##stage(name, act, rows, cols, k, stages, wm, wn, wk)
#include "gemm_variants.def"
