/* abstract.c: calls by their shapes alone, for frameworks that trace a program before it runs.
 *
 *     x, w13, ... = _Abstract(array, shape, dtype, device) ...      no memory
 *     operands, outputs, workspace, attributes = fused_experts(x, w13, ...)
 *
 * Such a call is parsed, validated and planned as every other one, so that its errors are the same,
 * and is then described instead of run. What is described here is read back by xla_ffi.c. */
#include "binding.h"
#include "cpu/cpu.h"
#include "xla_call.h"

#include <string.h>

#ifndef MOE_VERSION
#define MOE_VERSION "unknown"
#endif

typedef struct abstract_object {
    PyObject_HEAD
    PyObject *array; /* given back as an operand */
    char dtype_name[40];
    int32_t dtype, ndim;
    int64_t shape[MOE_MAX_DIMS]; /* the first ones of more */
    moe_backend backend;
    int32_t device;
} abstract_object;

/* ---- the type -------------------------------------------------------------------------------- */

static int fill(abstract_object *self, PyObject *array, PyObject *shape, PyObject *dtype,
                int device)
{
    self->array = Py_NewRef(array);
    const char *name = PyUnicode_AsUTF8AndSize(dtype, NULL);
    if (name == NULL) return -1;
    strncpy(self->dtype_name, name, sizeof self->dtype_name - 1);
    self->dtype = tensor_dtype_by_name(dtype);
    self->backend = device < 0 ? MOE_CPU : MOE_CUDA;
    self->device = device < 0 ? 0 : device;
    const Py_ssize_t ndim = PyTuple_Size(shape);
    self->ndim = ndim > MOE_MAX_DIMS ? MOE_MAX_DIMS + 1 : (int32_t)ndim;
    for (int i = 0; i < self->ndim && i < MOE_MAX_DIMS; ++i) {
        self->shape[i] = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
        if (self->shape[i] == -1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

static PyObject *abstract_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *array, *shape, *dtype;
    int device;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "OO!Ui:_Abstract", &array, &PyTuple_Type, &shape, &dtype, &device))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PyObject *self = alloc(type, 0); /* zeroed */
    if (self && fill((abstract_object *)self, array, shape, dtype, device)) Py_CLEAR(self);
    return self;
}

static void abstract_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    Py_XDECREF(((abstract_object *)object)->array);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF((PyObject *)type);
}

static PyType_Slot ABSTRACT_SLOTS[] = {
    {Py_tp_doc, "_Abstract(array, shape, dtype, device, /)\n--\n\nA tensor of which only shape, "
                "dtype and device (-1: the CPU) are known."},
    {Py_tp_new, abstract_new},
    {Py_tp_dealloc, abstract_dealloc},
    {0}};

PyType_Spec moe_abstract_spec = {"fusedmoe._C._Abstract", sizeof(abstract_object), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, ABSTRACT_SLOTS};

/* ---- in -------------------------------------------------------------------------------------- */

int abstract_import(call_frame *f, PyObject *object, const char *name, moe_tensor *tensor)
{
    const abstract_object *self = (const abstract_object *)object;
    if (f->num_abstract == TENSOR_HOLDS)
        return moe_fail(&f->err, MOE_ERROR_RUNTIME, "%s: too many tensors in one call", name);
    if (self->dtype == MOE_DTYPE_NONE)
        return moe_fail(&f->err, MOE_ERROR_TYPE,
                        "%s: expected a dtype that this library knows, got %s", name,
                        self->dtype_name);
    if (f->num_abstract == 0) f->abstract_end = MOE_ALIGNMENT;
    if (tensor_describe(name, (void *)f->abstract_end, self->dtype, self->ndim, self->shape, NULL,
                        tensor, &f->err))
        return f->err.status;
    tensor->backend = self->backend;
    tensor->device = self->device;
    tensor->readonly = true; /* arrays of such frameworks are immutable */
    const uintptr_t room = ((uintptr_t)tensor->span_bytes / MOE_ALIGNMENT + 1) * MOE_ALIGNMENT;
    if (__builtin_add_overflow(f->abstract_end, room, &f->abstract_end))
        return moe_fail(&f->err, MOE_ERROR_VALUE,
                        "%s: expected tensors that fit an address space together, got more", name);
    f->abstract[f->num_abstract].tensor = tensor;
    f->abstract[f->num_abstract++].object = object;
    return MOE_OK;
}

/* ---- out ------------------------------------------------------------------------------------- */

static PyObject *array_of(const call_frame *f, const moe_tensor *tensor)
{
    for (int i = 0; i < f->num_abstract; ++i)
        if (f->abstract[i].tensor == tensor)
            return ((abstract_object *)f->abstract[i].object)->array;
    return NULL;
}

/* The arrays that the call reads, in the order of moe_call_tensors, and their places there. */
static PyObject *operands_list(call_frame *f, int64_t *mask)
{
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < MOE_CALL_TENSORS; ++i) {
        const moe_tensor *tensor = moe_tensor_of(&f->call, i);
        if (!tensor_present(tensor)) continue;
        PyObject *array = array_of(f, tensor);
        if (array == NULL) {
            moe_fail(&f->err, MOE_ERROR_TYPE, "%s: expected an array of the framework that traces",
                     moe_call_tensors[i].name);
            Py_CLEAR(list);
        } else if (PyList_Append(list, array)) {
            Py_CLEAR(list);
        }
        *mask |= (int64_t)1 << i;
    }
    return list;
}

