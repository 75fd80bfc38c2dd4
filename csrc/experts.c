/* experts.c: Experts, the layer with its weights pinned and checked once.
 *
 *     class Experts:
 *         def __init__(self, w13, w2, *, ..., max_tokens=None):
 *             self.weights = own(check(w13, w2, w13_bias, w2_bias))  # views, never copies
 *             self.options = ...
 *         def run(self, hidden_states, topk_weights, topk_ids, out=None, workspace=None,
 *                 shared_output=None, stream=None):
 *             return _C.fused_experts(hidden_states, *self.weights, topk_weights, topk_ids,
 *                                     **self.options, ...)
 *
 * A call that runs without the GIL uses the weights it began with: they are counted, and rebind
 * only exchanges the pointer. */
#include "binding.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { NUM_WEIGHTS = 4, NUM_SCRATCH = 8 };

/* Owned views and the owners. Counted: the object's reference and one per running call, all
 * changed with the GIL. */
typedef struct experts_weights {
    int references;
    moe_tensor w13, w2, w13_bias, w2_bias;
    tensor_hold holds[NUM_WEIGHTS];
    call_memo memo; /* with the GIL */
} experts_weights;

/* Workspace for up to max_tokens, one per stream. */
typedef struct experts_scratch {
    bool used, busy; /* busy: a call is queueing kernels with it */
    void *stream;
    moe_tensor tensor;
    tensor_hold hold;
} experts_scratch;

typedef struct experts_object {
    PyObject_HEAD
    module_state *state; /* of the module that the type keeps alive */
    moe_options options;
    int32_t dtype;      /* argument dtype= */
    int64_t max_tokens; /* 0: no scratch */
    experts_weights *weights;
    moe_tensor expert_map;
    tensor_hold expert_map_hold;
    experts_scratch scratch[NUM_SCRATCH];
} experts_object;

/* ---- weights --------------------------------------------------------------------------------- */

static void release_weights(experts_weights *weights)
{
    if (weights == NULL || --weights->references > 0) return;
    for (int i = 0; i < NUM_WEIGHTS; ++i)
        tensor_release(&weights->holds[i]);
    PyMem_Free(weights);
}

static int own(module_state *state, PyObject *object, const char *name, int32_t dtype,
               moe_tensor *tensor, tensor_hold *hold, moe_error *err)
{
    memset(tensor, 0, sizeof *tensor);
    tensor_absent(tensor);
    if (object == Py_None) return MOE_OK;
    if (tensor_import_owned(&state->tensors, object, name, tensor, hold, err)) return err->status;
    reinterpret(tensor, dtype);
    return MOE_OK;
}

/* What moe_validate would blame on hidden_states, which are not here yet. */
static int check_w13(const moe_tensor *w13, int32_t dtype, moe_error *err)
{
    char got[160];
    if (!tensor_present(w13))
        return moe_fail(err, MOE_ERROR_TYPE, "w13: expected a tensor, got None");
    moe_tensor_text(w13, got, sizeof got);
    if (w13->dtype != MOE_BF16 && w13->dtype != MOE_F16 && w13->dtype != MOE_F32)
        return moe_fail(err, MOE_ERROR_TYPE,
                        "w13: expected dtype bfloat16, float16 or float32%s, got %s",
                        w13->dtype == MOE_U16 || w13->dtype == MOE_I16
                            ? ", or dtype='bfloat16' where integers hold such numbers"
                            : "",
                        got);
    if (dtype != MOE_DTYPE_NONE && w13->dtype != dtype)
        return moe_fail(err, MOE_ERROR_TYPE,
                        "w13: expected %s (dtype=) or integers of its width, got %s",
                        moe_dtype_name(dtype), got);
    if (w13->ndim != 3 || w13->shape[2] < 1)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "w13: expected shape [num_experts, rows, hidden_size], got %s", got);
    if (w13->dtype == MOE_F32 && w13->backend == MOE_CUDA)
        return moe_fail(err, MOE_ERROR_NOT_IMPLEMENTED,
                        "w13: float32 is computed by the CPU backend only, got a float32 tensor on "
                        "cuda:%d; cast to bfloat16 or "
                        "float16 for the GPU",
                        w13->device);
    return MOE_OK;
}

