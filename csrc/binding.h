/* binding.h: what the files that face Python share: module state, the argument parser, one call
 * from arguments to result. module.c, parse.c, call.c, experts.c and device_buffer.c; nothing
 * below them includes Python.h. */
#ifndef MOE_BINDING_H
#define MOE_BINDING_H

#include "tensor.h"

/* ---- signatures ------------------------------------------------------------------------------ */

/* The keyword arguments of the layer, in the one order that every function with them has. */
enum {
    KW_QUANT = 0,
    KW_W13_SCALE,
    KW_W2_SCALE,
    KW_W13_ZERO_POINT,
    KW_W2_ZERO_POINT,
    KW_HIDDEN_STATES_SCALE,
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
    KW_SHARED_OUTPUT,
    KW_NO_COMBINE,
    KW_EXPERT_MAP,
    KW_EXPERT_START,
    KW_DETERMINISTIC,
    KW_BATCH_INVARIANT,
    KW_OUT,
    KW_WORKSPACE,
    KW_STREAM,
    KW_DTYPE,
    NUM_LAYER_KW
};

/* Places in the tuple Routing.knobs (routing.py). */
enum {
    KNOB_RENORMALIZE = 0,
    KNOB_NUM_GROUPS,
    KNOB_TOPK_GROUPS,
    KNOB_NUM_SHARED,
    KNOB_SHARED_WEIGHT,
    KNOB_NUM_ZERO,
    KNOB_SOFTCAP,
    KNOB_WEIGHTS_DTYPE,
    KNOB_FIRST_SHARED_ID,
    KNOB_FIRST_TENSOR, /* ROUTING_TENSORS of module.c, in their order */
    NUM_ROUTING_KNOBS = KNOB_FIRST_TENSOR + 7
};

typedef enum signature_id {
    SIG_FUSED_EXPERTS = 0,
    SIG_FUSED_MOE,
    SIG_ROUTE,
    SIG_ALIGN,
    SIG_ROUTE_ALIGN,
    SIG_ALIGN_BLOCK,
    SIG_COUNT_TOKENS,
    SIG_GATE_UP,
    SIG_DOWN,
    SIG_COMBINE,
    SIG_EXPERTS,
    SIG_EXPERTS_CALL,
    SIG_EXPERTS_REBIND,
    SIG_PLAN,
    SIG_WORKSPACE_SIZE,
    SIG_DEVICE,
    SIG_DEVICE_ALLOC,
    SIG_DEVICE_STREAM,
    SIG_DEVICE_GRAPH,
    SIG_DEVICE_ELAPSED,
    SIG_DEVICE_COPY,
    SIG_DEVICE_VIEW,
    SIG_DLPACK,
    NUM_SIGNATURES
} signature_id;

enum { MAX_PARAMETERS = 40 };

typedef struct signature {
    const char *function; /* for messages */
    int num_parameters, num_required;
    const char *names[MAX_PARAMETERS];
} signature;

extern const signature moe_signatures[NUM_SIGNATURES]; /* parse.c; constant */

/* ---- module state ---------------------------------------------------------------------------- */

enum { NUM_CHOICES = 64 };

/* What the last call was checked with. A call of the same options whose tensors differ from these in their addresses alone
 * needs no checks but those of addresses, and has the same plan. With the GIL. */
enum { MEMO_OWN = 5, MEMO_TENSORS = 11 }; /* of call.c's list; an Experts owns the first ones */
typedef struct call_memo {
    bool used;
    unsigned plan_switches;
    moe_tensor tensors[MEMO_TENSORS];
    moe_options options;
    moe_problem problem;
    moe_plan plan;
} call_memo;

