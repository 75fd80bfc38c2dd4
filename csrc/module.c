/* module.c: fusedmoe._C. The functions, module state, and the one place that raises.
 *
 * In Python, every function of the layer would read
 *
 *     def fused_experts(hidden_states, w13, w2, topk_weights, topk_ids, *layer_kw):
 *         call = Call(import_(hidden_states), import_(w13), ..., options(layer_kw))
 *         problem = validate(call)              # TypeError, ValueError, NotImplementedError
 *         plan = plans.get(problem) or make_plan(problem, device_info(hidden_states.device))
 *         framework = framework_of(hidden_states)
 *         out = framework.empty(...) if out is None else out
 *         workspace = framework.empty(plan.workspace.total) if workspace is None else workspace
 *         run(call, plan, stream or framework.current_stream())
 *         return out
 *
 * The lines are call_prototype / call_tensor / parse_layer_options here and call_finish in
 * call.c. */
#include "binding.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifndef MOE_VERSION
#define MOE_VERSION "unknown"
#endif
#ifndef MOE_CUDA_VERSION
#define MOE_CUDA_VERSION 0
#endif

PyObject *raise_error(moe_error *err)
{
    PyObject *type = PyExc_RuntimeError;
    switch (err->status) {
    case MOE_ERROR_TYPE:
        type = PyExc_TypeError;
        break;
    case MOE_ERROR_VALUE:
        type = PyExc_ValueError;
        break;
    case MOE_ERROR_NOT_IMPLEMENTED:
        type = PyExc_NotImplementedError;
        break;
    case MOE_ERROR_MEMORY:
        type = PyExc_MemoryError;
        break;
    case MOE_OK:
    case MOE_ERROR_RUNTIME:
        break;
    case MOE_ERROR_PYTHON:
        if (PyErr_Occurred()) return NULL;
        break;
    }
    /* texts hold what users gave: not always UTF-8 where one was cut */
    PyObject *text = PyUnicode_DecodeUTF8(err->text, (Py_ssize_t)strlen(err->text), "replace");
    if (text) PyErr_SetObject(type, text);
    Py_XDECREF(text);
    return NULL;
}

/* ---- the layer ------------------------------------------------------------------------------- */

static int import_layer_keywords(call_frame *f, PyObject *const *kw)
{
    moe_call *c = &f->call;
    if (call_numbers(f, kw[KW_W13_BIAS], "w13_bias", &c->w13_bias) ||
        call_numbers(f, kw[KW_W2_BIAS], "w2_bias", &c->w2_bias) ||
        call_numbers(f, kw[KW_SHARED_OUTPUT], "shared_output", &c->shared_output) ||
        call_tensor(f, kw[KW_EXPERT_MAP], "expert_map", &c->expert_map) ||
        call_numbers(f, kw[KW_OUT], "out", &c->out) ||
        call_tensor(f, kw[KW_WORKSPACE], "workspace", &c->workspace))
        return f->err.status;
    call_output_add(f, "out", kw[KW_OUT], &c->out);
    return MOE_OK;
}

static PyObject *py_fused_experts(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                  PyObject *kwnames)
{
    module_state *state = PyModule_GetState(module);
    PyObject *values[MAX_PARAMETERS], *stream = Py_None;
    call_frame f;
    call_begin(&f, state, MOE_OP_FUSED_EXPERTS, "fused_experts");
    f.memo = &state->last;
    moe_call *c = &f.call;
    PyObject *const *v =
        parse_arguments(state, SIG_FUSED_EXPERTS, args, nargs, kwnames, values, &f.err);
    if (v == NULL) goto done;
    PyObject *const *kw = v + 5;
    stream = kw[KW_STREAM];
    if (parse_layer_options(state, kw, &c->options, &f.dtype, &f.err)) goto done;
    if (call_prototype(&f, v[0], "hidden_states", &c->hidden_states)) goto done;
    if (call_numbers(&f, v[1], "w13", &c->w13)) goto done;
    if (call_numbers(&f, v[2], "w2", &c->w2)) goto done;
    if (call_tensor(&f, v[3], "topk_weights", &c->topk_weights)) goto done;
    if (call_tensor(&f, v[4], "topk_ids", &c->topk_ids)) goto done;
    if (import_layer_keywords(&f, kw)) goto done;
done:
    return call_finish(&f, stream);
}

/* v: topk, method, routing_scale, knobs of fused_moe and route. Tensors are imported after the
 * prototype. */
static int parse_routing(call_frame *f, PyObject *const *v)
{
    PyObject *topk = v[0], *method = v[1], *scale = v[2];
    moe_options *o = &f->call.options;
    if (parse_routing_knobs(f->state, v[3], o, &f->err)) return f->err.status;
    if (parse_count("topk", topk, &o->topk, &f->err) ||
        parse_method(f->state, method, &o->method, &f->err) ||
        parse_double("routing_scale", scale, 1.0, &o->routing_scale, &f->err))
        return f->err.status;
    if (!isfinite((float)o->routing_scale))
        return moe_fail(&f->err, MOE_ERROR_VALUE,
                        "routing_scale: expected a finite number (float32), got %g",
                        o->routing_scale);
    return MOE_OK;
}

