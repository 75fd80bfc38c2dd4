/* launch.c: the stages on a GPU. A row of the kernel table is launched with the geometry that the plan gives;
 * every call of the driver is checked, nothing synchronises (but FUSEDMOE_SYNC=1), nothing is allocated.
 *
 * The kernels of a call are one chain of programmatic dependent launches: each waits for its predecessor
 * before it touches what others wrote, so that only their prologues overlap. */
#include "driver.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
#define MOE_ROUTE_VARIANT(name, held, packed, score, key, groups) ROUTE_##name,
#include "../../kernels/route_variants.def"
    NUM_ROUTE_VARIANTS
};

enum {
    KERNEL_ALIGN_FEW = 0,
    KERNEL_ALIGN_WHOLE,
    KERNEL_ALIGN_CLUSTER,
    KERNEL_ALIGN_COUNT,
    KERNEL_ALIGN_PLACE,
    KERNEL_ALIGN_TILES,
    KERNEL_ALIGN_PAD,
    KERNEL_COMBINE_BF16, /* F16 follows each */
    KERNEL_COMBINE_F16,
    KERNEL_COMBINE_BF16_2,
    KERNEL_COMBINE_F16_2,
    KERNEL_COMBINE_BF16_4,
    KERNEL_COMBINE_F16_4,
    KERNEL_COMBINE_BF16_5,
    KERNEL_COMBINE_F16_5,
    KERNEL_COMBINE_BF16_ANY,
    KERNEL_COMBINE_F16_ANY,
    KERNEL_DOWN_FILL,
    KERNEL_HOPPER_PROBE,
    KERNEL_ROUTE_GENERAL,                                 /* up to 128, 256, 512, 1024 experts */
    KERNEL_ROUTE_GENERAL_LAST = KERNEL_ROUTE_GENERAL + 3, /* rows of route_variants.def follow */
#define MOE_ROUTE_VARIANT(name, held, packed, score, key, groups) KERNEL_ROUTE_##name,
#include "../../kernels/route_variants.def"
    KERNEL_LAST_ROUTE = KERNEL_ROUTE_GENERAL + 3 + NUM_ROUTE_VARIANTS,
#define MOE_ROUTE_ALIGN_VARIANT(name, held, packed, score, key, groups) KERNEL_ROUTE_ALIGN_##name,
#include "../../kernels/route_variants.def"
    KERNEL_FIRST_VARIANT /* rows of gemm_variants.def follow */
};