typedef struct module_state {
    tensor_context tensors;
    PyObject *names[NUM_SIGNATURES]
                   [MAX_PARAMETERS]; /* interned: keywords are compared by pointer first */
    PyObject *choices[NUM_CHOICES];  /* interned values of string arguments, parse.c */
    PyObject *cuda_stream, *torch_cuda_stream; /* "__cuda_stream__", "cuda_stream" */
    PyObject *experts_type, *buffer_type, *abstract_type;
    /* Touched with the GIL held only, and copied out before it is released. */
    moe_plan_cache plans;
    call_memo last;              /* of fused_experts */
    int portable_kernels;        /* _restrict_plans: no kernel made for one architecture alone */
    int plan_tile_rows;          /* and only GEMM variants of this height; 0: all */
    int plan_gate_up, plan_down; /* _fix_plans: 1 + the row of the table; 0: all */
    int plan_high;               /* and tiles of MOE_HIGH_ROWS: as in moe_device_info */
    int plan_apart;              /* and no gate_up and down in one launch */
    unsigned plan_switches;      /* calls of _restrict_plans and _fix_plans */
    int64_t workspace_limit;     /* FUSEDMOE_WORKSPACE_LIMIT or the default */
} module_state;

/* The one place where a Python exception is raised; always NULL. */
PyObject *raise_error(moe_error *err);

static inline void error_clear(moe_error *err)
{
    err->status = MOE_OK; /* not memset: the text is a kilobyte, and empty is enough */
    err->cuda_code = 0;
    err->text[0] = 0;
}

/* What _restrict_plans asked for. */
static inline void restrict_plans(const module_state *state, moe_device_info *info)
{
    if (state->portable_kernels) info->hopper = 0;
    info->tile_rows = state->plan_tile_rows;
    info->gate_up_row = state->plan_gate_up;
    info->down_row = state->plan_down;
    info->apart = state->plan_apart;
    info->high = state->plan_high;
}

/* ---- parse.c --------------------------------------------------------------------------------- */

int parse_init(module_state *state, moe_error *err);
void parse_clear(module_state *state);

/* Arguments in the order of the signature, Py_None where not given; borrowed. The result is args
 * itself where everything came by position, else values. NULL: err is set. */
PyObject *const *parse_arguments(module_state *state, signature_id id, PyObject *const *args,
                                 Py_ssize_t nargs, PyObject *kwnames, PyObject **values,
                                 moe_error *err);
/* The same for tp_new and tp_call. */
int parse_tuple(module_state *state, signature_id id, PyObject *args, PyObject *kwargs,
                PyObject **values, moe_error *err);

int parse_bool(const char *name, PyObject *object, int32_t by_default, int32_t *value,
               moe_error *err);
int parse_double(const char *name, PyObject *object, double by_default, double *value,
                 moe_error *err);
int parse_int(const char *name, PyObject *object, int64_t by_default, int64_t *value,
              moe_error *err);
int parse_int32(const char *name, PyObject *object, int32_t by_default, int32_t *value,
                moe_error *err);
/* The same for a parameter that has no default: None is not a number. */
int parse_count(const char *name, PyObject *object, int64_t *value, moe_error *err);
int parse_count32(const char *name, PyObject *object, int32_t *value, moe_error *err);
int parse_activation(module_state *state, PyObject *object, int32_t *value, moe_error *err);
int parse_clamp(module_state *state, PyObject *object, int32_t *value, moe_error *err);
int parse_order(module_state *state, PyObject *object, int32_t *value, moe_error *err);
int parse_method(module_state *state, PyObject *object, int32_t *value, moe_error *err);
int parse_no_combine(module_state *state, PyObject *object, int32_t *value, moe_error *err);
int parse_backend(module_state *state, PyObject *object, moe_backend *value, moe_error *err);
/* bfloat16, float16, float32; MOE_DTYPE_NONE where not given */
int parse_dtype(module_state *state, PyObject *object, int32_t *value, moe_error *err);
/* What Routing.knobs holds beside topk, method, scale and tensors (routing.py); None: nothing. */
int parse_routing_knobs(module_state *state, PyObject *knobs, moe_options *options, moe_error *err);
int parse_ids_dtype(module_state *state, PyObject *object, int32_t *value, moe_error *err);
/* An optional number: has is 0 where it is None. */
int parse_optional_double(const char *name, PyObject *object, int32_t *has, double *value,
                          moe_error *err);