static int import_routing(call_frame *f, PyObject *knobs)
{
    moe_call *c = &f->call;
    const struct {
        const char *name;
        moe_tensor *tensor;
    } ROUTING_TENSORS[] = {{"correction_bias", &c->correction_bias},
                           {"expert_scale", &c->expert_scale},
                           {"num_token_non_padded", &c->num_token_non_padded},
                           {"expert_map", &c->routing_map},
                           {"replica_map", &c->replica_map},
                           {"tid2eid", &c->tid2eid},
                           {"token_ids", &c->token_ids}};
    if (knobs == Py_None) return MOE_OK;
    for (int i = 0; i < NUM_ROUTING_KNOBS - KNOB_FIRST_TENSOR; ++i)
        if (call_tensor(f, PyTuple_GetItem(knobs, KNOB_FIRST_TENSOR + i), ROUTING_TENSORS[i].name,
                        ROUTING_TENSORS[i].tensor))
            return f->err.status;
    return MOE_OK;
}

static PyObject *py_fused_moe(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *kwnames)
{
    module_state *state = PyModule_GetState(module);
    PyObject *values[MAX_PARAMETERS], *stream = Py_None;
    call_frame f;
    call_begin(&f, state, MOE_OP_FUSED_MOE, "fused_moe");
    moe_call *c = &f.call;
    PyObject *const *v =
        parse_arguments(state, SIG_FUSED_MOE, args, nargs, kwnames, values, &f.err);
    if (v == NULL) goto done;
    PyObject *const *kw = v + 8;
    stream = kw[KW_STREAM];
    if (parse_layer_options(state, kw, &c->options, &f.dtype, &f.err)) goto done;
    if (parse_routing(&f, v + 4)) goto done;
    if (call_prototype(&f, v[0], "hidden_states", &c->hidden_states)) goto done;
    if (call_numbers(&f, v[1], "w13", &c->w13)) goto done;
    if (call_numbers(&f, v[2], "w2", &c->w2)) goto done;
    if (call_tensor(&f, v[3], "router_logits", &c->router_logits)) goto done;
    if (import_routing(&f, v[7])) goto done;
    if (import_layer_keywords(&f, kw)) goto done;
done:
    return call_finish(&f, stream);
}

/* ---- the stages alone ------------------------------------------------------------------------ */

static PyObject *py_route(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *kwnames)
{
    module_state *state = PyModule_GetState(module);
    PyObject *values[MAX_PARAMETERS], *stream = Py_None;
    int32_t ids_dtype = MOE_I32;
    call_frame f;
    call_begin(&f, state, MOE_OP_ROUTE, "route");
    moe_call *c = &f.call;
    PyObject *const *v = parse_arguments(state, SIG_ROUTE, args, nargs, kwnames, values, &f.err);
    if (v == NULL) goto done;
    stream = v[10];
    if (parse_routing(&f, v + 1)) goto done;
    if (parse_ids_dtype(state, v[5], &ids_dtype, &f.err)) goto done;
    if (call_prototype(&f, v[0], "router_logits", &c->router_logits)) goto done;
    if (import_routing(&f, v[4])) goto done;
    if (call_tensor(&f, v[6], "out_weights", &c->topk_weights)) goto done;
    if (call_tensor(&f, v[7], "out_ids", &c->topk_ids)) goto done;
    if (call_tensor(&f, v[8], "out_packed", &c->packed)) goto done;
    if (call_tensor(&f, v[9], "out_counts", &c->counts)) goto done;
    call_output_add(&f, "out_weights", v[6], &c->topk_weights);
    call_output_add(&f, "out_ids", v[7], &c->topk_ids);
    f.outputs[1].dtype = ids_dtype;
done:
    return call_finish(&f, stream);
}

static PyObject *py_route_align(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                PyObject *kwnames)
{
    module_state *state = PyModule_GetState(module);
    PyObject *values[MAX_PARAMETERS], *stream = Py_None;
    int32_t ids_dtype = MOE_I32;
    call_frame f;
    call_begin(&f, state, MOE_OP_ROUTE_ALIGN, "route_align");
    moe_call *c = &f.call;
    PyObject *const *v =
        parse_arguments(state, SIG_ROUTE_ALIGN, args, nargs, kwnames, values, &f.err);
    if (v == NULL) goto done;
    stream = v[15];
    c->options.has_expert_start = v[7] != Py_None;
    if (parse_routing(&f, v + 1)) goto done;
    if (parse_int("num_experts", v[5], INT64_MIN, &c->num_experts, &f.err)) goto done;
    if (parse_int("expert_start", v[7], 0, &c->options.expert_start, &f.err)) goto done;
    if (parse_ids_dtype(state, v[8], &ids_dtype, &f.err)) goto done;
    if (call_prototype(&f, v[0], "router_logits", &c->router_logits)) goto done;
    if (import_routing(&f, v[4])) goto done;
    if (call_tensor(&f, v[6], "expert_map", &c->expert_map)) goto done;
    if (call_tensor(&f, v[9], "out_weights", &c->topk_weights)) goto done;
    if (call_tensor(&f, v[10], "out_ids", &c->topk_ids)) goto done;
    if (call_tensor(&f, v[11], "out_expert_offsets", &c->expert_offsets)) goto done;
    if (call_tensor(&f, v[12], "out_sorted_token_ids", &c->sorted_token_ids)) goto done;
    if (call_tensor(&f, v[13], "out_row_of_slot", &c->row_of_slot)) goto done;
    if (call_tensor(&f, v[14], "workspace", &c->workspace)) goto done;
    call_output_add(&f, "out_weights", v[9], &c->topk_weights);
    call_output_add(&f, "out_ids", v[10], &c->topk_ids);
    call_output_add(&f, "out_expert_offsets", v[11], &c->expert_offsets);
    call_output_add(&f, "out_sorted_token_ids", v[12], &c->sorted_token_ids);
    call_output_add(&f, "out_row_of_slot", v[13], &c->row_of_slot);
    f.outputs[1].dtype = ids_dtype;
done:
    return call_finish(&f, stream);
}