#define PARAMS_sm80_gate_up              moe_gate_up_args
#define PARAMS_sm80_down                 moe_down_args
#define PARAMS_sm90a_gate_up             moe_gate_up_args
#define PARAMS_sm90a_bare_gate_up        moe_gate_up_args
#define PARAMS_sm90a_bare_down           moe_down_args
#define PARAMS_sm90a_down                moe_down_args
#define PARAMS_sm90a_down_add            moe_down_add_args
#define PARAMS_sm90a_swap_gate_up        moe_gate_up_args
#define PARAMS_sm90a_swap_down           moe_down_args
#define PARAMS_sm90a_swap_experts        moe_experts_args
#define PARAMS_sm90a_plain_experts       moe_experts_args
#define PARAMS_sm90a_high_experts        moe_experts_args
#define PARAMS_sm90a_wide_experts        moe_experts_args
#define PARAMS_sm90a_joined_experts      moe_experts_args
#define PARAMS_sm90a_joined_bare_experts moe_experts_args
#define PARAMS_sm90a_split_gate_up       moe_gate_up_args
#define PARAMS_sm90a_split_down          moe_down_args
#define PARAMS_sm90a_decode_gate_up      moe_gate_up_decode_args
#define PARAMS_sm90a_decode_bare_gate_up PARAMS_sm90a_decode_gate_up
#define PARAMS_sm90a_decode_down         moe_down_decode_args
#define PARAMS_sm90a_decode_bare_down    PARAMS_sm90a_decode_down
#define ARCH_sm80                        80
#define ARCH_sm90a                       90
#define ARCH_sm90a_bare                  90
#define ARCH_sm90a_swap                  90
#define ARCH_sm90a_plain                 90
#define ARCH_sm90a_high                  90
#define ARCH_sm90a_wide                  90
#define ARCH_sm90a_joined                90
#define ARCH_sm90a_joined_bare           90
#define ARCH_sm90a_split                 90
#define ARCH_sm90a_decode                90
#define ARCH_sm90a_decode_bare           ARCH_sm90a_decode
#define MAPS_sm80_gate_up                0 /* tensor maps: of the weights, then of the token rows */
#define MAPS_sm80_down                   0
#define MAPS_sm90a_gate_up               1
#define MAPS_sm90a_bare_gate_up          1
#define MAPS_sm90a_bare_down             2
#define MAPS_sm90a_down                  2
#define MAPS_sm90a_down_add              2
#define MAPS_sm90a_swap_gate_up          1
#define MAPS_sm90a_swap_down             1
#define MAPS_sm90a_swap_experts          2 /* of w13, of w2 */
#define MAPS_sm90a_plain_experts         2
#define MAPS_sm90a_high_experts          5 /* the same, and of w13, w2, intermediate for high tiles */
#define MAPS_sm90a_wide_experts          5
#define MAPS_sm90a_joined_experts        3 /* of w13, of w2, of the intermediate */
#define MAPS_sm90a_joined_bare_experts   3
#define MAPS_sm90a_split_gate_up         1
#define MAPS_sm90a_split_down            2
#define MAPS_sm90a_decode_gate_up        2 /* of the weights: a stage, and what is left of K */
#define MAPS_sm90a_decode_bare_gate_up   MAPS_sm90a_decode_gate_up
#define MAPS_sm90a_decode_down           2
#define MAPS_sm90a_decode_bare_down      MAPS_sm90a_decode_down
#define FILE_sm80(stage)                 stage /* the .cu file that instantiates the row */
#define FILE_sm90a(stage)                stage "_sm90a"
#define FILE_sm90a_bare(stage)           stage "_sm90a"
#define FILE_sm90a_swap(stage)           stage "_swap_sm90a"
#define FILE_sm90a_plain(stage)          stage "_swap_sm90a"
#define FILE_sm90a_high(stage)           stage "_high_sm90a"
#define FILE_sm90a_wide(stage)           stage "_high_sm90a"
#define FILE_sm90a_joined(stage)         stage "_joined_sm90a"
#define FILE_sm90a_joined_bare(stage)    stage "_joined_sm90a"
#define FILE_sm90a_split(stage)          stage "_split_sm90a"
#define FILE_sm90a_decode(stage)         stage "_decode_sm90a"
#define FILE_sm90a_decode_bare(stage)    stage "_decode_sm90a"

