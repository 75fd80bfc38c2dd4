/* validate.c: every check that the tensors and scalars of a call need, in one place.
 *
 * A message names the argument, what was expected and what came. The order is fixed: kind and dtype
 * (TypeError), then rank and extents, strides, alignment, device and overlap (ValueError), then
 * combinations that no kernel serves (NotImplementedError). Nothing is written but the problem. */
#include "moe.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define MAX_MAP_STRIDE ((int64_t)1 << 39) /* bytes; twice that is what a tensor map can have */
#define MAX_EXTENT     ((int64_t)1 << 30) /* hidden_size, intermediate_size: 2 * I still fits 32 bits */
#define MAX_SLOTS      (((int64_t)1 << 31) - 1)

enum { TEXT = 160 };

/* What one tensor argument has to look like. shape -1: any extent (at least 1 unless it is the tokens). */
#define BIT(dtype) (1u << (dtype))

typedef struct expectation {
    const char *name;
    const moe_tensor *tensor;
    uint32_t dtypes; /* accepted: a bit each */
    int32_t ndim;
    int64_t shape[3];
    const char *shape_text; /* "[num_tokens, hidden_size]" */
    bool written;
} expectation;

static void shape_text(const int64_t *shape, int32_t ndim, char *text, size_t size)
{
    size_t used = (size_t)snprintf(text, size, "[");
    for (int i = 0; i < ndim && used < size; ++i) {
        int wrote = shape[i] < 0
                        ? snprintf(text + used, size - used, "%sany", i ? ", " : "")
                        : snprintf(text + used, size - used, "%s%" PRId64, i ? ", " : "", shape[i]);
        used += wrote > 0 ? (size_t)wrote : 0;
    }
    if (used < size) snprintf(text + used, size - used, "]");
}

static const char *dtypes_text(uint32_t dtypes, char *text, size_t size)
{
    size_t used = 0;
    text[0] = 0;
    for (int32_t dtype = 0; dtypes != 0 && used < size; ++dtype) {
        if (!(dtypes & BIT(dtype))) continue;
        dtypes &= ~BIT(dtype);
        int wrote = snprintf(text + used, size - used, "%s%s",
                             used == 0     ? ""
                             : dtypes == 0 ? " or "
                                           : ", ",
                             moe_dtype_name(dtype));
        used += wrote > 0 ? (size_t)wrote : 0;
    }
    return text;
}

/* kind, dtype, rank, extents, strides, element alignment, read-only. Texts are made where a check fails
 * only: ten tensors of a call that is right have to cost nanoseconds. */
static int check_tensor(const expectation *want, moe_error *err)
{
    const moe_tensor *t = want->tensor;
    char got[TEXT], dtypes[TEXT];
    if (!tensor_present(t))
        return moe_fail(err, MOE_ERROR_TYPE, "%s: expected a %s tensor %s, got None", want->name,
                        dtypes_text(want->dtypes, dtypes, sizeof dtypes), want->shape_text);
    if (t->dtype == MOE_DTYPE_NONE || !(want->dtypes & BIT(t->dtype)))
        return moe_fail(err, MOE_ERROR_TYPE, "%s: expected dtype %s, got %s", want->name,
                        dtypes_text(want->dtypes, dtypes, sizeof dtypes),
                        moe_tensor_text(t, got, sizeof got));
    if (t->ndim != want->ndim)
        return moe_fail(err, MOE_ERROR_VALUE, "%s: expected %d dimensions %s, got %s", want->name,
                        want->ndim, want->shape_text, moe_tensor_text(t, got, sizeof got));
    for (int i = 0; i < t->ndim; ++i) {
        if (want->shape[i] >= 0 && t->shape[i] != want->shape[i]) {
            char expected[TEXT];
            shape_text(want->shape, want->ndim, expected, sizeof expected);
            return moe_fail(err, MOE_ERROR_VALUE, "%s: expected shape %s (%s), got %s", want->name,
                            expected, want->shape_text, moe_tensor_text(t, got, sizeof got));
        }
    }
    if (t->span_bytes == 0) return MOE_OK;
    int64_t bytes = moe_dtype_bytes(t->dtype);
    for (int i = 0; i < t->ndim; ++i) {
        if (t->shape[i] > 1 && t->stride[i] < 0)
            return moe_fail(err, MOE_ERROR_VALUE,
                            "%s: expected strides of at least 0, got %" PRId64 " in dimension %d",
                            want->name, t->stride[i], i);
        int64_t span; /* a division would cost more than all of this */
        if (t->shape[i] > 1 &&
            (__builtin_mul_overflow(t->stride[i], t->shape[i], &span) || span > INT64_MAX / 16))
            return moe_fail(err, MOE_ERROR_VALUE,
                            "%s: stride %" PRId64 " times extent %" PRId64 " overflows 64 bits",
                            want->name, t->stride[i], t->shape[i]);
    }
    int last = t->ndim - 1;
    if (t->shape[last] > 1 && t->stride[last] != 1)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "%s: expected a last dimension of stride 1, got stride %" PRId64 " (%s)",
                        want->name, t->stride[last], moe_tensor_text(t, got, sizeof got));
    if (t->data == NULL)
        return moe_fail(err, MOE_ERROR_VALUE, "%s: expected memory, got a null pointer (%s)",
                        want->name, moe_tensor_text(t, got, sizeof got));
    if ((uintptr_t)t->data & (uintptr_t)(bytes - 1)) /* every size is a power of two */
        return moe_fail(err, MOE_ERROR_VALUE,
                        "%s: expected data aligned to its element size of %" PRId64
                        " bytes, got address modulo %" PRId64 " = %d",
                        want->name, bytes, bytes, (int)((uintptr_t)t->data % (uintptr_t)bytes));
    if (want->written) {
        if (t->readonly)
            return moe_fail(err, MOE_ERROR_VALUE,
                            "%s: expected a writable tensor, got a read-only one", want->name);
        /* rows of an output may be apart, never on top of each other */
        int64_t reach = 1;
        for (int i = last; i >= 0; --i) {
            if (t->shape[i] > 1 && t->stride[i] < reach)
                return moe_fail(err, MOE_ERROR_VALUE,
                                "%s: expected elements that do not overlap, got stride %" PRId64
                                " in dimension %d where at least %" PRId64 " is needed",
                                want->name, t->stride[i], i, reach);
            if (t->shape[i] > 1) reach = (t->shape[i] - 1) * t->stride[i] + reach;
        }
    }
    return MOE_OK;
}

static int fail_device(const char *name, const moe_tensor *t, const char *like_name,
                       const moe_tensor *like, moe_error *err)
{
    char want[32], got[32];
    if (like->backend == MOE_CPU)
        snprintf(want, sizeof want, "cpu");
    else
        snprintf(want, sizeof want, "cuda:%d", like->device);
    if (t->backend == MOE_CPU)
        snprintf(got, sizeof got, "cpu");
    else
        snprintf(got, sizeof got, "cuda:%d", t->device);
    return moe_fail(err, MOE_ERROR_VALUE, "%s: expected device %s like %s, got %s", name, want,
                    like_name, got);
}

