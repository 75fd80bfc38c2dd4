/* parse.c: arguments of the functions, without format strings: parsing thirty of them that way
 * costs more than importing ten tensors. Keywords are compared by pointer (names are interned),
 * then by text. Everything here is kind and range of scalars; what tensors have to look like is
 * in validate.c. */
#include "binding.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- signatures ------------------------------------------------------------------------------ */

/* clang-format off */
#define LAYER_KW                                                                                   \
    "quant", "w13_scale", "w2_scale", "w13_zero_point", "w2_zero_point", "hidden_states_scale",    \
    "intermediate_scale", "w13_bias", "w2_bias", "activation", "activation_alpha",                 \
    "activation_limit", "clamp", "gated", "w13_order", "apply_router_weight_on_input",             \
    "routed_scaling_factor", "shared_output", "no_combine", "expert_map", "expert_start",          \
    "deterministic", "batch_invariant", "out", "workspace", "stream", "dtype"

#define PLAN_KW                                                                                    \
    "num_tokens", "hidden_size", "intermediate_size", "num_experts", "topk", "dtype", "device",    \
    "num_sms", "gated", "no_combine", "routed", "router_experts", "vector_bytes",                  \
    "workspace_limit", "deterministic"

const signature moe_signatures[NUM_SIGNATURES] = {
    [SIG_FUSED_EXPERTS] = {"fused_experts", 5 + NUM_LAYER_KW, 5,
        {"hidden_states", "w13", "w2", "topk_weights", "topk_ids", LAYER_KW}},
    [SIG_FUSED_MOE] = {"fused_moe", 8 + NUM_LAYER_KW, 5,
        {"hidden_states", "w13", "w2", "router_logits", "topk", "method", "routing_scale", "knobs",
         LAYER_KW}},
    [SIG_ROUTE] = {"route", 11, 2,
        {"router_logits", "topk", "method", "routing_scale", "knobs", "ids_dtype", "out_weights",
         "out_ids", "out_packed", "out_counts", "stream"}},
    [SIG_ROUTE_ALIGN] = {"route_align", 16, 2,
        {"router_logits", "topk", "method", "routing_scale", "knobs", "num_experts", "expert_map",
         "expert_start", "ids_dtype", "out_weights", "out_ids", "out_expert_offsets",
         "out_sorted_token_ids", "out_row_of_slot", "workspace", "stream"}},
    [SIG_ALIGN] = {"align", 9, 2,
        {"topk_ids", "num_experts", "expert_map", "expert_start", "out_expert_offsets",
         "out_sorted_token_ids", "out_row_of_slot", "workspace", "stream"}},
    [SIG_ALIGN_BLOCK] = {"align_block_size", 11, 3,
        {"topk_ids", "block_size", "num_experts", "expert_map", "expert_start", "pad",
         "out_sorted_token_ids", "out_expert_ids", "out_num_tokens_post_padded", "workspace",
         "stream"}},
    [SIG_COUNT_TOKENS] = {"count_tokens_per_expert", 7, 2,
        {"topk_ids", "num_experts", "expert_map", "expert_start", "out", "workspace", "stream"}},
    [SIG_GATE_UP] = {"gate_up", 17, 5,
        {"hidden_states", "w13", "expert_offsets", "sorted_token_ids", "topk", "topk_weights",
         "w13_bias", "activation", "activation_alpha", "activation_limit", "clamp", "gated",
         "w13_order", "out", "workspace", "stream", "dtype"}},
    [SIG_DOWN] = {"down", 11, 5,
        {"intermediate", "w2", "expert_offsets", "sorted_token_ids", "topk", "topk_weights",
         "w2_bias", "out", "workspace", "stream", "dtype"}},
    [SIG_COMBINE] = {"combine", 7, 2,
        {"rows", "row_of_slot", "routed_scaling_factor", "shared_output", "out", "stream",
         "dtype"}},
    /* LAYER_KW without hidden_states_scale, shared_output, out, workspace, stream */
    [SIG_EXPERTS] = {"Experts", 25, 2,
        {"w13", "w2", "quant", "w13_scale", "w2_scale", "w13_zero_point", "w2_zero_point",
         "intermediate_scale", "w13_bias", "w2_bias", "activation", "activation_alpha",
         "activation_limit", "clamp", "gated", "w13_order", "apply_router_weight_on_input",
         "routed_scaling_factor", "no_combine", "expert_map", "expert_start", "deterministic",
         "batch_invariant", "dtype", "max_tokens"}},
    [SIG_EXPERTS_CALL] = {"Experts.__call__", 7, 3,
        {"hidden_states", "topk_weights", "topk_ids", "out", "workspace", "shared_output",
         "stream"}},
    [SIG_EXPERTS_REBIND] = {"Experts.rebind", 4, 2, {"w13", "w2", "w13_bias", "w2_bias"}},
    [SIG_PLAN] = {"plan", 15, 5, {PLAN_KW}},
    [SIG_WORKSPACE_SIZE] = {"workspace_size", 15, 5, {PLAN_KW}},
    [SIG_DEVICE] = {"_device", 1, 0, {"device"}},
    [SIG_DEVICE_ALLOC] = {"_device_alloc", 2, 1, {"nbytes", "device"}},
    [SIG_DEVICE_STREAM] = {"_device_graph", 2, 1, {"stream", "device"}},
    [SIG_DEVICE_GRAPH] = {"_device_graph_launch", 3, 2, {"graph", "stream", "device"}},
    [SIG_DEVICE_ELAPSED] = {"_device_graph_elapsed", 4, 3,
        {"graph", "stream", "replays", "device"}},
    [SIG_DEVICE_COPY] = {"copy", 2, 1, {"tensor", "offset"}},
    [SIG_DEVICE_VIEW] = {"view", 3, 2, {"shape", "dtype", "offset"}},
    [SIG_DLPACK] = {"__dlpack__", 4, 0, {"stream", "max_version", "dl_device", "copy"}},
};
/* clang-format on */