static PyObject *py_align(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *kwnames)
{
    module_state *state = PyModule_GetState(module);
    PyObject *values[MAX_PARAMETERS], *stream = Py_None;
    call_frame f;
    call_begin(&f, state, MOE_OP_ALIGN, "align");
    moe_call *c = &f.call;
    PyObject *const *v = parse_arguments(state, SIG_ALIGN, args, nargs, kwnames, values, &f.err);
    if (v == NULL) goto done;
    stream = v[8];
    c->options.has_expert_start = v[3] != Py_None;
    if (parse_count("num_experts", v[1], &c->num_experts, &f.err)) goto done;
    if (parse_int("expert_start", v[3], 0, &c->options.expert_start, &f.err)) goto done;
    if (call_prototype(&f, v[0], "topk_ids", &c->topk_ids)) goto done;
    if (call_tensor(&f, v[2], "expert_map", &c->expert_map)) goto done;
    if (call_tensor(&f, v[4], "out_expert_offsets", &c->expert_offsets)) goto done;
    if (call_tensor(&f, v[5], "out_sorted_token_ids", &c->sorted_token_ids)) goto done;
    if (call_tensor(&f, v[6], "out_row_of_slot", &c->row_of_slot)) goto done;
    if (call_tensor(&f, v[7], "workspace", &c->workspace)) goto done;
    call_output_add(&f, "out_expert_offsets", v[4], &c->expert_offsets);
    call_output_add(&f, "out_sorted_token_ids", v[5], &c->sorted_token_ids);
    call_output_add(&f, "out_row_of_slot", v[6], &c->row_of_slot);
done:
    return call_finish(&f, stream);
}

static PyObject *py_align_block_size(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                     PyObject *kwnames)
{
    module_state *state = PyModule_GetState(module);
    PyObject *values[MAX_PARAMETERS], *stream = Py_None;
    call_frame f;
    call_begin(&f, state, MOE_OP_ALIGN_BLOCK, "align_block_size");
    moe_call *c = &f.call;
    PyObject *const *v =
        parse_arguments(state, SIG_ALIGN_BLOCK, args, nargs, kwnames, values, &f.err);
    if (v == NULL) goto done;
    stream = v[10];
    c->options.has_expert_start = v[4] != Py_None;
    if (parse_count("block_size", v[1], &c->block_size, &f.err)) goto done;
    if (parse_count("num_experts", v[2], &c->num_experts, &f.err)) goto done;
    if (parse_int("expert_start", v[4], 0, &c->options.expert_start, &f.err)) goto done;
    if (parse_bool("pad", v[5], 1, &c->fill, &f.err)) goto done;
    if (call_prototype(&f, v[0], "topk_ids", &c->topk_ids)) goto done;
    if (call_tensor(&f, v[3], "expert_map", &c->expert_map)) goto done;
    if (call_tensor(&f, v[6], "out_sorted_token_ids", &c->sorted_token_ids)) goto done;
    if (call_tensor(&f, v[7], "out_expert_ids", &c->expert_ids)) goto done;
    if (call_tensor(&f, v[8], "out_num_tokens_post_padded", &c->num_tokens_post_padded)) goto done;
    if (call_tensor(&f, v[9], "workspace", &c->workspace)) goto done;
    call_output_add(&f, "out_sorted_token_ids", v[6], &c->sorted_token_ids);
    call_output_add(&f, "out_expert_ids", v[7], &c->expert_ids);
    call_output_add(&f, "out_num_tokens_post_padded", v[8], &c->num_tokens_post_padded);
done:
    return call_finish(&f, stream);
}

static PyObject *py_count_tokens(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                 PyObject *kwnames)
{
    module_state *state = PyModule_GetState(module);
    PyObject *values[MAX_PARAMETERS], *stream = Py_None;
    call_frame f;
    call_begin(&f, state, MOE_OP_ALIGN_BLOCK, "count_tokens_per_expert");
    moe_call *c = &f.call;
    PyObject *const *v =
        parse_arguments(state, SIG_COUNT_TOKENS, args, nargs, kwnames, values, &f.err);
    if (v == NULL) goto done;
    stream = v[6];
    c->options.has_expert_start = v[3] != Py_None;
    if (parse_count("num_experts", v[1], &c->num_experts, &f.err)) goto done;
    if (parse_int("expert_start", v[3], 0, &c->options.expert_start, &f.err)) goto done;
    if (call_prototype(&f, v[0], "topk_ids", &c->topk_ids)) goto done;
    if (call_tensor(&f, v[2], "expert_map", &c->expert_map)) goto done;
    if (call_tensor(&f, v[4], "out", &c->counts)) goto done;
    if (call_tensor(&f, v[5], "workspace", &c->workspace)) goto done;
    call_output_add(&f, "out", v[4], &c->counts);
done:
    return call_finish(&f, stream);
}

