/* moe_kernels.h: the border between C and the kernels, CPU and CUDA alike. One plain struct per stage;
 * a stage reads nothing else. CUDA kernels take it as a __grid_constant__ parameter, the CPU stages by
 * pointer. Sizes are asserted below, on both sides.
 *
 * Names: num_tokens T, hidden_size H, intermediate_size I (after gating), num_experts E (held here,
 * w13.shape[0]), topk k, num_slots = T * k, num_rows <= num_slots (slots that were not dropped).
 * Strides are in elements; the last dimension has stride 1. A pointer that may be NULL says so. */
#ifndef MOE_KERNELS_H
#define MOE_KERNELS_H

#include <stdint.h>

/* Element types; the values travel in the stage structs and in gemm_variants.def. */
enum {
    MOE_DTYPE_NONE = 0,
    MOE_F32,
    MOE_BF16,
    MOE_F16,
    MOE_I32,
    MOE_I64,
    MOE_U8,
    MOE_I8,
    MOE_U16,
    MOE_I16,
    MOE_F8E4M3,
    MOE_F8E5M2,
    MOE_F8E8M0,
    MOE_F4E2M1,
    MOE_F64,
    MOE_BOOL,
    MOE_U32,
    MOE_U64,
    MOE_DTYPE_COUNT
};

/* Activations: f(g) * u where gated, f(x) where not (reference.py: activate). */
enum {
    MOE_ACT_SILU = 0,   /* g * sigmoid(g) */
    MOE_ACT_GELU,       /* g * (1 + erf(g / sqrt(2))) / 2 */
    MOE_ACT_GELU_TANH,  /* the tanh form */
    MOE_ACT_RELU2,      /* max(g, 0)^2 */
    MOE_ACT_SWIGLU_OAI, /* g = min(g, limit), u = clamp(u, limit): g sigmoid(alpha g) (u + 1) */
    MOE_ACT_SITU,       /* alpha tanh(g / alpha) sigmoid(g) u; u = limit tanh(u / limit) if any */
    MOE_ACT_COUNT
};

/* Order of the 2 * I rows of one expert's w13 (and w13_bias). */
enum {
    MOE_ORDER_GATE_UP = 0, /* gate i is row i, up i is row I + i */
    MOE_ORDER_UP_GATE,     /* up i is row i, gate i is row I + i */
    MOE_ORDER_INTERLEAVED  /* gate i is row 2 i, up i is row 2 i + 1 */
};

/* Where the limit of MOE_ACT_SILU is applied (only where activation_limit is given). */
enum {
    MOE_CLAMP_NONE = 0,
    MOE_CLAMP_AFTER, /* min(silu(g), limit) * clamp(u, -limit, limit) */
    MOE_CLAMP_BEFORE /* silu(min(g, limit)) * clamp(u, -limit, limit) */
};

/* Routing: the values of the knobs, and the methods, which are points in their product (route_methods.def). */
enum {
    MOE_SCORE_SOFTMAX = 0,
    MOE_SCORE_SIGMOID,
    MOE_SCORE_SQRT_SOFTPLUS,
    MOE_SCORE_SPARSEMIXER,
    MOE_SCORE_CONSTANT,
    MOE_SCORE_ANY /* route_variants.def: not of a method */
};
enum { MOE_KEY_LOGIT = 0, MOE_KEY_SCORE, MOE_KEY_UNIFORM, MOE_KEY_ZIPF };
enum { MOE_BIAS_NONE = 0, MOE_BIAS_KEY, MOE_BIAS_LOGIT };
enum { MOE_GROUPS_NONE = 0, MOE_GROUPS_MAX, MOE_GROUPS_TOP2, MOE_GROUPS_QUOTA };
enum { MOE_IDS_LARGEST = 0, MOE_IDS_TABLE, MOE_IDS_ROUND_ROBIN };
enum { MOE_RENORMALIZE_NEVER = 0, MOE_RENORMALIZE_ALWAYS, MOE_RENORMALIZE_OFF, MOE_RENORMALIZE_ON };

/* What the slots of the shared experts weigh. */
enum {
    MOE_SHARED_SUM =
        0, /* scale * (the sum of the routed weights / scale), after renormalisation: 1 */
    MOE_SHARED_CONSTANT, /* shared_weight */
    MOE_SHARED_GATE,     /* the sigmoid of a column of its own, behind those of the experts */
    MOE_SHARED_SINK      /* the same, in one sum with the routed ones */
};

enum {
#define MOE_ROUTE_METHOD(name, score, key, bias, groups, ids, renormalize) MOE_ROUTE_##name,
#include "route_methods.def"
#undef MOE_ROUTE_METHOD
    MOE_ROUTE_COUNT
};

