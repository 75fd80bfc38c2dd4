/* plan.c: problem + device -> plan. Pure functions: no state, no device, no environment.
 *
 * 1. Tokens per pass: as many as the workspace limit allows (all of them, nearly always).
 * 2. On a GPU, the pair of GEMM variants with one tile height that a cost model expects to be fastest.
 * 3. Offsets of everything the stages need in one workspace. */
#include "moe.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* The columns of gemm_variants.def that choosing needs. */
typedef struct variant {
    const char *name;
    int32_t arch, stage, act_dtype, weight_dtype;
    int32_t rows, cols, k, stages, warps_n, threads, smem_bytes, align_bytes, weight_box, token_box,
        fetch_bytes;
} variant;

enum {
    ARCH_sm80 = 80,
    ARCH_sm90a = 90,
    ARCH_sm90a_decode = 91,
    ARCH_sm90a_swap = 92,
    ARCH_sm90a_split = 93,
    ARCH_sm90a_high = 94,
    ARCH_sm90a_wide = 95,
    ARCH_sm90a_plain = 96,
    ARCH_sm90a_bare = 97,
    ARCH_sm90a_joined = 98,
    ARCH_sm90a_joined_bare = 99,
    ARCH_sm90a_decode_bare = 100
};
enum {
    STAGE_gate_up = MOE_OP_GATE_UP,
    STAGE_down = MOE_OP_DOWN,
    STAGE_experts = -1, /* both */
    STAGE_down_add = -2
};
#define DTYPE_bf16 MOE_BF16
#define DTYPE_f16  MOE_F16

static const variant VARIANTS[] = {
#define MOE_GEMM_VARIANT(name, arch, stage, act, weight, scale, orient, layout, rows, cols, k,     \
                         stages, wm, wn, wk, cluster, align)                                       \
    {#name,                                                                                        \
     ARCH_##arch,                                                                                  \
     STAGE_##stage,                                                                                \
     DTYPE_##act,                                                                                  \
     DTYPE_##weight,                                                                               \
     rows,                                                                                         \
     cols,                                                                                         \
     k,                                                                                            \
     stages,                                                                                       \
     wn,                                                                                           \
     MOE_GEMM_THREADS(wm, wn, wk) + 32 * MOE_GEMM_PRODUCERS_##arch,                                \
     MOE_GEMM_SMEM_##arch(rows, cols, k, stages),                                                  \
     align,                                                                                        \
     MOE_GEMM_WEIGHT_BOX_##arch(cols),                                                             \
     MOE_GEMM_TOKEN_BOX_##arch(rows),                                                              \
     MOE_GEMM_FETCH_##arch},
#include "../kernels/gemm_variants.def"
#undef MOE_GEMM_VARIANT
};

/* The columns of route_variants.def. */
static const struct {
    int32_t held, packed, score, key, groups;
} ROUTE_VARIANTS[] = {
#define MOE_ROUTE_VARIANT(name, held, packed, score, key, groups)                                  \
    {held, packed, MOE_SCORE_##score, MOE_KEY_##key, groups},
#include "../kernels/route_variants.def"
};

enum { NUM_VARIANTS = sizeof VARIANTS / sizeof *VARIANTS, SMALLEST_TILE_ROWS = 16 };

const char *moe_variant_name(int32_t row)
{
    return row >= 0 && row < NUM_VARIANTS ? VARIANTS[row].name : "cpu";
}

int32_t moe_num_variants(void)
{
    return NUM_VARIANTS;
}

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}
static int64_t round_up(int64_t a, int64_t b)
{
    return ceil_div(a, b) * b;
}
static int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

int32_t moe_route_variant(const moe_route_args *a)
{
    const bool extras = a->num_slots > a->topk || a->num_zero_experts || a->softcap > 0 ||
                        a->expert_scale || a->replica_map || a->expert_map || a->packed ||
                        a->counts || a->weights_dtype != MOE_F32 || a->ids != MOE_IDS_LARGEST ||
                        a->bias == MOE_BIAS_LOGIT;
    const bool groups_of_32 = a->groups != MOE_GROUPS_QUOTA && a->num_experts == 32 * a->num_groups;
    if (extras || (a->num_groups && !groups_of_32)) return -1;
    for (int32_t i = 0; i < (int32_t)(sizeof ROUTE_VARIANTS / sizeof *ROUTE_VARIANTS); ++i) {
        const bool any = ROUTE_VARIANTS[i].score == MOE_SCORE_ANY &&
                         (a->score == MOE_SCORE_SOFTMAX || a->score == MOE_SCORE_SIGMOID);
        if (a->num_experts <= 32 * ROUTE_VARIANTS[i].held && a->key == ROUTE_VARIANTS[i].key &&
            (any || a->score == ROUTE_VARIANTS[i].score) &&
            ROUTE_VARIANTS[i].groups == (a->num_groups > 0) &&
            (!ROUTE_VARIANTS[i].packed ||
             (a->logits_dtype != MOE_F32 && a->bias == MOE_BIAS_NONE && !moe_route_needs_sum(a))))
            return i;
    }
    return -1;
}

bool moe_route_aligns(const moe_route_args *route)
{
    enum {
#define MOE_ROUTE_ALIGN_VARIANT(name, held, packed, score, key, groups) FUSED_##name,
#include "../kernels/route_variants.def"
        NUM_FUSED
    };
    const int32_t row = moe_route_variant(route);
    if (row < 0 || row >= NUM_FUSED) return false;
    /* measured: from here on one SM loses more than a launch takes */
    const bool fast = ROUTE_VARIANTS[row].packed && ROUTE_VARIANTS[row].held <= 8;
    return route->num_tokens <= (fast ? 8 : 4);
}

void moe_default_device(moe_backend backend, int32_t num_sms, moe_device_info *info)
{
    memset(info, 0, sizeof *info);
    info->backend = backend;
    if (backend == MOE_CUDA) { /* NVIDIA H200, measured */
        snprintf(info->name, sizeof info->name, "NVIDIA H200");
        info->num_sms = num_sms > 0 ? num_sms : 132;
        info->capability = 90;
        info->hopper = 1;
        info->smem_per_block = 227 * 1024;
        info->smem_per_sm = 228 * 1024;
        info->l2_bytes = (int64_t)50 << 20;
        info->read_bytes_per_us = 4.65e6;
        info->flops_per_us = 7.9e8 * info->num_sms / 132;
    } else { /* a two-core server slice; plans do not depend on it */
        snprintf(info->name, sizeof info->name, "CPU");
        info->num_sms = num_sms > 0 ? num_sms : 2;
        info->read_bytes_per_us = 4.1e4;
        info->flops_per_us = 1.5e5 * info->num_sms;
    }
}

/* ------------------------------------------------------------------------------------------------
 * Expected work of one pass */

/* Experts that num_tokens random tokens with topk distinct experts each touch. */
static double distinct_experts(const moe_problem *p, int64_t num_tokens)
{
    double share = fmin(1.0, (double)p->topk / p->num_experts);
    return p->num_experts * (1.0 - pow(1.0 - share, (double)num_tokens));
}

/* Rows of the tiles of three math warpgroups. */
enum { TALL_ROWS = 192 };

/* One grouped GEMM: weight_rows x depth weights per expert over num_slots rows. */
typedef struct gemm_shape {
    double experts, rows_per_expert, row_spread; /* row_spread: their standard deviation */
    int64_t weight_rows, depth, element_bytes,
        row_bytes; /* row_bytes: read and written per row beside the weights */
} gemm_shape;