static PyObject *py_gate_up(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                            PyObject *kwnames)
{
    module_state *state = PyModule_GetState(module);
    PyObject *values[MAX_PARAMETERS], *stream = Py_None;
    call_frame f;
    call_begin(&f, state, MOE_OP_GATE_UP, "gate_up");
    moe_call *c = &f.call;
    moe_options *o = &c->options;
    PyObject *const *v = parse_arguments(state, SIG_GATE_UP, args, nargs, kwnames, values, &f.err);
    if (v == NULL) goto done;
    stream = v[15];
    if (parse_count("topk", v[4], &o->topk, &f.err)) goto done;
    if (parse_activation(state, v[7], &o->activation, &f.err)) goto done;
    if (parse_optional_double("activation_alpha", v[8], &o->has_alpha, &o->activation_alpha,
                              &f.err))
        goto done;
    if (parse_optional_double("activation_limit", v[9], &o->has_limit, &o->activation_limit,
                              &f.err))
        goto done;
    if (parse_clamp(state, v[10], &o->clamp, &f.err)) goto done;
    if (parse_bool("gated", v[11], 1, &o->gated, &f.err)) goto done;
    if (parse_order(state, v[12], &o->w13_order, &f.err)) goto done;
    if (parse_dtype(state, v[16], &f.dtype, &f.err)) goto done;
    if (call_prototype(&f, v[0], "hidden_states", &c->hidden_states)) goto done;
    if (call_numbers(&f, v[1], "w13", &c->w13)) goto done;
    if (call_tensor(&f, v[2], "expert_offsets", &c->expert_offsets)) goto done;
    if (call_tensor(&f, v[3], "sorted_token_ids", &c->sorted_token_ids)) goto done;
    if (call_tensor(&f, v[5], "topk_weights", &c->topk_weights)) goto done;
    if (call_numbers(&f, v[6], "w13_bias", &c->w13_bias)) goto done;
    if (call_numbers(&f, v[13], "out", &c->out)) goto done;
    if (call_tensor(&f, v[14], "workspace", &c->workspace)) goto done;
    o->apply_router_weight_on_input = v[5] != Py_None;
    call_output_add(&f, "out", v[13], &c->out);
done:
    return call_finish(&f, stream);
}

static PyObject *py_down(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                         PyObject *kwnames)
{
    module_state *state = PyModule_GetState(module);
    PyObject *values[MAX_PARAMETERS], *stream = Py_None;
    call_frame f;
    call_begin(&f, state, MOE_OP_DOWN, "down");
    moe_call *c = &f.call;
    PyObject *const *v = parse_arguments(state, SIG_DOWN, args, nargs, kwnames, values, &f.err);
    if (v == NULL) goto done;
    stream = v[9];
    if (parse_count("topk", v[4], &c->options.topk, &f.err)) goto done;
    if (parse_dtype(state, v[10], &f.dtype, &f.err)) goto done;
    if (call_prototype(&f, v[0], "intermediate", &c->intermediate)) goto done;
    if (call_numbers(&f, v[1], "w2", &c->w2)) goto done;
    if (call_tensor(&f, v[2], "expert_offsets", &c->expert_offsets)) goto done;
    if (call_tensor(&f, v[3], "sorted_token_ids", &c->sorted_token_ids)) goto done;
    if (call_tensor(&f, v[5], "topk_weights", &c->topk_weights)) goto done;
    if (call_numbers(&f, v[6], "w2_bias", &c->w2_bias)) goto done;
    if (call_numbers(&f, v[7], "out", &c->out)) goto done;
    if (call_tensor(&f, v[8], "workspace", &c->workspace)) goto done;
    call_output_add(&f, "out", v[7], &c->out);
done:
    return call_finish(&f, stream);
}

static PyObject *py_combine(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                            PyObject *kwnames)
{
    module_state *state = PyModule_GetState(module);
    PyObject *values[MAX_PARAMETERS], *stream = Py_None;
    call_frame f;
    call_begin(&f, state, MOE_OP_COMBINE, "combine");
    moe_call *c = &f.call;
    PyObject *const *v = parse_arguments(state, SIG_COMBINE, args, nargs, kwnames, values, &f.err);
    if (v == NULL) goto done;
    stream = v[5];
    if (parse_double("routed_scaling_factor", v[2], 1.0, &c->options.routed_scaling_factor, &f.err))
        goto done;
    if (parse_dtype(state, v[6], &f.dtype, &f.err)) goto done;
    if (call_prototype(&f, v[0], "rows", &c->rows)) goto done;
    if (call_tensor(&f, v[1], "row_of_slot", &c->row_of_slot)) goto done;
    if (call_numbers(&f, v[3], "shared_output", &c->shared_output)) goto done;
    if (call_numbers(&f, v[4], "out", &c->out)) goto done;
    call_output_add(&f, "out", v[4], &c->out);
done:
    return call_finish(&f, stream);
}