/* One unit of work of a grouped GEMM: rows [row_begin, row_begin + num_rows) of one expert. */
typedef struct moe_tile {
    int32_t expert;
    int32_t row_begin;
    int32_t num_rows; /* 1 .. tile_rows */
    int32_t done;     /* 0; counts what gate_up has written, where down runs in the same launch */
} moe_tile;

/* Stage 1, route: topk_weights, topk_ids = select(router_logits). Slots are the topk routed ones, then those of
 * the shared experts: num_slots of them. What is 0 or NULL has no effect. */
typedef struct moe_route_args {
    const void *router_logits;   /* [num_tokens, num_experts + gate columns of shared experts] */
    void *topk_weights;          /* [num_tokens, num_slots] weights_dtype, written */
    void *topk_ids;              /* [num_tokens, num_slots] ids_dtype, written; -1: dropped */
    const void *correction_bias; /* [num_experts] bias_dtype */
    const float *expert_scale;   /* [num_experts], times the weight */
    const int32_t *num_token_non_padded; /* [1]; tokens from there on: id -1, weight 0 */
    const int32_t *replica_map;          /* [num_experts, num_replicas], -1 behind the last one */
    const int32_t *expert_map;           /* [expert_map_size], after replica_map */
    const void *tid2eid;                 /* [tid_rows, topk] tid_dtype */
    const void *token_ids;               /* [num_tokens] token_ids_dtype, rows of tid2eid */
    int32_t *packed; /* [num_tokens, num_slots], written: id << 16 | bits of the bf16 weight */
    int32_t *counts; /* [num_experts], added to: tokens that chose an expert, before any map */
    int64_t packed_stride; /* from row to row, as the following */
    int64_t logits_stride;
    int64_t weights_stride;
    int64_t ids_stride;
    int64_t replica_stride;
    int64_t tid_stride;
    int64_t tid_rows;
    int64_t expert_map_size;
    int64_t num_tokens;
    int64_t first_token; /* number of the first row, where a call is done in chunks */
    int32_t num_experts; /* 1 .. 1024 */
    int32_t topk;        /* routed: 1 .. 32 */
    int32_t num_slots;   /* topk + shared experts, 1 .. 32 */
    int32_t num_replicas;
    int32_t num_zero_experts; /* the last of num_experts: id -1, but weighted */
    int32_t num_groups;       /* 0 .. 32; 0: none */
    int32_t topk_groups;
    int32_t logits_dtype;    /* MOE_F32, MOE_BF16, MOE_F16 */
    int32_t weights_dtype;   /* the same */
    int32_t bias_dtype;      /* the same */
    int32_t ids_dtype;       /* MOE_I32, MOE_I64 */
    int32_t tid_dtype;       /* the same */
    int32_t token_ids_dtype; /* the same */
    int32_t method;          /* MOE_ROUTE_*; the knobs of its row follow */
    int32_t score, key, bias, groups, ids;
    int32_t renormalize; /* 0 or 1 */
    int32_t shared;      /* MOE_SHARED_* */
    int32_t
        general; /* 0: nothing but a softmax, perhaps renormalised, and a scale: the short kernel */
    float scale; /* multiplies the weights last */
    float shared_weight;
    float softcap;     /* logits = softcap * tanh(logits / softcap); 0: none */
    int32_t shared_id; /* of the first shared expert */
} moe_route_args;

/* Whether the scores need the sum of the row's softmax: not where they are divided by their own sum. */
#define moe_route_needs_sum(args)                                                                  \
    ((args)->score == MOE_SCORE_SOFTMAX && ((args)->key == MOE_KEY_SCORE || !(args)->renormalize))

/* What of it the kernels of route_variants.def read: a launch costs more the more parameters it carries. */
typedef struct moe_route_plain_args {
    const void *router_logits;
    void *topk_weights; /* f32 */
    void *topk_ids;
    const void *correction_bias;
    const int32_t *num_token_non_padded;
    int64_t logits_stride;
    int64_t weights_stride;
    int64_t ids_stride;
    int64_t num_tokens;
    int64_t first_token;
    int32_t num_experts;
    int32_t topk;
    int32_t num_groups;
    int32_t topk_groups;
    int32_t groups;
    int32_t logits_dtype;
    int32_t bias_dtype;
    int32_t ids_dtype;
    int32_t score;
    int32_t renormalize;
    float scale;
    int32_t reserved;
} moe_route_plain_args;

/* Stage 2, align: rows grouped by expert, stable by slot; the same bits every run.
 * local(id) = expert_map[id] where expert_map is given (outside [0, expert_map_size): dropped), else
 * id - expert_start; a slot whose local id is outside [0, num_experts) is dropped. */