/* ---- choices: string arguments with a closed set of values ----------------------------------- */

typedef struct choice {
    const char *text;
    int32_t value;
} choice;

/* Every set is a run of this table, so that module state can hold the interned texts in the same
 * order. */
static const choice CHOICES[] = {
    {"silu", MOE_ACT_SILU},
    {"gelu", MOE_ACT_GELU},
    {"gelu_tanh", MOE_ACT_GELU_TANH},
    {"relu2", MOE_ACT_RELU2},
    {"swiglu_oai", MOE_ACT_SWIGLU_OAI},
    {"situ", MOE_ACT_SITU},
    {"after", MOE_CLAMP_AFTER},
    {"before", MOE_CLAMP_BEFORE},
    {"gate_up", MOE_ORDER_GATE_UP},
    {"up_gate", MOE_ORDER_UP_GATE},
    {"interleaved", MOE_ORDER_INTERLEAVED},
    {"weighted", MOE_NO_COMBINE_WEIGHTED},
    {"unweighted", MOE_NO_COMBINE_UNWEIGHTED},
    {"cpu", MOE_CPU},
    {"cuda", MOE_CUDA},
    {"bfloat16", MOE_BF16},
    {"float16", MOE_F16},
    {"float32", MOE_F32},
    {"int32", MOE_I32},
    {"int64", MOE_I64},
    {"sum", MOE_SHARED_SUM},
    {"gate", MOE_SHARED_GATE},
    {"sink", MOE_SHARED_SINK},
#define MOE_ROUTE_METHOD(name, score, key, bias, groups, ids, renormalize)                         \
    {#name, MOE_ROUTE_##name},
#include "../kernels/route_methods.def"
#undef MOE_ROUTE_METHOD
};
enum { NUM_TEXTS = sizeof CHOICES / sizeof *CHOICES };
_Static_assert(sizeof CHOICES / sizeof *CHOICES <= (size_t)NUM_CHOICES,
               "module state has room for every choice");

typedef struct choices {
    int first, count;
    moe_status wrong; /* of a text that is none of them */
} choices;

static const choices ACTIVATIONS = {0, 6, MOE_ERROR_VALUE}, CLAMPS = {6, 2, MOE_ERROR_VALUE},
                     ORDERS = {8, 3, MOE_ERROR_VALUE}, NO_COMBINES = {11, 2, MOE_ERROR_VALUE},
                     BACKENDS = {13, 2, MOE_ERROR_VALUE}, DTYPES = {15, 3, MOE_ERROR_TYPE},
                     IDS_DTYPES = {18, 2, MOE_ERROR_TYPE}, SHARED = {20, 3, MOE_ERROR_VALUE},
                     METHODS = {23, MOE_ROUTE_COUNT, MOE_ERROR_VALUE};

static void choices_text(const choices *set, char *text, size_t size)
{
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < set->count && used < size; ++i) {
        int wrote = snprintf(text + used, size - used, "%s'%s'",
                             i == 0                ? ""
                             : i == set->count - 1 ? " or "
                                                   : ", ",
                             CHOICES[set->first + i].text);
        used += wrote > 0 ? (size_t)wrote : 0;
    }
}