static void set_weights(moe_call *call, const experts_object *self, const experts_weights *w)
{
    call->w13 = w->w13;
    call->w2 = w->w2;
    call->w13_bias = w->w13_bias;
    call->w2_bias = w->w2_bias;
    call->expert_map = self->expert_map;
    call->options = self->options;
}

static void empty_tensor(moe_tensor *t, const moe_tensor *beside, int32_t dtype, int64_t columns)
{
    memset(t, 0, sizeof *t);
    t->shape[1] = t->stride[0] = columns;
    t->stride[1] = 1;
    t->ndim = 2;
    t->dtype = dtype;
    t->lanes_packed = 1;
    t->backend = beside->backend;
    t->device = beside->device;
}

/* The checks of a call of no tokens are those of the weights. */
static int check_weights(const experts_object *self, const experts_weights *w, moe_error *err)
{
    call_frame f;
    moe_problem problem;
    if (check_w13(&w->w13, self->dtype, err)) return err->status;
    call_begin(&f, self->state, MOE_OP_FUSED_EXPERTS, "Experts");
    set_weights(&f.call, self, w);
    empty_tensor(&f.call.hidden_states, &w->w13, w->w13.dtype, w->w13.shape[2]);
    empty_tensor(&f.call.topk_weights, &w->w13, MOE_F32, 1);
    empty_tensor(&f.call.topk_ids, &w->w13, MOE_I32, 1);
    return moe_validate(&f.call, &problem, err);
}

static experts_weights *make_weights(const experts_object *self, PyObject *w13, PyObject *w2,
                                     PyObject *w13_bias, PyObject *w2_bias, moe_error *err)
{
    experts_weights *w = PyMem_Malloc(sizeof *w);
    if (w == NULL) {
        moe_fail(err, MOE_ERROR_MEMORY, "Experts: no memory");
        return NULL;
    }
    memset(w, 0, sizeof *w);
    w->references = 1;
    if (own(self->state, w13, "w13", self->dtype, &w->w13, &w->holds[0], err) ||
        own(self->state, w2, "w2", self->dtype, &w->w2, &w->holds[1], err) ||
        own(self->state, w13_bias, "w13_bias", self->dtype, &w->w13_bias, &w->holds[2], err) ||
        own(self->state, w2_bias, "w2_bias", self->dtype, &w->w2_bias, &w->holds[3], err) ||
        check_weights(self, w, err)) {
        release_weights(w);
        return NULL;
    }
    return w;
}

/* ---- scratch --------------------------------------------------------------------------------- */

int experts_take_scratch(experts_object *self, call_frame *f, int64_t required, void *stream)
{
    int at = -1;
    void *const per_thread =
        (void *)(uintptr_t)2; /* CU_STREAM_PER_THREAD: one name, many streams */
    if (self->max_tokens == 0 || stream == per_thread) return MOE_OK;
    for (int i = 0; i < NUM_SCRATCH; ++i) {
        if (self->scratch[i].used && self->scratch[i].stream == stream) {
            at = i;
            break;
        }
        if (!self->scratch[i].used && at < 0) at = i;
    }
    if (at < 0 || self->scratch[at].busy) return MOE_OK;
    experts_scratch *s = &self->scratch[at];
    if (!s->used) {
        if (f->problem.num_tokens > self->max_tokens) return MOE_OK;
        moe_problem largest = f->problem;
        moe_plan plan;
        largest.num_tokens = self->max_tokens;
        if (find_plan(f->state, &largest, f->like->backend, f->like->device, &plan, &f->err))
            return f->err.status;
        const int64_t bytes[] = {plan.workspace.total + MOE_ALIGNMENT};
        s->used = s->busy = true; /* reserved: allocation may run Python code */
        s->stream = stream;
        if (tensor_allocate(&f->state->tensors, f->prototype, f->like, "workspace", MOE_U8, 1,
                            bytes, &s->tensor, &s->hold, NULL, NULL, &f->err)) {
            s->used = s->busy = false;
            return f->err.status;
        }
        s->busy = false;
    }
    /* a call that needs more (more tokens or slots than the first one's plan) allocates its own */
    if (s->tensor.shape[0] - MOE_ALIGNMENT < required) return MOE_OK;
    s->busy = true;
    f->scratch = at;
    f->call.workspace = s->tensor;
    return MOE_OK;
}