typedef struct moe_align_args {
    const void *topk_ids;      /* [num_tokens, topk] ids_dtype, any bit pattern */
    const int32_t *expert_map; /* [expert_map_size] or NULL */
    int32_t *expert_offsets;   /* [num_experts + 1], written: exclusive scan of rows per expert */
    int32_t *sorted_token_ids; /* [num_slots], written below num_rows: row -> token * topk + slot */
    int32_t *row_of_slot;      /* [num_slots], written: slot -> row, -1 where dropped */
    moe_tile *tiles;    /* [max_tiles], written below num_tiles, or NULL: nobody reads them */
    int32_t *num_tiles; /* [4], written: tiles; 0, 0: taken; tiles of high_rows; or NULL as tiles */
    int32_t *
        counts; /* [count_blocks + num_blocks, num_experts] scratch, or NULL where one launch does all */
    int64_t ids_stride; /* from row to row */
    int64_t expert_start;
    int64_t expert_map_size;
    int64_t num_tokens;
    int32_t topk;
    int32_t num_experts;
    int16_t ids_dtype;   /* MOE_I32, MOE_I64 */
    int16_t piece_slots; /* of a block at a time, where two launches do all */
    int32_t tile_rows;   /* rows per tile */
    int32_t max_tiles;   /* capacity of tiles */
    int16_t num_blocks;  /* thread blocks that share the slots */
    int16_t
        count_blocks; /* where two launches do all: blocks that count, each for an equal number of those */
    /* 0, or tiles have so many rows instead where their number times high_cost / 16 is not above that of tiles of
     * tile_rows; num_tiles is 0 then, and their number stands behind the counters. */
    int32_t high_rows, high_cost;
} moe_align_args;

/* Stages 1 and 2 in one launch, for few tokens. */
typedef struct moe_route_align_args {
    moe_route_plain_args route;
    moe_align_args align; /* topk_ids: those that route writes */
} moe_route_align_args;

/* After align: the same rows with every expert's padded to a multiple of block_size, and how many there are.
 * Outputs that are NULL are not wanted. */
typedef struct moe_pad_args {
    const int32_t *expert_offsets; /* [num_experts + 1], of align */
    const int32_t *rows;           /* [num_slots], of align: row -> slot */
    int32_t *counts;               /* [num_experts], written: rows of an expert, or NULL */
    int32_t *sorted_token_ids;     /* [capacity], written: slots, num_slots where padded, or NULL */
    int32_t *expert_ids;           /* [num_blocks], written: of a block, -1 past the last */
    int32_t *num_tokens_post_padded; /* [1], written */
    int64_t num_slots;
    int64_t capacity;
    int64_t num_blocks;
    int32_t num_experts;
    int32_t block_size;
    int32_t fill; /* 1: sorted_token_ids is padded to its end, 0: to num_tokens_post_padded */
    int32_t reserved;
} moe_pad_args;

/* Stage 3, gate_up: intermediate[r] = act(x[token(r)] . w13[e]^T + w13_bias[e]), in f32, rounded once */
typedef struct moe_gate_up_args {
    const void *hidden_states; /* [num_tokens, hidden_size] dtype */
    const void *w13;           /* [num_experts, 2 I (I: not gated), hidden_size] dtype */
    const void *w13_bias;      /* [num_experts, the same rows] w13_bias_dtype, or NULL */
    const void *topk_weights;  /* [num_tokens, topk]: times (x . w13 + bias), or NULL */
    const int32_t *expert_offsets;
    const int32_t *sorted_token_ids;
    const moe_tile *tiles;    /* NULL on the CPU */
    const int32_t *num_tiles; /* NULL on the CPU */
    void *intermediate;       /* [num_rows, intermediate_size] dtype, written */
    int64_t hidden_stride;
    int64_t w13_expert_stride;
    int64_t w13_row_stride;
    int64_t w13_bias_stride; /* from expert to expert */
    int64_t weights_stride;
    int64_t intermediate_stride;
    int64_t num_tokens; /* of hidden_states; a token outside reads as zeros */
    int64_t num_slots; /* capacity of sorted_token_ids and intermediate; rows past it are skipped */
    int32_t num_experts;
    int32_t topk;
    int32_t hidden_size;
    int32_t intermediate_size;
    int32_t dtype;          /* of hidden_states, w13 and intermediate */
    int32_t w13_bias_dtype; /* MOE_F32 or dtype */
    int32_t weights_dtype;  /* MOE_F32, MOE_BF16, MOE_F16 */
    int32_t activation;     /* MOE_ACT_* */
    int32_t gated;          /* 0 or 1 */
    int32_t w13_order;      /* MOE_ORDER_*; MOE_ORDER_GATE_UP where not gated */
    int32_t clamp;          /* MOE_CLAMP_* (silu) */
    int32_t max_tiles;
    float activation_alpha; /* default already filled in */
    float activation_limit; /* <= 0: none */
} moe_gate_up_args;