/* repr(object), at most size - 1 bytes of it */
static const char *repr_text(PyObject *object, char *text, size_t size)
{
    PyObject *repr = PyObject_Repr(object);
    const char *utf8 = repr ? PyUnicode_AsUTF8AndSize(repr, NULL) : NULL;
    snprintf(text, size, "%s", utf8 ? utf8 : "an object without a repr");
    Py_XDECREF(repr);
    PyErr_Clear();
    return text;
}

static int parse_choice(module_state *state, const char *name, const choices *set, PyObject *object,
                        int32_t *value, moe_error *err)
{
    for (int i = set->first; i < set->first + set->count; ++i) {
        if (object == state->choices[i]) {
            *value = CHOICES[i].value;
            return MOE_OK;
        }
    }
    bool is_text = PyUnicode_Check(object);
    for (int i = set->first; is_text && i < set->first + set->count; ++i) {
        if (PyUnicode_CompareWithASCIIString(object, CHOICES[i].text) == 0) {
            *value = CHOICES[i].value;
            return MOE_OK;
        }
    }
    char expected[640], got[96];
    choices_text(set, expected, sizeof expected);
    if (!is_text)
        return moe_fail(err, MOE_ERROR_TYPE, "%s: expected %s, got %s", name, expected,
                        tensor_type_text(object, got, sizeof got));
    return moe_fail(err, set->wrong, "%s: expected %s, got %s", name, expected,
                    repr_text(object, got, sizeof got));
}

int parse_activation(module_state *state, PyObject *object, int32_t *value, moe_error *err)
{
    if (object == Py_None) return MOE_OK;
    return parse_choice(state, "activation", &ACTIVATIONS, object, value, err);
}

int parse_clamp(module_state *state, PyObject *object, int32_t *value, moe_error *err)
{
    if (object == Py_None) return MOE_OK;
    return parse_choice(state, "clamp", &CLAMPS, object, value, err);
}

int parse_order(module_state *state, PyObject *object, int32_t *value, moe_error *err)
{
    if (object == Py_None) return MOE_OK;
    return parse_choice(state, "w13_order", &ORDERS, object, value, err);
}

int parse_method(module_state *state, PyObject *object, int32_t *value, moe_error *err)
{
    *value = MOE_ROUTE_softmax_topk;
    if (object == Py_None) return MOE_OK;
    return parse_choice(state, "method", &METHODS, object, value, err);
}

int parse_no_combine(module_state *state, PyObject *object, int32_t *value, moe_error *err)
{
    if (object == Py_None || object == Py_False) return MOE_OK;
    if (object == Py_True) /* which of the two it would mean is for the caller to say */
        return moe_fail(err, MOE_ERROR_TYPE,
                        "no_combine: expected False, 'weighted' or 'unweighted', got True");
    return parse_choice(state, "no_combine", &NO_COMBINES, object, value, err);
}

