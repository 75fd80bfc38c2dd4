/* moe.h: what the C files share. No Python.h here or below.
 *
 * The way of a call:  module.c  fills a moe_call (tensors and scalars as the user gave them)
 *                     validate.c  checks it and describes it as a moe_problem (sizes only)
 *                     plan.c      problem + device -> moe_plan, a pure function
 *                     pipeline.c  runs the plan: the five stages in order, on cpu/ or cuda/ */
#ifndef MOE_H
#define MOE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../kernels/moe_kernels.h"
#include "status.h"

#define MOE_MAX_DIMS    4
#define MOE_MAX_EXPERTS 1024
#define MOE_MAX_TOPK    32
#define MOE_ALIGNMENT   256 /* of the workspace and of every part of it, bytes */
#define MOE_WORKSPACE_LIMIT                                                                        \
    ((int64_t)3 << 29) /* 1.5 GiB, the default of FUSEDMOE_WORKSPACE_LIMIT */

typedef enum moe_backend { MOE_CPU = 0, MOE_CUDA = 1 } moe_backend;

/* A tensor as a call sees it: borrowed, byte offset applied. data == NULL with ndim < 0: absent (None). */
typedef struct moe_tensor {
    void *data;
    int64_t shape[MOE_MAX_DIMS];
    int64_t stride[MOE_MAX_DIMS]; /* elements; extent-1 dimensions are normalised to compact */
    int32_t ndim;                 /* -1: absent */
    int32_t dtype;                /* MOE_F32 ... */
    int32_t lanes_packed;         /* elements per storage unit: 1, or 2 for two fp4 in a byte */
    moe_backend backend;
    int32_t device;
    int64_t span_bytes; /* from data to the end of the last element; 0 where empty */
    bool readonly;
} moe_tensor;

static inline bool tensor_present(const moe_tensor *t)
{
    return t->ndim >= 0;
}

/* Sizes in bytes of MOE_F32 ...; inline, since every check of every tensor asks. */
static inline int64_t moe_dtype_bytes(int32_t dtype)
{
    static const uint8_t BYTES[MOE_DTYPE_COUNT] = {
        [MOE_F32] = 4,    [MOE_BF16] = 2,   [MOE_F16] = 2,    [MOE_I32] = 4, [MOE_I64] = 8,
        [MOE_U8] = 1,     [MOE_I8] = 1,     [MOE_U16] = 2,    [MOE_I16] = 2, [MOE_F8E4M3] = 1,
        [MOE_F8E5M2] = 1, [MOE_F8E8M0] = 1, [MOE_F4E2M1] = 1, [MOE_F64] = 8, [MOE_BOOL] = 1,
        [MOE_U32] = 4,    [MOE_U64] = 8};
    return (uint32_t)dtype < MOE_DTYPE_COUNT ? BYTES[dtype] : 0;
}
/* "bfloat16"; dtype.c. */
const char *moe_dtype_name(int32_t dtype);
/* "float32 [512, 8]" into text; returns text. */
const char *moe_tensor_text(const moe_tensor *t, char *text, size_t size);

/* The stages a call may ask for. fused_moe is ROUTE | LAYER, fused_experts LAYER. */
typedef enum moe_operation {
    MOE_OP_FUSED_EXPERTS = 0,
    MOE_OP_FUSED_MOE,
    MOE_OP_ROUTE,
    MOE_OP_ALIGN,
    MOE_OP_ROUTE_ALIGN,
    MOE_OP_ALIGN_BLOCK, /* align, then padded to blocks or counted */
    MOE_OP_GATE_UP,
    MOE_OP_DOWN,
    MOE_OP_COMBINE
} moe_operation;

enum { MOE_COMBINE_SUM = 0, MOE_NO_COMBINE_WEIGHTED, MOE_NO_COMBINE_UNWEIGHTED };

/* Scalars of a call, parsed, defaults filled in where they do not depend on other arguments. */
typedef struct moe_options {
    int32_t activation; /* MOE_ACT_* */
    int32_t clamp;      /* MOE_CLAMP_* as given; pipeline.c drops it where there is no limit */
    int32_t gated;      /* 0 or 1 */
    int32_t w13_order;  /* MOE_ORDER_* */
    int32_t combine;    /* MOE_COMBINE_SUM, MOE_NO_COMBINE_* */
    int32_t apply_router_weight_on_input;
    int32_t deterministic;
    int32_t batch_invariant;
    int32_t has_alpha, has_limit, has_expert_start;
    double activation_alpha, activation_limit;
    double routed_scaling_factor;
    int64_t expert_start;
    /* route (fused_moe, route) */
    int32_t method;       /* MOE_ROUTE_* */
    int64_t topk;         /* routed experts of a token; slots are these and num_shared more */
    double routing_scale; /* multiplies the weights; 1 by default */
    int32_t renormalize;  /* 0, 1, or -1: what the method says */
    int32_t shared;       /* MOE_SHARED_*, where num_shared > 0 */
    int32_t weights_dtype;
    int64_t num_shared, num_zero_experts, num_groups, topk_groups;
    int64_t first_shared_id;       /* -1: the number of experts */
    double shared_weight, softcap; /* softcap 0: none */
} moe_options;