/* Stage 4, down: rows[r] = topk_weights[slot(r)] * (intermediate[r] . w2[e]^T + w2_bias[e]), in f32, rounded once */
typedef struct moe_down_args {
    const void *intermediate; /* [num_rows, intermediate_size] dtype */
    const void *w2;           /* [num_experts, hidden_size, intermediate_size] dtype */
    const void *w2_bias;      /* [num_experts, hidden_size] w2_bias_dtype, or NULL */
    const void *topk_weights; /* [num_tokens, topk] weights_dtype, or NULL: weight 1 */
    const int32_t *expert_offsets;
    const int32_t *sorted_token_ids;
    const moe_tile *tiles;    /* NULL on the CPU */
    const int32_t *num_tiles; /* NULL on the CPU */
    void *rows;               /* [num_rows, hidden_size] rows_dtype, written */
    int64_t intermediate_stride;
    int64_t w2_expert_stride;
    int64_t w2_row_stride;
    int64_t w2_bias_stride;
    int64_t weights_stride;
    int64_t rows_stride;
    int64_t num_tokens; /* of topk_weights; a token outside has weight 0 */
    int64_t num_slots;  /* capacity of sorted_token_ids, intermediate and rows */
    int32_t num_experts;
    int32_t topk;
    int32_t hidden_size;
    int32_t intermediate_size;
    int32_t dtype;         /* of intermediate, w2 and rows */
    int32_t w2_bias_dtype; /* MOE_F32 or dtype */
    int32_t weights_dtype;
    int32_t max_tiles;
} moe_down_args;

/* Stages 4 and 5 in one launch, sums in any order: out[token(r)] += round(scale * rows[r]), each sum rounded. out holds
 * shared_output or zeros before; where topk is 1 and nothing is shared, rows are written, not added. */
typedef struct moe_down_add_args {
    moe_down_args stage; /* rows: out [num_tokens, hidden_size], 16-byte aligned rows */
    float scale;         /* routed_scaling_factor */
    uint32_t band_tiles; /* column tiles done before the next ones begin; 0: all of them */
    int32_t once;        /* 1: a row of out is one row, and is written */
} moe_down_add_args;

/* Stages 3 and 4 in one launch. */
typedef struct moe_experts_args {
    moe_gate_up_args gate_up;
    moe_down_args down; /* tiles, num_tiles: the same */
} moe_experts_args;

/* A CUtensorMap, encoded by the host; cuda.h is no header of the kernels. */
typedef struct moe_tensor_map {
    uint64_t opaque[16];
} __attribute__((aligned(64))) moe_tensor_map;

/* Where the slots go, for kernels that read it from topk_ids themselves; the rule is that of moe_align_args. */
typedef struct moe_slot_args {
    const void *topk_ids;      /* [num_tokens, topk] ids_dtype, any bit pattern */
    const int32_t *expert_map; /* [expert_map_size] or NULL */
    int64_t ids_stride;
    int64_t expert_start;
    int64_t expert_map_size;
    int32_t ids_dtype; /* MOE_I32, MOE_I64 */
    int32_t num_experts;
    int32_t topk;
    int32_t num_slots; /* num_tokens * topk, at most MOE_DECODE_SLOTS */
    /* what down will read, brought near by gate_up; or NULL */
    const void *topk_weights;
    int64_t weights_stride_bytes;
} moe_slot_args;

/* gate_up at a few tokens, without align: row r of intermediate is slot r. sorted_token_ids, expert_offsets and
 * tiles of `stage` are not used. */
typedef struct moe_gate_up_decode_args {
    moe_gate_up_args stage;
    moe_slot_args slots;
    int32_t ring_stages;
    int32_t stages_left; /* still to be asked for by every thread block when down may start */
} moe_gate_up_decode_args;

/* down and combine at a few tokens: a thread block owns columns of out and adds up all slots. rows of `stage` is
 * not used. */
typedef struct moe_down_decode_args {
    moe_down_args stage;
    moe_slot_args slots;
    const void *shared_output; /* [num_tokens, hidden_size] dtype, or NULL */
    void *out;                 /* [num_tokens, hidden_size] dtype, every element is written */
    int64_t shared_stride;
    int64_t out_stride;
    float scale;
    int32_t vector;     /* rows of out and shared_output are 8-byte aligned */
    int32_t box_chunks; /* pieces of K in one copy, 1 .. 8 */
    int32_t copies;     /* of a stage */
    int32_t ring_stages;
    int32_t reserved;
} moe_down_decode_args;