/* ---- planning -------------------------------------------------------------------------------- */

/* The arguments of plan and workspace_size. */
static int parse_problem(module_state *state, PyObject *const *v, moe_problem *p,
                         moe_backend *backend, int32_t *num_sms, moe_error *err)
{
    memset(p, 0, sizeof *p);
    *backend = MOE_CUDA;
    if (parse_count("num_tokens", v[0], &p->num_tokens, err) ||
        parse_count32("hidden_size", v[1], &p->hidden_size, err) ||
        parse_count32("intermediate_size", v[2], &p->intermediate_size, err) ||
        parse_count32("num_experts", v[3], &p->num_experts, err) ||
        parse_count32("topk", v[4], &p->topk, err) || parse_dtype(state, v[5], &p->dtype, err) ||
        parse_backend(state, v[6], backend, err) || parse_int32("num_sms", v[7], 0, num_sms, err) ||
        parse_bool("gated", v[8], 1, &p->gated, err) ||
        parse_no_combine(state, v[9], &p->combine, err) ||
        parse_bool("routed", v[10], 0, &p->routed, err) ||
        parse_int32("router_experts", v[11], 0, &p->router_experts, err) ||
        parse_int32("vector_bytes", v[12], 16, &p->vector_bytes, err) ||
        parse_int("workspace_limit", v[13], 0, &p->workspace_limit, err) ||
        parse_bool("deterministic", v[14], 1, &p->deterministic, err))
        return err->status;
    if (p->dtype == MOE_DTYPE_NONE) p->dtype = MOE_BF16;
    if (p->dtype == MOE_F32 && *backend == MOE_CUDA)
        return moe_fail(err, MOE_ERROR_NOT_IMPLEMENTED,
                        "dtype: expected 'bfloat16' or 'float16' on a GPU, got 'float32', which is "
                        "computed by the CPU backend only");
    if (*num_sms < 0)
        return moe_fail(err, MOE_ERROR_VALUE, "num_sms: expected 0 or more, got %" PRId32,
                        *num_sms);
    if (p->routed && p->router_experts == 0) p->router_experts = p->num_experts;
    if (!p->routed) p->router_experts = 0;
    if (p->routed && (p->topk < 1 || p->topk > p->router_experts))
        return moe_fail(err, MOE_ERROR_VALUE, "topk: expected 1 .. %" PRId32 ", got %" PRId32,
                        p->router_experts, p->topk);
    if (p->workspace_limit == 0) p->workspace_limit = state->workspace_limit;
    /* rows that are no multiple of 16 bytes are not aligned to 16 bytes, whatever the first one
     * is */
    const int64_t bytes = moe_dtype_bytes(p->dtype);
    if (p->vector_bytes == 16 && (p->hidden_size * bytes % 16 || p->intermediate_size * bytes % 16))
        p->vector_bytes = (int32_t)bytes;
    p->out_vector_bytes = p->hidden_size * bytes % 16 ? (int32_t)bytes : 16;
    p->ids_dtype = MOE_I32;
    p->operation = p->routed ? MOE_OP_FUSED_MOE : MOE_OP_FUSED_EXPERTS;
    p->plain = p->gated;
    return MOE_OK;
}

static PyObject *gemm_dict(const moe_gemm_plan *g)
{
    return Py_BuildValue(
        "{ss si si si si si si si si si si sd sd sd}", "name", moe_variant_name(g->variant),
        "variant", g->variant, "tile_rows", g->tile_rows, "tile_cols", g->tile_cols, "tile_k",
        g->tile_k, "grid_cols", g->grid_cols, "threads", g->threads, "smem_bytes", g->smem_bytes,
        "cluster_blocks", g->cluster_blocks, "ring_stages", g->ring_stages, "band_tiles",
        g->band_tiles, "bytes", g->bytes, "flops", g->flops, "us", g->us);
}

static PyObject *workspace_dict(const moe_workspace *w)
{
    return Py_BuildValue("{sL sL sL sL sL sL sL sL sL sL sL}", "topk_weights",
                         (long long)w->topk_weights, "topk_ids", (long long)w->topk_ids,
                         "expert_offsets", (long long)w->expert_offsets, "sorted_token_ids",
                         (long long)w->sorted_token_ids, "row_of_slot", (long long)w->row_of_slot,
                         "tiles", (long long)w->tiles, "num_tiles", (long long)w->num_tiles,
                         "counts", (long long)w->counts, "intermediate", (long long)w->intermediate,
                         "rows", (long long)w->rows, "total", (long long)w->total);
}

static const char *combine_name(int32_t combine)
{
    return combine == MOE_NO_COMBINE_WEIGHTED     ? "weighted"
           : combine == MOE_NO_COMBINE_UNWEIGHTED ? "unweighted"
                                                  : "sum";
}