static inline int check_device(const char *name, const moe_tensor *t, const char *like_name,
                               const moe_tensor *like, moe_error *err)
{
    if (!tensor_present(t) || (t->backend == like->backend && t->device == like->device))
        return MOE_OK;
    return fail_device(name, t, like_name, like, err);
}

static bool overlaps(const moe_tensor *a, const moe_tensor *b)
{
    if (!tensor_present(b) || a->span_bytes == 0 || b->span_bytes == 0) return false;
    const uintptr_t a_begin = (uintptr_t)a->data, b_begin = (uintptr_t)b->data;
    return a_begin < b_begin + (uintptr_t)b->span_bytes &&
           b_begin < a_begin + (uintptr_t)a->span_bytes && a->backend == b->backend &&
           a->device == b->device;
}

/* Same memory, same layout: safe where an element is read before the same element is written. */
static bool identical(const moe_tensor *a, const moe_tensor *b)
{
    if (a->data != b->data || a->ndim != b->ndim || a->dtype != b->dtype) return false;
    for (int i = 0; i < a->ndim; ++i)
        if (a->shape[i] != b->shape[i] || (a->shape[i] > 1 && a->stride[i] != b->stride[i]))
            return false;
    return true;
}

static int check_extent(const char *name, const char *what, int64_t value, int64_t low,
                        int64_t high, moe_error *err)
{
    if (value >= low && value <= high) return MOE_OK;
    return moe_fail(err, MOE_ERROR_VALUE,
                    "%s: expected %s in %" PRId64 " .. %" PRId64 ", got %" PRId64, name, what, low,
                    high, value);
}

static int check_slots(const char *name, int64_t num_tokens, int64_t topk, moe_error *err)
{
    if (check_extent(name, "topk", topk, 1, MOE_MAX_TOPK, err)) return err->status;
    if (num_tokens > MAX_SLOTS / topk)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "%s: expected num_tokens * topk below 2^31, got %" PRId64 " * %" PRId64,
                        name, num_tokens, topk);
    return MOE_OK;
}

/* 16 where every row starts on 16 bytes and holds whole 16-byte pieces, and strides are such as tensor maps have,
 * else the element's size */
static int32_t vector_bytes(const moe_tensor *t, int32_t so_far)
{
    if (!tensor_present(t) || t->span_bytes == 0) return so_far;
    int64_t bytes = moe_dtype_bytes(t->dtype), last = t->ndim - 1;
    bool aligned = (uintptr_t)t->data % 16 == 0 && t->shape[last] * bytes % 16 == 0;
    for (int i = 0; i < last; ++i)
        aligned =
            aligned && (t->shape[i] <= 1 || (t->stride[i] * bytes % 16 == 0 && t->stride[i] > 0 &&
                                             t->stride[i] < MAX_MAP_STRIDE / bytes));
    return aligned ? so_far : (int32_t)bytes;
}

/* The same for an output of `columns` elements a row: the caller's tensor, or a compact one still to be allocated. */
static int32_t out_vector_bytes(const moe_tensor *out, int64_t columns, int32_t dtype,
                                int32_t so_far)
{
    int64_t bytes = moe_dtype_bytes(dtype);
    return tensor_present(out)    ? vector_bytes(out, so_far)
           : columns * bytes % 16 ? (int32_t)bytes
                                  : so_far;
}

static int check_activation(const moe_options *o, moe_error *err)
{
    static const char *const NAMES[MOE_ACT_COUNT] = {"silu",  "gelu",       "gelu_tanh",
                                                     "relu2", "swiglu_oai", "situ"};
    bool takes_alpha = o->activation == MOE_ACT_SWIGLU_OAI || o->activation == MOE_ACT_SITU;
    bool takes_limit = takes_alpha || o->activation == MOE_ACT_SILU;
    const char *name = NAMES[o->activation];
    if (o->has_alpha && !takes_alpha)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "activation_alpha: expected None with activation '%s', got %g", name,
                        o->activation_alpha);
    if (o->has_limit && !takes_limit)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "activation_limit: expected None with activation '%s', got %g", name,
                        o->activation_limit);
    if (o->has_alpha && !(isfinite((float)o->activation_alpha) && (float)o->activation_alpha > 0))
        return moe_fail(err, MOE_ERROR_VALUE,
                        "activation_alpha: expected a finite number above 0, got %g",
                        o->activation_alpha);
    if (o->has_limit && !(isfinite((float)o->activation_limit) && (float)o->activation_limit > 0))
        return moe_fail(err, MOE_ERROR_VALUE,
                        "activation_limit: expected a finite number above 0, got %g",
                        o->activation_limit);
    if (!o->gated && o->activation == MOE_ACT_SWIGLU_OAI)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "gated: expected True with activation 'swiglu_oai', got False");
    if (!o->gated && o->w13_order != MOE_ORDER_GATE_UP)
        return moe_fail(
            err, MOE_ERROR_VALUE,
            "w13_order: expected 'gate_up' with gated=False (there is no up half to order)");
    return MOE_OK;
}

static int check_scale(const moe_options *o, moe_error *err)
{
    if (isfinite((float)o->routed_scaling_factor)) return MOE_OK;
    return moe_fail(err, MOE_ERROR_VALUE,
                    "routed_scaling_factor: expected a finite number (float32), got %g",
                    o->routed_scaling_factor);
}

static int check_expert_map(const moe_call *c, const char *like_name, const moe_tensor *like,
                            moe_error *err)
{
    if (!tensor_present(&c->expert_map)) return MOE_OK;
    const expectation map = {"expert_map", &c->expert_map,     BIT(MOE_I32), 1,
                             {-1},         "[global experts]", false};
    if (check_tensor(&map, err)) return err->status;
    if (check_extent("expert_map", "length", c->expert_map.shape[0], 1, MAX_SLOTS, err))
        return err->status;
    if (c->options.has_expert_start)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "expert_start: expected None where expert_map is given, got %" PRId64,
                        c->options.expert_start);
    return check_device("expert_map", &c->expert_map, like_name, like, err);
}

static int check_expert_start(const moe_options *o, moe_error *err)
{
    if (!o->has_expert_start) return MOE_OK;
    return check_extent("expert_start", "a rank's first expert", o->expert_start, 0, MAX_SLOTS,
                        err);
}

typedef struct named_tensor {
    const char *name;
    const moe_tensor *tensor;
} named_tensor;

/* written must not overlap any of the others; in place over `allowed` is fine where the layouts agree */
static int check_overlap(const named_tensor *written, const named_tensor *others, int count,
                         const moe_tensor *const *allowed, int num_allowed, moe_error *err)
{
    if (!tensor_present(written->tensor)) return MOE_OK;
    for (int i = 0; i < count; ++i) {
        if (!overlaps(written->tensor, others[i].tensor)) continue;
        bool fine = false;
        for (int k = 0; k < num_allowed; ++k)
            fine |= others[i].tensor == allowed[k] && identical(written->tensor, allowed[k]);
        if (!fine)
            return moe_fail(err, MOE_ERROR_VALUE,
                            "%s: expected memory of its own, got memory that overlaps %s",
                            written->name, others[i].name);
    }
    return MOE_OK;
}