/* Expected tiles of `tile_rows` rows: the rows of an expert are about normally distributed. */
static double expected_tiles(const gemm_shape *s, int32_t tile_rows)
{
    const double mean = s->rows_per_expert;
    double tiles = 1.0;
    if (mean > 16.0 * tile_rows) return s->experts * (mean / tile_rows + 0.5);
    for (int j = 1; j * tile_rows < mean + 5.0 * s->row_spread + tile_rows;
         ++j) /* P(rows > j * tile_rows) */
        tiles += 0.5 * erfc((j * tile_rows + 0.5 - mean) / (s->row_spread * 1.41421356 + 1e-9));
    return s->experts * tiles;
}

static double weight_bytes(const gemm_shape *s)
{
    return s->experts * (double)s->weight_rows * (double)s->depth * (double)s->element_bytes;
}

/* The same for a variant of sm90a: every SM walks over its share of the tiles, one at a time. Fitted to the stage
 * times in docs/notes/hopper_kernels.md, then made as much too slow as variant_us is on average: only the comparison
 * matters. */
static double persistent_us(const variant *v, const gemm_shape *s, const moe_device_info *d)
{
    /* launch, first bytes of the ring, the last epilogue; down's ring is full before it may begin */
    const double start_us = v->stage == STAGE_down ? 1.4 : 3.0,
                 tile_us = 2.3 * v->cols / 256, /* the part of an epilogue that nothing hides */
        mma_share = 0.84;                       /* of the device's matrix rate */
    double tiles = expected_tiles(s, v->rows);
    double share = tiles * (double)ceil_div(s->weight_rows, v->cols) / d->num_sms;
    share = share < 8.0 ? ceil(share) : share + 0.5;
    /* 64 rows that are padding cost no math; in a tile of 128 rows the way of its weights takes as long */
    double height = v->rows < TALL_ROWS ? v->rows : 64.0 * expected_tiles(s, 64) / tiles;
    /* shared memory: every warpgroup reads all of the weights; at 128 x 256 that takes as long as the math, and what is
     * narrower less than that by less */
    double groups = height / 64.0;
    double port = fmax(1.0, (groups * (v->cols + 128.0) + v->cols) / (2.0 * groups * v->cols));
    double step_us =
        port * 2.0 * height * v->cols * v->k / (d->flops_per_us / d->num_sms * mma_share);
    double compute_us = start_us + share * ((double)ceil_div(s->depth, v->k) * step_us + tile_us);
    double stream_bytes =
        s->experts * (double)s->weight_rows * (double)s->depth * (double)s->element_bytes +
        s->experts * s->rows_per_expert * (double)s->row_bytes;
    return fmax(compute_us, stream_bytes / (0.8 * d->read_bytes_per_us) + start_us);
}

/* The same for a variant of mma.sync: the memory stream, or the waves of thread blocks, each of which fills its ring and
 * then runs at what one block alone or the SM's share of the matrix rate or of L2 allows. Down waits for a step of few
 * stages longer. */
static double variant_us(const variant *v, const gemm_shape *s, const moe_device_info *d)
{
    const bool down = v->stage == STAGE_down;
    const double start_us = 2.3, fill_us = down ? 1.4 : 2.4, wait_us = down ? 0.46 : 0.0,
                 result_us = 0.36 / 8192, k_us = 0.067 / 64, alone_share = 0.3, stream_share = 0.92,
                 row_times = 2.7, l2_bytes_per_us_sm = 1.2e5;
    const double mma_share = v->rows >= 128  ? 0.63
                             : v->rows >= 64 ? 0.43
                             : v->rows >= 32 ? 0.23
                                             : 0.13;              /* of the device's matrix rate */
    const double load_share = v->align_bytes >= 16 ? 1.0 : 0.044; /* elements, not 16 bytes */
    const double sm_flops_per_us = d->flops_per_us / d->num_sms;
    const double blocks = expected_tiles(s, v->rows) * (double)ceil_div(s->weight_rows, v->cols);
    const int32_t by_smem = d->smem_per_sm / (v->smem_bytes + 1024), by_threads = 2048 / v->threads;
    const int32_t by_registers = v->rows * v->cols >= 128 * 128 ? 2 : 8;
    const double resident = fmax(1.0, fmin(by_smem, fmin(by_threads, by_registers)));
    const double per_sm = fmin(resident, ceil(blocks / d->num_sms));
    double waves = blocks / (d->num_sms * per_sm);
    if (waves < 4.0) waves = ceil(waves); /* later waves fill in behind each other */
    const double flops = 2.0 * v->rows * v->cols * v->k,
                 bytes = (double)(v->rows + v->cols) * v->k * (double)s->element_bytes;
    const double alone_us =
        wait_us / (v->stages - 1) + k_us * v->k + flops / (sm_flops_per_us * alone_share);
    const double step_us = fmax(alone_us, per_sm * fmax(flops / (sm_flops_per_us * mma_share),
                                                        bytes / (l2_bytes_per_us_sm * load_share)));
    const double compute_us = waves * (fill_us + per_sm * v->rows * v->cols * result_us +
                                       (double)ceil_div(s->depth, v->k) * step_us);
    const double stream_bytes =
        weight_bytes(s) + row_times * s->experts * s->rows_per_expert * (double)s->row_bytes;
    return fmax(compute_us, stream_bytes / (stream_share * d->read_bytes_per_us) + start_us);
}

/* Persistent blocks that take what memory gives: bytes, and the end, where the last items are under way alone. */
static double stream_us(const variant *v, const gemm_shape *s, double bytes,
                        const moe_device_info *d)
{
    const bool early = v->stage == STAGE_down && v->arch != ARCH_sm90a_swap; /* its ring is full */
    const double start_us = early ? 1.4 : 3.0, rate_share = 0.965, end_share = 0.093;
    const double end_bytes =
        (double)(ceil_div(s->depth, v->k) * v->k * v->cols) * (double)s->element_bytes * d->num_sms;
    return start_us + (bytes / rate_share + end_share * end_bytes) / d->read_bytes_per_us;
}

/* The same for a variant of sm90a_swap: the items of each SM in turn; or the weights once from memory and again from L2 for
 * each further tile of an expert. */
static double swap_us(const variant *v, const gemm_shape *s, const moe_device_info *d)
{
    const double fill_us = 1.6, item_us = v->rows > 32 ? 1.3 : 1.0, result_us = 0.31 / 8192,
                 half = 0.6, mma_share = v->rows > 32 ? 0.5 : 0.55, l2_bytes_per_us_sm = 8e4,
                 again = 0.33, row_times = 1.2;
    const double tiles = expected_tiles(s, v->rows), all_rows = s->experts * s->rows_per_expert;
    const double rows = fmin(v->rows, all_rows / tiles); /* of a tile, on average */
    double items = tiles * (double)ceil_div(s->weight_rows, v->cols) / d->num_sms;
    items = items < 4.0 ? ceil(items) : items + half;
    const double step_us =
        fmax(2.0 * v->rows * v->cols * v->k / (d->flops_per_us / d->num_sms * mma_share),
             (rows + v->cols) * v->k * (double)s->element_bytes / l2_bytes_per_us_sm);
    const double compute_us = fill_us + items * ((double)ceil_div(s->depth, v->k) * step_us +
                                                 item_us + rows * v->cols * result_us);
    const double bytes = weight_bytes(s) * (1.0 + again * (tiles / s->experts - 1.0)) +
                         row_times * all_rows * (double)s->row_bytes;
    /* items and rows cost a little, too, where memory is what takes time */
    return fmax(compute_us, stream_us(v, s, bytes, d)) + 0.04 * items + 0.03 * (v->rows - 32);
}

/* Columns of tiles of TALL_ROWS rows. Measured: gate_up takes all of its columns at once where they fit, so that token rows
 * come once; down takes the wider tile unless more of it is padding. */
static int32_t tall_cols(const variant *v, const gemm_shape *s)
{
    const int64_t by_192 = ceil_div(s->weight_rows, 192) * 192,
                  by_256 = ceil_div(s->weight_rows, 256) * 256;
    if (v->stage == STAGE_down) return by_256 <= by_192 + by_192 / 32 ? 256 : 192;
    if (s->weight_rows % 224 == 0) return 224;
    return by_192 > 192 && by_256 == 256 ? 256 : 192;
}