void experts_give_scratch(experts_object *self, const call_frame *f)
{
    self->scratch[f->scratch].busy = false;
}

/* ---- calls ----------------------------------------------------------------------------------- */

/* v: hidden_states, topk_weights, topk_ids, out, workspace, shared_output, stream */
static PyObject *run(experts_object *self, PyObject *const *v)
{
    experts_weights *weights = self->weights;
    call_frame f;
    call_begin(&f, self->state, MOE_OP_FUSED_EXPERTS, "Experts");
    moe_call *c = &f.call;
    f.experts = self;
    f.dtype = self->dtype;
    if (weights == NULL) { /* only an object in the middle of its collection */
        moe_fail(&f.err, MOE_ERROR_RUNTIME,
                 "Experts: expected weights, got an object that was cleared");
        return call_finish(&f, v[6]);
    }
    ++weights->references;
    f.memo = &weights->memo;
    set_weights(c, self, weights);
    if (call_prototype(&f, v[0], "hidden_states", &c->hidden_states)) goto done;
    if (call_tensor(&f, v[1], "topk_weights", &c->topk_weights)) goto done;
    if (call_tensor(&f, v[2], "topk_ids", &c->topk_ids)) goto done;
    if (call_numbers(&f, v[3], "out", &c->out)) goto done;
    if (call_tensor(&f, v[4], "workspace", &c->workspace)) goto done;
    if (call_numbers(&f, v[5], "shared_output", &c->shared_output)) goto done;
    call_output_add(&f, "out", v[3], &c->out);
done:;
    PyObject *result = call_finish(&f, v[6]);
    release_weights(weights);
    return result;
}

static PyObject *experts_run(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { MOST = 7, LEAST = 3 };
    PyObject *values[MOST];
    if (nargs == MOST) return run((experts_object *)self, args);
    if (nargs < LEAST || nargs > MOST) {
        moe_error err;
        error_clear(&err);
        moe_fail(&err, MOE_ERROR_TYPE,
                 "Experts.run: expected %d to %d arguments by position, got %zd", LEAST, MOST,
                 nargs);
        return raise_error(&err);
    }
    for (Py_ssize_t i = 0; i < MOST; ++i)
        values[i] = i < nargs ? args[i] : Py_None;
    return run((experts_object *)self, values);
}

static PyObject *experts_call(PyObject *self, PyObject *args, PyObject *kwargs)
{
    experts_object *experts = (experts_object *)self;
    PyObject *values[MAX_PARAMETERS];
    moe_error err;
    error_clear(&err);
    if (parse_tuple(experts->state, SIG_EXPERTS_CALL, args, kwargs, values, &err))
        return raise_error(&err);
    return run(experts, values);
}

static int same_sizes(const char *name, const moe_tensor *got, const moe_tensor *want,
                      moe_error *err)
{
    bool same = got->ndim == want->ndim && got->dtype == want->dtype &&
                got->backend == want->backend && got->device == want->device;
    for (int i = 0; same && i < got->ndim; ++i)
        same = got->shape[i] == want->shape[i];
    if (same) return MOE_OK;
    char got_text[160], want_text[160];
    return moe_fail(err, MOE_ERROR_VALUE,
                    "%s: expected the sizes, dtype and device of the weights before, %s, got %s",
                    name, moe_tensor_text(want, want_text, sizeof want_text),
                    moe_tensor_text(got, got_text, sizeof got_text));
}

static PyObject *experts_rebind(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                                PyObject *kwnames)
{
    experts_object *self = (experts_object *)object;
    experts_weights *old = self->weights, *made = NULL;
    PyObject *values[MAX_PARAMETERS];
    moe_error err;
    error_clear(&err);
    PyObject *const *v =
        parse_arguments(self->state, SIG_EXPERTS_REBIND, args, nargs, kwnames, values, &err);
    if (v == NULL || old == NULL) return raise_error(&err);
    ++old->references; /* importing may run Python code, which may rebind */
    made = make_weights(self, v[0], v[1], v[2], v[3], &err);
    if (made && (same_sizes("w13", &made->w13, &old->w13, &err) ||
                 same_sizes("w2", &made->w2, &old->w2, &err))) {
        release_weights(made);
        made = NULL;
    }
    if (made) {
        experts_weights *last = self->weights;
        self->weights = made;
        release_weights(last);
    }
    release_weights(old);
    if (made == NULL) return raise_error(&err);
    Py_RETURN_NONE;
}

