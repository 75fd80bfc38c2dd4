// arch: sm_90a
/* gate_up_sm90a.cu: gate_up.cu with wgmma: the same arguments, formula and order of rounding (stage 3 of 5)
 * In     weights  tensor map of w13 as [num_experts, halves, I, hidden_size], boxes of half a tile's rows: the gate
 *                 rows of a tile, then its up rows, whatever their order in memory
 * Grid   min(MOE_GEMM_GRID(max_tiles, 2 I (or I), cols), SMs) blocks that walk over the tiles
 * Needs  align == 16, as there; compute capability 9.0
 * Cost   from about a hundred rows an expert on math, else the weights once for each tile of an expert */
#include "gate_up.cuh"
#include "gemm_wgmma.cuh"

template <class T>
struct gate_up_problem {
    const moe_gate_up_args &args;
    const tensor_map *weights;
    int32_t num_cols, k_size;
    static constexpr int kTaken = 1;
    static constexpr uint32_t band_tiles = 0;

    __device__ __forceinline__ int2 box(int32_t col, int32_t part, int32_t rows) const
    {
        return args.gated
                   ? make_int2(col / 2, args.w13_order == MOE_ORDER_UP_GATE ? 1 - part : part)
                   : make_int2(col + part * rows, 0);
    }

    __device__ __forceinline__ const typename T::element *tokens() const
    {
        return static_cast<const typename T::element *>(args.hidden_states);
    }

    __device__ __forceinline__ int64_t token_stride() const { return args.hidden_stride; }

    // Plain silu from registers; all else is one loop, not 32 copies of each activation.
    template <class Gemm>
    __device__ __forceinline__ void
    write(typename Gemm::shared &smem, const typename Gemm::work &work,
          const float (&sums)[Gemm::kSums], const float (&weight)[2]) const
    {
        if (args.activation == MOE_ACT_SILU && args.gated && !args.w13_bias && !args.topk_weights &&
            !(args.activation_limit > 0.0f))
            write_silu<Gemm>(smem, work, sums);
        else
            write_any<Gemm>(smem, work, sums, weight);
    }

    template <class Gemm>
    __device__ __forceinline__ void write_silu(typename Gemm::shared &smem,
                                               const typename Gemm::work &work,
                                               const float (&sums)[Gemm::kSums]) const
    {
        constexpr int kBlocks = Gemm::kOutCols / 8;
#pragma unroll
        for (int j = 0; j < Gemm::kCols / 16; j += 2) {
            float y[8];
#pragma unroll
            for (int i = 0; i < 8; ++i)
                y[i] = swish(sums[j * 4 + i], 1.0f) * sums[j * 4 + i + Gemm::kSums / 2];
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                pairs[i] = T::round2(y[2 * i], y[2 * i + 1]);
            Gemm::out_put(smem, j % kBlocks, pairs);
            if ((j + 2) % kBlocks == 0)
                Gemm::out_copy(smem, work, args.intermediate, args.intermediate_stride,
                               work.col_begin / 2 + (j + 2 - kBlocks) * 8, args.intermediate_size);
        }
    }

    // Where not gated there are twice as many outputs.
    template <class Gemm>
    __device__ __forceinline__ void
    write_any(typename Gemm::shared &smem, const typename Gemm::work &work,
              const float (&sums)[Gemm::kSums], const float (&weight)[2]) const
    {
        constexpr int kBlocks = Gemm::kOutCols / 8, kHalfBlocks = Gemm::kCols / 16,
                      kHalf = Gemm::kSums / 2;
        bool gated = args.gated;
        weight_rows rows = gate_up_rows<T>(work.expert, args);
        int32_t out = gated ? work.col_begin / 2 : work.col_begin;
#pragma unroll 1
        for (int part = 0; part < (gated ? 1 : 2); ++part) {
#pragma unroll 1
            for (int j = 0; j < kHalfBlocks; j += 2, out += 16) {
                uint32_t pairs[4];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float g[4], u[4], y[4];
#pragma unroll
                    for (int from = 0; from < kHalfBlocks;
                         from += 2) // registers have no index: compare
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            int at = (from + i / 2) * 4 + half * 2 + i % 2;
                            if (from == j) {
                                g[i] = part == 0 ? sums[at] : sums[at + kHalf];
                                u[i] = gated ? sums[at + kHalf] : 1.0f;
                            }
                        }
                    make_outputs(y, g, u, out + Gemm::lane_col(0), 8, weight[half], work.expert,
                                 rows, args);
                    pairs[half] = T::round2(y[0], y[1]);
                    pairs[2 + half] = T::round2(y[2], y[3]);
                }
                Gemm::out_put(smem, j % kBlocks, pairs);
                if ((j + 2) % kBlocks == 0)
                    Gemm::out_copy(smem, work, args.intermediate, args.intermediate_stride,
                                   out + 16 - Gemm::kOutCols, args.intermediate_size);
            }
        }
    }
};

#define MOE_KERNEL_sm90a_gate_up(name, type, rows, cols, k, stages, wm, wn, wk)                    \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a, 1)                           \
        name(const __grid_constant__ moe_gate_up_args args,                                        \
             const __grid_constant__ tensor_map weights)                                           \
    {                                                                                              \
        prefetch_maps(weights);                                                                    \
        run_gemm<gemm_wgmma<type, true, rows, cols, k, stages>>(                                   \
            gate_up_problem<type>{args, &weights, gate_up_cols(args), args.hidden_size});          \
    }
#define MOE_KERNEL_sm90a_down_add(...)
#define MOE_KERNEL_sm90a_down(...)
#define MOE_KERNEL_sm80_gate_up(...)
#define MOE_KERNEL_sm80_down(...)
#define MOE_KERNEL_sm90a_decode_gate_up(...)
#define MOE_KERNEL_sm90a_decode_down(...)
#define MOE_KERNEL_sm90a_swap_gate_up(...)
#define MOE_KERNEL_sm90a_swap_down(...)
#define MOE_KERNEL_sm90a_swap_experts(...)
#define MOE_GEMM_VARIANT(name, arch, stage, act, weight, scale, orient, layout, rows, cols, k,     \
                         stages, wm, wn, wk, cluster, align)                                       \
    MOE_KERNEL_##arch##_##stage(name, act, rows, cols, k, stages, wm, wn, wk)
#include "gemm_variants.def"