/* What three math warpgroups are for: most experts have one such tile, many would have two of 128 rows, and there are some
 * for every SM, or at most one where those of 128 rows are more. */
static bool suits_tall(const variant *v, const gemm_shape *s, const moe_device_info *d)
{
    const double tall = expected_tiles(s, TALL_ROWS), low = expected_tiles(s, 128);
    const double cols = (double)ceil_div(s->weight_rows, v->cols);
    const bool one_wave = tall * cols <= d->num_sms && low * cols > d->num_sms;
    return tall <= 1.1 * s->experts && low >= 1.25 * s->experts &&
           (one_wave || tall * cols >= 1.5 * d->num_sms);
}

/* Elsewhere they have to be expected to be a good deal faster. 224 columns were measured to be slower there. */
static bool wants_tall(const variant *v, const gemm_shape *s, const moe_device_info *d)
{
    const double items = expected_tiles(s, TALL_ROWS) * (double)ceil_div(s->weight_rows, v->cols);
    const bool one_wave =
        v->stage == STAGE_gate_up && items <= d->num_sms && items > 0.6 * d->num_sms;
    return one_wave || (v->cols == tall_cols(v, s) && (v->cols != 224 || suits_tall(v, s, d)));
}

/* Blocks of a cluster that split K between them, for a variant of sm90a_split: as many as leave all tiles at work at the same
 * time and each block some steps. And the time: steps of what the gather or the math takes, or L2 for all blocks; then the
 * sums of a tile once through the network between SMs. Fitted to the stages alone of 26 random layers,
 * docs/notes/hopper_kernels.md. */
static int32_t split_blocks(const variant *v, const gemm_shape *s, const moe_device_info *d,
                            double *us)
{
    /* of 1, 2, .. blocks, at a time on 132 SMs: no cluster leaves its group of SMs */
    static const int32_t CLUSTERS[MOE_SPLIT_BLOCKS] = {132, 66, 39, 30, 22, 17, 15, 15};
    const int64_t fewest_steps = 5;
    const bool gathers = v->stage == STAGE_gate_up;
    const double start_us = 1.4, tile_us = 0.77, sums_us = 0.58, sent_us = 6.1e-5, /* a byte */
        step_us = gathers ? 0.137 : 0.172, group_us = gathers ? 0.069 : 0.0,
                 math_us = gathers ? 0.1 : 0.087, l2_bytes_per_us = 6.0e6;
    const double tiles = expected_tiles(s, v->rows), width = v->cols / 128.0,
                 items = tiles * (double)ceil_div(s->weight_rows, v->cols) *
                         (s->row_spread > 0.0 ? 1.05 : 1.0),
                 groups = ceil(fmin(v->rows, s->rows_per_expert) / 64.0), /* of a full tile */
        mean_rows = 64.0 * fmin(v->rows / 64.0, expected_tiles(s, 64) / tiles),
                 step_bytes = (mean_rows + v->cols) * v->k * (double)s->element_bytes,
                 sum_bytes = 4.0 * v->cols * 64.0 * groups;
    const int64_t steps = ceil_div(s->depth, v->k);
    int32_t blocks = (int32_t)min64(steps, 2);
    double clusters[2]; /* of so many blocks, of one more */
    for (;; ++blocks) {
        for (int more = 0; more < 2; ++more)
            clusters[more] = floor(CLUSTERS[(int32_t)min64(blocks + more, MOE_SPLIT_BLOCKS) - 1] *
                                   d->num_sms / 132.0);
        if (blocks == MOE_SPLIT_BLOCKS || steps < fewest_steps * (blocks + 1) ||
            items > clusters[1])
            break;
    }
    const double active = fmin(items, fmax(1.0, clusters[0])) * blocks,
                 step = fmax(step_us + group_us * groups + math_us * groups * width,
                             step_bytes * active / l2_bytes_per_us),
                 wave = tile_us * width + (double)ceil_div(steps, blocks) * step + sums_us +
                        sent_us * sum_bytes * (blocks - 1) / blocks;
    *us = start_us + ceil(items / fmax(1.0, clusters[0])) * wave;
    return blocks;
}

/* What the kernels are compared by; fitted to measurements of one kind beside the other, docs/notes/plan.md. */
static double gemm_us(const variant *v, const gemm_shape *s, const moe_device_info *d)
{
    if (v->arch == ARCH_sm90a_swap) return swap_us(v, s, d);
    if (v->arch == ARCH_sm80) return variant_us(v, s, d);
    if (v->arch == ARCH_sm90a_split) {
        double us = INFINITY;
        split_blocks(v, s, d, &us);
        return fmax(us, stream_us(v, s, weight_bytes(s), d));
    }
    const double padded = (double)(ceil_div(s->weight_rows, v->cols) * v->cols);
    const double us =
        persistent_us(v, s, d) * 0.867 * (1.0 + 0.48 * (padded / (double)s->weight_rows - 1.0));
    /* Weight rows that are no whole sectors of 32 bytes: a piece of one is read with a part of its neighbours', and tiles of
     * 128 rows read more pieces. Measured where experts have several tiles, and blocks some items each. */
    const bool sectors = s->depth * s->element_bytes % 32 == 0 || s->rows_per_expert <= TALL_ROWS;
    const double items = expected_tiles(s, v->rows) * (double)ceil_div(s->weight_rows, v->cols);
    double unsuited = 1.0;
    if (v->rows == TALL_ROWS)
        unsuited = suits_tall(v, s, d) ? 1.0 : 1.18;
    else if (!sectors && items >= 4.0 * d->num_sms)
        unsuited = 1.2;
    return unsuited * fmax(us, stream_us(v, s, weight_bytes(s), d) + 0.03 * (v->rows - 32));
}

static bool usable(const variant *v, int32_t stage, const moe_problem *p, const moe_device_info *d)
{
    bool arch = v->arch == ARCH_sm80 ? d->capability >= 80 : d->hopper != 0;
    return arch && v->arch != ARCH_sm90a_bare && v->arch != ARCH_sm90a_decode_bare &&
           v->stage == stage && v->act_dtype == p->dtype && v->weight_dtype == p->dtype &&
           v->align_bytes <= p->vector_bytes && v->smem_bytes <= d->smem_per_block;
}

static bool is_layer(const moe_problem *p)
{
    return p->operation == MOE_OP_FUSED_EXPERTS || p->operation == MOE_OP_FUSED_MOE;
}

/* Whether rows of down may go into out without combine, where the tile does (adding_row): sums in any order were asked for,
 * or are of one row. Measured on an H200 (docs/notes/combine.md): faster wherever down is of sm90a; fewer than 16 MB of
 * rows (topk 1: 1 MB) not looked at. */
static bool may_add(const moe_problem *p, const moe_device_info *d)
{
    const int64_t row_bytes = (int64_t)p->hidden_size * moe_dtype_bytes(p->dtype),
                  fewest_bytes = d->tile_rows || d->down_row > 0 ? 0
                                 : p->topk == 1                  ? 1000000
                                                                 : 16000000;
    return is_layer(p) && p->combine == MOE_COMBINE_SUM && (p->topk == 1 || !p->deterministic) &&
           row_bytes % 16 == 0 && p->out_vector_bytes >= 16 &&
           p->num_tokens * p->topk * row_bytes >= fewest_bytes;
}

/* The row of down that adds its rows into out with the tiles of `chosen`, or -1. Where sums are in any order tiles of 192 rows
 * are of 192 columns: only these were measured. */