static int check_workspace(const moe_call *c, const char *like_name, const moe_tensor *like,
                           moe_error *err)
{
    if (!tensor_present(&c->workspace)) return MOE_OK;
    const expectation workspace = {"workspace", &c->workspace, BIT(MOE_U8), 1,
                                   {-1},        "[bytes]",     true};
    if (check_tensor(&workspace, err)) return err->status;
    return check_device("workspace", &c->workspace, like_name, like, err);
}

/* ---- routing --------------------------------------------------------------------------------- */

/* One optional tensor that routing reads: kind, dtype, shape and device. */
static int check_routing_tensor(const expectation *want, const char *like_name,
                                const moe_tensor *like, moe_error *err)
{
    if (!tensor_present(want->tensor)) return MOE_OK;
    if (check_tensor(want, err)) return err->status;
    return check_device(want->name, want->tensor, like_name, like, err);
}

static int check_expert_groups(const moe_options *o, const moe_route_method *m, int64_t experts,
                               moe_error *err)
{
    const int64_t groups = o->num_groups, kept = o->topk_groups;
    if (m->groups == MOE_GROUPS_NONE) {
        if (groups || kept)
            return moe_fail(err, MOE_ERROR_VALUE,
                            "%s: expected None with method '%s', got %" PRId64,
                            groups ? "num_groups" : "topk_groups", m->name, groups ? groups : kept);
        return MOE_OK;
    }
    if (check_extent("num_groups", "a number of groups", groups, 1, MOE_MAX_TOPK, err))
        return err->status;
    if (experts % groups)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "num_groups: expected a divisor of %" PRId64 " experts, got %" PRId64,
                        experts, groups);
    if (m->groups == MOE_GROUPS_QUOTA) {
        if (kept)
            return moe_fail(err, MOE_ERROR_VALUE,
                            "topk_groups: expected None with method '%s', got %" PRId64, m->name,
                            kept);
        if (o->topk % groups)
            return moe_fail(err, MOE_ERROR_VALUE,
                            "topk: expected a multiple of num_groups %" PRId64
                            " with method '%s', got %" PRId64,
                            groups, m->name, o->topk);
        return MOE_OK;
    }
    if (m->groups == MOE_GROUPS_TOP2 && experts / groups < 2)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "num_groups: expected two experts or more in a group with method '%s', "
                        "got %" PRId64 " groups of %" PRId64 " experts",
                        m->name, groups, experts);
    if (check_extent("topk_groups", "a number of groups", kept, 1, groups, err)) return err->status;
    if (o->topk > kept * (experts / groups))
        return moe_fail(err, MOE_ERROR_VALUE,
                        "topk: expected at most the %" PRId64 " experts of topk_groups groups, got "
                        "%" PRId64,
                        kept * (experts / groups), o->topk);
    return MOE_OK;
}

static int check_routing_scalars(const moe_options *o, const moe_route_method *m, moe_error *err)
{
    const int renormalize = o->renormalize;
    if ((m->renormalize == MOE_RENORMALIZE_NEVER && renormalize == 1) ||
        (m->renormalize == MOE_RENORMALIZE_ALWAYS && renormalize == 0))
        return moe_fail(err, MOE_ERROR_VALUE,
                        "renormalize: expected %s or None with method '%s', got %s",
                        renormalize ? "False" : "True", m->name, renormalize ? "True" : "False");
    if (m->score == MOE_SCORE_SPARSEMIXER && o->topk > 2)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "topk: expected 1 or 2 with method '%s', got %" PRId64, m->name, o->topk);
    if (o->method == MOE_ROUTE_llama4 && o->topk != 1)
        return moe_fail(err, MOE_ERROR_VALUE, "topk: expected 1 with method '%s', got %" PRId64,
                        m->name, o->topk);
    if (!isfinite((float)o->softcap) || o->softcap < 0)
        return moe_fail(err, MOE_ERROR_VALUE, "softcap: expected a finite number above 0, got %g",
                        o->softcap);
    if (!isfinite((float)o->shared_weight))
        return moe_fail(err, MOE_ERROR_VALUE,
                        "shared_weight: expected a finite number (float32), got %g",
                        o->shared_weight);
    const bool sink = o->num_shared > 0 && o->shared == MOE_SHARED_SINK;
    if (sink != (o->method == MOE_ROUTE_sigmoid_bias_sink))
        return moe_fail(err, MOE_ERROR_VALUE,
                        "shared_weight: expected 'sink' and num_fused_shared_experts above 0 with "
                        "method 'sigmoid_bias_sink' and nowhere else, got method '%s'",
                        m->name);
    return MOE_OK;
}

/* router_logits and all that goes with them. experts: the routed columns; slots: topk and the shared ones. */
static int check_routing(const moe_call *c, const char *like_name, const moe_tensor *like,
                         int64_t *experts, int64_t *slots, moe_error *err)
{
    const moe_options *o = &c->options;
    const moe_route_method *m = &moe_route_methods[o->method];
    const moe_tensor *l = &c->router_logits;
    const int64_t num_tokens = l->shape[0], columns = l->shape[1];
    if (check_extent("num_fused_shared_experts", "a number of experts", o->num_shared, 0,
                     MOE_MAX_TOPK - 1, err))
        return err->status;
    const int64_t gates = o->shared >= MOE_SHARED_GATE ? o->num_shared : 0, e = columns - gates;
    if (check_extent("router_logits", gates ? "columns without those of shared experts" : "columns",
                     e, 1, MOE_MAX_EXPERTS, err))
        return err->status;
    if (check_extent("topk", "a number of experts", o->topk, 1, e < MOE_MAX_TOPK ? e : MOE_MAX_TOPK,
                     err))
        return err->status;
    if (check_extent("num_fused_shared_experts", "topk and the shared experts together",
                     o->topk + o->num_shared, 1, MOE_MAX_TOPK, err))
        return err->status;
    if (check_extent("num_zero_experts", "a number of experts", o->num_zero_experts, 0, e - 1, err))
        return err->status;
    if (o->first_shared_id >= 0 && check_extent("first_shared_id", "an id", o->first_shared_id, 0,
                                                INT32_MAX - MOE_MAX_TOPK, err))
        return err->status;
    if (check_routing_scalars(o, m, err) || check_expert_groups(o, m, e, err)) return err->status;
    if ((m->bias == MOE_BIAS_NONE) == tensor_present(&c->correction_bias))
        return moe_fail(err, MOE_ERROR_VALUE, "correction_bias: expected %s with method '%s'",
                        m->bias == MOE_BIAS_NONE ? "None" : "a tensor [num_experts]", m->name);
    if ((m->ids == MOE_IDS_TABLE) != tensor_present(&c->tid2eid))
        return moe_fail(err, MOE_ERROR_VALUE, "tid2eid: expected %s with method '%s'",
                        m->ids == MOE_IDS_TABLE ? "a table [rows, topk]" : "None", m->name);
    if (tensor_present(&c->token_ids) != (o->method == MOE_ROUTE_hash))
        return moe_fail(err, MOE_ERROR_VALUE, "token_ids: expected %s with method '%s'",
                        o->method == MOE_ROUTE_hash ? "a tensor [num_tokens]" : "None", m->name);
    const int64_t rows = o->method == MOE_ROUTE_forced ? num_tokens : -1;
    const expectation wants[] = {
        {"correction_bias",
         &c->correction_bias,
         BIT(MOE_F32) | BIT(MOE_BF16) | BIT(MOE_F16),
         1,
         {e},
         "[num_experts]",
         false},
        {"expert_scale", &c->expert_scale, BIT(MOE_F32), 1, {e}, "[num_experts]", false},
        {"num_token_non_padded", &c->num_token_non_padded, BIT(MOE_I32), 1, {1}, "[1]", false},
        {"expert_map", &c->routing_map, BIT(MOE_I32), 1, {-1}, "[physical experts]", false},
        {"replica_map",
         &c->replica_map,
         BIT(MOE_I32),
         2,
         {e - o->num_zero_experts, -1},
         "[num_experts, replicas]",
         false},
        {"tid2eid",
         &c->tid2eid,
         BIT(MOE_I32) | BIT(MOE_I64),
         2,
         {rows, o->topk},
         rows < 0 ? "[vocabulary, topk]" : "[num_tokens, topk]",
         false},
        {"token_ids",
         &c->token_ids,
         BIT(MOE_I32) | BIT(MOE_I64),
         1,
         {num_tokens},
         "[num_tokens]",
         false}};
    for (size_t i = 0; i < sizeof wants / sizeof *wants; ++i)
        if (check_routing_tensor(&wants[i], like_name, like, err)) return err->status;
    if (tensor_present(&c->routing_map) && !tensor_present(&c->replica_map) &&
        c->routing_map.shape[0] < e - o->num_zero_experts)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "expert_map: expected %" PRId64 " ids or more, got %" PRId64,
                        e - o->num_zero_experts, c->routing_map.shape[0]);
    *experts = e;
    *slots = o->topk + o->num_shared;
    return MOE_OK;
}