/* Stage 5, combine: out[t] = round(scale * sum over slots s of rows[row_of_slot[t, s]] + shared_output[t]),
 * f32, slots in order 0 .. topk - 1. no_combine is this stage with topk = 1 on num_tokens * topk "tokens". */
typedef struct moe_combine_args {
    const void *rows;           /* [num_rows, hidden_size] dtype */
    const int32_t *row_of_slot; /* [num_tokens, topk], -1: dropped */
    const void *shared_output;  /* [num_tokens, hidden_size] dtype, or NULL */
    void *out;                  /* [num_tokens, hidden_size] dtype, every element is written */
    int64_t rows_stride;
    int64_t shared_stride;
    int64_t out_stride;
    int64_t num_tokens;
    int64_t num_rows; /* rows of `rows`: a row_of_slot outside [0, num_rows) counts as dropped */
    int32_t topk;
    int32_t hidden_size;
    int32_t dtype;
    float scale; /* routed_scaling_factor */
} moe_combine_args;

/* In front of a down that adds: out[t] = shared_output[t], or zeros. */
typedef struct moe_fill_args {
    const void *shared_output;  /* [num_tokens, hidden_size] bf16, f16; or NULL */
    const int32_t *row_of_slot; /* [num_tokens]: tokens with a row are left out; NULL: none */
    void *out; /* [num_tokens, hidden_size] the same, 16-byte aligned rows, written */
    int64_t shared_stride;
    int64_t out_stride;
    int64_t num_tokens;
    int32_t hidden_size;
    int32_t wait; /* 1: gate_up, in front, reads from out */
} moe_fill_args;

/* Launch geometry of a row of gemm_variants.def. One dimension of thread blocks (a second one would end at 65535):
 * col_tiles = ceil(weight rows / cols) column tiles for each of max_tiles tiles; blocks past *num_tiles leave at once.
 * Rows of sm90a: at most a block per SM, and MOE_GEMM_PRODUCERS_sm90a warps more.
 * Shared memory: the ring of token and weight rows, then 8 bytes for each row of the tile. */
#define MOE_GEMM_THREADS(wm, wn, wk)         (32 * (wm) * (wn) * (wk))
#define MOE_GEMM_PRODUCERS_sm80              0 /* warps beside these that only copy */
#define MOE_GEMM_PRODUCERS_sm90a             4
#define MOE_GEMM_PRODUCERS_sm90a_bare        4
#define MOE_GEMM_PRODUCERS_sm90a_split       4
#define MOE_GEMM_PRODUCERS_sm90a_decode      2 /* one copies, one writes (gate_up); both copy (down) */
#define MOE_GEMM_PRODUCERS_sm90a_decode_bare MOE_GEMM_PRODUCERS_sm90a_decode
#define MOE_GEMM_PRODUCERS_sm90a_high        4
#define MOE_GEMM_PRODUCERS_sm90a_wide        4
#define MOE_GEMM_PRODUCERS_sm90a_joined      4
#define MOE_GEMM_PRODUCERS_sm90a_joined_bare 4
#define MOE_GEMM_PRODUCERS_sm90a_swap        4 /* one feeds the copy engine, two gather */
#define MOE_GEMM_PRODUCERS_sm90a_plain       4
#define MOE_GEMM_SMEM_BYTES(rows, cols, k, stages)                                                 \
    ((stages) * ((rows) + (cols)) * (k) * 2 + (rows) * 8)
/* The ring, half the tile's columns of rounded results (a quarter where no more fits, none of their own where not even
 * that does), barriers and items. */
#define MOE_GEMM_RING_sm90a(rows, cols, k, stages) ((stages) * ((rows) + (cols)) * (k) * 2)
#define MOE_GEMM_FITS_sm90a(rows, cols, k, stages, out)                                            \
    (MOE_GEMM_RING_sm90a(rows, cols, k, stages) + (rows) * (2 * (out) + 16) <= 226 * 1024)
#define MOE_GEMM_OUT_COLS_sm90a(rows, cols, k, stages)                                             \
    (MOE_GEMM_FITS_sm90a(rows, cols, k, stages, (cols) / 2)   ? (cols) / 2                         \
     : MOE_GEMM_FITS_sm90a(rows, cols, k, stages, (cols) / 4) ? (cols) / 4                         \
                                                              : 0)
#define MOE_GEMM_OUT_sm90a(rows, cols, k, stages)                                                  \
    (MOE_GEMM_OUT_COLS_sm90a(rows, cols, k, stages) == 0                                           \
         ? 2048 /* tokens of two tiles' rows */                                                    \
         : (rows) * (2 * MOE_GEMM_OUT_COLS_sm90a(rows, cols, k, stages) + 16))