void default_options(moe_options *options);
/* All of LAYER_KW but the tensors; kw is indexed by KW_*. */
int parse_layer_options(module_state *state, PyObject *const *kw, moe_options *options,
                        int32_t *dtype, moe_error *err);

/* ---- call.c ---------------------------------------------------------------------------------- */

/* A tensor that a call writes: the caller's, or allocated by the framework of the prototype. */
typedef struct call_output {
    const char *name;
    PyObject *given; /* borrowed; Py_None: allocate */
    moe_tensor *tensor;
    int32_t dtype, ndim;
    int64_t shape[MOE_MAX_DIMS];
    PyObject *object, *wrap; /* what the user gets, owned; wrap(object) first, where there is one */
} call_output;

enum { MAX_OUTPUTS = 5 };

struct experts_object;

typedef struct call_frame {
    module_state *state;
    moe_call call;
    moe_problem problem;
    moe_plan plan;
    tensor_holds holds;
    PyObject *prototype;    /* whose framework allocates and whose stream is used; borrowed */
    const moe_tensor *like; /* prototype, imported */
    int32_t dtype;          /* of the argument dtype=, or MOE_DTYPE_NONE */
    int num_outputs;
    call_output outputs[MAX_OUTPUTS];
    /* Tensors without memory: the call is described instead of run. They lie at addresses that do
     * not overlap, beyond all others. */
    int num_abstract;
    uintptr_t abstract_end;
    struct {
        const moe_tensor *tensor;
        PyObject *object; /* borrowed */
    } abstract[TENSOR_HOLDS];
    struct experts_object *experts; /* whose scratch may be used, or NULL */
    call_memo *memo;                /* where the last such call may be, or NULL */
    int scratch;                    /* its slot in use, or -1 */
    moe_error err;
} call_frame;

void call_begin(call_frame *f, module_state *state, moe_operation operation, const char *function);
/* Imports a tensor where object is not None. */
int call_tensor(call_frame *f, PyObject *object, const char *name, moe_tensor *tensor);
/* The same for numbers: dtype= reads integers of its width as such numbers. */
int call_numbers(call_frame *f, PyObject *object, const char *name, moe_tensor *tensor);
/* hidden_states, intermediate, rows or what else decides framework, device and stream. */
int call_prototype(call_frame *f, PyObject *object, const char *name, moe_tensor *tensor);
void call_output_add(call_frame *f, const char *name, PyObject *given, moe_tensor *tensor);
/* Validate, plan, allocate what is missing, run, wrap. Returns the output, or a tuple of them,
 * or NULL with an exception. Releases everything the frame holds, also after an earlier error
 * (f->err). */
PyObject *call_finish(call_frame *f, PyObject *stream);

int find_plan(module_state *state, const moe_problem *problem, moe_backend backend, int32_t device,
              moe_plan *plan, moe_error *err);
/* dtype= on one tensor */
void reinterpret(moe_tensor *tensor, int32_t dtype);

/* ---- abstract.c: calls by their shapes alone, for frameworks that trace ------------------------ */

extern PyType_Spec moe_abstract_spec;
/* An _Abstract as a tensor, at an address of its own. */
int abstract_import(call_frame *f, PyObject *object, const char *name, moe_tensor *tensor);
/* What call_finish returns for such a call, validated and planned: (operands, results, attributes). */
PyObject *abstract_describe(call_frame *f);
extern PyMethodDef moe_abstract_methods[]; /* ends with {0} */

/* ---- experts.c ------------------------------------------------------------------------------- */

extern PyType_Spec moe_experts_spec;
/* Scratch of `experts` for the frame's plan on stream, into call.workspace; 0 and no workspace
 * where it has none that fits or another thread is launching with it. */
int experts_take_scratch(struct experts_object *experts, call_frame *f, int64_t required,
                         void *stream);
void experts_give_scratch(struct experts_object *experts, const call_frame *f);

/* ---- device_buffer.c ------------------------------------------------------------------------- */

extern PyType_Spec moe_buffer_spec, moe_view_spec;
extern PyMethodDef moe_device_methods[]; /* ends with {0} */

#endif