/* hidden_states or intermediate decide the dtype and the device of a call */
static int check_activations(const char *name, const moe_tensor *t, const char *text,
                             moe_error *err)
{
    const expectation want = {name, t,    BIT(MOE_BF16) | BIT(MOE_F16) | BIT(MOE_F32), 2, {-1, -1},
                              text, false};
    char got[TEXT];
    if (tensor_present(t) && (t->dtype == MOE_U16 || t->dtype == MOE_I16))
        return moe_fail(
            err, MOE_ERROR_TYPE,
            "%s: expected dtype bfloat16, float16 or float32, or dtype='bfloat16' where "
            "integers hold such numbers, got %s",
            name, moe_tensor_text(t, got, sizeof got));
    if (check_tensor(&want, err)) return err->status;
    if (t->dtype == MOE_F32 && t->backend == MOE_CUDA)
        return moe_fail(err, MOE_ERROR_NOT_IMPLEMENTED,
                        "%s: float32 is computed by the CPU backend only, got a float32 tensor on "
                        "cuda:%d; cast to "
                        "bfloat16 or float16 for the GPU",
                        name, t->device);
    return check_extent(name, "columns", t->shape[1], 1, MAX_EXTENT, err);
}

/* w13 against hidden_size and, where w2 is there, intermediate_size */
static int check_w13(const moe_call *c, moe_error *err)
{
    const moe_tensor *x = &c->hidden_states;
    const expectation w13 = {"w13",
                             &c->w13,
                             BIT(x->dtype),
                             3,
                             {-1, -1, x->shape[1]},
                             c->options.gated ? "[num_experts, 2 * intermediate_size, hidden_size]"
                                              : "[num_experts, intermediate_size, hidden_size]",
                             false};
    if (check_tensor(&w13, err)) return err->status;
    if (check_extent("w13", "num_experts", c->w13.shape[0], 1, MOE_MAX_EXPERTS, err))
        return err->status;
    if (check_extent("w13", "rows per expert", c->w13.shape[1], 1, 2 * MAX_EXTENT - 2, err))
        return err->status;
    if (c->options.gated && c->w13.shape[1] % 2)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "w13: expected an even number of rows (gate and up), got %" PRId64,
                        c->w13.shape[1]);
    return check_device("w13", &c->w13, "hidden_states", x, err);
}

static int check_bias(const char *name, const moe_tensor *bias, const moe_tensor *weights,
                      const char *text, moe_error *err)
{
    if (!tensor_present(bias)) return MOE_OK;
    const expectation want = {
        name, bias, BIT(MOE_F32) | BIT(weights->dtype), 2, {weights->shape[0], weights->shape[1]},
        text, false};
    if (check_tensor(&want, err)) return err->status;
    return MOE_OK;
}

int moe_check_apart(const moe_call *c, moe_error *err)
{
    const named_tensor out = {"out", &c->out}, workspace = {"workspace", &c->workspace};
    const moe_tensor *const in_place[] = {&c->hidden_states, &c->shared_output};
    const bool sum = c->options.combine == MOE_COMBINE_SUM;
    named_tensor given[MOE_CALL_TENSORS];
    int count = 0;
    for (int i = 0; i < MOE_CALL_TENSORS; ++i) {
        const moe_tensor *t = moe_const_tensor_of(c, i);
        if (tensor_present(t) && t != out.tensor && t != workspace.tensor)
            given[count++] = (named_tensor){moe_call_tensors[i].name, t};
    }
    if (check_overlap(&out, given, count, in_place, sum ? 2 : 0, err)) return err->status;
    given[count++] = out;
    return check_overlap(&workspace, given, count, NULL, 0, err);
}