/* The knobs of a routing method: a row of route_methods.def. */
typedef struct moe_route_method {
    const char *name;
    int32_t score, key, bias, groups, ids, renormalize;
} moe_route_method;

extern const moe_route_method moe_route_methods[MOE_ROUTE_COUNT]; /* dtype.c */

/* One call as the user gave it. */
typedef struct moe_call {
    moe_operation operation;
    const char *function; /* for messages */
    moe_tensor hidden_states, w13, w2, topk_weights, topk_ids, router_logits;
    moe_tensor w13_bias, w2_bias, shared_output, expert_map;
    moe_tensor out, workspace;
    /* stages alone */
    moe_tensor expert_offsets, sorted_token_ids, row_of_slot, intermediate, rows;
    /* what routing reads beside the logits */
    moe_tensor correction_bias, expert_scale, num_token_non_padded, routing_map, replica_map;
    moe_tensor tid2eid, token_ids;
    moe_tensor packed; /* of route, as counts below */
    moe_options options;
    /* align alone */
    int64_t num_experts;
    /* align_block_size, count_tokens_per_expert: sorted_token_ids padded, and these */
    moe_tensor expert_ids, num_tokens_post_padded, counts;
    int64_t block_size; /* 0: counts alone */
    int32_t fill;
} moe_call;

/* A call by the names of its parts, for whoever carries it across a border. call_fields.c. */
enum { MOE_CALL_TENSORS = 28 };
typedef struct moe_call_tensor {
    const char *name;
    size_t offset; /* in moe_call */
} moe_call_tensor;
extern const moe_call_tensor moe_call_tensors[MOE_CALL_TENSORS];

static inline const moe_tensor *moe_const_tensor_of(const moe_call *call, int index)
{
    return (const moe_tensor *)(const void *)((const char *)call + moe_call_tensors[index].offset);
}

static inline moe_tensor *moe_tensor_of(moe_call *call, int index)
{
    return (moe_tensor *)(void *)((char *)call + moe_call_tensors[index].offset);
}

/* A call on its way through another runtime: the scalars travel by name, the tensors as two lists
 * in the order of moe_call_tensors. */
typedef struct moe_message {
    moe_call call;
    int64_t operands, results; /* bit i: tensor i is in the list */
    int64_t workspace_limit;
} moe_message;

typedef enum moe_scalar_kind { MOE_SCALAR_I32, MOE_SCALAR_I64, MOE_SCALAR_F64 } moe_scalar_kind;
typedef struct moe_call_scalar {
    const char *name;
    moe_scalar_kind kind;
    size_t offset;     /* in moe_message */
    int64_t low, high; /* of an integer; beyond these it would index no table */
} moe_call_scalar;
enum { MOE_CALL_SCALARS = 31 };
extern const moe_call_scalar moe_call_scalars[MOE_CALL_SCALARS]; /* sorted by name */

/* The sizes of a layer and nothing else: the key of the plan cache, compared with memcmp (zero it first). */
typedef struct moe_problem {
    int64_t num_tokens;
    int32_t hidden_size;
    int32_t intermediate_size;
    int32_t num_experts; /* w13.shape[0] */
    int32_t topk;
    int32_t dtype; /* MOE_BF16, MOE_F16, MOE_F32 */
    int32_t ids_dtype;
    int32_t gated;
    int32_t combine;          /* MOE_COMBINE_SUM, MOE_NO_COMBINE_* */
    int32_t routed;           /* 1: the call starts at router_logits */
    int32_t router_experts;   /* columns of router_logits, else 0 */
    int32_t vector_bytes;     /* every row of hidden_states, w13, w2 has: 16, or the element's */
    int32_t out_vector_bytes; /* the same for out and shared_output */
    int32_t deterministic;
    int32_t batch_invariant;
    int32_t operation; /* MOE_OP_*: which stages run, so which parts of the workspace are needed */
    int32_t plain;     /* a layer of gated silu without limit, biases and router weights on input */
    int64_t workspace_limit; /* bytes; 0: MOE_WORKSPACE_LIMIT */
} moe_problem;

