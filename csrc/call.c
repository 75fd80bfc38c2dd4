/* call.c: one call, from imported arguments to its result.
 *
 *   validate -> plan (cached) -> allocate what the caller left out -> run without the GIL -> result
 *
 * Nothing is written before the last check has passed. On the fast path (table tensors, out and
 * workspace given, a plan that is cached) nothing is allocated and no Python code runs. */
#include "binding.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"

#include <inttypes.h>
#include <stddef.h>
#include <string.h>

/* ---- imports --------------------------------------------------------------------------------- */

void call_begin(call_frame *f, module_state *state, moe_operation operation, const char *function)
{
    moe_call *c = &f->call;
    for (int i = 0; i < MOE_CALL_TENSORS; ++i) {
        moe_tensor *tensor = moe_tensor_of(c, i);
        tensor_absent(tensor);
        tensor->readonly = false;
        tensor->span_bytes = 0;
        tensor->backend = MOE_CPU;
        tensor->device = 0;
        tensor->dtype = MOE_DTYPE_NONE;
    }
    c->operation = operation;
    c->function = function;
    c->num_experts = 0;
    c->block_size = 0;
    c->fill = 1;
    default_options(&c->options);
    f->state = state;
    f->holds.count = 0;
    f->prototype = NULL;
    f->like = NULL;
    f->dtype = MOE_DTYPE_NONE;
    f->num_outputs = 0;
    f->num_abstract = 0;
    f->experts = NULL;
    f->memo = NULL;
    f->scratch = -1;
    error_clear(&f->err);
}

int call_tensor(call_frame *f, PyObject *object, const char *name, moe_tensor *tensor)
{
    if (object == Py_None) return MOE_OK;
    if ((PyObject *)Py_TYPE(object) == f->state->abstract_type)
        return abstract_import(f, object, name, tensor);
    return tensor_import(&f->state->tensors, object, name, tensor, &f->holds, &f->err);
}

void reinterpret(moe_tensor *t, int32_t dtype)
{
    if (dtype == MOE_DTYPE_NONE || !tensor_present(t)) return;
    bool integers =
        t->dtype == MOE_U16 || t->dtype == MOE_I16 || t->dtype == MOE_U32 || t->dtype == MOE_I32;
    if (integers && moe_dtype_bytes(t->dtype) == moe_dtype_bytes(dtype)) t->dtype = dtype;
}

int call_numbers(call_frame *f, PyObject *object, const char *name, moe_tensor *tensor)
{
    if (call_tensor(f, object, name, tensor)) return f->err.status;
    reinterpret(tensor, f->dtype);
    return MOE_OK;
}

int call_prototype(call_frame *f, PyObject *object, const char *name, moe_tensor *tensor)
{
    f->prototype = object;
    f->like = tensor;
    if (call_numbers(f, object, name, tensor)) return f->err.status;
    char got[128];
    if (f->dtype != MOE_DTYPE_NONE && tensor_present(tensor) && tensor->dtype != f->dtype)
        return moe_fail(&f->err, MOE_ERROR_TYPE,
                        "%s: expected %s (dtype=) or integers of its width, got %s", name,
                        moe_dtype_name(f->dtype), moe_tensor_text(tensor, got, sizeof got));
    return MOE_OK;
}

void call_output_add(call_frame *f, const char *name, PyObject *given, moe_tensor *tensor)
{
    call_output *out = &f->outputs[f->num_outputs++];
    out->name = name;
    out->given = given;
    out->tensor = tensor;
    out->object = NULL;
    out->wrap = NULL;
}

/* ---- the plan -------------------------------------------------------------------------------- */

int find_plan(module_state *state, const moe_problem *problem, moe_backend backend, int32_t device,
              moe_plan *plan, moe_error *err)
{
    if (moe_plan_find(&state->plans, problem, backend, device, plan)) return MOE_OK;
    moe_device_info info;
    if (backend == MOE_CUDA ? moe_cuda_device_info(device, &info, err)
                            : moe_cpu_device_info(&info, err))
        return err->status;
    restrict_plans(state, &info);
    if (moe_make_plan(problem, &info, plan, err)) return err->status;
    moe_plan_keep(&state->plans, problem, backend, device, plan);
    return MOE_OK;
}