static int validate_layer(const moe_call *c, moe_problem *p, moe_error *err)
{
    const moe_tensor *x = &c->hidden_states;
    const moe_options *o = &c->options;
    if (check_activations("hidden_states", x, "[num_tokens, hidden_size]", err)) return err->status;
    int64_t num_tokens = x->shape[0], hidden = x->shape[1];
    if (check_w13(c, err)) return err->status;
    int64_t num_experts = c->w13.shape[0],
            intermediate = o->gated ? c->w13.shape[1] / 2 : c->w13.shape[1];

    const expectation w2 = {"w2",
                            &c->w2,
                            BIT(x->dtype),
                            3,
                            {num_experts, hidden, intermediate},
                            "[num_experts, hidden_size, intermediate_size]",
                            false};
    if (check_tensor(&w2, err)) return err->status;
    if (check_device("w2", &c->w2, "hidden_states", x, err)) return err->status;
    if (check_bias("w13_bias", &c->w13_bias, &c->w13, "[num_experts, rows of w13]", err))
        return err->status;
    if (check_bias("w2_bias", &c->w2_bias, &c->w2, "[num_experts, hidden_size]", err))
        return err->status;
    if (check_activation(o, err) || check_scale(o, err) || check_expert_start(o, err))
        return err->status;
    if (check_expert_map(c, "hidden_states", x, err)) return err->status;

    int64_t topk = 0, router_experts = 0;
    if (c->operation == MOE_OP_FUSED_MOE) {
        const moe_tensor *l = &c->router_logits;
        const expectation logits = {"router_logits",
                                    l,
                                    BIT(MOE_F32) | BIT(MOE_BF16) | BIT(MOE_F16),
                                    2,
                                    {num_tokens, -1},
                                    "[num_tokens, num_experts]",
                                    false};
        if (check_tensor(&logits, err)) return err->status;
        if (check_routing(c, "hidden_states", x, &router_experts, &topk, err)) return err->status;
        bool global = tensor_present(&c->expert_map) || o->has_expert_start ||
                      tensor_present(&c->routing_map) || tensor_present(&c->replica_map);
        const int64_t routed = router_experts - o->num_zero_experts + o->num_shared;
        if (!global && routed != num_experts)
            return moe_fail(err, MOE_ERROR_VALUE,
                            "router_logits: expected %" PRId64 " columns like w13 (or expert_map / "
                            "expert_start), got %" PRId64,
                            num_experts, routed);
    } else {
        const expectation ids = {"topk_ids", &c->topk_ids,     BIT(MOE_I32) | BIT(MOE_I64),
                                 2,          {num_tokens, -1}, "[num_tokens, topk]",
                                 false};
        if (check_tensor(&ids, err)) return err->status;
        topk = c->topk_ids.shape[1];
        if (check_extent("topk_ids", "topk", topk, 1, MOE_MAX_TOPK, err)) return err->status;
        const expectation weights = {"topk_weights",
                                     &c->topk_weights,
                                     BIT(MOE_F32) | BIT(MOE_BF16) | BIT(MOE_F16),
                                     2,
                                     {num_tokens, topk},
                                     "[num_tokens, topk]",
                                     false};
        if (check_tensor(&weights, err)) return err->status;
    }
    if (check_slots(c->operation == MOE_OP_FUSED_MOE ? "router_logits" : "topk_ids", num_tokens,
                    topk, err))
        return err->status;

    if (tensor_present(&c->shared_output)) {
        if (o->combine != MOE_COMBINE_SUM)
            return moe_fail(
                err, MOE_ERROR_VALUE,
                "shared_output: expected None with no_combine (there is no sum to add it to)");
        const expectation shared = {
            "shared_output",      &c->shared_output,           BIT(x->dtype), 2,
            {num_tokens, hidden}, "[num_tokens, hidden_size]", false};
        if (check_tensor(&shared, err)) return err->status;
    }
    bool sum = o->combine == MOE_COMBINE_SUM;
    if (tensor_present(&c->out)) {
        const expectation rows = {"out",
                                  &c->out,
                                  BIT(x->dtype),
                                  sum ? 2 : 3,
                                  {num_tokens, sum ? hidden : topk, hidden},
                                  sum ? "[num_tokens, hidden_size]"
                                      : "[num_tokens, topk, hidden_size] with no_combine",
                                  true};
        if (check_tensor(&rows, err)) return err->status;
        /* the slots of a token must follow each other evenly over the tokens: combine sees num_tokens * topk rows */
        if (!sum && num_tokens > 1 && topk > 1 && c->out.stride[0] != topk * c->out.stride[1])
            return moe_fail(
                err, MOE_ERROR_VALUE,
                "out: expected stride[0] == topk * stride[1] with no_combine, got %" PRId64
                " and %" PRId64,
                c->out.stride[0], c->out.stride[1]);
    }
    if (check_workspace(c, "hidden_states", x, err)) return err->status;

    for (int i = 0; i < MOE_CALL_TENSORS; ++i)
        if (check_device(moe_call_tensors[i].name, moe_const_tensor_of(c, i), "hidden_states", x,
                         err))
            return err->status;
    if (moe_check_apart(c, err)) return err->status;
    if (o->batch_invariant)
        return moe_fail(err, MOE_ERROR_NOT_IMPLEMENTED,
                        "batch_invariant: expected False, got True; that mode is not built yet");

    int32_t vector = vector_bytes(x, 16);
    vector = vector_bytes(&c->w13, vector);
    vector = vector_bytes(&c->w2, vector);
    int32_t out_vector = out_vector_bytes(&c->out, hidden, x->dtype, 16);
    p->num_tokens = num_tokens;
    p->hidden_size = (int32_t)hidden;
    p->intermediate_size = (int32_t)intermediate;
    p->num_experts = (int32_t)num_experts;
    p->topk = (int32_t)topk;
    p->dtype = x->dtype;
    p->ids_dtype = c->operation == MOE_OP_FUSED_MOE ? MOE_I32 : c->topk_ids.dtype;
    p->gated = o->gated;
    p->combine = o->combine;
    p->routed = c->operation == MOE_OP_FUSED_MOE;
    p->router_experts = (int32_t)router_experts;
    p->vector_bytes = vector;
    p->out_vector_bytes = vector_bytes(&c->shared_output, out_vector);
    p->deterministic = o->deterministic;
    p->plain = o->activation == MOE_ACT_SILU && o->gated && !o->has_limit &&
               !o->apply_router_weight_on_input && !tensor_present(&c->w13_bias) &&
               !tensor_present(&c->w2_bias);
    return MOE_OK;
}

static int validate_route(const moe_call *c, moe_problem *p, moe_error *err)
{
    const moe_tensor *l = &c->router_logits;
    const expectation logits = {"router_logits",
                                l,
                                BIT(MOE_F32) | BIT(MOE_BF16) | BIT(MOE_F16),
                                2,
                                {-1, -1},
                                "[num_tokens, num_experts]",
                                false};
    if (check_tensor(&logits, err)) return err->status;
    int64_t num_tokens = l->shape[0], experts = 0, topk = 0;
    if (check_routing(c, "router_logits", l, &experts, &topk, err)) return err->status;
    if (check_slots("router_logits", num_tokens, topk, err)) return err->status;
    if (check_scale(&c->options, err)) return err->status;
    const expectation outs[] = {
        {"out_weights",
         &c->topk_weights,
         BIT(MOE_F32) | BIT(MOE_BF16) | BIT(MOE_F16),
         2,
         {num_tokens, topk},
         "[num_tokens, topk]",
         true},
        {"out_ids",
         &c->topk_ids,
         BIT(MOE_I32) | BIT(MOE_I64),
         2,
         {num_tokens, topk},
         "[num_tokens, topk]",
         true},
        {"out_packed", &c->packed, BIT(MOE_I32), 2, {num_tokens, topk}, "[num_tokens, topk]", true},
        {"out_counts", &c->counts, BIT(MOE_I32), 1, {experts}, "[num_experts]", true}};
    const named_tensor all[] = {{"router_logits", l},
                                {"correction_bias", &c->correction_bias},
                                {"expert_scale", &c->expert_scale},
                                {"num_token_non_padded", &c->num_token_non_padded},
                                {"expert_map", &c->routing_map},
                                {"replica_map", &c->replica_map},
                                {"tid2eid", &c->tid2eid},
                                {"token_ids", &c->token_ids},
                                {"out_weights", &c->topk_weights},
                                {"out_ids", &c->topk_ids},
                                {"out_packed", &c->packed},
                                {"out_counts", &c->counts}};
    enum { NUM_OUTS = sizeof outs / sizeof *outs, FIRST_OUT = sizeof all / sizeof *all - NUM_OUTS };
    for (int i = 0; i < NUM_OUTS; ++i) {
        if (!tensor_present(outs[i].tensor)) continue;
        if (check_tensor(&outs[i], err)) return err->status;
        if (check_device(outs[i].name, outs[i].tensor, "router_logits", l, err)) return err->status;
        if (check_overlap(&all[FIRST_OUT + i], all, FIRST_OUT + i, NULL, 0, err))
            return err->status;
    }
    p->num_tokens = num_tokens;
    p->topk = (int32_t)topk;
    p->num_experts = p->router_experts = (int32_t)experts;
    p->hidden_size = p->intermediate_size = 1;
    p->dtype = MOE_BF16;
    p->ids_dtype = MOE_I32;
    p->routed = 1;
    p->gated = 1;
    p->vector_bytes = p->out_vector_bytes = 2;
    p->deterministic = 1;
    return MOE_OK;
}