static PyObject *problem_dict(const moe_problem *p)
{
    return Py_BuildValue("{sL si si si si ss sO ss sO si si si sL}", "num_tokens",
                         (long long)p->num_tokens, "hidden_size", p->hidden_size,
                         "intermediate_size", p->intermediate_size, "num_experts", p->num_experts,
                         "topk", p->topk, "dtype", moe_dtype_name(p->dtype), "gated",
                         p->gated ? Py_True : Py_False, "combine", combine_name(p->combine),
                         "routed", p->routed ? Py_True : Py_False, "router_experts",
                         p->router_experts, "vector_bytes", p->vector_bytes, "out_vector_bytes",
                         p->out_vector_bytes, "workspace_limit", (long long)p->workspace_limit);
}

static PyObject *plan_dict(const moe_plan *plan)
{
    /* "N" steals, and Py_BuildValue passes a NULL on as its own failure */
    return Py_BuildValue(
        "{sN ss si sL sL si si si si si sL sL si sO sO sN sN sN sd sd sd}", "problem",
        problem_dict(&plan->problem), "backend", plan->backend == MOE_CUDA ? "cuda" : "cpu",
        "num_sms", plan->num_sms, "chunk_tokens", (long long)plan->chunk_tokens, "num_chunks",
        (long long)plan->num_chunks, "align_blocks", plan->align.blocks, "align_count_blocks",
        plan->align.count_blocks, "tile_rows", plan->tile_rows, "max_tiles", plan->max_tiles,
        "combine_vector_bytes", plan->combine_vector_bytes, "intermediate_stride",
        (long long)plan->intermediate_stride, "rows_stride", (long long)plan->rows_stride,
        "num_launches", plan->num_launches, "deterministic",
        plan->deterministic ? Py_True : Py_False, "batch_invariant",
        plan->batch_invariant ? Py_True : Py_False, "gate_up", gemm_dict(&plan->gate_up), "down",
        gemm_dict(&plan->down), "workspace", workspace_dict(&plan->workspace), "bytes", plan->bytes,
        "flops", plan->flops, "us", plan->us);
}

/* The plan of plan() and workspace_size(). num_sms 0: of the first GPU here where `look` and
 * there is one, else an H200. */
static int plan_for_sizes(module_state *state, signature_id id, PyObject *const *args,
                          Py_ssize_t nargs, PyObject *kwnames, bool look, moe_plan *plan,
                          moe_error *err)
{
    PyObject *values[MAX_PARAMETERS];
    moe_problem problem;
    moe_backend backend;
    int32_t num_sms;
    moe_device_info info;
    PyObject *const *v = parse_arguments(state, id, args, nargs, kwnames, values, err);
    if (v == NULL || parse_problem(state, v, &problem, &backend, &num_sms, err)) return err->status;
    moe_default_device(backend, num_sms, &info);
    if (look && backend == MOE_CUDA && num_sms == 0) {
        moe_error ignored;
        moe_device_info found;
        int count = 0;
        error_clear(&ignored);
        if (!moe_cuda_device_count(&count, &ignored) && count > 0 &&
            !moe_cuda_device_info(0, &found, &ignored))
            info = found;
    }
    restrict_plans(state, &info);
    return moe_make_plan(&problem, &info, plan, err);
}

static PyObject *py_plan(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                         PyObject *kwnames)
{
    moe_error err;
    moe_plan plan;
    error_clear(&err);
    if (plan_for_sizes(PyModule_GetState(module), SIG_PLAN, args, nargs, kwnames, true, &plan,
                       &err))
        return raise_error(&err);
    return plan_dict(&plan);
}

static PyObject *py_workspace_size(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                   PyObject *kwnames)
{
    moe_error err;
    moe_plan plan;
    error_clear(&err);
    if (plan_for_sizes(PyModule_GetState(module), SIG_WORKSPACE_SIZE, args, nargs, kwnames, false,
                       &plan, &err))
        return raise_error(&err);
    /* CPU allocators align to 16 or 64 bytes: room to start at a multiple of 256 */
    const int64_t room = plan.backend == MOE_CPU && plan.workspace.total > 0 ? MOE_ALIGNMENT : 0;
    return PyLong_FromLongLong(plan.workspace.total + room);
}

/* _restrict_plans(portable, tile_rows, apart=False, high=0): a private switch for benchmarks and tests, which run kernels that
 * the plan would not choose on this GPU or for layers so small. */
static PyObject *py_restrict_plans(PyObject *module, PyObject *args)
{
    module_state *state = PyModule_GetState(module);
    int portable = 0, tile_rows = 0, apart = 0, high = 0;
    if (!PyArg_ParseTuple(args, "pi|pi:_restrict_plans", &portable, &tile_rows, &apart, &high))
        return NULL;
    state->portable_kernels = portable;
    state->plan_tile_rows = tile_rows;
    state->plan_apart = apart;
    state->plan_high = high;
    memset(&state->plans, 0, sizeof state->plans); /* made under the other setting */
    ++state->plan_switches;
    return Py_NewRef(Py_None);
}

/* _fix_plans(gate_up, down): the same for rows of gemm_variants.def, which have one height; -1: the plan's choice,
 * both -2: the kernels of decode wherever they can. */