#define MOE_GEMM_SMEM_BYTES_sm90a(rows, cols, k, stages)                                           \
    ((MOE_GEMM_RING_sm90a(rows, cols, k, stages) + MOE_GEMM_OUT_sm90a(rows, cols, k, stages) +     \
      16 * (stages) + 320 + 1023) /                                                                \
     1024 * 1024)
#define MOE_GEMM_SMEM_sm80(rows, cols, k, stages)  MOE_GEMM_SMEM_BYTES(rows, cols, k, stages)
#define MOE_GEMM_SMEM_sm90a(rows, cols, k, stages) MOE_GEMM_SMEM_BYTES_sm90a(rows, cols, k, stages)
#define MOE_GEMM_SMEM_sm90a_bare(rows, cols, k, stages)                                            \
    MOE_GEMM_SMEM_BYTES_sm90a(rows, cols, k, stages)
#define MOE_GEMM_SMEM_sm90a_split(rows, cols, k, stages)                                           \
    MOE_GEMM_SMEM_BYTES_sm90a(rows, cols, k, stages)
#define MOE_SPLIT_BLOCKS 8 /* of a cluster, at most, that split K between them */
/* The ring, eight warps' results and router weights, 16 items and their barriers, barriers of the ring. */
#define MOE_GEMM_SMEM_BYTES_sm90a_swap(rows, cols, k, stages)                                      \
    (((stages) * ((rows) + (cols)) * (k) * 2 + 8 * (768 + (rows) * 4) + 16 * 40 + 16 * (stages) +  \
      16 + 1023) /                                                                                 \
     1024 * 1024)
#define MOE_GEMM_SMEM_sm90a_swap(rows, cols, k, stages)                                            \
    MOE_GEMM_SMEM_BYTES_sm90a_swap(rows, cols, k, stages)
#define MOE_GEMM_SMEM_sm90a_plain(rows, cols, k, stages)                                           \
    MOE_GEMM_SMEM_BYTES_sm90a_swap(rows, cols, k, stages)
#define MOE_HIGH_SMEM_BYTES                             (227 * 1024) /* the ring of the higher tiles */
#define MOE_GEMM_SMEM_sm90a_high(rows, cols, k, stages) MOE_HIGH_SMEM_BYTES
#define MOE_GEMM_SMEM_sm90a_wide(rows, cols, k, stages) MOE_HIGH_SMEM_BYTES
#define MOE_HIGH_ROWS                                   128
#define MOE_HIGH_DOWN_COLS                              256
/* Tiles of down behind gate_up's, by the columns of these: all of 256 columns but those of 192 x 192. */
#define MOE_JOINED_DOWN_COLS(rows, cols)                       ((rows) == 192 && (cols) == 192 ? 192 : 256)
#define MOE_JOINED_DOWN_STAGES                                 4
#define MOE_JOINED_SMEM_BYTES                                  (227 * 1024) /* the larger one of both, at most */
#define MOE_GEMM_SMEM_sm90a_joined(rows, cols, k, stages)      MOE_JOINED_SMEM_BYTES
#define MOE_GEMM_SMEM_sm90a_joined_bare(rows, cols, k, stages) MOE_JOINED_SMEM_BYTES
#define MOE_GEMM_SMEM_sm90a_decode(rows, cols, k, stages)                                          \
    (227 * 1024) /* at most; the plan adds it up */
#define MOE_GEMM_SMEM_sm90a_decode_bare(rows, cols, k, stages)                                     \
    MOE_GEMM_SMEM_sm90a_decode(rows, cols, k, stages)
#define MOE_GEMM_GRID(max_tiles, weight_rows, cols)                                                \
    ((int64_t)(max_tiles) * (((int64_t)(weight_rows) + (cols) - 1) / (cols)))

/* Decode (rows of sm90a_decode): `rows` is the most tokens, in steps of 8; a stage of the ring of gate_up is 16 weight
 * rows by 512 of K. Shared memory: the ring, then the token rows, MOE_DECODE_PANEL_PITCH apart; then the
 * warps' sums; then what is known of the slots. */
#define MOE_DECODE_SLOTS                   512
#define MOE_DECODE_MATH_WARPS              8
#define MOE_DECODE_MAX_STAGES              16
#define MOE_DECODE_AT_ONCE                 (-1) /* stages_left: down may start after gate_up's wait */
#define MOE_DECODE_SLOT_BYTES              5888 /* barriers, slots, experts, weights */
#define MOE_DECODE_STAGE_BYTES             16384
#define MOE_DECODE_PANEL_PITCH(k)          ((((k) + 63) / 64 * 64 + 8) * 2)
#define MOE_DECODE_UP_SUMS(rows)           (2 * MOE_DECODE_MATH_WARPS * (rows) * 20 * 4)
#define MOE_DECODE_SLOT_TABLE(ranks, rows) ((ranks) * (rows) * 2)
#define MOE_DECODE_DOWN_SUMS(rows, cols)   (MOE_DECODE_MATH_WARPS * (rows) * ((cols) + 4) * 4)
/* Tensor maps: 64 columns of K, that is 128 bytes, of so many weight rows of one half (gate, up; other weights have
 * one half) and of so many token rows. */