static bool differs_in_address(const moe_tensor *a, const moe_tensor *b)
{
    if (a->ndim != b->ndim) return false;
    for (int32_t i = 0; i < a->ndim; ++i)
        if (a->shape[i] != b->shape[i] || a->stride[i] != b->stride[i]) return false;
    const uintptr_t from = (uintptr_t)a->data, to = (uintptr_t)b->data;
    return a->ndim < 0 ||
           (a->dtype == b->dtype && a->lanes_packed == b->lanes_packed &&
            a->backend == b->backend && a->device == b->device && a->readonly == b->readonly &&
            (from ^ to) % 16 == 0 && (from == 0) == (to == 0));
}

static const size_t MEMO_OFFSETS[MEMO_TENSORS] = {
    offsetof(moe_call, w13),           offsetof(moe_call, w2),
    offsetof(moe_call, w13_bias),      offsetof(moe_call, w2_bias),
    offsetof(moe_call, expert_map),    offsetof(moe_call, hidden_states),
    offsetof(moe_call, topk_weights),  offsetof(moe_call, topk_ids),
    offsetof(moe_call, shared_output), offsetof(moe_call, out),
    offsetof(moe_call, workspace)};

static const moe_tensor *memo_tensor(const moe_call *call, int i)
{
    return (const moe_tensor *)(const void *)((const char *)call + MEMO_OFFSETS[i]);
}

/* Whether the memo is of such a call; then problem and plan are taken from it. moved: some address is another one. */
static bool recall(call_frame *f, bool *moved)
{
    call_memo *memo = f->memo;
    const moe_call *c = &f->call;
    if (!memo->used || memo->plan_switches != f->state->plan_switches || f->num_abstract)
        return false;
    if (!f->experts && memcmp(&memo->options, &c->options, sizeof c->options) != 0) return false;
    const int first = f->experts ? MEMO_OWN : 0;
    *moved = false;
    for (int i = first; i < MEMO_TENSORS; ++i) {
        const moe_tensor *t = memo_tensor(c, i);
        if (!differs_in_address(&memo->tensors[i], t)) return false;
        *moved |= tensor_present(t) && memo->tensors[i].data != t->data;
    }
    f->problem = memo->problem;
    f->plan = memo->plan;
    return true;
}

static void remember(const call_frame *f)
{
    call_memo *memo = f->memo;
    if (f->num_abstract) return;
    memo->used = true;
    memo->plan_switches = f->state->plan_switches;
    memo->options = f->call.options;
    for (int i = 0; i < MEMO_TENSORS; ++i)
        memo->tensors[i] = *memo_tensor(&f->call, i);
    memo->problem = f->problem;
    memo->plan = f->plan;
}

static int make_plan(call_frame *f)
{
    bool moved = false;
    if (f->memo && recall(f, &moved)) {
        if (!moved) return MOE_OK;
        if (moe_check_apart(&f->call, &f->err)) return f->err.status;
        for (int i = 0; i < MEMO_TENSORS; ++i)
            f->memo->tensors[i].data = memo_tensor(&f->call, i)->data;
        return MOE_OK;
    }
    if (moe_validate(&f->call, &f->problem, &f->err)) return f->err.status;
    if (moe_is_layer(f->call.operation)) f->problem.workspace_limit = f->state->workspace_limit;
    if (find_plan(f->state, &f->problem, f->like->backend, f->like->device, &f->plan, &f->err))
        return f->err.status;
    if (f->memo) remember(f);
    return MOE_OK;
}

/* ---- streams --------------------------------------------------------------------------------- */