static int32_t adding_row(const variant *chosen, const moe_problem *p, const moe_device_info *d)
{
    for (int32_t i = 0; i < NUM_VARIANTS; ++i) {
        const variant *v = &VARIANTS[i];
        const bool fits = v->cols == chosen->cols || (p->topk > 1 && v->rows == TALL_ROWS);
        if (chosen->arch == ARCH_sm90a && v->rows == chosen->rows && fits &&
            usable(v, STAGE_down_add, p, d))
            return i;
    }
    return -1;
}

/* Whether the plan may choose it: on Hopper mma.sync with tiles of 64 rows and more was the fastest nowhere; and who asks for
 * tiles of one height means the kernels made for it. */
static bool allowed(int32_t row, int32_t stage, const moe_problem *p, const moe_device_info *d)
{
    const variant *v = &VARIANTS[row];
    const int32_t only = stage == MOE_OP_GATE_UP ? d->gate_up_row : d->down_row;
    if (only > 0 && VARIANTS[only - 1].stage != STAGE_experts) return only == row + 1;
    const int32_t fewest_rows = d->tile_rows ? 32 : 64;
    return !(d->hopper && p->vector_bytes >= 16 && v->arch == ARCH_sm80 && v->rows >= fewest_rows);
}

/* Measured: below, decode and the kernels of mma.sync are faster than K split over a cluster; and so is a K of few steps
 * that is not split. */
enum { FEWEST_SPLIT_TOKENS = 20, FEWEST_SPLIT_STEPS = 10 };

/* Expected rows of an expert up to which sm90a_swap was measured to be faster than wgmma with tiles of 128 rows; more
 * where these are fewer than SMs. */
static int32_t most_swap_rows(const moe_problem *p, const moe_device_info *d)
{
    const int64_t rows = (p->gated ? 2 : 1) * (int64_t)p->intermediate_size;
    const int64_t tiles = p->num_experts * ceil_div(rows, 256);
    return tiles < d->num_sms ? 72 : 48;
}

/* A stream of rows read and written, and a launch. */
static double combine_us(double bytes, const moe_device_info *d)
{
    return bytes / (0.9 * d->read_bytes_per_us) + 2.0;
}

static int32_t best_variant(int32_t stage, int32_t tile_rows, const moe_problem *p,
                            const moe_device_info *d, const gemm_shape *s, double *us)
{
    const bool once = stage == MOE_OP_DOWN && p->topk == 1 && may_add(p, d);
    const double row_bytes = (double)p->hidden_size * (double)moe_dtype_bytes(p->dtype),
                 others_us = once ? combine_us(2.0 * (double)p->num_tokens * row_bytes, d) : 0.0;
    int32_t best = -1;
    for (int32_t i = 0; i < NUM_VARIANTS; ++i) {
        if (VARIANTS[i].rows != tile_rows || VARIANTS[i].arch == ARCH_sm90a_decode ||
            !usable(&VARIANTS[i], stage, p, d) || !allowed(i, stage, p, d))
            continue;
        const bool free = d->tile_rows == 0 && d->gate_up_row <= 0 && d->down_row <= 0;
        const bool splits = VARIANTS[i].arch == ARCH_sm90a_split;
        if (free && tile_rows == TALL_ROWS && !splits && !wants_tall(&VARIANTS[i], s, d)) continue;
        if (free && splits &&
            (p->num_tokens < FEWEST_SPLIT_TOKENS ||
             ceil_div(s->depth, VARIANTS[i].k) < FEWEST_SPLIT_STEPS))
            continue;
        double cost = gemm_us(&VARIANTS[i], s, d);
        if (once && adding_row(&VARIANTS[i], p, d) < 0) cost += others_us;
        if (best < 0 || cost < *us) {
            best = i;
            *us = cost;
        }
    }
    return best;
}

static void fill_gemm(moe_gemm_plan *g, int32_t row, const gemm_shape *s, const moe_device_info *d,
                      double us)
{
    const variant *v = &VARIANTS[row];
    g->variant = row;
    g->tile_rows = v->rows;
    g->tile_cols = v->cols;
    g->tile_k = v->k;
    g->grid_cols = (int32_t)ceil_div(s->weight_rows, v->cols);
    g->threads = v->threads;
    g->smem_bytes = v->smem_bytes;
    g->max_blocks = v->arch == ARCH_sm80 || v->arch == ARCH_sm90a_split ? 0 : d->num_sms;
    double split_us = 0;
    g->cluster_blocks = v->arch == ARCH_sm90a_split ? split_blocks(v, s, d, &split_us) : 0;
    g->weight_box = v->weight_box;
    g->token_box = v->token_box;
    g->weight_fourths =
        v->arch == ARCH_sm90a && (v->stage == STAGE_down || v->stage == STAGE_down_add);
    /* Two pieces of a row in one stage need it nowhere. Else 256 bytes gained 2 to 5 % on an H100, and lost as much in
     * prefill on an H200, whose memory is faster. */
    const double h100_bytes_per_us = 3.5e6;
    g->fetch_bytes =
        v->k > MOE_MAP_COLS || d->read_bytes_per_us > h100_bytes_per_us ? 128 : v->fetch_bytes;
    g->us = us;
}

static void expected_work(moe_gemm_plan *g, const gemm_shape *s)
{
    double rows = s->experts * s->rows_per_expert;
    g->flops = 2.0 * rows * (double)s->weight_rows * (double)s->depth;
    g->bytes = s->experts * (double)s->weight_rows * (double)s->depth * (double)s->element_bytes +
               rows * (double)s->row_bytes;
}

/* ------------------------------------------------------------------------------------------------
 * Workspace */

static bool needs(const moe_problem *p, int32_t stage)
{
    return p->operation == MOE_OP_FUSED_EXPERTS || p->operation == MOE_OP_FUSED_MOE ||
           p->operation == stage;
}

static bool aligns(const moe_problem *p)
{
    return needs(p, MOE_OP_ALIGN) || p->operation == MOE_OP_ROUTE_ALIGN;
}

static int64_t take(int64_t *total, bool used, int64_t bytes)
{
    if (!used) return -1;
    int64_t at = *total;
    if (__builtin_add_overflow(at, round_up(bytes, MOE_ALIGNMENT), total))
        *total = INT64_MAX; /* more than any limit: choose_chunk takes fewer tokens */
    return at;
}

/* Threads of a block of align: these, but one for each expert; no more than needed, since barriers wait for all. */
static int32_t align_threads(int64_t least, int32_t num_experts)
{
    const int64_t threads = round_up(least > num_experts ? least : num_experts, 128);
    return (int32_t)min64(threads, MOE_ALIGN_THREADS);
}

/* Whether somebody reads the list of tiles. */
static bool wants_tiles(const moe_problem *p)
{
    return needs(p, MOE_OP_GATE_UP) || needs(p, MOE_OP_DOWN);
}

/* Two launches: as many slots at a time as a block has, its threads hold and its memory. */
static int32_t piece_slots(const moe_plan *plan, const moe_align_plan *align, int64_t num_slots)
{
    const int64_t share = round_up(ceil_div(num_slots, align->blocks), 4);
    int64_t piece = min64(share, MOE_ALIGN_PIECE_THREAD_SLOTS * align->threads);
    while (MOE_ALIGN_PIECE_SMEM_BYTES(plan->problem.num_experts, piece) + MOE_ALIGN_STATIC_BYTES >
           plan->smem_per_block)
        piece = piece / 2;
    return (int32_t)piece;
}