/* [(shape, dtype)], in the same order. */
static PyObject *outputs_list(call_frame *f, int64_t *mask)
{
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < MOE_CALL_TENSORS; ++i) {
        const call_output *out = NULL;
        for (int k = 0; k < f->num_outputs; ++k)
            if (f->outputs[k].tensor == moe_tensor_of(&f->call, i)) out = &f->outputs[k];
        if (out == NULL) continue;
        PyObject *shape = PyList_New(0), *pair = NULL;
        for (int d = 0; shape && d < out->ndim; ++d) {
            PyObject *extent = PyLong_FromLongLong(out->shape[d]);
            if (extent == NULL || PyList_Append(shape, extent)) Py_CLEAR(shape);
            Py_XDECREF(extent);
        }
        if (shape) pair = Py_BuildValue("Ns", shape, moe_dtype_name(out->dtype));
        if (pair == NULL || PyList_Append(list, pair)) Py_CLEAR(list);
        Py_XDECREF(pair);
        *mask |= (int64_t)1 << i;
    }
    return list;
}

/* Of the call on either backend: a traced program does not say yet where it will run. */
static int64_t workspace_bytes(const call_frame *f)
{
    int64_t bytes = f->plan.workspace.total;
    for (moe_backend backend = MOE_CPU; backend <= MOE_CUDA; ++backend) {
        moe_device_info info;
        moe_plan plan;
        moe_error ignored; /* no kernel for float32 on a GPU */
        error_clear(&ignored);
        moe_default_device(backend, 0, &info);
        if (moe_make_plan(&f->problem, &info, &plan, &ignored) == MOE_OK &&
            plan.workspace.total > bytes)
            bytes = plan.workspace.total;
    }
    return bytes ? bytes + MOE_ALIGNMENT : 0; /* room to start at a multiple of 256 */
}

static PyObject *scalar_value(const moe_call_scalar *row, const moe_message *message)
{
    const char *field = (const char *)message + row->offset;
    int32_t i32;
    int64_t i64;
    double f64;
    switch (row->kind) {
    case MOE_SCALAR_I32:
        memcpy(&i32, field, sizeof i32);
        return PyLong_FromLong(i32);
    case MOE_SCALAR_I64:
        memcpy(&i64, field, sizeof i64);
        return PyLong_FromLongLong(i64);
    case MOE_SCALAR_F64:
        memcpy(&f64, field, sizeof f64);
        return PyFloat_FromDouble(f64);
    }
    return NULL;
}

static PyObject *attributes_dict(const moe_message *message)
{
    PyObject *dict = Py_BuildValue("{ss}", MOE_XLA_VERSION_ATTRIBUTE, MOE_VERSION);
    for (int i = 0; dict && i < MOE_CALL_SCALARS; ++i) {
        PyObject *value = scalar_value(&moe_call_scalars[i], message);
        if (value == NULL || PyDict_SetItemString(dict, moe_call_scalars[i].name, value))
            Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

PyObject *abstract_describe(call_frame *f)
{
    moe_message message = {.call = f->call, .workspace_limit = f->problem.workspace_limit};
    const int64_t workspace = workspace_bytes(f);
    PyObject *operands = NULL, *outputs = NULL, *attributes = NULL, *result = NULL;
    if ((operands = operands_list(f, &message.operands)) == NULL) goto done;
    if ((outputs = outputs_list(f, &message.results)) == NULL) goto done;
    for (int i = 0; i < MOE_CALL_TENSORS; ++i)
        if (workspace && moe_tensor_of(&f->call, i) == &f->call.workspace)
            message.results |= (int64_t)1 << i;
    if ((attributes = attributes_dict(&message)) == NULL) goto done;
    result = Py_BuildValue("OOLO", operands, outputs, (long long)workspace, attributes);
done:
    if (result == NULL && f->err.status == MOE_OK) f->err.status = MOE_ERROR_PYTHON;
    Py_XDECREF(attributes);
    Py_XDECREF(outputs);
    Py_XDECREF(operands);
    return result;
}

/* ---- handlers -------------------------------------------------------------------------------- */

/* [(function, platform, capsule)] */
static PyObject *xla_handlers(PyObject *module, PyObject *ignored)
{
    PyObject *list = PyList_New(0);
    (void)module, (void)ignored;
    for (int i = 0; list && i < MOE_XLA_HANDLERS; ++i) {
        const moe_xla_handler *h = &moe_xla_handlers[i];
        void *address;
        memcpy(&address, &h->handler, sizeof address);
        PyObject *capsule =
            PyCapsule_New(address, NULL, NULL); /* without a name, as XLA wants it */
        PyObject *row = capsule ? Py_BuildValue("ssN", h->function, h->platform, capsule) : NULL;
        if (row == NULL || PyList_Append(list, row)) Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

/* For calls that will run without the GIL; under it, since another thread may write os.environ. */
static PyObject *read_environment(PyObject *module, PyObject *ignored)
{
    (void)module, (void)ignored;
    moe_cpu_read_environment();
    return Py_NewRef(Py_None);
}

PyMethodDef moe_abstract_methods[] = {
    {"_read_environment", read_environment, METH_NOARGS,
     "_read_environment($module)\n--\n\nReads FUSEDMOE_NUM_THREADS, FUSEDMOE_CPU_ISA and "
     "FUSEDMOE_CHECK for the calls to come."},
    {"_xla_handlers", xla_handlers, METH_NOARGS,
     "_xla_handlers($module)\n--\n\n[(function, platform, capsule)] for jax.ffi."},
    {0}};