static PyObject *py_fix_plans(PyObject *module, PyObject *args)
{
    module_state *state = PyModule_GetState(module);
    int gate_up = -1, down = -1;
    if (!PyArg_ParseTuple(args, "ii:_fix_plans", &gate_up, &down)) return NULL;
    state->plan_gate_up = gate_up + 1;
    state->plan_down = down + 1;
    memset(&state->plans, 0, sizeof state->plans);
    ++state->plan_switches;
    return Py_NewRef(Py_None);
}

/* ---- devices and facts ----------------------------------------------------------------------- */

static int parse_device(module_state *state, PyObject *const *args, Py_ssize_t nargs,
                        PyObject *kwnames, int32_t *device, moe_error *err)
{
    PyObject *values[MAX_PARAMETERS];
    PyObject *const *v = parse_arguments(state, SIG_DEVICE, args, nargs, kwnames, values, err);
    return v == NULL ? (int)err->status : parse_int32("device", v[0], 0, device, err);
}

static PyObject *py_load(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                         PyObject *kwnames)
{
    moe_error err;
    int32_t device;
    error_clear(&err);
    if (parse_device(PyModule_GetState(module), args, nargs, kwnames, &device, &err))
        return raise_error(&err);
    Py_BEGIN_ALLOW_THREADS
    moe_cuda_load(device, &err);
    Py_END_ALLOW_THREADS
    if (err.status) return raise_error(&err);
    Py_RETURN_NONE;
}

static PyObject *py_device_count(PyObject *module, PyObject *ignored)
{
    moe_error err;
    int count = 0;
    (void)module, (void)ignored;
    error_clear(&err);
    if (moe_cuda_device_count(&count, &err)) return raise_error(&err);
    return PyLong_FromLong(count);
}

static PyObject *devices_list(void)
{
    moe_error err;
    int count = 0;
    PyObject *list = PyList_New(0);
    error_clear(&err);
    if (moe_cuda_device_count(&count, &err)) count = 0; /* no driver is no device */
    for (int i = 0; list && i < count; ++i) {
        moe_device_info d;
        error_clear(&err);
        PyObject *device =
            moe_cuda_device_info(i, &d, &err)
                ? Py_BuildValue("{ss}", "error", err.text)
                : Py_BuildValue("{ss si si si si sL sd sd}", "name", d.name, "num_sms", d.num_sms,
                                "capability", d.capability, "smem_per_block", d.smem_per_block,
                                "smem_per_sm", d.smem_per_sm, "l2_bytes", (long long)d.l2_bytes,
                                "read_bytes_per_us", d.read_bytes_per_us, "flops_per_us",
                                d.flops_per_us);
        if (device == NULL || PyList_Append(list, device)) Py_CLEAR(list);
        Py_XDECREF(device);
    }
    return list;
}