static const moe_kernel_row KERNELS[] = {
    [KERNEL_ALIGN_FEW] = {"moe_align_few", "align", 0, 80, sizeof(moe_align_args)},
    [KERNEL_ALIGN_WHOLE] = {"moe_align_whole", "align", MOE_SMEM_ALL, 80, sizeof(moe_align_args)},
    [KERNEL_ALIGN_CLUSTER] = {"moe_align_cluster", "align_cluster_sm90a", MOE_SMEM_ALL, 90,
                              sizeof(moe_align_args)},
    [KERNEL_ALIGN_COUNT] = {"moe_align_count", "align", 0, 80, sizeof(moe_align_args)},
    [KERNEL_ALIGN_PLACE] = {"moe_align_place", "align", MOE_SMEM_ALL, 80, sizeof(moe_align_args)},
    [KERNEL_ALIGN_TILES] = {"moe_align_tiles", "align", 0, 80, sizeof(moe_align_args)},
    [KERNEL_ALIGN_PAD] = {"moe_align_pad", "align", 0, 80, sizeof(moe_pad_args)},
    [KERNEL_COMBINE_BF16] = {"moe_combine_bf16", "combine", 0, 80, sizeof(moe_combine_args)},
    [KERNEL_COMBINE_F16] = {"moe_combine_f16", "combine", 0, 80, sizeof(moe_combine_args)},
    [KERNEL_COMBINE_BF16_2] = {"moe_combine_bf16_2", "combine", 0, 80, sizeof(moe_combine_args)},
    [KERNEL_COMBINE_F16_2] = {"moe_combine_f16_2", "combine", 0, 80, sizeof(moe_combine_args)},
    [KERNEL_COMBINE_BF16_4] = {"moe_combine_bf16_4", "combine", 0, 80, sizeof(moe_combine_args)},
    [KERNEL_COMBINE_F16_4] = {"moe_combine_f16_4", "combine", 0, 80, sizeof(moe_combine_args)},
    [KERNEL_COMBINE_BF16_5] = {"moe_combine_bf16_5", "combine", 0, 80, sizeof(moe_combine_args)},
    [KERNEL_COMBINE_F16_5] = {"moe_combine_f16_5", "combine", 0, 80, sizeof(moe_combine_args)},
    [KERNEL_COMBINE_BF16_ANY] = {"moe_combine_bf16_any", "combine", 0, 80,
                                 sizeof(moe_combine_args)},
    [KERNEL_COMBINE_F16_ANY] = {"moe_combine_f16_any", "combine", 0, 80, sizeof(moe_combine_args)},
    [KERNEL_DOWN_FILL] = {"moe_down_fill", "down_add_sm90a", 0, 90, sizeof(moe_fill_args)},
    [KERNEL_HOPPER_PROBE] = {"moe_hopper_probe", "hopper_probe", 0, 90, 0},
    {"moe_route_general_4", "route", 0, 80, sizeof(moe_route_args)},
    {"moe_route_general_8", "route", 0, 80, sizeof(moe_route_args)},
    {"moe_route_general_16", "route", 0, 80, sizeof(moe_route_args)},
    {"moe_route_general_32", "route", 0, 80, sizeof(moe_route_args)},
#define MOE_ROUTE_VARIANT(name, held, packed, score, key, groups)                                  \
    {"moe_route_" #name, "route", 0, 80, sizeof(moe_route_plain_args)},
#include "../../kernels/route_variants.def"
#define MOE_ROUTE_ALIGN_VARIANT(name, held, packed, score, key, groups)                            \
    {"moe_route_align_" #name, "route_align", 0, 80, sizeof(moe_route_align_args)},
#include "../../kernels/route_variants.def"
#define MOE_GEMM_VARIANT(name, arch, stage, act, weight, scale, orient, layout, rows, cols, k,     \
                         stages, wm, wn, wk, cluster, align)                                       \
    {#name,                                                                                        \
     FILE_##arch(#stage),                                                                          \
     MOE_GEMM_SMEM_##arch(rows, cols, k, stages),                                                  \
     ARCH_##arch,                                                                                  \
     sizeof(PARAMS_##arch##_##stage),                                                              \
     MAPS_##arch##_##stage},
#include "../../kernels/gemm_variants.def"
#undef MOE_GEMM_VARIANT
};

enum { NUM_KERNELS = sizeof KERNELS / sizeof *KERNELS };
_Static_assert(sizeof KERNELS / sizeof *KERNELS <= (size_t)MOE_MAX_KERNELS,
               "moe_device.kernels holds a function per row");

const moe_kernel_row *moe_kernel_table(int *count)
{
    *count = NUM_KERNELS;
    return KERNELS;
}

typedef struct geometry {
    int64_t blocks;
    int threads;
    int smem_bytes;
    bool dependent; /* may start before the kernel in front of it has ended */
    int cluster;    /* blocks of one; 0: there are none */
} geometry;

static atomic_bool synchronise_launches, leave_out_launches, ptx_only;

static bool is_one(const char *name)
{
    const char *text = getenv(name);
    return text && strcmp(text, "1") == 0;
}

void moe_cuda_read_environment(void)
{
    atomic_store_explicit(&synchronise_launches, is_one("FUSEDMOE_SYNC"), memory_order_relaxed);
    atomic_store_explicit(&leave_out_launches, is_one("FUSEDMOE_NO_LAUNCH"), memory_order_relaxed);
    const char *jit = getenv("CUDA_FORCE_PTX_JIT"); /* the driver's: it takes no machine code */
    atomic_store_explicit(&ptx_only, jit && *jit && strcmp(jit, "0") != 0, memory_order_relaxed);
}

bool moe_cuda_ptx_only(void)
{
    return atomic_load_explicit(&ptx_only, memory_order_relaxed);
}

/* FUSEDMOE_SYNC=1: waits for the kernel and names it where it failed; not while the stream is being captured. */
static int synchronise(const moe_driver *driver, CUstream stream, const char *name, moe_error *err)
{
    CUstreamCaptureStatus capturing = CU_STREAM_CAPTURE_STATUS_NONE;
    driver->cuStreamIsCapturing(stream, &capturing);
    if (capturing != CU_STREAM_CAPTURE_STATUS_NONE) return MOE_OK;
    CUresult code = driver->cuStreamSynchronize(stream);
    char what[96];
    snprintf(what, sizeof what, "kernel %s failed while running", name);
    return code == CUDA_SUCCESS ? MOE_OK : moe_cuda_fail(driver, code, what, err);
}

/* keys: of the maps that the kernel takes, or NULL where it takes none. */
static int launch_mapped(int kernel, const geometry *g, void *args, const moe_tensor_key *keys,
                         int device, void *stream, moe_error *err)
{
    const moe_driver *driver = NULL;
    moe_device *state = NULL;
    int pushed = 0;
    if (moe_driver_get(&driver, err) || moe_device_get(device, &state, err)) return err->status;
    CUfunction function = state->kernels[kernel].function;
    if (!function)
        return moe_fail(err, MOE_ERROR_NOT_IMPLEMENTED, "device: kernel %s has no code for %s",
                        KERNELS[kernel].name, state->info.name);
    if (g->blocks < 1 || g->blocks > INT32_MAX)
        return moe_fail(err, MOE_ERROR_VALUE, "num_tokens: %s would need %lld thread blocks",
                        KERNELS[kernel].name, (long long)g->blocks);
    if (atomic_load_explicit(&leave_out_launches, memory_order_relaxed)) return MOE_OK;
    CUlaunchAttribute attributes[2];
    unsigned num_attributes = 0;
    memset(attributes, 0, sizeof attributes);
    if (g->dependent && state->kernels[kernel].dependent) {
        attributes[num_attributes].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attributes[num_attributes++].value.programmaticStreamSerializationAllowed = 1;
    }
    if (g->cluster > 0) {
        attributes[num_attributes].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attributes[num_attributes].value.clusterDim.x = (unsigned)g->cluster;
        attributes[num_attributes].value.clusterDim.y = 1;
        attributes[num_attributes++].value.clusterDim.z = 1;
    }
    CUlaunchConfig config;
    memset(&config, 0, sizeof config);
    config.gridDimX = (unsigned)g->blocks;
    config.gridDimY = config.gridDimZ = 1;
    config.blockDimX = (unsigned)g->threads;
    config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = (unsigned)g->smem_bytes;
    config.hStream = stream;
    config.attrs = attributes;
    config.numAttrs = num_attributes;
    CUtensorMap maps[MOE_MAX_MAPS];
    void *params[1 + MOE_MAX_MAPS] = {args};
    if (moe_context_enter(driver, state, &pushed, err)) return err->status;
    for (int i = 0; i < KERNELS[kernel].maps && !err->status; ++i) {
        moe_tensor_map_get(driver, device, &keys[i], &maps[i], err);
        params[i + 1] = &maps[i];
    }
    if (err->status) {
        moe_context_leave(driver, pushed);
        return err->status;
    }
    CUresult code = driver->cuLaunchKernelEx(&config, function, params, NULL);
    if (code != CUDA_SUCCESS) {
        char what[96];
        snprintf(what, sizeof what, "launching kernel %s failed", KERNELS[kernel].name);
        moe_cuda_fail(driver, code, what, err);
    } else if (atomic_load_explicit(&synchronise_launches, memory_order_relaxed)) {
        synchronise(driver, stream, KERNELS[kernel].name, err);
    }
    moe_context_leave(driver, pushed);
    return err->status;
}

static int launch(int kernel, const geometry *g, void *args, int device, void *stream,
                  moe_error *err)
{
    return launch_mapped(kernel, g, args, NULL, device, stream, err);
}

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static moe_route_plain_args plain_args(const moe_route_args *a)
{
    const moe_route_plain_args plain = {
        .router_logits = a->router_logits,
        .topk_weights = a->topk_weights,
        .topk_ids = a->topk_ids,
        .correction_bias = a->bias == MOE_BIAS_KEY ? a->correction_bias : NULL,
        .num_token_non_padded = a->num_token_non_padded,
        .logits_stride = a->logits_stride,
        .weights_stride = a->weights_stride,
        .ids_stride = a->ids_stride,
        .num_tokens = a->num_tokens,
        .first_token = a->first_token,
        .num_experts = a->num_experts,
        .topk = a->topk,
        .num_groups = a->num_groups,
        .topk_groups = a->topk_groups,
        .groups = a->groups,
        .logits_dtype = a->logits_dtype,
        .bias_dtype = a->bias_dtype,
        .ids_dtype = a->ids_dtype,
        .score = a->score,
        .renormalize = a->renormalize,
        .scale = a->scale,
    };
    return plain;
}

int moe_cuda_route(const moe_plan *plan, const moe_route_args *args, int device, void *stream,
                   moe_error *err)
{
    const geometry g = {ceil_div(args->num_tokens, plan->route_threads / 32), plan->route_threads,
                        0, true, 0};
    const int32_t variant = moe_route_variant(args);
    if (variant < 0) {
        moe_route_args a = *args;
        const int tier = (a.num_experts > 128) + (a.num_experts > 256) + (a.num_experts > 512);
        return launch(KERNEL_ROUTE_GENERAL + tier, &g, &a, device, stream, err);
    }
    moe_route_plain_args a = plain_args(args);
    return launch(KERNEL_ROUTE_GENERAL + 4 + variant, &g, &a, device, stream, err);
}

int moe_cuda_route_align(const moe_plan *plan, const moe_route_args *route,
                         const moe_align_args *align, int device, void *stream, moe_error *err)
{
    (void)plan;
    moe_route_align_args a = {plain_args(route), *align};
    const geometry g = {1, MOE_ROUTE_ALIGN_THREADS, 0, true, 0};
    return launch(KERNEL_LAST_ROUTE + 1 + moe_route_variant(route), &g, &a, device, stream, err);
}

int moe_cuda_align(const moe_plan *plan, const moe_align_args *args, int device, void *stream,
                   moe_error *err)
{
    moe_align_args a = *args;
    const moe_align_plan *align = &plan->align;
    const int64_t share = ceil_div(ceil_div(a.num_tokens * a.topk, a.num_blocks), 4) * 4;
    geometry g = {align->blocks, align->threads, 0, true, 0};
    int kernel = KERNEL_ALIGN_FEW;
    if (align->kind == MOE_ALIGN_WHOLE) {
        kernel = KERNEL_ALIGN_WHOLE;
        g.smem_bytes = (int)MOE_ALIGN_SMEM_BYTES(a.num_experts, share);
    } else if (align->kind == MOE_ALIGN_CLUSTERS) {
        kernel = KERNEL_ALIGN_CLUSTER;
        g.smem_bytes = (int)MOE_ALIGN_CLUSTER_SMEM_BYTES(a.num_experts, share);
        g.cluster = MOE_ALIGN_CLUSTER;
    } else if (align->kind == MOE_ALIGN_TWICE) {
        const geometry count = {align->count_blocks, MOE_ALIGN_THREADS,
                                align->blocks / align->count_blocks * a.num_experts * 4, true, 0};
        if (launch(KERNEL_ALIGN_COUNT, &count, &a, device, stream, err)) return err->status;
        kernel = KERNEL_ALIGN_PLACE;
        g.smem_bytes = (int)MOE_ALIGN_PIECE_SMEM_BYTES(a.num_experts, a.piece_slots);
    }
    return launch(kernel, &g, &a, device, stream, err);
}

int moe_cuda_align_tiles(const moe_plan *plan, const moe_align_args *args, int device, void *stream,
                         moe_error *err)
{
    (void)plan;
    moe_align_args a = *args;
    const geometry g = {1, MOE_ALIGN_THREADS, 0, true, 0};
    return launch(KERNEL_ALIGN_TILES, &g, &a, device, stream, err);
}

int moe_cuda_align_pad(const moe_plan *plan, const moe_pad_args *args, int device, void *stream,
                       moe_error *err)
{
    moe_pad_args a = *args;
    const int64_t blocks = a.sorted_token_ids ? ceil_div(a.capacity, MOE_ALIGN_THREADS) : 1,
                  most = 2 * plan->num_sms;
    const geometry g = {blocks < 1      ? 1
                        : blocks < most ? blocks
                                        : most,
                        MOE_ALIGN_THREADS, 0, true, 0};
    return launch(KERNEL_ALIGN_PAD, &g, &a, device, stream, err);
}

static geometry gemm_geometry(const moe_gemm_plan *gemm, int32_t max_tiles)
{
    int64_t blocks = (int64_t)gemm->grid_cols * max_tiles;
    if (gemm->max_blocks > 0 && blocks > gemm->max_blocks) blocks = gemm->max_blocks;
    if (gemm->cluster_blocks > 0) blocks *= gemm->cluster_blocks;
    const geometry g = {blocks, gemm->threads, gemm->smem_bytes, true, gemm->cluster_blocks};
    return g;
}

/* Strides in elements. An expert, half or row that is the only one has no stride to speak of. */
static moe_tensor_key tensor_key(const void *data, int32_t dtype, int32_t box_rows, int64_t k,
                                 int64_t rows, int64_t halves, int64_t experts, int64_t row_stride,
                                 int64_t half_stride, int64_t expert_stride)
{
    const uint64_t bytes = (uint64_t)moe_dtype_bytes(dtype);
    moe_tensor_key key = {
        .address = (uint64_t)(uintptr_t)data,
        .dims = {(uint64_t)k, (uint64_t)rows, (uint64_t)halves, (uint64_t)experts},
        .dtype = (uint16_t)dtype,
        .fetch_bytes = 128,
        .box_rows = (uint32_t)box_rows,
        .box_halves = 1,
    };
    key.strides[0] = bytes * (uint64_t)(rows > 1 ? row_stride : k);
    key.strides[1] = halves > 1 ? bytes * (uint64_t)half_stride : key.strides[0];
    key.strides[2] = experts > 1 ? bytes * (uint64_t)expert_stride : key.strides[0];
    return key;
}

static moe_tensor_key w13_key(const moe_gate_up_args *a, int32_t box_rows)
{
    const bool interleaved = a->w13_order == MOE_ORDER_INTERLEAVED;
    const int64_t stride = a->w13_row_stride;
    return tensor_key(a->w13, a->dtype, box_rows, a->hidden_size, a->intermediate_size,
                      a->gated ? 2 : 1, a->num_experts, interleaved ? 2 * stride : stride,
                      interleaved ? stride : a->intermediate_size * stride, a->w13_expert_stride);
}

static moe_tensor_key w2_key(const moe_down_args *a, int32_t box_rows)
{
    return tensor_key(a->w2, a->dtype, box_rows, a->intermediate_size, a->hidden_size, 1,
                      a->num_experts, a->w2_row_stride, 0, a->w2_expert_stride);
}

int moe_cuda_gate_up(const moe_plan *plan, const moe_gate_up_args *args, int device, void *stream,
                     moe_error *err)
{
    moe_gate_up_args a = *args;
    const geometry g = gemm_geometry(&plan->gate_up, plan->max_tiles);
    moe_tensor_key weights = w13_key(&a, plan->gate_up.weight_box);
    weights.fetch_bytes = (uint16_t)plan->gate_up.fetch_bytes;
    return launch_mapped(KERNEL_FIRST_VARIANT + plan->gate_up.variant, &g, &a, &weights, device,
                         stream, err);
}

/* w2 for the kernels whose results leave from registers: [experts, 4, hidden_size / 4, I]. A box is every fourth row of four
 * times as many, then the rows one further, and so on: down_wgmma.cuh has use for that order. */
static moe_tensor_key w2_fourths_key(const moe_down_args *a, int32_t box_rows)
{
    moe_tensor_key key =
        tensor_key(a->w2, a->dtype, box_rows / 4, a->intermediate_size, a->hidden_size / 4, 4,
                   a->num_experts, 4 * a->w2_row_stride, a->w2_row_stride, a->w2_expert_stride);
    key.box_halves = 4;
    return key;
}

static moe_tensor_key rows_key(const moe_down_args *a, int32_t box_rows)
{
    return tensor_key(a->intermediate, a->dtype, box_rows, a->intermediate_size, a->num_slots, 1, 1,
                      a->intermediate_stride, 0, 0);
}

int moe_cuda_experts(const moe_plan *plan, const moe_experts_args *args, int device, void *stream,
                     moe_error *err)
{
    moe_experts_args a = *args;
    moe_gemm_plan both = plan->gate_up;
    both.grid_cols += plan->down.grid_cols;
    const geometry g = gemm_geometry(&both, plan->max_tiles);
    moe_tensor_key keys[5] = {w13_key(&a.gate_up, plan->gate_up.weight_box),
                              w2_key(&a.down, plan->down.weight_box)};
    keys[0].fetch_bytes = (uint16_t)plan->gate_up.fetch_bytes;
    keys[1].fetch_bytes = (uint16_t)plan->down.fetch_bytes;
    if (plan->down.weight_fourths) {
        keys[1] = w2_fourths_key(&a.down, plan->down.weight_box);
        keys[2] = rows_key(&a.down, plan->down.token_box);
    }
    if (plan->high_rows) {
        keys[2] = w13_key(&a.gate_up, MOE_GEMM_WEIGHT_BOX_sm90a(plan->high_cols));
        keys[3] = w2_fourths_key(&a.down, MOE_GEMM_WEIGHT_BOX_sm90a(MOE_HIGH_DOWN_COLS));
        keys[4] = rows_key(&a.down, MOE_GEMM_TOKEN_BOX_sm90a(MOE_HIGH_ROWS));
    }
    return launch_mapped(KERNEL_FIRST_VARIANT + plan->gate_up.variant, &g, &a, keys, device, stream,
                         err);
}

int moe_cuda_gate_up_decode(const moe_plan *plan, const moe_gate_up_decode_args *args, int device,
                            void *stream, moe_error *err)
{
    moe_gate_up_decode_args a = *args;
    const geometry g = gemm_geometry(&plan->gate_up, plan->max_tiles);
    moe_tensor_key keys[2];
    keys[0] =
        w13_key(&a.stage, a.stage.gated ? plan->gate_up.weight_box / 2 : plan->gate_up.weight_box);
    keys[0].box_halves = a.stage.gated ? 2 : 1;
    keys[1] = keys[0];
    keys[0].box_chunks = MOE_DECODE_MATH_WARPS;
    return launch_mapped(KERNEL_FIRST_VARIANT + plan->gate_up.variant, &g, &a, keys, device, stream,
                         err);
}

/* args: moe_down_args or what begins with them. */
static int launch_down(const moe_plan *plan, const moe_down_args *a, void *args, int device,
                       void *stream, moe_error *err)
{
    geometry g = gemm_geometry(&plan->down, plan->max_tiles);
    /* down reads the work list before it waits, which only gate_up in front of it makes safe */
    g.dependent = plan->problem.operation != MOE_OP_DOWN;
    const int32_t box = plan->down.weight_box;
    moe_tensor_key keys[2] = {plan->down.weight_fourths ? w2_fourths_key(a, box) : w2_key(a, box),
                              rows_key(a, plan->down.token_box)};
    keys[0].fetch_bytes = (uint16_t)plan->down.fetch_bytes;
    return launch_mapped(KERNEL_FIRST_VARIANT + plan->down.variant, &g, args, keys, device, stream,
                         err);
}

int moe_cuda_down(const moe_plan *plan, const moe_down_args *args, int device, void *stream,
                  moe_error *err)
{
    moe_down_args a = *args;
    return launch_down(plan, &a, &a, device, stream, err);
}

int moe_cuda_down_add(const moe_plan *plan, const moe_down_add_args *args, int device, void *stream,
                      moe_error *err)
{
    moe_down_add_args a = *args;
    return launch_down(plan, &a.stage, &a, device, stream, err);
}

int moe_cuda_down_decode(const moe_plan *plan, const moe_down_decode_args *args, int device,
                         void *stream, moe_error *err)
{
    moe_down_decode_args a = *args;
    const geometry g = gemm_geometry(&plan->down, plan->max_tiles);
    moe_tensor_key keys[2];
    keys[0] = keys[1] = w2_key(&a.stage, plan->down.weight_box);
    keys[0].box_chunks = (uint32_t)a.box_chunks;
    return launch_mapped(KERNEL_FIRST_VARIANT + plan->down.variant, &g, &a, keys, device, stream,
                         err);
}

int moe_cuda_combine(const moe_plan *plan, const moe_combine_args *args, int device, void *stream,
                     moe_error *err)
{
    moe_combine_args a = *args;
    const int32_t slots = plan->combine_slots;
    int kernel = slots == 0   ? KERNEL_COMBINE_BF16_ANY
                 : slots == 2 ? KERNEL_COMBINE_BF16_2
                 : slots == 4 ? KERNEL_COMBINE_BF16_4
                 : slots == 5 ? KERNEL_COMBINE_BF16_5
                              : KERNEL_COMBINE_BF16;
    if (a.dtype != MOE_BF16) ++kernel;
    const int32_t tokens = MOE_COMBINE_IN_FLIGHT / (slots > 0 ? slots : MOE_COMBINE_IN_FLIGHT);
    const int64_t blocks = MOE_COMBINE_BLOCKS(ceil_div(a.num_tokens, tokens), a.hidden_size);
    const geometry g = {blocks < (1 << 30) ? blocks : 1 << 30, MOE_COMBINE_THREADS, 0, true, 0};
    return launch(kernel, &g, &a, device, stream, err);
}

int moe_cuda_fill(const moe_plan *plan, const moe_fill_args *args, int device, void *stream,
                  moe_error *err)
{
    moe_fill_args a = *args;
    const int64_t most = (int64_t)MOE_FILL_BLOCKS * plan->num_sms;
    const geometry g = {a.num_tokens < most ? a.num_tokens : most, MOE_FILL_THREADS, 0, true, 0};
    return launch(KERNEL_DOWN_FILL, &g, &a, device, stream, err);
}

/* ------------------------------------------------------------------------------------------------
 * The Hopper probe: C [64, 64] = A [64, 64] B [64, 64]^T through tensor maps, TMA and wgmma. */

enum { PROBE = 64 };

static int encode_probe(const moe_driver *driver, CUtensorMap *map, void *data, moe_error *err)
{
    const cuuint64_t dims[2] = {PROBE, PROBE}, strides[1] = {PROBE * 2};
    const cuuint32_t box[2] = {PROBE, PROBE}, steps[2] = {1, 1};
    CUresult code = driver->cuTensorMapEncodeTiled(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data, dims, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return code == CUDA_SUCCESS ? MOE_OK
                                : moe_cuda_fail(driver, code, "cuTensorMapEncodeTiled", err);
}

/* Small integers in bf16, so that the product is exact in f32. */
static int probe_value(int matrix, int row, int column)
{
    return (row * 7 + column * (matrix ? 5 : 3) + matrix) % 9 - 4;
}

static uint16_t bf16_of_small(int value)
{
    float f = (float)value;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static int run_probe(const moe_driver *driver, moe_device *state, int device, CUdeviceptr buffer,
                     double *max_error, moe_error *err)
{
    enum { BYTES = PROBE * PROBE * 2 };
    uint16_t a[PROBE * PROBE], b[PROBE * PROBE];
    float c[PROBE * PROBE];
    for (int i = 0; i < PROBE * PROBE; ++i) {
        a[i] = bf16_of_small(probe_value(0, i / PROBE, i % PROBE));
        b[i] = bf16_of_small(probe_value(1, i / PROBE, i % PROBE));
    }
    char *base = (char *)(uintptr_t)buffer;
    if (moe_cuda_copy(device, base, a, BYTES, MOE_COPY_TO_DEVICE, err)) return err->status;
    if (moe_cuda_copy(device, base + BYTES, b, BYTES, MOE_COPY_TO_DEVICE, err)) return err->status;
    CUtensorMap map_a, map_b;
    if (encode_probe(driver, &map_a, base, err) || encode_probe(driver, &map_b, base + BYTES, err))
        return err->status;
    CUdeviceptr out = buffer + 2 * BYTES;
    void *params[] = {&map_a, &map_b, &out};
    CUlaunchConfig config;
    memset(&config, 0, sizeof config);
    config.gridDimX = config.gridDimY = config.gridDimZ = 1;
    config.blockDimX = 128;
    config.blockDimY = config.blockDimZ = 1;
    CUresult code = driver->cuLaunchKernelEx(&config, state->kernels[KERNEL_HOPPER_PROBE].function,
                                             params, NULL);
    if (code != CUDA_SUCCESS)
        return moe_cuda_fail(driver, code, "launching kernel moe_hopper_probe failed", err);
    if (moe_cuda_copy(device, c, base + 2 * BYTES, (int64_t)sizeof c, MOE_COPY_TO_HOST, err))
        return err->status;
    *max_error = 0;
    for (int i = 0; i < PROBE; ++i)
        for (int j = 0; j < PROBE; ++j) {
            int want = 0;
            for (int k = 0; k < PROBE; ++k)
                want += probe_value(0, i, k) * probe_value(1, j, k);
            double off = (double)c[i * PROBE + j] - want;
            if (off < 0) off = -off;
            if (!(off <= *max_error)) *max_error = off; /* a NaN stays */
        }
    return MOE_OK;
}

int moe_cuda_probe_hopper(int device, double *max_error, moe_error *err)
{
    const moe_driver *driver = NULL;
    moe_device *state = NULL;
    void *buffer = NULL;
    int pushed = 0;
    if (moe_driver_get(&driver, err) || moe_device_get(device, &state, err)) return err->status;
    if (!state->kernels[KERNEL_HOPPER_PROBE].function)
        return moe_fail(
            err, MOE_ERROR_NOT_IMPLEMENTED,
            "device: the Hopper probe is sm_90a machine code, which %s (compute capability "
            "%d.%d) does not run%s",
            state->info.name, state->info.capability / 10, state->info.capability % 10,
            state->info.capability == 90 ? " while CUDA_FORCE_PTX_JIT is set" : "");
    if (moe_cuda_alloc(device, PROBE * PROBE * 8, &buffer, err)) return err->status;
    if (!moe_context_enter(driver, state, &pushed, err)) {
        run_probe(driver, state, device, (CUdeviceptr)(uintptr_t)buffer, max_error, err);
        moe_context_leave(driver, pushed);
    }
    moe_cuda_free(device, buffer);
    return err->status;
}