/* What align writes, for topk_ids or, with route, router_logits: `like`, whose name is like_name. */
static int check_align_outputs(const moe_call *c, const char *like_name, const moe_tensor *like,
                               int64_t num_tokens, int64_t topk, int64_t experts, moe_error *err)
{
    const expectation outs[] = {
        {"out_expert_offsets",
         &c->expert_offsets,
         BIT(MOE_I32),
         1,
         {experts + 1},
         "[num_experts + 1]",
         true},
        {"out_sorted_token_ids",
         &c->sorted_token_ids,
         BIT(MOE_I32),
         1,
         {num_tokens * topk},
         "[num_tokens * topk]",
         true},
        {"out_row_of_slot",
         &c->row_of_slot,
         BIT(MOE_I32),
         2,
         {num_tokens, topk},
         "[num_tokens, topk]",
         true},
        {"workspace", &c->workspace, BIT(MOE_U8), 1, {-1}, "[bytes]", true}};
    const named_tensor all[] = {{"router_logits", &c->router_logits},
                                {"correction_bias", &c->correction_bias},
                                {"expert_scale", &c->expert_scale},
                                {"num_token_non_padded", &c->num_token_non_padded},
                                {"expert_map", &c->routing_map},
                                {"replica_map", &c->replica_map},
                                {"tid2eid", &c->tid2eid},
                                {"token_ids", &c->token_ids},
                                {"topk_weights", &c->topk_weights},
                                {"topk_ids", &c->topk_ids},
                                {"expert_map", &c->expert_map},
                                {"out_expert_offsets", &c->expert_offsets},
                                {"out_sorted_token_ids", &c->sorted_token_ids},
                                {"out_row_of_slot", &c->row_of_slot},
                                {"workspace", &c->workspace}};
    enum { NUM_OUTS = sizeof outs / sizeof *outs, FIRST_OUT = sizeof all / sizeof *all - NUM_OUTS };
    for (int i = 0; i < NUM_OUTS; ++i) {
        if (!tensor_present(outs[i].tensor)) continue;
        if (check_tensor(&outs[i], err)) return err->status;
        if (check_device(outs[i].name, outs[i].tensor, like_name, like, err)) return err->status;
        if (check_overlap(&all[FIRST_OUT + i], all, FIRST_OUT + i, NULL, 0, err))
            return err->status;
    }
    if (tensor_present(&c->row_of_slot) && num_tokens > 1 && c->row_of_slot.stride[0] != topk)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "out_row_of_slot: expected a compact tensor, got row stride %" PRId64,
                        c->row_of_slot.stride[0]);
    return MOE_OK;
}

static int validate_route_align(const moe_call *c, moe_problem *p, moe_error *err)
{
    if (validate_route(c, p, err)) return err->status;
    const int64_t all =
        c->num_experts == INT64_MIN ? p->router_experts + c->options.num_shared : c->num_experts;
    if (check_extent("num_experts", "a number of experts", all, 1, MOE_MAX_EXPERTS, err))
        return err->status;
    if (check_expert_start(&c->options, err)) return err->status;
    if (check_expert_map(c, "router_logits", &c->router_logits, err)) return err->status;
    p->num_experts = (int32_t)all;
    return check_align_outputs(c, "router_logits", &c->router_logits, p->num_tokens, p->topk, all,
                               err);
}

static int validate_align(const moe_call *c, moe_problem *p, moe_error *err)
{
    const moe_tensor *ids = &c->topk_ids;
    const expectation want = {"topk_ids",           ids,  BIT(MOE_I32) | BIT(MOE_I64), 2, {-1, -1},
                              "[num_tokens, topk]", false};
    if (check_tensor(&want, err)) return err->status;
    int64_t num_tokens = ids->shape[0], topk = ids->shape[1], experts = c->num_experts;
    if (check_slots("topk_ids", num_tokens, topk, err)) return err->status;
    if (check_extent("num_experts", "a number of experts", experts, 1, MOE_MAX_EXPERTS, err))
        return err->status;
    if (check_expert_start(&c->options, err)) return err->status;
    if (check_expert_map(c, "topk_ids", ids, err)) return err->status;
    if (check_align_outputs(c, "topk_ids", ids, num_tokens, topk, experts, err)) return err->status;
    p->num_tokens = num_tokens;
    p->topk = (int32_t)topk;
    p->num_experts = (int32_t)experts;
    p->hidden_size = p->intermediate_size = 1;
    p->dtype = MOE_BF16;
    p->ids_dtype = ids->dtype;
    p->gated = 1;
    p->vector_bytes = p->out_vector_bytes = 2;
    p->deterministic = 1;
    return MOE_OK;
}