int parse_backend(module_state *state, PyObject *object, moe_backend *value, moe_error *err)
{
    int32_t backend = (int32_t)*value;
    if (object != Py_None && parse_choice(state, "device", &BACKENDS, object, &backend, err))
        return err->status;
    *value = (moe_backend)backend;
    return MOE_OK;
}

int parse_dtype(module_state *state, PyObject *object, int32_t *value, moe_error *err)
{
    *value = MOE_DTYPE_NONE;
    if (object == Py_None) return MOE_OK;
    int32_t known = PyUnicode_Check(object) ? tensor_dtype_by_name(object) : MOE_DTYPE_NONE;
    if (known == MOE_F8E4M3 || known == MOE_F8E5M2 || known == MOE_F8E8M0 || known == MOE_F4E2M1)
        return moe_fail(err, MOE_ERROR_NOT_IMPLEMENTED,
                        "dtype: expected 'bfloat16', 'float16' or 'float32', got '%s', which is "
                        "not built yet",
                        moe_dtype_name(known));
    return parse_choice(state, "dtype", &DTYPES, object, value, err);
}

int parse_routing_knobs(module_state *state, PyObject *knobs, moe_options *o, moe_error *err)
{
    if (knobs == Py_None) return MOE_OK;
    if (!PyTuple_Check(knobs) || PyTuple_Size(knobs) != NUM_ROUTING_KNOBS)
        return moe_fail(err, MOE_ERROR_TYPE, "knobs: expected None or the knobs of a Routing");
    PyObject *const renormalize = PyTuple_GetItem(knobs, KNOB_RENORMALIZE);
    PyObject *const shared = PyTuple_GetItem(knobs, KNOB_SHARED_WEIGHT);
    if (parse_bool("renormalize", renormalize, -1, &o->renormalize, err) ||
        parse_int("num_groups", PyTuple_GetItem(knobs, KNOB_NUM_GROUPS), 0, &o->num_groups, err) ||
        parse_int("topk_groups", PyTuple_GetItem(knobs, KNOB_TOPK_GROUPS), 0, &o->topk_groups,
                  err) ||
        parse_int("num_fused_shared_experts", PyTuple_GetItem(knobs, KNOB_NUM_SHARED), 0,
                  &o->num_shared, err) ||
        parse_int("num_zero_experts", PyTuple_GetItem(knobs, KNOB_NUM_ZERO), 0,
                  &o->num_zero_experts, err) ||
        parse_int("first_shared_id", PyTuple_GetItem(knobs, KNOB_FIRST_SHARED_ID), -1,
                  &o->first_shared_id, err) ||
        parse_double("softcap", PyTuple_GetItem(knobs, KNOB_SOFTCAP), 0, &o->softcap, err) ||
        parse_dtype(state, PyTuple_GetItem(knobs, KNOB_WEIGHTS_DTYPE), &o->weights_dtype, err))
        return err->status;
    if (o->weights_dtype == MOE_DTYPE_NONE) o->weights_dtype = MOE_F32;
    if (PyUnicode_Check(shared))
        return parse_choice(state, "shared_weight", &SHARED, shared, &o->shared, err);
    if (shared == Py_None) return MOE_OK; /* sum */
    o->shared = MOE_SHARED_CONSTANT;
    return parse_double("shared_weight", shared, 1, &o->shared_weight, err);
}

int parse_ids_dtype(module_state *state, PyObject *object, int32_t *value, moe_error *err)
{
    *value = MOE_I32;
    if (object == Py_None) return MOE_OK;
    return parse_choice(state, "ids_dtype", &IDS_DTYPES, object, value, err);
}

/* ---- numbers --------------------------------------------------------------------------------- */

static int fail_kind(const char *name, const char *expected, PyObject *object, moe_error *err)
{
    char got[128];
    return moe_fail(err, MOE_ERROR_TYPE, "%s: expected %s, got %s", name, expected,
                    tensor_type_text(object, got, sizeof got));
}