/* ---- the type -------------------------------------------------------------------------------- */

/* Where each parameter of Experts lies in LAYER_KW; -1: it is no keyword of the layer. */
static const int LAYER_KW_OF_EXPERTS[] = {-1,
                                          -1,
                                          KW_QUANT,
                                          KW_W13_SCALE,
                                          KW_W2_SCALE,
                                          KW_W13_ZERO_POINT,
                                          KW_W2_ZERO_POINT,
                                          KW_INTERMEDIATE_SCALE,
                                          KW_W13_BIAS,
                                          KW_W2_BIAS,
                                          KW_ACTIVATION,
                                          KW_ACTIVATION_ALPHA,
                                          KW_ACTIVATION_LIMIT,
                                          KW_CLAMP,
                                          KW_GATED,
                                          KW_W13_ORDER,
                                          KW_APPLY_ROUTER_WEIGHT_ON_INPUT,
                                          KW_ROUTED_SCALING_FACTOR,
                                          KW_NO_COMBINE,
                                          KW_EXPERT_MAP,
                                          KW_EXPERT_START,
                                          KW_DETERMINISTIC,
                                          KW_BATCH_INVARIANT,
                                          KW_DTYPE,
                                          -1};
enum { EXPERTS_MAX_TOKENS = sizeof LAYER_KW_OF_EXPERTS / sizeof *LAYER_KW_OF_EXPERTS - 1 };

static int fill(experts_object *self, module_state *state, PyObject *const *v, moe_error *err)
{
    PyObject *kw[NUM_LAYER_KW];
    for (int i = 0; i < NUM_LAYER_KW; ++i)
        kw[i] = Py_None;
    for (int i = 0; i < EXPERTS_MAX_TOKENS; ++i)
        if (LAYER_KW_OF_EXPERTS[i] >= 0) kw[LAYER_KW_OF_EXPERTS[i]] = v[i];
    self->state = state;
    default_options(&self->options);
    if (parse_layer_options(state, kw, &self->options, &self->dtype, err)) return err->status;
    if (parse_int("max_tokens", v[EXPERTS_MAX_TOKENS], 0, &self->max_tokens, err))
        return err->status;
    if (v[EXPERTS_MAX_TOKENS] != Py_None && (self->max_tokens < 1 || self->max_tokens > INT32_MAX))
        return moe_fail(err, MOE_ERROR_VALUE, "max_tokens: expected None or 1 .. %d, got %" PRId64,
                        (int)INT32_MAX, self->max_tokens);
    if (own(state, kw[KW_EXPERT_MAP], "expert_map", MOE_DTYPE_NONE, &self->expert_map,
            &self->expert_map_hold, err))
        return err->status;
    self->weights = make_weights(self, v[0], v[1], kw[KW_W13_BIAS], kw[KW_W2_BIAS], err);
    return err->status;
}

static PyObject *experts_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    module_state *state = PyType_GetModuleState(type);
    PyObject *values[MAX_PARAMETERS];
    moe_error err;
    error_clear(&err);
    if (state == NULL) return NULL;
    if (parse_tuple(state, SIG_EXPERTS, args, kwargs, values, &err)) return raise_error(&err);
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PyObject *self = alloc(type, 0); /* zeroed */
    if (self && fill((experts_object *)self, state, values, &err)) {
        Py_DECREF(self);
        return raise_error(&err);
    }
    return self;
}

static int experts_traverse(PyObject *object, visitproc visit, void *arg)
{
    experts_object *self = (experts_object *)object;
    Py_VISIT((PyObject *)Py_TYPE(object));
    for (int i = 0; self->weights && i < NUM_WEIGHTS; ++i)
        Py_VISIT(self->weights->holds[i].object);
    Py_VISIT(self->expert_map_hold.object);
    for (int i = 0; i < NUM_SCRATCH; ++i)
        Py_VISIT(self->scratch[i].hold.object);
    return 0;
}