#define MOE_MAP_COLS                                64
#define MOE_GEMM_WEIGHT_BOX_sm80(cols)              0
#define MOE_GEMM_TOKEN_BOX_sm80(rows)               0
#define MOE_GEMM_WEIGHT_BOX_sm90a(cols)             ((cols) / 2)
#define MOE_GEMM_WEIGHT_BOX_sm90a_bare(cols)        ((cols) / 2)
#define MOE_GEMM_TOKEN_BOX_sm90a_bare(rows)         64
#define MOE_GEMM_WEIGHT_BOX_sm90a_joined(cols)      ((cols) / 2)
#define MOE_GEMM_WEIGHT_BOX_sm90a_joined_bare(cols) ((cols) / 2)
#define MOE_GEMM_WEIGHT_BOX_sm90a_split(cols)       ((cols) / 2)
#define MOE_GEMM_TOKEN_BOX_sm90a(rows)              64
#define MOE_GEMM_TOKEN_BOX_sm90a_joined(rows)       64
#define MOE_GEMM_TOKEN_BOX_sm90a_joined_bare(rows)  64
#define MOE_GEMM_TOKEN_BOX_sm90a_split(rows)        64
#define MOE_GEMM_WEIGHT_BOX_sm90a_swap(cols)        ((cols) / 2)
#define MOE_GEMM_TOKEN_BOX_sm90a_swap(rows)         0
#define MOE_GEMM_WEIGHT_BOX_sm90a_plain(cols)       ((cols) / 2)
#define MOE_GEMM_TOKEN_BOX_sm90a_plain(rows)        0
#define MOE_GEMM_WEIGHT_BOX_sm90a_high(cols)        ((cols) / 2)
#define MOE_GEMM_TOKEN_BOX_sm90a_high(rows)         0
#define MOE_GEMM_WEIGHT_BOX_sm90a_wide(cols)        ((cols) / 2)
#define MOE_GEMM_TOKEN_BOX_sm90a_wide(rows)         0
#define MOE_GEMM_WEIGHT_BOX_sm90a_decode(cols)      (cols)
#define MOE_GEMM_WEIGHT_BOX_sm90a_decode_bare(cols) MOE_GEMM_WEIGHT_BOX_sm90a_decode(cols)
#define MOE_GEMM_TOKEN_BOX_sm90a_decode(rows)       0
#define MOE_GEMM_TOKEN_BOX_sm90a_decode_bare(rows)  MOE_GEMM_TOKEN_BOX_sm90a_decode(rows)
/* What L2 asks memory for where a copy of weights misses it. */
#define MOE_GEMM_FETCH_sm80              128
#define MOE_GEMM_FETCH_sm90a             128
#define MOE_GEMM_FETCH_sm90a_bare        128
#define MOE_GEMM_FETCH_sm90a_joined      128
#define MOE_GEMM_FETCH_sm90a_joined_bare 128
#define MOE_GEMM_FETCH_sm90a_split       128
#define MOE_GEMM_FETCH_sm90a_swap        256
#define MOE_GEMM_FETCH_sm90a_plain       256
#define MOE_GEMM_FETCH_sm90a_high        256
#define MOE_GEMM_FETCH_sm90a_wide        256
#define MOE_GEMM_FETCH_sm90a_decode      128
#define MOE_GEMM_FETCH_sm90a_decode_bare MOE_GEMM_FETCH_sm90a_decode

/* align sorts num_slots slots of a block by a matrix of bits in shared memory: a row for each expert, in steps of 4 words
 * of which there is an odd number, so that neighbouring rows start in different banks; a count for each step, in pairs;
 * and 12 bytes for what the block knows of the expert. */
#define MOE_ALIGN_STEPS(num_slots) ((((num_slots) + 127) / 128) | 1)
#define MOE_ALIGN_SMEM_BYTES(num_experts, num_slots)                                               \
    ((int64_t)(num_experts) * (MOE_ALIGN_STEPS(num_slots) * (16 + 2) + 2 + 12))