/* Tensors convert to numbers too, by waiting for the device: not here. */
static bool is_number_like(PyObject *object, const char *method)
{
    PyObject *type = (PyObject *)Py_TYPE(object);
    return PyObject_HasAttrString(type, method) && !PyObject_HasAttrString(type, "__dlpack__");
}

int parse_bool(const char *name, PyObject *object, int32_t by_default, int32_t *value,
               moe_error *err)
{
    if (object == Py_True)
        *value = 1;
    else if (object == Py_False)
        *value = 0;
    else if (object == Py_None)
        *value = by_default;
    else
        return fail_kind(name, "True or False", object, err);
    return MOE_OK;
}

int parse_double(const char *name, PyObject *object, double by_default, double *value,
                 moe_error *err)
{
    *value = by_default;
    if (object == Py_None) return MOE_OK;
    if (PyBool_Check(object)) return fail_kind(name, "a number", object, err);
    if (!PyFloat_Check(object) && !PyLong_Check(object) && !is_number_like(object, "__float__"))
        return fail_kind(name, "a number", object, err);
    *value = PyFloat_AsDouble(object);
    if (*value == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Clear();
            return moe_fail(err, MOE_ERROR_VALUE,
                            "%s: expected a number that a float can hold, got a larger one", name);
        }
        return tensor_fail_with_exception(err, MOE_ERROR_TYPE, name, "a number", object);
    }
    return MOE_OK;
}

int parse_optional_double(const char *name, PyObject *object, int32_t *has, double *value,
                          moe_error *err)
{
    *has = object != Py_None;
    return *has ? parse_double(name, object, 0, value, err) : MOE_OK;
}

int parse_int(const char *name, PyObject *object, int64_t by_default, int64_t *value,
              moe_error *err)
{
    *value = by_default;
    if (object == Py_None) return MOE_OK;
    if (PyBool_Check(object) || (!PyLong_Check(object) && !is_number_like(object, "__index__")))
        return fail_kind(name, "an integer", object, err);
    PyObject *integer = PyNumber_Index(object);
    if (integer == NULL)
        return tensor_fail_with_exception(err, MOE_ERROR_TYPE, name, "an integer", object);
    int overflow = 0;
    *value = PyLong_AsLongLongAndOverflow(integer, &overflow);
    char got[64];
    if (overflow)
        moe_fail(err, MOE_ERROR_VALUE, "%s: expected an integer of 64 bits, got %s", name,
                 repr_text(integer, got, sizeof got));
    Py_DECREF(integer);
    return err->status;
}

int parse_int32(const char *name, PyObject *object, int32_t by_default, int32_t *value,
                moe_error *err)
{
    int64_t wide = by_default;
    *value = by_default;
    if (parse_int(name, object, by_default, &wide, err)) return err->status;
    if (wide < INT32_MIN || wide > INT32_MAX)
        return moe_fail(err, MOE_ERROR_VALUE, "%s: expected an integer of 32 bits, got %" PRId64,
                        name, wide);
    *value = (int32_t)wide;
    return MOE_OK;
}

int parse_count(const char *name, PyObject *object, int64_t *value, moe_error *err)
{
    if (object == Py_None) return fail_kind(name, "an integer", object, err);
    return parse_int(name, object, 0, value, err);
}

int parse_count32(const char *name, PyObject *object, int32_t *value, moe_error *err)
{
    if (object == Py_None) return fail_kind(name, "an integer", object, err);
    return parse_int32(name, object, 0, value, err);
}

/* ---- the layer's keywords -------------------------------------------------------------------- */

static int refuse_quantised(PyObject *const *kw, moe_error *err)
{
    for (int i = KW_QUANT; i <= KW_INTERMEDIATE_SCALE; ++i) {
        if (kw[i] == Py_None) continue;
        char got[96];
        if (PyUnicode_Check(kw[i]))
            repr_text(kw[i], got, sizeof got);
        else
            tensor_type_text(kw[i], got, sizeof got);
        return moe_fail(err, MOE_ERROR_NOT_IMPLEMENTED,
                        "%s: expected None, got %s; quantised weights are not built yet",
                        moe_signatures[SIG_FUSED_EXPERTS].names[5 + i], got);
    }
    return MOE_OK;
}

