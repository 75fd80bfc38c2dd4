// arch: sm_90a
/* gate_up_split_sm90a.cu: gate_up_sm90a.cu with K split over a cluster: the same arguments, formula and rounding; sums of
 * parts of K are added up in their order (stage 3 of 5)
 * In     weights  as gate_up_sm90a.cu
 * Grid   clusters of up to MOE_SPLIT_BLOCKS blocks, MOE_GEMM_GRID(max_tiles, 2 I (or I), cols) of them
 * Needs  align == 16, as there; compute capability 9.0; no more blocks in a cluster than steps of K
 * Cost   as gate_up_sm90a.cu, and a tile of f32 sums once through the network between SMs */
#include "gate_up_wgmma.cuh"
#include "gemm_split.cuh"

template <class T>
struct gate_up_part : gate_up_operands<T> {
    using gate_up_operands<T>::args;

    // low, high: columns of the tile from unit_col and unit_col + half on.
    template <class Work>
    __device__ __forceinline__ void write_unit(const Work &work, int32_t row, int32_t unit_col,
                                               int32_t half, float (&low)[4], float (&high)[4],
                                               const float (&weight)[2]) const
    {
        const bool gated = args.gated;
        if (is_plain(args)) {
            const int32_t col = work.col_begin / 2 + threadIdx.x % 4 * 2 + unit_col;
            auto *to = static_cast<typename T::element *>(args.intermediate) +
                       (int64_t{work.row_begin} + row) * args.intermediate_stride + col;
#pragma unroll
            for (int i = 0; i < 2; ++i, to += 8 * args.intermediate_stride)
                if (row + i * 8 < work.num_rows && col < args.intermediate_size)
                    *reinterpret_cast<uint32_t *>(to) =
                        plain_pair<T>(low[2 * i], low[2 * i + 1], high[2 * i], high[2 * i + 1]);
            return;
        }
        const weight_rows rows = gate_up_rows<T>(work.expert, args);
        const int32_t lane_col = threadIdx.x % 4 * 2 + unit_col;
        for (int part = 0; part < (gated ? 1 : 2); ++part) {
            const int32_t col =
                gated ? work.col_begin / 2 + lane_col : work.col_begin + lane_col + part * half;
            if (col >= args.intermediate_size) return;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (row + i * 8 >= work.num_rows) continue;
                float g[2] = {part ? high[2 * i] : low[2 * i],
                              part ? high[2 * i + 1] : low[2 * i + 1]},
                      u[2] = {gated ? high[2 * i] : 1.0f, gated ? high[2 * i + 1] : 1.0f}, y[2];
                make_outputs(y, g, u, col, weight[i], work.expert, rows, args);
                auto *to = static_cast<typename T::element *>(args.intermediate) +
                           (int64_t{work.row_begin} + row + i * 8) * args.intermediate_stride + col;
                *reinterpret_cast<uint32_t *>(to) = T::round2(y[0], y[1]);
            }
        }
    }
};

#define MOE_KERNEL_sm90a_split_gate_up(name, type, rows, cols, k, stages, wm, wn, wk, align)       \
    extern "C" __global__ void __launch_bounds__(                                                  \
        MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_sm90a_split, 1)                     \
        name(const __grid_constant__ moe_gate_up_args args,                                        \
             const __grid_constant__ tensor_map weights)                                           \
    {                                                                                              \
        prefetch_maps(weights);                                                                    \
        run_gemm<gemm_split<type, true, rows, cols, k, stages>>(                                   \
            gate_up_part<type>{args, &weights, gate_up_cols(args), args.hidden_size});             \
    }
#include "gemm_instances.cuh"