/* stream= as a handle: an int, or an object with __cuda_stream__ (or torch's cuda_stream). */
static int parse_stream(call_frame *f, PyObject *object, void **stream)
{
    static const char EXPECTED[] = "None, an int (CUstream) or an object with __cuda_stream__";
    module_state *state = f->state;
    moe_error *err = &f->err;
    PyObject *handle = NULL, *found = NULL;
    char got[128];
    if (PyLong_Check(object) && !PyBool_Check(object)) {
        handle = Py_NewRef(object);
    } else if ((found = PyObject_GetAttr(object, state->cuda_stream)) != NULL) {
        if (PyCallable_Check(found)) {
            PyObject *pair = PyObject_Call(found, state->tensors.no_arguments, NULL);
            Py_DECREF(found);
            found = pair;
        }
        if (found && PyTuple_Check(found) && PyTuple_Size(found) == 2)
            handle = Py_NewRef(PyTuple_GetItem(found, 1));
    } else {
        PyErr_Clear();
        handle = PyObject_GetAttr(object, state->torch_cuda_stream);
    }
    Py_XDECREF(found);
    if (handle == NULL || !PyLong_Check(handle)) {
        PyErr_Clear();
        Py_XDECREF(handle);
        return moe_fail(err, MOE_ERROR_TYPE, "stream: expected %s, got %s", EXPECTED,
                        tensor_type_text(object, got, sizeof got));
    }
    unsigned long long value = PyLong_AsUnsignedLongLong(handle);
    Py_DECREF(handle);
    if (value == (unsigned long long)-1 && PyErr_Occurred()) {
        PyErr_Clear();
        return moe_fail(
            err, MOE_ERROR_VALUE,
            "stream: expected a CUstream of 0 or more in 64 bits, got a number outside");
    }
    *stream = (void *)(uintptr_t)value;
    return MOE_OK;
}

/* The stream that the prototype's framework is queueing on. */
static int current_stream(call_frame *f, void **stream)
{
    const tensor_type *found = tensor_find_type(&f->state->tensors, f->prototype, &f->err);
    if (found == NULL) return f->err.status;
    *stream = NULL;
    if (found->door == DOOR_VIEW) return MOE_OK;
    if (found->door == DOOR_TABLE) {
        if (found->api->current_work_stream(kDLCUDA, f->like->device, stream) == 0) return MOE_OK;
        return tensor_fail_with_exception(&f->err, MOE_ERROR_RUNTIME, "stream",
                                          "the framework to name its current stream", f->prototype);
    }
    PyObject *frameworks = PyImport_ImportModule("fusedmoe.frameworks");
    PyObject *device = frameworks ? PyLong_FromLong(f->like->device) : NULL;
    PyObject *function = device ? PyObject_GetAttrString(frameworks, "current_stream") : NULL;
    PyObject *handle =
        function ? PyObject_CallFunctionObjArgs(function, f->prototype, device, NULL) : NULL;
    int status = MOE_OK;
    if (handle == NULL) {
        f->err.status = MOE_ERROR_PYTHON;
        status = MOE_ERROR_PYTHON;
    } else
        status = parse_stream(f, handle, stream);
    Py_XDECREF(handle);
    Py_XDECREF(function);
    Py_XDECREF(device);
    Py_XDECREF(frameworks);
    return status;
}

/* Memory from a caching allocator belongs to the stream it was allocated on. Where the caller
 * names another one than the framework's current stream, that one is made current while
 * allocating: a context manager, or NULL. */
static int enter_stream(call_frame *f, void *stream, PyObject **context)
{
    void *current = NULL;
    *context = NULL;
    if (current_stream(f, &current)) return f->err.status;
    if (current == stream) return MOE_OK;
    PyObject *frameworks = PyImport_ImportModule("fusedmoe.frameworks");
    PyObject *function = frameworks ? PyObject_GetAttrString(frameworks, "stream_context") : NULL;
    PyObject *device = function ? PyLong_FromLong(f->like->device) : NULL;
    PyObject *handle = device ? PyLong_FromUnsignedLongLong((uintptr_t)stream) : NULL;
    PyObject *manager =
        handle ? PyObject_CallFunctionObjArgs(function, f->prototype, device, handle, NULL) : NULL;
    PyObject *entered =
        manager && manager != Py_None ? PyObject_CallMethod(manager, "__enter__", NULL) : NULL;
    if (entered)
        *context = Py_NewRef(manager);
    else if (manager != Py_None)
        f->err.status = MOE_ERROR_PYTHON;
    Py_XDECREF(entered);
    Py_XDECREF(manager);
    Py_XDECREF(handle);
    Py_XDECREF(device);
    Py_XDECREF(function);
    Py_XDECREF(frameworks);
    return f->err.status;
}