/* What plan.c may know of a device. */
typedef struct moe_device_info {
    moe_backend backend;
    int32_t device;
    int32_t num_sms;     /* threads on the CPU */
    int32_t capability;  /* 90 for sm_90; on the CPU the level of simd.h */
    int32_t hopper;      /* 1: runs the kernels made for sm_90a */
    int32_t tile_rows;   /* tests: only variants of this height, where there are any; 0: all */
    int32_t gate_up_row; /* tests: 1 + the row of gemm_variants.def, no other; 0: all */
    int32_t down_row; /* the same; both -1: decode wherever it can; one row of both stages: that */
    int32_t apart;    /* tests: 1: gate_up and down in launches of their own */
    int32_t high;     /* tests: high_cost; 0: the plan's choice, -1: no tiles of MOE_HIGH_ROWS */
    int32_t smem_per_block; /* bytes, opt-in maximum */
    int32_t smem_per_sm;    /* bytes */
    int64_t l2_bytes;
    double read_bytes_per_us; /* memory stream */
    double flops_per_us;      /* dense matrix rate of the activations' dtype */
    char name[64];
} moe_device_info;

/* Offsets into the workspace, bytes, multiples of MOE_ALIGNMENT; -1: not used. */
typedef struct moe_workspace {
    int64_t topk_weights, topk_ids, expert_offsets, sorted_token_ids, row_of_slot;
    int64_t tiles, num_tiles, counts, intermediate, rows;
    int64_t total;
} moe_workspace;

typedef struct moe_gemm_plan {
    int32_t variant; /* row of gemm_variants.def, -1 on the CPU */
    int32_t tile_rows, tile_cols, tile_k;
    int32_t grid_cols; /* column tiles: grid.x; grid.y is max_tiles */
    int32_t threads;
    int32_t smem_bytes;
    int32_t max_blocks;            /* that walk over the tiles; 0: a thread block for each */
    int32_t cluster_blocks;        /* that split K of a tile between them; 0: one for all of it */
    int32_t weight_box, token_box; /* rows that a tensor copy brings; 0: none */
    int32_t weight_fourths;        /* 1: weight rows come as every fourth, then those behind them */
    int32_t fetch_bytes;           /* of weights that L2 asks memory for at once */
    int32_t ring_stages, box_chunks,
        copies;              /* decode: of the ring; pieces of K in a copy, copies in a stage */
    int32_t stages_left;     /* decode, gate_up: still to be asked for when down may start */
    int32_t band_tiles;      /* down that adds: column tiles before the next ones; 0: all */
    double bytes, flops, us; /* expected */
} moe_gemm_plan;

enum {
    MOE_ALIGN_FEW = 0,  /* one launch, a warp for each row and each offset; no tiles */
    MOE_ALIGN_WHOLE,    /* one launch, a thread for each slot of a block */
    MOE_ALIGN_CLUSTERS, /* the same, counted by clusters of blocks */
    MOE_ALIGN_TWICE     /* counts, then places: two launches */
};

typedef struct moe_align_plan {
    int32_t kind; /* MOE_ALIGN_*, on a GPU */
    int32_t blocks, threads;
    int32_t count_blocks, piece_slots; /* of two launches: as in moe_align_args */
} moe_align_plan;

/* One plan, made once. Stages take it and decide nothing again. */
typedef struct moe_plan {
    moe_problem problem;
    moe_backend backend;
    int32_t num_sms;
    int32_t smem_per_block;
    int32_t hopper;       /* 1: runs the kernels made for sm_90a */
    int64_t chunk_tokens; /* tokens per pass; num_tokens where one pass is enough */
    int64_t num_chunks;
    int32_t decode;     /* 1: no align and no combine; gate_up and down read topk_ids themselves */
    int32_t one_launch; /* 1: gate_up and down, by the variant of both */
    int32_t high_rows, high_cost; /* in one launch: what align may choose, as in moe_align_args */
    int32_t high_cols;            /* of gate_up in such a tile */
    int32_t adds; /* 1: out is filled, then down adds its rows; deterministic where topk is 1 */
    moe_align_plan align;
    int32_t route_threads; /* of a block; a warp for each token */
    int32_t tile_rows;
    int32_t max_tiles; /* of one chunk */
    int32_t combine_vector_bytes;
    int32_t
        combine_slots; /* of a token that a thread of combine sums at a time; 0: column by column */
    int64_t intermediate_stride, rows_stride; /* elements */
    int32_t num_launches; /* at most: route and align of few tokens go together */
    int32_t deterministic, batch_invariant;
    moe_gemm_plan gate_up, down;
    moe_workspace workspace;
    double bytes, flops, us; /* expected, whole call */
} moe_plan;