void default_options(moe_options *options)
{
    memset(options, 0, sizeof *options); /* silu, gate_up, sum, softmax_topk */
    options->clamp = MOE_CLAMP_AFTER;
    options->gated = 1;
    options->deterministic = 1;
    options->routed_scaling_factor = 1.0;
    options->routing_scale = 1.0;
    options->renormalize = -1;
    options->weights_dtype = MOE_F32;
    options->first_shared_id = -1;
}

int parse_layer_options(module_state *state, PyObject *const *kw, moe_options *o, int32_t *dtype,
                        moe_error *err)
{
    if (refuse_quantised(kw, err)) return err->status;
    if (parse_activation(state, kw[KW_ACTIVATION], &o->activation, err) ||
        parse_optional_double("activation_alpha", kw[KW_ACTIVATION_ALPHA], &o->has_alpha,
                              &o->activation_alpha, err) ||
        parse_optional_double("activation_limit", kw[KW_ACTIVATION_LIMIT], &o->has_limit,
                              &o->activation_limit, err) ||
        parse_clamp(state, kw[KW_CLAMP], &o->clamp, err) ||
        parse_bool("gated", kw[KW_GATED], 1, &o->gated, err) ||
        parse_order(state, kw[KW_W13_ORDER], &o->w13_order, err) ||
        parse_bool("apply_router_weight_on_input", kw[KW_APPLY_ROUTER_WEIGHT_ON_INPUT], 0,
                   &o->apply_router_weight_on_input, err) ||
        parse_double("routed_scaling_factor", kw[KW_ROUTED_SCALING_FACTOR], 1.0,
                     &o->routed_scaling_factor, err) ||
        parse_no_combine(state, kw[KW_NO_COMBINE], &o->combine, err))
        return err->status;
    o->has_expert_start = kw[KW_EXPERT_START] != Py_None;
    if (parse_int("expert_start", kw[KW_EXPERT_START], 0, &o->expert_start, err) ||
        parse_bool("deterministic", kw[KW_DETERMINISTIC], 1, &o->deterministic, err) ||
        parse_bool("batch_invariant", kw[KW_BATCH_INVARIANT], 0, &o->batch_invariant, err))
        return err->status;
    return parse_dtype(state, kw[KW_DTYPE], dtype, err);
}

/* ---- the parser ------------------------------------------------------------------------------ */

static int fail_count(const signature *sig, Py_ssize_t nargs, moe_error *err)
{
    return moe_fail(err, MOE_ERROR_TYPE, "%s: expected at most %d arguments, got %zd",
                    sig->function, sig->num_parameters, nargs);
}

static int fail_missing(const signature *sig, PyObject **values, moe_error *err)
{
    for (int i = 0; i < sig->num_required; ++i)
        if (values[i] == NULL)
            return moe_fail(err, MOE_ERROR_TYPE, "%s: expected by %s, got no such argument",
                            sig->names[i], sig->function);
    return MOE_OK;
}

/* Where a call gives several keywords they mostly come in order: the search starts after the
 * last hit. */
static int find_keyword(module_state *state, signature_id id, PyObject *key, int start)
{
    const int count = moe_signatures[id].num_parameters;
    PyObject *const *names = state->names[id];
    for (int i = start; i < count; ++i)
        if (names[i] == key) return i;
    for (int i = 0; i < start; ++i)
        if (names[i] == key) return i;
    for (int i = 0; i < count; ++i)
        if (PyUnicode_CompareWithASCIIString(key, moe_signatures[id].names[i]) == 0) return i;
    return -1;
}