static int leave_stream(call_frame *f, PyObject *context)
{
    if (context == NULL) return f->err.status;
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *left = PyObject_CallMethod(context, "__exit__", "OOO", Py_None, Py_None, Py_None);
    if (left == NULL && type == NULL && f->err.status == MOE_OK)
        f->err.status = MOE_ERROR_PYTHON;
    else {
        if (left == NULL) PyErr_Clear(); /* the first error wins */
        PyErr_Restore(type, value, trace);
    }
    Py_XDECREF(left);
    Py_DECREF(context);
    return f->err.status;
}

/* ---- outputs and workspace ------------------------------------------------------------------- */

static void shape_output(call_output *out, int32_t dtype, int32_t ndim, int64_t a, int64_t b,
                         int64_t c)
{
    out->dtype = dtype;
    out->ndim = ndim;
    out->shape[0] = a;
    out->shape[1] = b;
    out->shape[2] = c;
}

/* Outputs in the order in which module.c adds them. */
static void shape_outputs(call_frame *f)
{
    const moe_problem *p = &f->problem;
    call_output *out = f->outputs;
    const int64_t slots = p->num_tokens * p->topk;
    switch (f->call.operation) {
    case MOE_OP_FUSED_EXPERTS:
    case MOE_OP_FUSED_MOE:
        if (p->combine == MOE_COMBINE_SUM)
            shape_output(out, p->dtype, 2, p->num_tokens, p->hidden_size, 0);
        else
            shape_output(out, p->dtype, 3, p->num_tokens, p->topk, p->hidden_size);
        break;
    case MOE_OP_ROUTE: /* out[1].dtype is ids_dtype already */
        shape_output(&out[0], f->call.options.weights_dtype, 2, p->num_tokens, p->topk, 0);
        shape_output(&out[1], out[1].dtype, 2, p->num_tokens, p->topk, 0);
        break;
    case MOE_OP_ROUTE_ALIGN:
        shape_output(&out[0], MOE_F32, 2, p->num_tokens, p->topk, 0);
        shape_output(&out[1], out[1].dtype, 2, p->num_tokens, p->topk, 0);
        out += 2;
        /* fall through */
    case MOE_OP_ALIGN:
        shape_output(&out[0], MOE_I32, 1, p->num_experts + 1, 0, 0);
        shape_output(&out[1], MOE_I32, 1, slots, 0, 0);
        shape_output(&out[2], MOE_I32, 2, p->num_tokens, p->topk, 0);
        break;
    case MOE_OP_ALIGN_BLOCK:
        if (f->call.block_size == 0) {
            shape_output(out, MOE_I32, 1, p->num_experts, 0, 0);
            break;
        }
        shape_output(&out[0], MOE_I32, 1,
                     moe_padded_rows(slots, p->num_experts, f->call.block_size), 0, 0);
        shape_output(&out[1], MOE_I32, 1, out[0].shape[0] / f->call.block_size, 0, 0);
        shape_output(&out[2], MOE_I32, 1, 1, 0, 0);
        break;
    case MOE_OP_GATE_UP:
        shape_output(out, p->dtype, 2, slots, p->intermediate_size, 0);
        break;
    case MOE_OP_DOWN:
        shape_output(out, p->dtype, 2, slots, p->hidden_size, 0);
        break;
    case MOE_OP_COMBINE:
        shape_output(out, p->dtype, 2, p->num_tokens, p->hidden_size, 0);
        break;
    }
}

static int allocate_outputs(call_frame *f)
{
    for (int i = 0; i < f->num_outputs; ++i) {
        call_output *out = &f->outputs[i];
        if (out->object) continue;
        tensor_hold hold;
        if (tensor_allocate(&f->state->tensors, f->prototype, f->like, out->name, out->dtype,
                            out->ndim, out->shape, out->tensor, &hold, &out->object, &out->wrap,
                            &f->err))
            return f->err.status;
        if (hold.versioned || hold.legacy || hold.object) f->holds.items[f->holds.count++] = hold;
    }
    return MOE_OK;
}