/* tensor.c: shape, strides and memory into tensor, with the checks that every door shares. strides
 * NULL: compact. */
int tensor_describe(const char *name, void *data, int32_t dtype, int32_t ndim, const int64_t *shape,
                    const int64_t *strides, moe_tensor *tensor, moe_error *err);

/* validate.c: every check a call's tensors and scalars need; fills problem. Writes nothing else. */
int moe_validate(const moe_call *call, moe_problem *problem, moe_error *err);
/* Of a layer, what depends on addresses beyond their alignment: out and workspace overlap nothing that they may not. */
int moe_check_apart(const moe_call *call, moe_error *err);
/* The most rows that num_slots slots can have, each expert padded to blocks: a multiple of block_size. */
int64_t moe_padded_rows(int64_t num_slots, int64_t num_experts, int64_t block_size);
/* The problem of shapes alone (workspace_size, plan): range checks on the sizes. */
int moe_validate_problem(const moe_problem *problem, moe_error *err);

/* plan.c: pure. */
int moe_make_plan(const moe_problem *problem, const moe_device_info *device, moe_plan *plan,
                  moe_error *err);
/* The H200 by default, with num_sms replaced where num_sms > 0: plans without a GPU. */
void moe_default_device(moe_backend backend, int32_t num_sms, moe_device_info *info);

/* plan_cache.c: plans by problem and device. The caller serialises; an entry is copied out. */
enum { MOE_PLAN_SLOTS = 64, MOE_PLAN_PROBES = 4 };

typedef struct moe_plan_entry {
    bool used;
    moe_backend backend;
    int32_t device;
    moe_plan plan; /* plan.problem is the key, with backend and device */
} moe_plan_entry;

/* Never more than MOE_PLAN_SLOTS: a full row of MOE_PLAN_PROBES slots loses one. */
typedef struct moe_plan_cache {
    moe_plan_entry entries[MOE_PLAN_SLOTS];
    unsigned evictions;
} moe_plan_cache;

bool moe_plan_find(const moe_plan_cache *cache, const moe_problem *problem, moe_backend backend,
                   int32_t device, moe_plan *plan);
/* Nothing where the plan has completed its problem, which then would not be found again. */
void moe_plan_keep(moe_plan_cache *cache, const moe_problem *problem, moe_backend backend,
                   int32_t device, const moe_plan *plan);
/* The row of route_variants.def that does what `args` say; -1: none, so moe_route_general_*. */
int32_t moe_route_variant(const moe_route_args *args);

/* Whether one launch does both stages on a GPU. */
bool moe_route_aligns(const moe_route_args *route);

/* Rows of gemm_variants.def by number; "cpu" for -1. */
const char *moe_variant_name(int32_t row);
int32_t moe_num_variants(void);

static inline bool moe_is_layer(moe_operation operation)
{
    return operation == MOE_OP_FUSED_EXPERTS || operation == MOE_OP_FUSED_MOE;
}

/* pipeline.c: the caller's workspace is large enough for the plan, alignment included. */
int moe_check_workspace(const moe_call *call, const moe_plan *plan, moe_error *err);
/* Stages in order. out and workspace are present and checked. stream: CUstream or NULL. */
int moe_run_layer(const moe_call *call, const moe_plan *plan, void *stream, moe_error *err);
/* One stage alone, or route and align. */
int moe_run_stage(const moe_call *call, const moe_plan *plan, void *stream, moe_error *err);

/* cpu/: the five stages. No state but the thread pool; any thread may call. */
int moe_cpu_device_info(moe_device_info *info, moe_error *err);
int moe_cpu_route(const moe_route_args *args, moe_error *err);
int moe_cpu_align(const moe_align_args *args, moe_error *err);
/* FUSEDMOE_CHECK=1: an id that no expert can have is an error. Reads only what describes the ids. */
int moe_cpu_check_ids(const moe_align_args *args, moe_error *err);
int moe_cpu_align_pad(const moe_pad_args *args, moe_error *err);
int moe_cpu_gate_up(const moe_gate_up_args *args, moe_error *err);
int moe_cpu_down(const moe_down_args *args, moe_error *err);
int moe_cpu_combine(const moe_combine_args *args, moe_error *err);

#endif