static int validate_align_block(const moe_call *c, moe_problem *p, moe_error *err)
{
    const moe_tensor *ids = &c->topk_ids;
    const expectation want = {"topk_ids",           ids,  BIT(MOE_I32) | BIT(MOE_I64), 2, {-1, -1},
                              "[num_tokens, topk]", false};
    if (check_tensor(&want, err)) return err->status;
    const int64_t num_tokens = ids->shape[0], topk = ids->shape[1], experts = c->num_experts;
    if (check_slots("topk_ids", num_tokens, topk, err)) return err->status;
    if (check_extent("num_experts", "a number of experts", experts, 1, MOE_MAX_EXPERTS, err))
        return err->status;
    if (check_expert_start(&c->options, err)) return err->status;
    if (check_expert_map(c, "topk_ids", ids, err)) return err->status;
    const expectation counts = {"out",     &c->counts,      BIT(MOE_I32), 1,
                                {experts}, "[num_experts]", true};
    const expectation outs[] = {
        {"out_sorted_token_ids", &c->sorted_token_ids, BIT(MOE_I32), 1, {-1}, "[capacity]", true},
        {"out_expert_ids", &c->expert_ids, BIT(MOE_I32), 1, {-1}, "[blocks]", true},
        {"out_num_tokens_post_padded",
         &c->num_tokens_post_padded,
         BIT(MOE_I32),
         1,
         {1},
         "[1]",
         true},
        counts,
        {"workspace", &c->workspace, BIT(MOE_U8), 1, {-1}, "[bytes]", true}};
    const named_tensor all[] = {{"topk_ids", ids},
                                {"expert_map", &c->expert_map},
                                {"out_sorted_token_ids", &c->sorted_token_ids},
                                {"out_expert_ids", &c->expert_ids},
                                {"out_num_tokens_post_padded", &c->num_tokens_post_padded},
                                {"out", &c->counts},
                                {"workspace", &c->workspace}};
    int64_t capacity = 0;
    if (c->function[0] == 'a') { /* align_block_size */
        if (check_extent("block_size", "rows of a block", c->block_size, 1, 256, err))
            return err->status;
        capacity = moe_padded_rows(num_tokens * topk, experts, c->block_size);
        if (check_extent("topk_ids", "rows with padding", capacity, 0, MAX_SLOTS, err))
            return err->status;
    }
    for (int i = 0; i < 5; ++i) {
        const moe_tensor *t = outs[i].tensor;
        if (!tensor_present(t)) continue;
        if (check_tensor(&outs[i], err)) return err->status;
        if (check_device(outs[i].name, t, "topk_ids", ids, err)) return err->status;
        if (check_overlap(&all[i + 2], all, i + 2, NULL, 0, err)) return err->status;
        const int64_t least = i == 0 ? capacity : i == 1 ? capacity / c->block_size : 0;
        if (t->shape[0] < least)
            return moe_fail(err, MOE_ERROR_VALUE,
                            "%s: expected at least %" PRId64 " elements, got %" PRId64,
                            outs[i].name, least, t->shape[0]);
    }
    p->num_tokens = num_tokens;
    p->topk = (int32_t)topk;
    p->num_experts = (int32_t)experts;
    p->hidden_size = p->intermediate_size = 1;
    p->dtype = MOE_BF16;
    p->ids_dtype = ids->dtype;
    p->gated = 1;
    p->vector_bytes = p->out_vector_bytes = 2;
    p->deterministic = 1;
    return MOE_OK;
}

int64_t moe_padded_rows(int64_t num_slots, int64_t num_experts, int64_t block_size)
{
    const int64_t hit = num_slots < num_experts ? num_slots : num_experts;
    return (num_slots + hit * (block_size - 1)) / block_size * block_size;
}

/* expert_offsets and sorted_token_ids of gate_up and down alone */
static int check_groups(const moe_call *c, const char *like_name, const moe_tensor *like,
                        int64_t num_experts, int64_t num_slots, moe_error *err)
{
    const expectation wants[] = {{"expert_offsets",
                                  &c->expert_offsets,
                                  BIT(MOE_I32),
                                  1,
                                  {num_experts + 1},
                                  "[num_experts + 1]",
                                  false},
                                 {"sorted_token_ids",
                                  &c->sorted_token_ids,
                                  BIT(MOE_I32),
                                  1,
                                  {num_slots},
                                  "[num_tokens * topk]",
                                  false}};
    for (int i = 0; i < 2; ++i) {
        if (check_tensor(&wants[i], err)) return err->status;
        if (check_device(wants[i].name, wants[i].tensor, like_name, like, err)) return err->status;
    }
    return MOE_OK;
}

static int check_stage_weights(const moe_call *c, const char *like_name, const moe_tensor *like,
                               int64_t num_tokens, int64_t topk, moe_error *err)
{
    if (!tensor_present(&c->topk_weights)) return MOE_OK;
    const expectation weights = {"topk_weights",
                                 &c->topk_weights,
                                 BIT(MOE_F32) | BIT(MOE_BF16) | BIT(MOE_F16),
                                 2,
                                 {num_tokens, topk},
                                 "[num_tokens, topk]",
                                 false};
    if (check_tensor(&weights, err)) return err->status;
    return check_device("topk_weights", &c->topk_weights, like_name, like, err);
}

/* out [rows, columns] of a stage alone, workspace, and neither over any input */
static int check_stage_out(const moe_call *c, const char *like_name, const moe_tensor *like,
                           int64_t rows, int64_t columns, const char *text, moe_error *err)
{
    const expectation out = {"out", &c->out, BIT(like->dtype), 2, {rows, columns}, text, true};
    if (tensor_present(&c->out)) {
        if (check_tensor(&out, err)) return err->status;
        if (check_device("out", &c->out, like_name, like, err)) return err->status;
    }
    if (check_workspace(c, like_name, like, err)) return err->status;
    const named_tensor all[] = {{"hidden_states", &c->hidden_states},
                                {"w13", &c->w13},
                                {"w2", &c->w2},
                                {"topk_weights", &c->topk_weights},
                                {"w13_bias", &c->w13_bias},
                                {"w2_bias", &c->w2_bias},
                                {"expert_offsets", &c->expert_offsets},
                                {"sorted_token_ids", &c->sorted_token_ids},
                                {"row_of_slot", &c->row_of_slot},
                                {"intermediate", &c->intermediate},
                                {"rows", &c->rows},
                                {"shared_output", &c->shared_output},
                                {"out", &c->out},
                                {"workspace", &c->workspace}};
    enum { NUM_ALL = sizeof all / sizeof *all, OUT = NUM_ALL - 2, WORKSPACE = NUM_ALL - 1 };
    const moe_tensor *const in_place[] = {&c->shared_output};
    if (check_overlap(&all[OUT], all, OUT, in_place, 1, err)) return err->status;
    return check_overlap(&all[WORKSPACE], all, WORKSPACE, NULL, 0, err);
}

static int validate_gate_up(const moe_call *c, moe_problem *p, moe_error *err)
{
    const moe_tensor *x = &c->hidden_states;
    const moe_options *o = &c->options;
    if (check_activations("hidden_states", x, "[num_tokens, hidden_size]", err)) return err->status;
    if (check_w13(c, err)) return err->status;
    int64_t num_tokens = x->shape[0], num_experts = c->w13.shape[0];
    int64_t intermediate = o->gated ? c->w13.shape[1] / 2 : c->w13.shape[1];
    if (check_extent("topk", "slots per token", o->topk, 1, MOE_MAX_TOPK, err)) return err->status;
    if (check_slots("topk", num_tokens, o->topk, err)) return err->status;
    if (check_bias("w13_bias", &c->w13_bias, &c->w13, "[num_experts, rows of w13]", err))
        return err->status;
    if (check_device("w13_bias", &c->w13_bias, "hidden_states", x, err)) return err->status;
    if (check_activation(o, err)) return err->status;
    if (check_groups(c, "hidden_states", x, num_experts, num_tokens * o->topk, err))
        return err->status;
    if (check_stage_weights(c, "hidden_states", x, num_tokens, o->topk, err)) return err->status;
    if (check_stage_out(c, "hidden_states", x, num_tokens * o->topk, intermediate,
                        "[num_tokens * topk, intermediate_size]", err))
        return err->status;
    p->num_tokens = num_tokens;
    p->hidden_size = (int32_t)x->shape[1];
    p->intermediate_size = (int32_t)intermediate;
    p->num_experts = (int32_t)num_experts;
    p->topk = (int32_t)o->topk;
    p->dtype = x->dtype;
    p->ids_dtype = MOE_I32;
    p->gated = o->gated;
    p->vector_bytes = out_vector_bytes(&c->out, intermediate, x->dtype,
                                       vector_bytes(&c->w13, vector_bytes(x, 16)));
    p->out_vector_bytes = 2;
    p->deterministic = 1;
    return MOE_OK;
}