static PyObject *kernels_list(void)
{
    PyObject *list = PyList_New(0);
    for (int32_t i = 0; list && i < moe_num_variants(); ++i) {
        PyObject *name = PyUnicode_FromString(moe_variant_name(i));
        if (name == NULL || PyList_Append(list, name)) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *py_info(PyObject *module, PyObject *ignored)
{
    moe_error err;
    moe_device_info cpu;
    int driver = 0;
    (void)module, (void)ignored;
    error_clear(&err);
    moe_cpu_read_environment();
    if (moe_cpu_device_info(&cpu, &err)) return raise_error(&err);
    error_clear(&err);
    if (moe_cuda_driver_version(&driver, &err)) driver = 0;
    PyObject *driver_version = driver ? PyLong_FromLong(driver) : Py_NewRef(Py_None);
    return Py_BuildValue("{ss sO si sN sN s{ss ss si sL} sN}", "version", MOE_VERSION, "cuda_built",
                         MOE_CUDA_BUILT ? Py_True : Py_False, "cuda_version", MOE_CUDA_VERSION,
                         "driver", driver_version, "devices", devices_list(), "cpu", "name",
                         cpu.name, "isa", moe_cpu_isa(), "threads", moe_cpu_threads(), "l2_bytes",
                         (long long)cpu.l2_bytes, "kernels", kernels_list());
}

static PyObject *py_cpu_read_bandwidth(PyObject *module, PyObject *ignored)
{
    double bytes_per_us;
    (void)module, (void)ignored;
    moe_cpu_read_environment();
    Py_BEGIN_ALLOW_THREADS
    bytes_per_us = moe_cpu_read_bandwidth();
    Py_END_ALLOW_THREADS
    return PyFloat_FromDouble(bytes_per_us * 1e6);
}

/* {method: (score, key, bias, groups, ids, renormalize)}, the rows of route_methods.def */
static PyObject *py_routing_methods(PyObject *module, PyObject *ignored)
{
    PyObject *methods = PyDict_New();
    (void)module, (void)ignored;
    for (int i = 0; methods && i < MOE_ROUTE_COUNT; ++i) {
        const moe_route_method *m = &moe_route_methods[i];
        PyObject *row =
            Py_BuildValue("iiiiii", m->score, m->key, m->bias, m->groups, m->ids, m->renormalize);
        if (row == NULL || PyDict_SetItemString(methods, m->name, row)) Py_CLEAR(methods);
        Py_XDECREF(row);
    }
    return methods;
}

/* ---- the module ------------------------------------------------------------------------------ */

#define FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL | METH_KEYWORDS

static PyMethodDef METHODS[] = {
    {"fused_experts", FAST(py_fused_experts), "The layer; see fusedmoe.fused_experts."},
    {"fused_moe", FAST(py_fused_moe), "Routing and the layer; see fusedmoe.fused_moe."},
    {"route", FAST(py_route), "Stage 1; see fusedmoe.route."},
    {"route_align", FAST(py_route_align), "Stages 1 and 2; see fusedmoe.route_align."},
    {"align", FAST(py_align), "Stage 2; see fusedmoe.align."},
    {"align_block_size", FAST(py_align_block_size), "See fusedmoe.align_block_size."},
    {"count_tokens_per_expert", FAST(py_count_tokens), "See fusedmoe.count_tokens_per_expert."},
    {"gate_up", FAST(py_gate_up), "Stage 3; see fusedmoe.gate_up."},
    {"down", FAST(py_down), "Stage 4; see fusedmoe.down."},
    {"combine", FAST(py_combine), "Stage 5; see fusedmoe.combine."},
    {"plan", FAST(py_plan), "What a call of these sizes does, as a dict; see fusedmoe.plan."},
    {"workspace_size", FAST(py_workspace_size), "Bytes of workspace; see fusedmoe.workspace_size."},
    {"load", FAST(py_load), "Loads every kernel of a GPU; see fusedmoe.load."},
    {"device_count", py_device_count, METH_NOARGS,
     "GPUs that the driver shows; RuntimeError without a driver."},
    {"info", py_info, METH_NOARGS, "Facts about this build and machine, as a dict."},
    {"_restrict_plans", py_restrict_plans, METH_VARARGS,
     "(portable, tile_rows, apart=False, high=0): plans take no kernel made for one architecture; "
     "only "
     "this "
     "height; gate_up and down in launches of their own."},
    {"_fix_plans", py_fix_plans, METH_VARARGS,
     "(gate_up, down): plans take these rows of the table of variants; -1: their own choice; both "
     "-2: the kernels of decode wherever they can."},
    {"_routing_methods", py_routing_methods, METH_NOARGS,
     "The knobs of the routing methods, by name; see fusedmoe.routing."},
    {"_cpu_read_bandwidth", py_cpu_read_bandwidth, METH_NOARGS,
     "Bytes per second read from memory by all threads, measured now."},
    {0}};

/* FUSEDMOE_WORKSPACE_LIMIT, bytes; read once. */
static int read_workspace_limit(int64_t *limit, moe_error *err)
{
    const char *text = getenv("FUSEDMOE_WORKSPACE_LIMIT");
    *limit = MOE_WORKSPACE_LIMIT;
    if (text == NULL || *text == 0) return MOE_OK;
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (*end != 0 || errno || value <= 0)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "FUSEDMOE_WORKSPACE_LIMIT: expected a number of bytes above 0, got '%.40s'",
                        text);
    *limit = value;
    return MOE_OK;
}

static PyObject *add_type(PyObject *module, PyType_Spec *spec, const char *name, moe_error *err)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type && name && PyModule_AddObjectRef(module, name, type)) Py_CLEAR(type);
    if (type == NULL) err->status = MOE_ERROR_PYTHON;
    return type;
}

static int module_exec(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    moe_error err;
    error_clear(&err);
    moe_cuda_read_environment();
    if (parse_init(state, &err) || tensor_context_init(&state->tensors, &err) ||
        read_workspace_limit(&state->workspace_limit, &err))
        goto failed;
    if ((state->experts_type = add_type(module, &moe_experts_spec, "Experts", &err)) == NULL)
        goto failed;
    if ((state->buffer_type = add_type(module, &moe_buffer_spec, "_DeviceBuffer", &err)) == NULL)
        goto failed;
    if ((state->abstract_type = add_type(module, &moe_abstract_spec, "_Abstract", &err)) == NULL)
        goto failed;
    if ((state->tensors.view_type = add_type(module, &moe_view_spec, "_DeviceView", &err)) == NULL)
        goto failed;
    if (PyModule_AddFunctions(module, moe_device_methods) ||
        PyModule_AddFunctions(module, moe_abstract_methods))
        return -1;
    return PyModule_AddStringConstant(module, "__version__", MOE_VERSION);
failed:
    raise_error(&err);
    return -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = PyModule_GetState(module);
    if (state == NULL) return 0;
    Py_VISIT(state->experts_type);
    Py_VISIT(state->buffer_type);
    Py_VISIT(state->abstract_type);
    return tensor_context_traverse(&state->tensors, visit, arg);
}

static int module_clear(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    if (state == NULL) return 0;
    Py_CLEAR(state->experts_type);
    Py_CLEAR(state->buffer_type);
    Py_CLEAR(state->abstract_type);
    tensor_context_clear(&state->tensors);
    parse_clear(state);
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, module_exec}, {0}};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    "fusedmoe._C",
    "The C extension of fusedmoe. Private: use the functions of fusedmoe.",
    sizeof(module_state),
    METHODS,
    SLOTS,
    module_traverse,
    module_clear,
    module_free};

PyMODINIT_FUNC PyInit__C(void)
{
    return PyModuleDef_Init(&MODULE);
}
