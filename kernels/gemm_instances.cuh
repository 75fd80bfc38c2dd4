// gemm_instances.cuh: the rows of gemm_variants.def as kernels: those whose MOE_KERNEL_<arch>_<stage> the file defines before it
// includes this one; the rest are other files'. No guard: once, at a file's end.
#ifndef MOE_KERNEL_sm80_gate_up
#define MOE_KERNEL_sm80_gate_up(...)
#endif
#ifndef MOE_KERNEL_sm80_down
#define MOE_KERNEL_sm80_down(...)
#endif
#ifndef MOE_KERNEL_sm90a_gate_up
#define MOE_KERNEL_sm90a_gate_up(...)
#endif
#ifndef MOE_KERNEL_sm90a_bare_gate_up
#define MOE_KERNEL_sm90a_bare_gate_up(...)
#endif
#ifndef MOE_KERNEL_sm90a_bare_down
#define MOE_KERNEL_sm90a_bare_down(...)
#endif
#ifndef MOE_KERNEL_sm90a_down
#define MOE_KERNEL_sm90a_down(...)
#endif
#ifndef MOE_KERNEL_sm90a_down_add
#define MOE_KERNEL_sm90a_down_add(...)
#endif
#ifndef MOE_KERNEL_sm90a_swap_gate_up
#define MOE_KERNEL_sm90a_swap_gate_up(...)
#endif
#ifndef MOE_KERNEL_sm90a_swap_down
#define MOE_KERNEL_sm90a_swap_down(...)
#endif
#ifndef MOE_KERNEL_sm90a_swap_experts
#define MOE_KERNEL_sm90a_swap_experts(...)
#endif
#ifndef MOE_KERNEL_sm90a_plain_experts
#define MOE_KERNEL_sm90a_plain_experts(...)
#endif
#ifndef MOE_KERNEL_sm90a_high_experts
#define MOE_KERNEL_sm90a_high_experts(...)
#endif
#ifndef MOE_KERNEL_sm90a_wide_experts
#define MOE_KERNEL_sm90a_wide_experts(...)
#endif
#ifndef MOE_KERNEL_sm90a_joined_experts
#define MOE_KERNEL_sm90a_joined_experts(...)
#endif
#ifndef MOE_KERNEL_sm90a_joined_bare_experts
#define MOE_KERNEL_sm90a_joined_bare_experts(...)
#endif
#ifndef MOE_KERNEL_sm90a_split_gate_up
#define MOE_KERNEL_sm90a_split_gate_up(...)
#endif
#ifndef MOE_KERNEL_sm90a_split_down
#define MOE_KERNEL_sm90a_split_down(...)
#endif
#ifndef MOE_KERNEL_sm90a_decode_gate_up
#define MOE_KERNEL_sm90a_decode_gate_up(...)
#endif
#ifndef MOE_KERNEL_sm90a_decode_bare_gate_up
#define MOE_KERNEL_sm90a_decode_bare_gate_up(...)
#endif
#ifndef MOE_KERNEL_sm90a_decode_bare_down
#define MOE_KERNEL_sm90a_decode_bare_down(...)
#endif
#ifndef MOE_KERNEL_sm90a_decode_down
#define MOE_KERNEL_sm90a_decode_down(...)
#endif
#define MOE_GEMM_VARIANT(name, arch, stage, act, weight, scale, orient, layout, rows, cols, k,     \
                         stages, wm, wn, wk, cluster, align)                                       \
    MOE_KERNEL_##arch##_##stage(name, act, rows, cols, k, stages, wm, wn, wk, align)
#include "gemm_variants.def"