static int set_keyword(module_state *state, signature_id id, PyObject *key, PyObject *value,
                       PyObject **values, int *at, moe_error *err)
{
    const signature *sig = &moe_signatures[id];
    char text[96];
    if (!PyUnicode_Check(key))
        return moe_fail(err, MOE_ERROR_TYPE, "%s: expected keywords that are text", sig->function);
    int found = find_keyword(state, id, key, *at);
    if (found < 0)
        return moe_fail(err, MOE_ERROR_TYPE, "%s: expected a keyword of its signature, got %s",
                        sig->function, repr_text(key, text, sizeof text));
    if (values[found])
        return moe_fail(err, MOE_ERROR_TYPE,
                        "%s: expected by %s once, got it by position and by keyword",
                        sig->names[found], sig->function);
    values[found] = value;
    *at = found + 1 < sig->num_parameters ? found + 1 : 0;
    return MOE_OK;
}

static int complete(const signature *sig, PyObject **values, moe_error *err)
{
    if (fail_missing(sig, values, err)) return err->status;
    for (int i = 0; i < sig->num_parameters; ++i)
        if (values[i] == NULL) values[i] = Py_None;
    return MOE_OK;
}

PyObject *const *parse_arguments(module_state *state, signature_id id, PyObject *const *args,
                                 Py_ssize_t nargs, PyObject *kwnames, PyObject **values,
                                 moe_error *err)
{
    const signature *sig = &moe_signatures[id];
    Py_ssize_t num_keywords = kwnames ? PyTuple_Size(kwnames) : 0;
    if (nargs == sig->num_parameters && num_keywords == 0) return args;
    if (nargs > sig->num_parameters) {
        fail_count(sig, nargs, err);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < nargs; ++i)
        values[i] = args[i];
    for (Py_ssize_t i = nargs; i < sig->num_parameters; ++i)
        values[i] = NULL;
    int at = (int)(nargs < sig->num_parameters ? nargs : 0);
    for (Py_ssize_t i = 0; i < num_keywords; ++i)
        if (set_keyword(state, id, PyTuple_GetItem(kwnames, i), args[nargs + i], values, &at, err))
            return NULL;
    return complete(sig, values, err) ? NULL : values;
}

int parse_tuple(module_state *state, signature_id id, PyObject *args, PyObject *kwargs,
                PyObject **values, moe_error *err)
{
    const signature *sig = &moe_signatures[id];
    Py_ssize_t nargs = PyTuple_Size(args), position = 0;
    if (nargs > sig->num_parameters) return fail_count(sig, nargs, err);
    for (Py_ssize_t i = 0; i < sig->num_parameters; ++i)
        values[i] = i < nargs ? PyTuple_GetItem(args, i) : NULL;
    int at = (int)(nargs < sig->num_parameters ? nargs : 0);
    PyObject *key, *value;
    while (kwargs && PyDict_Next(kwargs, &position, &key, &value))
        if (set_keyword(state, id, key, value, values, &at, err)) return err->status;
    return complete(sig, values, err);
}

/* ---- state ----------------------------------------------------------------------------------- */

int parse_init(module_state *state, moe_error *err)
{
    for (int id = 0; id < NUM_SIGNATURES; ++id)
        for (int i = 0; i < moe_signatures[id].num_parameters; ++i)
            if ((state->names[id][i] = PyUnicode_InternFromString(moe_signatures[id].names[i])) ==
                NULL)
                goto failed;
    for (int i = 0; i < NUM_TEXTS; ++i)
        if ((state->choices[i] = PyUnicode_InternFromString(CHOICES[i].text)) == NULL) goto failed;
    if ((state->cuda_stream = PyUnicode_InternFromString("__cuda_stream__")) == NULL) goto failed;
    if ((state->torch_cuda_stream = PyUnicode_InternFromString("cuda_stream")) == NULL) goto failed;
    return MOE_OK;
failed:
    err->status = MOE_ERROR_PYTHON;
    return MOE_ERROR_PYTHON;
}

void parse_clear(module_state *state)
{
    for (int id = 0; id < NUM_SIGNATURES; ++id)
        for (int i = 0; i < MAX_PARAMETERS; ++i)
            Py_CLEAR(state->names[id][i]);
    for (int i = 0; i < NUM_TEXTS; ++i)
        Py_CLEAR(state->choices[i]);
    Py_CLEAR(state->cuda_stream);
    Py_CLEAR(state->torch_cuda_stream);
}