static int allocate_workspace(call_frame *f, void *stream)
{
    const int64_t required = f->plan.workspace.total;
    if (required == 0) return MOE_OK;
    if (f->experts && experts_take_scratch(f->experts, f, required, stream)) return f->err.status;
    if (tensor_present(&f->call.workspace)) return MOE_OK;
    const int64_t bytes[] = {required +
                             MOE_ALIGNMENT}; /* frameworks align to 16 bytes, 64 or more */
    tensor_hold hold;
    if (tensor_allocate(&f->state->tensors, f->prototype, f->like, "workspace", MOE_U8, 1, bytes,
                        &f->call.workspace, &hold, NULL, NULL, &f->err))
        return f->err.status;
    f->holds.items[f->holds.count++] = hold;
    return MOE_OK;
}

/* Stream, then outputs, then workspace, each only where it is needed. */
static int prepare(call_frame *f, PyObject *stream_object, void **stream)
{
    bool missing = !tensor_present(&f->call.workspace) && f->plan.workspace.total > 0;
    for (int i = 0; i < f->num_outputs; ++i)
        missing |= f->outputs[i].object == NULL;
    PyObject *context = NULL;
    if (f->like->backend == MOE_CUDA) {
        if (moe_cuda_survived_fork(&f->err))
            return f->err.status; /* before the framework trips over it */
        if (stream_object == Py_None) {
            if (current_stream(f, stream)) return f->err.status;
        } else if (missing && enter_stream(f, *stream, &context))
            return f->err.status;
    }
    if (missing) {
        int32_t vector_bytes = f->problem.out_vector_bytes;
        if (allocate_outputs(f) == MOE_OK && allocate_workspace(f, *stream) == MOE_OK &&
            moe_is_layer(f->call.operation) && (uintptr_t)f->call.out.data % 16 != 0 &&
            vector_bytes == 16)
            make_plan(f); /* an allocator with a coarser alignment than every known one */
    }
    return leave_stream(f, context);
}

static PyObject *take_result(call_frame *f)
{
    PyObject *results[MAX_OUTPUTS];
    for (int i = 0; i < f->num_outputs; ++i) {
        call_output *out = &f->outputs[i];
        if (out->wrap) {
            PyObject *wrapped = PyObject_CallFunctionObjArgs(out->wrap, out->object, NULL);
            if (wrapped == NULL) {
                f->err.status = MOE_ERROR_PYTHON;
                return NULL;
            }
            Py_DECREF(out->object);
            out->object = wrapped;
        }
        results[i] = out->object;
    }
    if (f->num_outputs == 1) return Py_NewRef(results[0]);
    PyObject *tuple = PyTuple_New(f->num_outputs);
    for (int i = 0; tuple && i < f->num_outputs; ++i)
        if (PyTuple_SetItem(tuple, i, Py_NewRef(results[i]))) Py_CLEAR(tuple);
    if (tuple == NULL) f->err.status = MOE_ERROR_PYTHON;
    return tuple;
}

PyObject *call_finish(call_frame *f, PyObject *stream_object)
{
    PyObject *result = NULL;
    void *stream = NULL;
    if (f->err.status) goto done;
    if (f->like->backend == MOE_CPU) moe_cpu_read_environment();
    if (stream_object != Py_None && parse_stream(f, stream_object, &stream)) goto done;
    if (make_plan(f)) goto done;
    if (tensor_present(&f->call.workspace) && moe_check_workspace(&f->call, &f->plan, &f->err))
        goto done;
    shape_outputs(f);
    for (int i = 0; i < f->num_outputs; ++i)
        if (f->outputs[i].given != Py_None) f->outputs[i].object = Py_NewRef(f->outputs[i].given);
    if (f->num_abstract) {
        result = abstract_describe(f);
        goto done;
    }
    if (prepare(f, stream_object, &stream)) goto done;
    Py_BEGIN_ALLOW_THREADS
    if (moe_is_layer(f->call.operation))
        moe_run_layer(&f->call, &f->plan, stream, &f->err);
    else
        moe_run_stage(&f->call, &f->plan, stream, &f->err);
    Py_END_ALLOW_THREADS
    if (f->err.status == MOE_OK) result = take_result(f);
done:
    if (f->scratch >= 0) experts_give_scratch(f->experts, f);
    for (int i = 0; i < f->num_outputs; ++i) {
        Py_XDECREF(f->outputs[i].object);
        Py_XDECREF(f->outputs[i].wrap);
    }
    tensor_release_all(&f->holds);
    return result ? result : raise_error(&f->err);
}