/* All of it measured. */
static moe_align_plan plan_align(const moe_plan *plan, int64_t num_slots)
{
    const int32_t num_experts = plan->problem.num_experts;
    moe_align_plan align = {MOE_ALIGN_WHOLE, 1, 0, 0, 0};
    if (plan->backend == MOE_CPU) return align;
    const bool clusters = plan->hopper && num_experts <= 512;
    if (num_slots <= MOE_ALIGN_FEW_SLOTS && !wants_tiles(&plan->problem)) {
        align.kind = MOE_ALIGN_FEW;
        align.threads = MOE_ALIGN_FEW_THREADS;
        const int64_t warps = num_slots + num_experts + 1, in_block = MOE_ALIGN_FEW_THREADS / 32;
        align.blocks = (int32_t)min64(ceil_div(warps, in_block), MOE_ALIGN_WHOLE_BLOCKS);
    } else if (num_slots <= MOE_ALIGN_ONE_SLOTS &&
               MOE_ALIGN_SMEM_BYTES(num_experts, num_slots) + MOE_ALIGN_STATIC_BYTES <=
                   plan->smem_per_block) {
        align.threads = align_threads(num_slots, num_experts);
    } else if (num_slots <= (num_experts <= 256 ? clusters ? 8192 : 16384
                             : clusters         ? 10240
                                                : 24576)) {
        /* with more experts what the other forms tell each other is longer */
        align.blocks =
            (int32_t)min64(ceil_div(num_slots, MOE_ALIGN_SHARE_SLOTS), MOE_ALIGN_WHOLE_BLOCKS);
        /* where there are many slots, many threads count them sooner than their barriers last */
        align.threads = align_threads(num_slots <= 1024   ? 256
                                      : num_slots <= 4096 ? 512
                                                          : 1024,
                                      num_experts);
    } else if (clusters && num_slots <= 49152) {
        align.kind = MOE_ALIGN_CLUSTERS;
        align.threads = 512; /* and as many slots */
        align.blocks = num_slots <= 32768 ? 64 : 96;
    } else {
        /* blocks of both launches have SMs of their own up to 2^18; every block reads the counts of all */
        align.kind = MOE_ALIGN_TWICE;
        align.count_blocks = num_slots < 1 << 18 ? 16 : num_slots < 1 << 19 ? 32 : 64;
        align.blocks = num_slots < 1 << 18 ? 96 : 128;
        align.threads = align_threads(num_slots < 1 << 19 ? 512 : 1024, num_experts);
        align.piece_slots = piece_slots(plan, &align, num_slots);
    }
    return align;
}

static int64_t most_tiles(const moe_problem *p, int64_t num_slots, int32_t tile_rows)
{
    return min64(num_slots, num_slots / tile_rows + min64(p->num_experts, num_slots));
}

/* Offsets for one pass of chunk_tokens. Independent of the tile height, so that it never shrinks as tokens grow. */
static void lay_out(const moe_plan *plan, int64_t chunk_tokens, moe_workspace *w)
{
    const moe_problem *p = &plan->problem;
    const bool gpu = plan->backend == MOE_CUDA, layer = is_layer(p),
               block = p->operation == MOE_OP_ALIGN_BLOCK;
    const bool list = gpu && wants_tiles(p);
    const moe_align_plan align = plan_align(plan, chunk_tokens * p->topk);
    const int64_t slots = chunk_tokens * p->topk, bytes = moe_dtype_bytes(p->dtype);
    int64_t total = 0;
    w->topk_weights = take(&total, layer && p->routed, slots * 4);
    w->topk_ids = take(&total, layer && p->routed, slots * 4);
    w->expert_offsets = take(&total, layer || block, (p->num_experts + 1) * 4);
    w->sorted_token_ids = take(&total, layer || block, slots * 4);
    w->row_of_slot = take(&total, layer || block, slots * 4);
    w->tiles =
        take(&total, list, most_tiles(p, slots, SMALLEST_TILE_ROWS) * (int64_t)sizeof(moe_tile));
    w->num_tiles = take(&total, list, 16); /* and what stands behind it */
    w->counts = take(&total, gpu && (block || aligns(p)) && align.kind == MOE_ALIGN_TWICE,
                     (int64_t)(align.count_blocks + align.blocks) * p->num_experts * 4);
    w->intermediate = take(&total, layer, slots * plan->intermediate_stride * bytes);
    w->rows = take(&total, layer, slots * plan->rows_stride * bytes);
    w->total = total;
}