/* Thread blocks of the other stages. */
#define MOE_ROUTE_MAX_THREADS   256 /* one warp per token */
#define MOE_ROUTE_ALIGN_THREADS 512 /* at most; a warp per token, a thread for each expert */
#define MOE_ROUTE_ALIGN_SLOTS   256 /* at most, of route_align */
#define MOE_ALIGN_THREADS       1024
/* align of few slots without tiles: every block holds all of them, a warp finds each row and each offset */
#define MOE_ALIGN_FEW_SLOTS   640 /* at most; measured */
#define MOE_ALIGN_FEW_THREADS 512
/* align in one launch else: by one block, or by blocks of about so many slots, of which each counts the slots of all others */
#define MOE_ALIGN_ONE_SLOTS    384
#define MOE_ALIGN_SHARE_SLOTS  128
#define MOE_ALIGN_WHOLE_BLOCKS 128 /* at most */
/* align of more slots in one launch: blocks in clusters, each of which shares the counting of all slots out; a word for each
 * expert from each block of the cluster behind what sorts the block's own */
#define MOE_ALIGN_CLUSTER 8
#define MOE_ALIGN_CLUSTER_SMEM_BYTES(num_experts, num_slots)                                       \
    (MOE_ALIGN_SMEM_BYTES(num_experts, num_slots) + 4 * MOE_ALIGN_CLUSTER * (int64_t)(num_experts))
/* a block of moe_align_place sorts a piece of its slots at a time: so many for each thread, at most */
#define MOE_ALIGN_PIECE_THREAD_SLOTS 4
#define MOE_ALIGN_PIECE_SMEM_BYTES(num_experts, piece_slots)                                       \
    (MOE_ALIGN_SMEM_BYTES(num_experts, piece_slots) + 4 * (int64_t)(piece_slots))
#define MOE_ALIGN_STATIC_BYTES 1024 /* of shared memory beside MOE_ALIGN_SMEM_BYTES, at most */
#define MOE_COMBINE_THREADS    128  /* 8 columns of a token each */
#define MOE_COMBINE_IN_FLIGHT  8    /* rows that are under way at once for a thread */
#define MOE_FILL_THREADS       32
#define MOE_FILL_BLOCKS        8 /* for each SM, not at once */
#define MOE_COMBINE_MANY                                                                           \
    (1 << 18) /* threads: from here on each takes several tokens of up to 4 slots */
/* Whether each token starts with a block of its own: where that leaves few threads idle. */
#define MOE_COMBINE_CHUNKS(hidden_size) (((int64_t)(hidden_size) + 7) / 8)
#define MOE_COMBINE_COL_BLOCKS(hidden_size)                                                        \
    ((MOE_COMBINE_CHUNKS(hidden_size) + MOE_COMBINE_THREADS - 1) / MOE_COMBINE_THREADS)
#define MOE_COMBINE_APART(hidden_size)                                                             \
    (5 * MOE_COMBINE_CHUNKS(hidden_size) >=                                                        \
     4 * MOE_COMBINE_THREADS * MOE_COMBINE_COL_BLOCKS(hidden_size))
#define MOE_COMBINE_BLOCKS(groups, hidden_size)                                                    \
    (MOE_COMBINE_APART(hidden_size)                                                                \
         ? (groups) * MOE_COMBINE_COL_BLOCKS(hidden_size)                                          \
         : ((groups) * MOE_COMBINE_CHUNKS(hidden_size) + MOE_COMBINE_THREADS - 1) /                \
               MOE_COMBINE_THREADS)

#ifdef __cplusplus
#define MOE_ASSERT_SIZE(type, bytes)                                                               \
    static_assert(sizeof(type) == (bytes), "C and CUDA agree on " #type)
#else
#define MOE_ASSERT_SIZE(type, bytes)                                                               \
    _Static_assert(sizeof(type) == (bytes), "C and CUDA agree on " #type)
#endif
MOE_ASSERT_SIZE(moe_tile, 16);
MOE_ASSERT_SIZE(moe_route_args, 280);
MOE_ASSERT_SIZE(moe_route_plain_args, 128);
MOE_ASSERT_SIZE(moe_align_args, 128);
MOE_ASSERT_SIZE(moe_route_align_args, 256);
MOE_ASSERT_SIZE(moe_pad_args, 88);
MOE_ASSERT_SIZE(moe_gate_up_args, 192);
MOE_ASSERT_SIZE(moe_down_args, 168);
MOE_ASSERT_SIZE(moe_down_add_args, 184);
MOE_ASSERT_SIZE(moe_experts_args, 360);
MOE_ASSERT_SIZE(moe_tensor_map, 128);
MOE_ASSERT_SIZE(moe_slot_args, 72);
MOE_ASSERT_SIZE(moe_gate_up_decode_args, 272);
MOE_ASSERT_SIZE(moe_down_decode_args, 296);
MOE_ASSERT_SIZE(moe_combine_args, 88);
MOE_ASSERT_SIZE(moe_fill_args, 56);

#endif