static int experts_clear(PyObject *object)
{
    experts_object *self = (experts_object *)object;
    experts_weights *weights = self->weights;
    self->weights = NULL;
    release_weights(weights);
    tensor_release(&self->expert_map_hold);
    for (int i = 0; i < NUM_SCRATCH; ++i) {
        if (self->scratch[i].used) tensor_release(&self->scratch[i].hold);
        self->scratch[i].used = false;
    }
    return 0;
}

static void experts_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    experts_clear(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF((PyObject *)type);
}

static PyObject *missing_weights(void)
{
    PyErr_SetString(PyExc_RuntimeError,
                    "Experts: expected weights, got an object that was cleared");
    return NULL;
}

static PyObject *get_num_experts(PyObject *object, void *closure)
{
    const experts_weights *w = ((experts_object *)object)->weights;
    (void)closure;
    return w ? PyLong_FromLongLong(w->w13.shape[0]) : missing_weights();
}

static PyObject *get_hidden_size(PyObject *object, void *closure)
{
    const experts_weights *w = ((experts_object *)object)->weights;
    (void)closure;
    return w ? PyLong_FromLongLong(w->w13.shape[2]) : missing_weights();
}

static PyObject *get_intermediate_size(PyObject *object, void *closure)
{
    const experts_weights *w = ((experts_object *)object)->weights;
    (void)closure;
    return w ? PyLong_FromLongLong(w->w2.shape[2]) : missing_weights();
}

static PyObject *get_dtype(PyObject *object, void *closure)
{
    const experts_weights *w = ((experts_object *)object)->weights;
    (void)closure;
    return w ? PyUnicode_FromString(moe_dtype_name(w->w13.dtype)) : missing_weights();
}

static PyObject *get_device(PyObject *object, void *closure)
{
    const experts_weights *w = ((experts_object *)object)->weights;
    (void)closure;
    if (w == NULL) return missing_weights();
    return w->w13.backend == MOE_CPU ? PyUnicode_FromString("cpu")
                                     : PyUnicode_FromFormat("cuda:%d", (int)w->w13.device);
}

static PyMethodDef EXPERTS_METHODS[] = {
    {"run", (PyCFunction)(void (*)(void))experts_run, METH_FASTCALL,
     "run($self, hidden_states, topk_weights, topk_ids, out=None, workspace=None, "
     "shared_output=None, stream=None, /)\n--\n\n"
     "The layer, arguments by position only: the fastest way to call it."},
    {"rebind", (PyCFunction)(void (*)(void))experts_rebind, METH_FASTCALL | METH_KEYWORDS,
     "rebind($self, w13, w2, w13_bias=None, w2_bias=None)\n--\n\n"
     "Exchanges the weights for others of the same sizes, dtype and device. Calls that run keep "
     "the old ones; None: no bias."},
    {0}};

static PyGetSetDef EXPERTS_GETSET[] = {
    {"num_experts", get_num_experts, NULL, "Experts held here, w13.shape[0].", NULL},
    {"hidden_size", get_hidden_size, NULL, "w13.shape[2].", NULL},
    {"intermediate_size", get_intermediate_size, NULL, "w2.shape[2].", NULL},
    {"dtype", get_dtype, NULL,
     "Of the weights and activations: 'bfloat16', 'float16' or 'float32'.", NULL},
    {"device", get_device, NULL, "'cpu' or 'cuda:0'.", NULL},
    {0}};

static PyType_Slot EXPERTS_SLOTS[] = {
    {Py_tp_doc, "The layer with its weights pinned and checked once; see fusedmoe.Experts."},
    {Py_tp_new, experts_new},
    {Py_tp_call, experts_call},
    {Py_tp_traverse, experts_traverse},
    {Py_tp_clear, experts_clear},
    {Py_tp_dealloc, experts_dealloc},
    {Py_tp_methods, EXPERTS_METHODS},
    {Py_tp_getset, EXPERTS_GETSET},
    {0}};

PyType_Spec moe_experts_spec = {"fusedmoe.Experts", sizeof(experts_object), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
                                EXPERTS_SLOTS};