/* The most tokens whose pass fits the limit; 0 where not even one does. */
static int64_t tokens_within(const moe_plan *plan, int64_t limit)
{
    int64_t low = 0, high = plan->problem.num_tokens;
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        moe_workspace w;
        lay_out(plan, middle, &w);
        if (w.total <= limit)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

static int choose_chunk(moe_plan *plan, moe_error *err)
{
    const moe_problem *p = &plan->problem;
    /* half of 64 bits is beyond every address, and leaves room to add to */
    const int64_t limit =
        min64(p->workspace_limit > 0 ? p->workspace_limit : MOE_WORKSPACE_LIMIT, INT64_MAX / 2);
    plan->chunk_tokens = is_layer(p) ? tokens_within(plan, limit) : p->num_tokens;
    if (p->num_tokens > 0 && plan->chunk_tokens == 0) {
        moe_workspace w;
        lay_out(plan, 1, &w);
        return moe_fail(err, MOE_ERROR_VALUE,
                        "workspace_limit: expected at least the %" PRId64
                        " bytes that one token needs, got %" PRId64,
                        w.total, limit);
    }
    plan->num_chunks = plan->chunk_tokens ? ceil_div(p->num_tokens, plan->chunk_tokens) : 0;
    lay_out(plan, plan->chunk_tokens, &plan->workspace);
    return MOE_OK;
}

/* ------------------------------------------------------------------------------------------------ */

static int choose_gemms(moe_plan *plan, const moe_device_info *d, const gemm_shape *gate_up,
                        const gemm_shape *down, moe_error *err)
{
    const moe_problem *p = &plan->problem;
    double best = INFINITY;
    bool preferred = false;                      /* the best one so far is of device.tile_rows */
    for (int32_t i = 0; i < NUM_VARIANTS; ++i) { /* every tile height that some variant has */
        double up_us = 0, down_us = 0;
        int32_t rows = VARIANTS[i].rows;
        int32_t up_row = best_variant(MOE_OP_GATE_UP, rows, p, d, gate_up, &up_us);
        int32_t down_row = best_variant(MOE_OP_DOWN, rows, p, d, down, &down_us);
        if (up_row < 0 || down_row < 0) continue;
        if (d->tile_rows && rows == d->tile_rows) {
            if (!preferred) best = INFINITY;
            preferred = true;
        } else if (preferred) {
            continue;
        }
        if (up_us + down_us >= best) continue;
        best = up_us + down_us;
        fill_gemm(&plan->gate_up, up_row, gate_up, d, up_us);
        fill_gemm(&plan->down, down_row, down, d, gemm_us(&VARIANTS[down_row], down, d));
        plan->tile_rows = rows;
    }
    if (!isfinite(best))
        return moe_fail(
            err, MOE_ERROR_NOT_IMPLEMENTED,
            "dtype: no kernel computes %s with %d-byte alignment on compute capability %d.%d",
            moe_dtype_name(p->dtype), p->vector_bytes, d->capability / 10, d->capability % 10);
    return MOE_OK;
}

/* A layer's gate_up and down in one launch, by a row for both (docs/notes/mid_kernels.md): measured on an H200 wherever the
 * weights are what takes time and their items are enough for all SMs; and where each of them would be of sm90a_swap. */
static bool join_gemms(moe_plan *plan, const moe_device_info *d, const gemm_shape *gate_up,
                       const gemm_shape *down)
{
    const moe_problem *p = &plan->problem;
    const double rows = gate_up->rows_per_expert;
    if (d->apart || d->gate_up_row || d->down_row || !is_layer(p)) return false;
    int32_t height = plan->tile_rows;
    if (!d->tile_rows) {
        if (p->num_tokens <= 8 || rows > most_swap_rows(p, d)) return false;
        const double bytes = weight_bytes(gate_up) + weight_bytes(down);
        const double items = gate_up->experts * (double)ceil_div(gate_up->weight_rows, 128);
        if (bytes >= 100e6 && items >= d->num_sms)
            height = rows <= 20.0 ? 32 : rows <= 48.0 ? 64 : 96;
        else if (VARIANTS[plan->gate_up.variant].arch != ARCH_sm90a_swap ||
                 VARIANTS[plan->down.variant].arch != ARCH_sm90a_swap)
            return false;
    } else if (VARIANTS[plan->gate_up.variant].arch != ARCH_sm90a_swap ||
               VARIANTS[plan->down.variant].arch != ARCH_sm90a_swap) {
        return false;
    }
    for (int32_t i = 0; i < NUM_VARIANTS; ++i) {
        if (VARIANTS[i].rows != height || !usable(&VARIANTS[i], STAGE_experts, p, d) ||
            VARIANTS[i].arch != (p->plain ? ARCH_sm90a_plain : ARCH_sm90a_swap))
            continue;
        fill_gemm(&plan->gate_up, i, gate_up, d, plan->gate_up.us);
        fill_gemm(&plan->down, i, down, d, plan->down.us);
        plan->tile_rows = height;
        plan->one_launch = 1;
        return true;
    }
    return false;
}

/* The row of both stages that tests hold plans to, or -1. */
static int32_t only_experts(const moe_device_info *d)
{
    const int32_t row = d->gate_up_row - 1;
    return row >= 0 && d->down_row == d->gate_up_row && VARIANTS[row].stage == STAGE_experts ? row
                                                                                             : -1;
}

/* The same of tiles of prefill. Measured on an H200 (docs/notes/hopper_kernels.md): 1 to 11 % faster where gate_up has some
 * items for each SM and down one, and both take some 70 us and more; with less, the change from gate_up to down takes more
 * than a launch. Tiles of three math warpgroups also need items of gate_up that take longer than looking up the next. */
static void join_tiles(moe_plan *plan, const moe_device_info *d, const gemm_shape *gate_up,
                       const gemm_shape *down)
{
    const double least_us = 60.0, least_items = 1.9, least_down_items = 1.0; /* of an SM */
    const int64_t least_tall_steps = 16;
    const moe_problem *p = &plan->problem;
    const variant *up = &VARIANTS[plan->gate_up.variant], *low = &VARIANTS[plan->down.variant];
    const int32_t only = only_experts(d);
    const bool free = !d->apart && !d->tile_rows && d->gate_up_row <= 0 && d->down_row <= 0;
    const double tiles = expected_tiles(gate_up, up->rows);
    const bool wanted =
        free && up->arch == ARCH_sm90a && low->arch == ARCH_sm90a &&
        plan->gate_up.us + plan->down.us >= least_us &&
        tiles * (double)ceil_div(gate_up->weight_rows, up->cols) >= least_items * d->num_sms &&
        tiles * (double)ceil_div(down->weight_rows, low->cols) >= least_down_items * d->num_sms &&
        (up->rows != TALL_ROWS || ceil_div(gate_up->depth, up->k) >= least_tall_steps);
    if (!is_layer(p) || plan->decode || plan->one_launch || plan->adds || !(wanted || only >= 0))
        return;
    for (int32_t i = 0; i < NUM_VARIANTS; ++i) {
        const variant *v = &VARIANTS[i];
        const bool plain = v->arch == ARCH_sm90a_joined_bare && only >= 0 && p->plain;
        const bool fits = only >= 0 ? i == only : v->rows == up->rows && v->cols == up->cols;
        if (!fits || !(v->arch == ARCH_sm90a_joined || plain) || !usable(v, STAGE_experts, p, d))
            continue;
        fill_gemm(&plan->gate_up, i, gate_up, d, plan->gate_up.us);
        fill_gemm(&plan->down, i, down, d, plan->down.us);
        plan->down.tile_cols = MOE_JOINED_DOWN_COLS(v->rows, v->cols);
        plan->down.grid_cols = (int32_t)ceil_div(down->weight_rows, plan->down.tile_cols);
        plan->down.weight_box = MOE_GEMM_WEIGHT_BOX_sm90a(plan->down.tile_cols);
        plan->down.weight_fourths = 1;
        plan->tile_rows = v->rows;
        plan->one_launch = 1;
    }
}

/* Tiles of the height that uniform routing asks for are read again and again where few experts have most of the rows. Only
 * align knows: where there are many more of them than of high ones, it makes those, and the launch does them by the loops of
 * prefill behind its own (experts_high_sm90a.cu). */
static void offer_high(moe_plan *plan, const moe_device_info *d)
{
    const moe_problem *p = &plan->problem;
    if (!plan->one_launch || !p->plain || d->high < 0) return;
    const int64_t items = p->topk * ceil_div(plan->chunk_tokens, MOE_HIGH_ROWS) *
                          ceil_div(2 * (int64_t)p->intermediate_size, 192);
    /* measured: with fewer items, where all tokens go to the same experts, high tiles are no faster */
    const bool worth = plan->chunk_tokens > MOE_HIGH_ROWS && items > d->num_sms * 2 / 5;
    if (d->high == 0 && !worth) return;
    /* the wider, which are faster for each column, once a block has more than one */
    const int32_t arch = items <= d->num_sms ? ARCH_sm90a_high : ARCH_sm90a_wide;
    for (int32_t i = 0; i < NUM_VARIANTS; ++i) {
        const variant *v = &VARIANTS[i];
        const bool is_high = v->arch == ARCH_sm90a_high || v->arch == ARCH_sm90a_wide;
        if (!is_high || (v->arch != arch && (d->high == 0 || plan->high_rows)) ||
            v->rows != plan->tile_rows || !usable(v, STAGE_experts, p, d))
            continue;
        plan->gate_up.variant = plan->down.variant = i;
        plan->gate_up.smem_bytes = plan->down.smem_bytes = v->smem_bytes;
        plan->high_rows = MOE_HIGH_ROWS;
        plan->high_cols = v->arch == ARCH_sm90a_high ? 192 : 256;
        /* a high tile takes as long as three of 32 rows, as 1.75 of 64 */
        plan->high_cost = d->high > 0 ? d->high : v->rows == 32 ? 48 : 28;
    }
}

/* The same tile without the code of options, where the layer has none. */
static int32_t plain_row(int32_t row, const moe_problem *p, const moe_device_info *d)
{
    const variant *v = &VARIANTS[row];
    const int32_t plain = v->arch == ARCH_sm90a          ? ARCH_sm90a_bare
                          : v->arch == ARCH_sm90a_joined ? ARCH_sm90a_joined_bare
                          : v->arch == ARCH_sm90a_decode ? ARCH_sm90a_decode_bare
                                                         : 0;
    if (!plain || !p->plain || d->gate_up_row > 0 || d->down_row > 0) return row;
    for (int32_t i = 0; i < NUM_VARIANTS; ++i) {
        const variant *of = &VARIANTS[i];
        if (of->arch == plain && of->stage == v->stage && of->act_dtype == v->act_dtype &&
            of->rows == v->rows && of->cols == v->cols && of->stages == v->stages)
            return i;
    }
    return row;
}

/* Down adds its rows into out. An out that L2 does not hold is done in bands of columns, unless the intermediate, which every
 * band reads anew, has long rows; a row of topk 1 is written, not added, and needs no bands. */
static void choose_adds(moe_plan *plan, const moe_device_info *d, const gemm_shape *down)
{
    const moe_problem *p = &plan->problem;
    const bool once = p->topk == 1;
    const int64_t out_bytes = plan->chunk_tokens * p->hidden_size * moe_dtype_bytes(p->dtype);
    if (plan->decode || plan->one_launch || !may_add(p, d)) return;
    const int32_t row = adding_row(&VARIANTS[plan->down.variant], p, d);
    if (row < 0) return;
    fill_gemm(&plan->down, row, down, d, plan->down.us);
    plan->adds = 1;
    plan->deterministic = once;
    if (!once && p->intermediate_size <= 256 && out_bytes > d->l2_bytes / 5 * 3) {
        const int64_t tiles = d->l2_bytes / 3 / (plan->chunk_tokens * VARIANTS[row].cols * 2);
        plan->down.band_tiles = (int32_t)(tiles > 1 ? tiles : 1);
    }
}

/* Slots that a thread of combine sums at a time: with few of them it takes several tokens, where there are enough for all
 * SMs; 9 and 10 are two times 5. */
static int32_t combine_slots(const moe_plan *plan)
{
    const moe_problem *p = &plan->problem;
    const bool sum = p->combine == MOE_COMBINE_SUM; /* else every slot is a token */
    const int32_t topk = sum ? p->topk : 1;
    const int64_t tokens = sum ? plan->chunk_tokens : plan->chunk_tokens * p->topk;
    if (plan->combine_vector_bytes < 16) return 0;
    if (topk <= 4 && tokens >= ceil_div(MOE_COMBINE_MANY, MOE_COMBINE_CHUNKS(p->hidden_size)))
        return topk <= 2 ? 2 : 4;
    return topk == 9 || topk == 10 ? 5 : MOE_COMBINE_IN_FLIGHT;
}

/* ------------------------------------------------------------------------------------------------
 * Decode: gate_up and down that need no align and no combine */

/* The row for a call's tokens and columns of a thread block, -1 where there is none. */
static int32_t decode_variant(int32_t stage, int64_t tokens, int32_t cols, const moe_problem *p,
                              const moe_device_info *d)
{
    int32_t best = -1;
    for (int32_t i = 0; i < NUM_VARIANTS; ++i) {
        const variant *v = &VARIANTS[i];
        if (v->arch != ARCH_sm90a_decode || v->cols != cols || v->rows < tokens) continue;
        if (!usable(v, stage, p, d)) continue;
        if (best < 0 || v->rows < VARIANTS[best].rows) best = i;
    }
    return best;
}

/* Microseconds of both launches. gate_up: the stream, or the items of each SM, after every SM has read all token rows. down:
 * the stream, or the copies of a thread block, which reads its columns of all experts, after the intermediate. */
static double decode_us(const gemm_shape *gate_up, const gemm_shape *down, double tokens,
                        int32_t cols, double copies, const moe_device_info *d)
{
    const double start_us = tokens > 8 ? 5.4 : 4.6, token_us = 0.05, copy_us = 0.16,
                 panel_rate = 3.4e4, down_panel_rate = 1.6e4, item_rate = 1.7e5,
                 copy_rate = 9.1e4; /* bytes per us */
    const double rate = 0.956 * d->read_bytes_per_us, bytes = (double)down->element_bytes;
    const double items = gate_up->experts * (double)ceil_div(gate_up->weight_rows, 16),
                 item_bytes = 16.0 * (double)gate_up->depth * bytes,
                 rounds = (double)ceil_div(ceil_div(down->weight_rows, cols), d->num_sms);
    const double up_us =
        fmax(items * item_bytes / rate, ceil(items / d->num_sms) * item_bytes / item_rate) +
        tokens * (double)gate_up->depth * bytes / panel_rate;
    const double down_us =
        fmax(weight_bytes(down) / rate,
             rounds * down->experts *
                 (copies * copy_us + (double)down->depth * cols * bytes / copy_rate)) +
        down->experts * down->rows_per_expert * (double)down->depth * bytes / down_panel_rate;
    return start_us + tokens * token_us + up_us + down_us;
}

/* Each kernel takes what it can use of the shared memory of an SM. Measured: six stages of gate_up's ring are as good as any
 * number above. Where both fit beside each other, down starts when gate_up has asked for all but the last of its weights,
 * and its own follow without a gap. That is worth 4 to 10 % where an expert's rows of w2 are so short that down's copies
 * are small (copies of several experts in a stage); where they are large it costs as much: gate_up's shorter ring, and
 * token rows that wait behind down's weights. There down starts on every SM as gate_up leaves it. A launch takes 3 us from
 * where it may start: beside a short gate_up, down may right after gate_up's wait. Returns false where the kernels cannot
 * do this problem, or would not be faster. */
enum {
    FEWEST_STAGES = 4, /* of gate_up's ring */
    FEWEST_BESIDE = 3, /* the same, with down on the SM */
    MOST_STAGES = 6,
    LOW_COPY_BYTES = 16384,
    LEAST_COPY_BYTES = 8192, /* measured: smaller ones do not keep the memory busy */
    LOW_STAGE_BYTES = 12288,
    STAGES_LEFT = 8,      /* a launch and finding the experts take as long as these from memory */
    ALL_STAGES = 12,      /* of a block of gate_up, on average: with so few, down starts at once */
    BLOCK_RESERVED = 1024 /* of the SM's shared memory, by every thread block */
};

static bool choose_decode(moe_plan *plan, const moe_device_info *d, const gemm_shape *gate_up,
                          const gemm_shape *down)
{
    const moe_problem *p = &plan->problem;
    const int64_t tokens = p->num_tokens, slots = tokens * p->topk;
    if (d->tile_rows || d->gate_up_row > 0 || d->down_row > 0 || !is_layer(p) ||
        p->combine != MOE_COMBINE_SUM || plan->num_chunks != 1 || p->vector_bytes < 16 ||
        slots > MOE_DECODE_SLOTS)
        return false;
    /* a thread block's share of the items is found in 32 bits */
    if (slots * ceil_div(p->intermediate_size, 8) * d->num_sms > UINT32_MAX) return false;
    /* measured: above 8 tokens a piece of K left over, which takes a stage of its own, costs more than align and combine */
    const bool left_over = p->intermediate_size % MOE_MAP_COLS != 0;
    if (tokens > 8 && left_over && gate_up->rows_per_expert < 1.5) return false;
    const int32_t cols = ceil_div(p->hidden_size, 16) <= d->num_sms ? 16 : 32;
    const int32_t up = decode_variant(MOE_OP_GATE_UP, tokens, 16, p, d),
                  low = decode_variant(MOE_OP_DOWN, tokens, cols, p, d);
    if (up < 0 || low < 0) return false;

    const int64_t up_fixed = tokens * MOE_DECODE_PANEL_PITCH((int64_t)p->hidden_size) +
                             MOE_DECODE_UP_SUMS(VARIANTS[up].rows) + MOE_DECODE_SLOT_BYTES;
    const int64_t low_fixed =
        slots * MOE_DECODE_PANEL_PITCH((int64_t)p->intermediate_size) +
        MOE_DECODE_DOWN_SUMS(VARIANTS[low].rows, cols) + MOE_DECODE_SLOT_BYTES +
        round_up(MOE_DECODE_SLOT_TABLE(min64(p->num_experts, slots), VARIANTS[low].rows), 16);
    /* down: a copy brings at most LOW_COPY_BYTES, in equal shares of an expert; a stage at least LOW_STAGE_BYTES, or what is
     * a warp's share of all; less of both where not every warp had a stage of its own */
    const int64_t piece = (int64_t)cols * MOE_MAP_COLS * 2;
    const int64_t room = (d->smem_per_block - low_fixed) / MOE_DECODE_MATH_WARPS;
    const int64_t most = min64(LOW_COPY_BYTES, room > LEAST_COPY_BYTES ? room : LEAST_COPY_BYTES);
    if (tokens > 8 && room < LEAST_COPY_BYTES) return false;
    const int64_t pieces =
        p->intermediate_size / MOE_MAP_COLS > 0 ? p->intermediate_size / MOE_MAP_COLS : 1;
    const int32_t box = (int32_t)ceil_div(pieces, ceil_div(pieces, most / piece));
    const int64_t expert_copies = ceil_div(pieces, box) + left_over;
    const int64_t all_copies = (int64_t)(down->experts + 0.5) * expert_copies;
    const bool small_copies = box * piece < LOW_STAGE_BYTES;
    const int32_t copies =
        (int32_t)min64(min64(ceil_div(LOW_STAGE_BYTES, box * piece), most / (box * piece)),
                       ceil_div(all_copies, MOE_DECODE_MATH_WARPS));
    const int64_t low_stage = copies * box * piece;
    const double up_bytes = gate_up->experts * (double)(gate_up->weight_rows * gate_up->depth * 2),
                 low_bytes = down->experts * (double)(down->weight_rows * down->depth * 2);
    const int64_t low_stages =
        min64(min64(MOE_DECODE_MATH_WARPS, (d->smem_per_block - low_fixed) / low_stage),
              ceil_div(all_copies, copies));
    const int64_t beside =
        (d->smem_per_sm - 2 * BLOCK_RESERVED - low_fixed - low_stages * low_stage - up_fixed) /
        MOE_DECODE_STAGE_BYTES;
    /* with 16 tokens the registers of both do not fit */
    const bool both = tokens <= 8 && small_copies && beside >= FEWEST_BESIDE;
    const int64_t up_stages =
        min64(MOST_STAGES, both ? beside : (d->smem_per_block - up_fixed) / MOE_DECODE_STAGE_BYTES);
    if (up_stages < (both ? FEWEST_BESIDE : FEWEST_STAGES) || low_stages < 1 ||
        (low_stages < 2 && ceil_div(all_copies, copies) > 1))
        return false;

    const double us = decode_us(gate_up, down, (double)tokens, cols, (double)expert_copies, d);
    /* align, combine, and what four launches lose between them */
    const double others = 4.4 + 1.085 * (plan->gate_up.us + plan->down.us);
    if (us > others && d->gate_up_row >= 0) return false;

    const double share = up_bytes / (up_bytes + low_bytes);
    fill_gemm(&plan->gate_up, up, gate_up, d, us * share);
    fill_gemm(&plan->down, low, down, d, us * (1 - share));
    plan->decode = 1;
    plan->tile_rows = VARIANTS[up].rows;
    plan->gate_up.max_blocks = d->num_sms;
    plan->gate_up.ring_stages = (int32_t)up_stages;
    const bool at_once = up_bytes <= (double)ALL_STAGES * MOE_DECODE_STAGE_BYTES * d->num_sms;
    plan->gate_up.stages_left = !both ? INT32_MAX : at_once ? MOE_DECODE_AT_ONCE : STAGES_LEFT;
    plan->gate_up.smem_bytes = (int32_t)(up_fixed + up_stages * MOE_DECODE_STAGE_BYTES);
    plan->down.max_blocks = (int32_t)min64(d->num_sms, plan->down.grid_cols);
    plan->down.ring_stages = (int32_t)low_stages;
    plan->down.box_chunks = box;
    plan->down.copies = copies;
    plan->down.smem_bytes = (int32_t)(low_fixed + low_stages * low_stage);
    return true;
}

int moe_make_plan(const moe_problem *problem, const moe_device_info *device, moe_plan *plan,
                  moe_error *err)
{
    memset(plan, 0, sizeof *plan);
    if (moe_validate_problem(problem, err)) return err->status;
    const moe_problem *p = &plan->problem;
    plan->problem = *problem;
    plan->backend = device->backend;
    plan->num_sms = device->num_sms;
    plan->smem_per_block = device->smem_per_block;
    plan->hopper = device->hopper;
    plan->deterministic = 1; /* every kernel there is but those of choose_adds */
    const int64_t bytes = moe_dtype_bytes(p->dtype);
    plan->intermediate_stride = round_up(p->intermediate_size, 16 / bytes);
    plan->rows_stride = round_up(p->hidden_size, 16 / bytes);
    plan->combine_vector_bytes =
        p->hidden_size * bytes % 16 == 0 ? p->out_vector_bytes : (int32_t)bytes;
    if (choose_chunk(plan, err)) return err->status;
    plan->combine_slots = combine_slots(plan);

    const int64_t tokens = plan->chunk_tokens, slots = tokens * p->topk;
    const double experts = fmax(distinct_experts(p, tokens), 1e-9), rows = (double)slots / experts;
    const int64_t row_bytes = ((int64_t)p->hidden_size + p->intermediate_size) * bytes;
    const int32_t halves = p->gated ? 2 : 1;
    const double spread = sqrt(rows * fmax(0.0, 1.0 - (double)p->topk / p->num_experts));
    const gemm_shape gate_up = {
        experts,        rows,  spread,   (int64_t)halves * p->intermediate_size,
        p->hidden_size, bytes, row_bytes};
    const gemm_shape down = {experts, rows,     spread, p->hidden_size, p->intermediate_size,
                             bytes,   row_bytes};
    plan->gate_up.variant = plan->down.variant = -1;
    plan->align = plan_align(plan, slots);
    plan->route_threads = 128; /* measured: 32 and 64 are slower from 4096 tokens, 256 below 256 */
    plan->tile_rows = SMALLEST_TILE_ROWS;
    if (plan->backend == MOE_CUDA) {
        if (choose_gemms(plan, device, &gate_up, &down, err)) return err->status;
        /* measured: from 16 tokens on one launch for gate_up and down is as fast as decode, or faster */
        const bool joined = tokens >= 16 && join_gemms(plan, device, &gate_up, &down);
        if (!joined && !choose_decode(plan, device, &gate_up, &down))
            join_gemms(plan, device, &gate_up, &down);
        /* of few slots a token combine is short, and one launch saves more than adding does: gptoss at 8192 tokens 867 us in
         * one launch, 946 with sums in any order, 976 by default before (hot); from topk 8 on it is the other way round */
        if (p->topk > 1 && p->topk <= 4) join_tiles(plan, device, &gate_up, &down);
        choose_adds(plan, device, &down);
        offer_high(plan, device);
        join_tiles(plan, device, &gate_up, &down);
        plan->gate_up.variant = plain_row(plan->gate_up.variant, p, device);
        plan->down.variant = plain_row(plan->down.variant, p, device);
    }
    plan->max_tiles = (int32_t)most_tiles(p, slots, plan->tile_rows);

    expected_work(&plan->gate_up, &gate_up);
    expected_work(&plan->down, &down);
    const double combine_bytes =
        (double)(plan->adds ? tokens : slots + tokens) * p->hidden_size * (double)bytes;
    const double chunks = (double)plan->num_chunks;
    plan->bytes = chunks * (plan->gate_up.bytes + plan->down.bytes + combine_bytes);
    plan->flops = chunks * (plan->gate_up.flops + plan->down.flops);
    const int32_t align_launches = plan->decode ? 0 : plan->workspace.counts >= 0 ? 2 : 1;
    const int32_t combine_launches = plan->decode ? 0 : 1;
    if (plan->backend == MOE_CUDA) {
        const double last_us = plan->decode ? 0 : combine_us(combine_bytes, device);
        plan->us = chunks * (plan->gate_up.us + plan->down.us + last_us + 3.0 * align_launches +
                             (p->routed ? 2.5 : 0));
        plan->num_launches =
            (int32_t)min64(INT32_MAX, plan->num_chunks * (2 - plan->one_launch + combine_launches +
                                                          align_launches + (p->routed ? 1 : 0)));
    } else {
        plan->gate_up.us = fmax(plan->gate_up.bytes / device->read_bytes_per_us,
                                plan->gate_up.flops / device->flops_per_us);
        plan->down.us = fmax(plan->down.bytes / device->read_bytes_per_us,
                             plan->down.flops / device->flops_per_us);
        plan->us =
            chunks * (plan->gate_up.us + plan->down.us + combine_bytes / device->read_bytes_per_us);
    }
    return MOE_OK;
}