static int validate_down(const moe_call *c, moe_problem *p, moe_error *err)
{
    const moe_tensor *x = &c->intermediate;
    const moe_options *o = &c->options;
    if (check_activations("intermediate", x, "[num_tokens * topk, intermediate_size]", err))
        return err->status;
    const expectation w2 = {"w2",
                            &c->w2,
                            BIT(x->dtype),
                            3,
                            {-1, -1, x->shape[1]},
                            "[num_experts, hidden_size, intermediate_size]",
                            false};
    if (check_tensor(&w2, err)) return err->status;
    if (check_device("w2", &c->w2, "intermediate", x, err)) return err->status;
    if (check_extent("w2", "num_experts", c->w2.shape[0], 1, MOE_MAX_EXPERTS, err))
        return err->status;
    if (check_extent("w2", "hidden_size", c->w2.shape[1], 1, MAX_EXTENT, err)) return err->status;
    if (check_extent("topk", "slots per token", o->topk, 1, MOE_MAX_TOPK, err)) return err->status;
    if (x->shape[0] % o->topk)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "intermediate: expected num_tokens * topk rows (a multiple of topk %" PRId64
                        "), got %" PRId64,
                        o->topk, x->shape[0]);
    int64_t num_tokens = x->shape[0] / o->topk, num_experts = c->w2.shape[0];
    if (check_slots("topk", num_tokens, o->topk, err)) return err->status;
    if (check_bias("w2_bias", &c->w2_bias, &c->w2, "[num_experts, hidden_size]", err))
        return err->status;
    if (check_device("w2_bias", &c->w2_bias, "intermediate", x, err)) return err->status;
    if (check_groups(c, "intermediate", x, num_experts, x->shape[0], err)) return err->status;
    if (check_stage_weights(c, "intermediate", x, num_tokens, o->topk, err)) return err->status;
    if (check_stage_out(c, "intermediate", x, x->shape[0], c->w2.shape[1],
                        "[num_tokens * topk, hidden_size]", err))
        return err->status;
    p->num_tokens = num_tokens;
    p->hidden_size = (int32_t)c->w2.shape[1];
    p->intermediate_size = (int32_t)x->shape[1];
    p->num_experts = (int32_t)num_experts;
    p->topk = (int32_t)o->topk;
    p->dtype = x->dtype;
    p->ids_dtype = MOE_I32;
    p->gated = 1;
    p->vector_bytes = out_vector_bytes(&c->out, c->w2.shape[1], x->dtype,
                                       vector_bytes(&c->w2, vector_bytes(x, 16)));
    p->out_vector_bytes = 2;
    p->deterministic = 1;
    return MOE_OK;
}

static int validate_combine(const moe_call *c, moe_problem *p, moe_error *err)
{
    const moe_tensor *x = &c->rows;
    if (check_activations("rows", x, "[num_rows, hidden_size]", err)) return err->status;
    const expectation slots = {"row_of_slot", &c->row_of_slot,      BIT(MOE_I32), 2,
                               {-1, -1},      "[num_tokens, topk]", false};
    if (check_tensor(&slots, err)) return err->status;
    int64_t num_tokens = c->row_of_slot.shape[0], topk = c->row_of_slot.shape[1];
    if (check_slots("row_of_slot", num_tokens, topk, err)) return err->status;
    if (num_tokens > 1 && c->row_of_slot.stride[0] != topk)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "row_of_slot: expected a compact tensor, got row stride %" PRId64,
                        c->row_of_slot.stride[0]);
    if (check_device("row_of_slot", &c->row_of_slot, "rows", x, err)) return err->status;
    if (check_scale(&c->options, err)) return err->status;
    if (tensor_present(&c->shared_output)) {
        const expectation shared = {
            "shared_output",           &c->shared_output,           BIT(x->dtype), 2,
            {num_tokens, x->shape[1]}, "[num_tokens, hidden_size]", false};
        if (check_tensor(&shared, err)) return err->status;
        if (check_device("shared_output", &c->shared_output, "rows", x, err)) return err->status;
    }
    if (check_stage_out(c, "rows", x, num_tokens, x->shape[1], "[num_tokens, hidden_size]", err))
        return err->status;
    p->num_tokens = num_tokens;
    p->hidden_size = (int32_t)x->shape[1];
    p->intermediate_size = 1;
    p->num_experts = 1;
    p->topk = (int32_t)topk;
    p->dtype = x->dtype;
    p->ids_dtype = MOE_I32;
    p->gated = 1;
    p->vector_bytes = vector_bytes(x, 16);
    p->out_vector_bytes = vector_bytes(
        &c->shared_output, out_vector_bytes(&c->out, x->shape[1], x->dtype, p->vector_bytes));
    p->deterministic = 1;
    return MOE_OK;
}

int moe_validate(const moe_call *call, moe_problem *problem, moe_error *err)
{
    memset(problem, 0, sizeof *problem);
    problem->operation = call->operation;
    switch (call->operation) {
    case MOE_OP_FUSED_EXPERTS:
    case MOE_OP_FUSED_MOE:
        return validate_layer(call, problem, err);
    case MOE_OP_ROUTE:
        return validate_route(call, problem, err);
    case MOE_OP_ALIGN:
        return validate_align(call, problem, err);
    case MOE_OP_ROUTE_ALIGN:
        return validate_route_align(call, problem, err);
    case MOE_OP_ALIGN_BLOCK:
        return validate_align_block(call, problem, err);
    case MOE_OP_GATE_UP:
        return validate_gate_up(call, problem, err);
    case MOE_OP_DOWN:
        return validate_down(call, problem, err);
    case MOE_OP_COMBINE:
        return validate_combine(call, problem, err);
    }
    return moe_fail(err, MOE_ERROR_RUNTIME, "operation: unknown (%d)", (int)call->operation);
}

int moe_validate_problem(const moe_problem *p, moe_error *err)
{
    if (check_extent("num_tokens", "a number of tokens", p->num_tokens, 0, MAX_SLOTS, err))
        return err->status;
    if (check_extent("hidden_size", "a size", p->hidden_size, 1, MAX_EXTENT, err))
        return err->status;
    if (check_extent("intermediate_size", "a size", p->intermediate_size, 1, MAX_EXTENT, err))
        return err->status;
    if (check_extent("num_experts", "a number of experts", p->num_experts, 1, MOE_MAX_EXPERTS, err))
        return err->status;
    if (check_slots("topk", p->num_tokens, p->topk, err)) return err->status;
    if (p->routed) {
        if (check_extent("router_experts", "a number of experts", p->router_experts, 1,
                         MOE_MAX_EXPERTS, err))
            return err->status;
    }
    if (check_extent("workspace_limit", "bytes", p->workspace_limit, 0, INT64_MAX, err))
        return err->status;
    if (p->vector_bytes != 16 && p->vector_bytes != moe_dtype_bytes(p->dtype))
        return moe_fail(err, MOE_ERROR_VALUE,
                        "vector_bytes: expected 16 or the element's %d, got %d",
                        (int)moe_dtype_bytes(p->dtype), p->vector_bytes);
    return MOE_OK;
}
