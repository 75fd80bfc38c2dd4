/* device_buffer.c: GPU memory, streams and graphs for demo, check and bench, which run without
 * any framework. All of it synchronises or allocates, so no call of the layer comes here;
 * csrc/cuda/device.c does the work.
 *
 *     buffer = _device_alloc(nbytes, device)
 *     buffer.copy_from(array)
 *     x = buffer.view((4, 2048), "bfloat16") */
#include "binding.h"
#include "cuda/cuda.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct buffer_object {
    PyObject_HEAD
    module_state *state;
    char *data;
    int64_t nbytes;
    int32_t device;
} buffer_object;

typedef struct view_object {
    PyObject_HEAD
    PyObject *buffer;
    moe_tensor tensor;
} view_object;

static void free_object(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF((PyObject *)type);
}

static PyObject *new_object(PyObject *type)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot((PyTypeObject *)type, Py_tp_alloc);
    return alloc((PyTypeObject *)type, 0);
}

/* ---- views ----------------------------------------------------------------------------------- */

int device_view_import(PyObject *view, const char *name, moe_tensor *tensor, moe_error *err)
{
    (void)name, (void)err;
    *tensor = ((view_object *)view)->tensor;
    return MOE_OK;
}

static int64_t view_bytes(const moe_tensor *t)
{
    int64_t bytes = moe_dtype_bytes(t->dtype);
    for (int i = 0; i < t->ndim; ++i)
        bytes *= t->shape[i];
    return bytes;
}

/* One exported tensor: the struct the consumer sees, and what keeps it alive. */
typedef struct exported {
    union {
        DLManagedTensorVersioned versioned;
        DLManagedTensor legacy;
    } managed;
    int64_t shape[MOE_MAX_DIMS], strides[MOE_MAX_DIMS];
    PyObject *view;
} exported;

static void release_exported(exported *e)
{
    PyGILState_STATE gil = PyGILState_Ensure(); /* a deleter may come from any thread */
    Py_DECREF(e->view);
    PyGILState_Release(gil);
    free(e);
}

static void delete_versioned(DLManagedTensorVersioned *self)
{
    release_exported(self->manager_ctx);
}

static void delete_legacy(DLManagedTensor *self)
{
    release_exported(self->manager_ctx);
}

static void destroy_versioned(PyObject *capsule)
{
    if (!PyCapsule_IsValid(capsule, "dltensor_versioned")) return; /* taken: renamed to used_ */
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    managed->deleter(managed);
}

static void destroy_legacy(PyObject *capsule)
{
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
    managed->deleter(managed);
}

/* stream is not looked at: whoever uses these views has synchronised or works on the stream that
 * wrote them. */
static PyObject *view_dlpack(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
    view_object *self = (view_object *)object;
    module_state *state = ((buffer_object *)self->buffer)->state;
    PyObject *values[MAX_PARAMETERS];
    moe_error err;
    error_clear(&err);
    PyObject *const *v = parse_arguments(state, SIG_DLPACK, args, nargs, kwnames, values, &err);
    if (v == NULL) return raise_error(&err);
    bool versioned = PyTuple_Check(v[1]) && PyTuple_Size(v[1]) == 2 &&
                     PyLong_AsLong(PyTuple_GetItem(v[1], 0)) >= 1;
    PyErr_Clear();
    exported *e = calloc(1, sizeof *e);
    if (e == NULL) return PyErr_NoMemory();
    const moe_tensor *t = &self->tensor;
    memcpy(e->shape, t->shape, sizeof e->shape);
    memcpy(e->strides, t->stride, sizeof e->strides);
    e->view = Py_NewRef(object);
    DLTensor *dl = versioned ? &e->managed.versioned.dl_tensor : &e->managed.legacy.dl_tensor;
    dl->data = t->data;
    dl->device.device_type = kDLCUDA;
    dl->device.device_id = t->device;
    dl->ndim = t->ndim;
    dl->dtype = tensor_dlpack_dtype(t->dtype);
    dl->shape = e->shape;
    dl->strides = e->strides;
    PyObject *capsule;
    if (versioned) {
        e->managed.versioned.version.major = DLPACK_MAJOR_VERSION;
        e->managed.versioned.version.minor = DLPACK_MINOR_VERSION;
        e->managed.versioned.manager_ctx = e;
        e->managed.versioned.deleter = delete_versioned;
        capsule = PyCapsule_New(&e->managed.versioned, "dltensor_versioned", destroy_versioned);
    } else {
        e->managed.legacy.manager_ctx = e;
        e->managed.legacy.deleter = delete_legacy;
        capsule = PyCapsule_New(&e->managed.legacy, "dltensor", destroy_legacy);
    }
    if (capsule == NULL) release_exported(e);
    return capsule;
}

static PyObject *view_dlpack_device(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    return Py_BuildValue("(ii)", kDLCUDA, (int)((view_object *)object)->tensor.device);
}

static PyObject *view_ptr(PyObject *object, void *closure)
{
    (void)closure;
    return PyLong_FromVoidPtr(((view_object *)object)->tensor.data);
}

static PyObject *view_nbytes(PyObject *object, void *closure)
{
    (void)closure;
    return PyLong_FromLongLong(view_bytes(&((view_object *)object)->tensor));
}

static PyObject *view_device(PyObject *object, void *closure)
{
    (void)closure;
    return PyLong_FromLong(((view_object *)object)->tensor.device);
}

static PyObject *view_dtype(PyObject *object, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(moe_dtype_name(((view_object *)object)->tensor.dtype));
}

static PyObject *view_shape(PyObject *object, void *closure)
{
    const moe_tensor *t = &((view_object *)object)->tensor;
    (void)closure;
    PyObject *shape = PyTuple_New(t->ndim);
    for (int i = 0; shape && i < t->ndim; ++i) {
        PyObject *extent = PyLong_FromLongLong(t->shape[i]);
        if (extent == NULL || PyTuple_SetItem(shape, i, extent)) Py_CLEAR(shape);
    }
    return shape;
}

static void view_dealloc(PyObject *object)
{
    PyObject *buffer = ((view_object *)object)->buffer;
    free_object(object);
    Py_XDECREF(buffer);
}

static PyMethodDef VIEW_METHODS[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))view_dlpack, METH_FASTCALL | METH_KEYWORDS,
     "A DLPack capsule of the view."},
    {"__dlpack_device__", view_dlpack_device, METH_NOARGS, "(kDLCUDA, device)"},
    {0}};

static PyGetSetDef VIEW_GETSET[] = {{"ptr", view_ptr, NULL, "Device address.", NULL},
                                    {"nbytes", view_nbytes, NULL, "Size in bytes.", NULL},
                                    {"device", view_device, NULL, "CUDA device.", NULL},
                                    {"dtype", view_dtype, NULL, "Name of the dtype.", NULL},
                                    {"shape", view_shape, NULL, "Extents.", NULL},
                                    {0}};

static PyType_Slot VIEW_SLOTS[] = {{Py_tp_doc, "A compact tensor in a _DeviceBuffer."},
                                   {Py_tp_dealloc, view_dealloc},
                                   {Py_tp_methods, VIEW_METHODS},
                                   {Py_tp_getset, VIEW_GETSET},
                                   {0}};

PyType_Spec moe_view_spec = {
    "fusedmoe._C._DeviceView", sizeof(view_object), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, VIEW_SLOTS};

/* ---- buffers --------------------------------------------------------------------------------- */

static int check_range(const buffer_object *self, int64_t offset, int64_t bytes, moe_error *err)
{
    if (offset >= 0 && bytes >= 0 && offset <= self->nbytes && bytes <= self->nbytes - offset)
        return MOE_OK;
    return moe_fail(err, MOE_ERROR_VALUE,
                    "offset: expected a range inside the buffer of %" PRId64 " bytes, got %" PRId64
                    " bytes from %" PRId64,
                    self->nbytes, bytes, offset);
}

/* Copies between the buffer and a compact CPU tensor, and waits. */
static PyObject *copy(PyObject *object, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames,
                      int kind)
{
    buffer_object *self = (buffer_object *)object;
    PyObject *values[MAX_PARAMETERS];
    tensor_holds holds;
    moe_tensor t;
    moe_error err;
    int64_t offset = 0;
    error_clear(&err);
    holds.count = 0;
    PyObject *const *v =
        parse_arguments(self->state, SIG_DEVICE_COPY, args, nargs, kwnames, values, &err);
    if (v == NULL || parse_int("offset", v[1], 0, &offset, &err) ||
        tensor_import(&self->state->tensors, v[0], "tensor", &t, &holds, &err))
        goto done;
    int64_t compact = 1, bytes = view_bytes(&t);
    for (int i = t.ndim - 1; i >= 0; --i) {
        if (bytes && t.stride[i] != compact)
            moe_fail(&err, MOE_ERROR_VALUE, "tensor: expected a compact tensor, got strides");
        compact *= t.shape[i];
    }
    if (err.status) goto done;
    if (t.backend != MOE_CPU)
        moe_fail(&err, MOE_ERROR_VALUE, "tensor: expected a tensor on the CPU, got one on cuda:%d",
                 t.device);
    else if (kind == MOE_COPY_TO_HOST && t.readonly)
        moe_fail(&err, MOE_ERROR_VALUE, "tensor: expected a writable tensor");
    if (err.status || check_range(self, offset, bytes, &err)) goto done;
    Py_BEGIN_ALLOW_THREADS
    if (kind == MOE_COPY_TO_DEVICE)
        moe_cuda_copy(self->device, self->data + offset, t.data, bytes, kind, &err);
    else
        moe_cuda_copy(self->device, t.data, self->data + offset, bytes, kind, &err);
    Py_END_ALLOW_THREADS
done:
    tensor_release_all(&holds);
    if (err.status) return raise_error(&err);
    Py_RETURN_NONE;
}

static PyObject *buffer_copy_from(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                  PyObject *kwnames)
{
    return copy(self, args, nargs, kwnames, MOE_COPY_TO_DEVICE);
}

static PyObject *buffer_copy_to(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                PyObject *kwnames)
{
    return copy(self, args, nargs, kwnames, MOE_COPY_TO_HOST);
}

static int parse_shape(PyObject *object, int32_t *ndim, int64_t *shape, moe_error *err)
{
    if (!PyTuple_Check(object))
        return moe_fail(err, MOE_ERROR_TYPE, "shape: expected a tuple of integers");
    Py_ssize_t count = PyTuple_Size(object);
    if (count > MOE_MAX_DIMS)
        return moe_fail(err, MOE_ERROR_VALUE, "shape: expected at most %d extents, got %zd",
                        MOE_MAX_DIMS, count);
    *ndim = (int32_t)count;
    for (Py_ssize_t i = 0; i < count; ++i)
        if (parse_int("shape", PyTuple_GetItem(object, i), 0, &shape[i], err)) return err->status;
    return MOE_OK;
}

static PyObject *buffer_view(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
    buffer_object *self = (buffer_object *)object;
    PyObject *values[MAX_PARAMETERS];
    moe_error err;
    moe_tensor t;
    int32_t ndim = 0;
    int64_t shape[MOE_MAX_DIMS], offset = 0;
    error_clear(&err);
    PyObject *const *v =
        parse_arguments(self->state, SIG_DEVICE_VIEW, args, nargs, kwnames, values, &err);
    if (v == NULL || parse_shape(v[0], &ndim, shape, &err) ||
        parse_int("offset", v[2], 0, &offset, &err))
        return raise_error(&err);
    int32_t dtype = PyUnicode_Check(v[1]) ? tensor_dtype_by_name(v[1]) : MOE_DTYPE_NONE;
    if (dtype == MOE_DTYPE_NONE) {
        moe_fail(&err, MOE_ERROR_TYPE, "dtype: expected the name of a dtype");
        return raise_error(&err);
    }
    if (check_range(self, offset, 0, &err) ||
        tensor_describe("shape", self->data + offset, dtype, ndim, shape, NULL, &t, &err) ||
        check_range(self, offset, view_bytes(&t), &err))
        return raise_error(&err);
    PyObject *view = new_object(self->state->tensors.view_type);
    if (view == NULL) return NULL;
    t.backend = MOE_CUDA;
    t.device = self->device;
    ((view_object *)view)->tensor = t;
    ((view_object *)view)->buffer = Py_NewRef(object);
    return view;
}

static PyObject *buffer_ptr(PyObject *object, void *closure)
{
    (void)closure;
    return PyLong_FromVoidPtr(((buffer_object *)object)->data);
}

static PyObject *buffer_nbytes(PyObject *object, void *closure)
{
    (void)closure;
    return PyLong_FromLongLong(((buffer_object *)object)->nbytes);
}

static PyObject *buffer_device(PyObject *object, void *closure)
{
    (void)closure;
    return PyLong_FromLong(((buffer_object *)object)->device);
}

static void buffer_dealloc(PyObject *object)
{
    buffer_object *self = (buffer_object *)object;
    if (self->data) moe_cuda_free(self->device, self->data);
    free_object(object);
}

static PyMethodDef BUFFER_METHODS[] = {
    {"copy_from", (PyCFunction)(void (*)(void))buffer_copy_from, METH_FASTCALL | METH_KEYWORDS,
     "copy_from($self, tensor, offset=0)\n--\n\nCopies a compact CPU tensor to the buffer and "
     "waits for it."},
    {"copy_to", (PyCFunction)(void (*)(void))buffer_copy_to, METH_FASTCALL | METH_KEYWORDS,
     "copy_to($self, tensor, offset=0)\n--\n\nFills a compact CPU tensor from the buffer and waits "
     "for it."},
    {"view", (PyCFunction)(void (*)(void))buffer_view, METH_FASTCALL | METH_KEYWORDS,
     "view($self, shape, dtype, offset=0)\n--\n\nA compact tensor in the buffer, which it keeps "
     "alive."},
    {0}};

static PyGetSetDef BUFFER_GETSET[] = {{"ptr", buffer_ptr, NULL, "Device address.", NULL},
                                      {"nbytes", buffer_nbytes, NULL, "Size in bytes.", NULL},
                                      {"device", buffer_device, NULL, "CUDA device.", NULL},
                                      {0}};

static PyType_Slot BUFFER_SLOTS[] = {{Py_tp_doc, "GPU memory, freed with the object."},
                                     {Py_tp_dealloc, buffer_dealloc},
                                     {Py_tp_methods, BUFFER_METHODS},
                                     {Py_tp_getset, BUFFER_GETSET},
                                     {0}};

PyType_Spec moe_buffer_spec = {"fusedmoe._C._DeviceBuffer", sizeof(buffer_object), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE |
                                   Py_TPFLAGS_DISALLOW_INSTANTIATION,
                               BUFFER_SLOTS};

/* ---- functions ------------------------------------------------------------------------------- */

static PyObject *device_alloc(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *kwnames)
{
    module_state *state = PyModule_GetState(module);
    PyObject *values[MAX_PARAMETERS];
    moe_error err;
    int64_t nbytes = 0;
    int32_t device = 0;
    void *data = NULL;
    error_clear(&err);
    PyObject *const *v =
        parse_arguments(state, SIG_DEVICE_ALLOC, args, nargs, kwnames, values, &err);
    if (v == NULL || parse_int("nbytes", v[0], 0, &nbytes, &err) ||
        parse_int32("device", v[1], 0, &device, &err))
        return raise_error(&err);
    if (nbytes < 1) {
        moe_fail(&err, MOE_ERROR_VALUE, "nbytes: expected at least 1, got %" PRId64, nbytes);
        return raise_error(&err);
    }
    if (moe_cuda_alloc(device, nbytes, &data, &err)) return raise_error(&err);
    PyObject *object = new_object(state->buffer_type);
    if (object == NULL) {
        moe_cuda_free(device, data);
        return NULL;
    }
    buffer_object *self = (buffer_object *)object;
    self->state = state; /* the type keeps the module alive */
    self->data = data;
    self->nbytes = nbytes;
    self->device = device;
    return object;
}

static int parse_one_device(module_state *state, PyObject *const *args, Py_ssize_t nargs,
                            PyObject *kwnames, int32_t *device, moe_error *err)
{
    PyObject *values[MAX_PARAMETERS];
    error_clear(err);
    PyObject *const *v = parse_arguments(state, SIG_DEVICE, args, nargs, kwnames, values, err);
    return v == NULL ? (int)err->status : parse_int32("device", v[0], 0, device, err);
}

static PyObject *device_stream(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                               PyObject *kwnames)
{
    moe_error err;
    int32_t device;
    void *stream = NULL;
    if (parse_one_device(PyModule_GetState(module), args, nargs, kwnames, &device, &err) ||
        moe_cuda_stream_create(device, &stream, &err))
        return raise_error(&err);
    return PyLong_FromVoidPtr(stream);
}

static PyObject *device_synchronize(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                    PyObject *kwnames)
{
    moe_error err;
    int32_t device;
    if (parse_one_device(PyModule_GetState(module), args, nargs, kwnames, &device, &err))
        return raise_error(&err);
    Py_BEGIN_ALLOW_THREADS
    moe_cuda_synchronize(device, &err);
    Py_END_ALLOW_THREADS
    if (err.status) return raise_error(&err);
    Py_RETURN_NONE;
}

static PyObject *device_probe_hopper(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                     PyObject *kwnames)
{
    moe_error err;
    int32_t device;
    double max_error = 0;
    if (parse_one_device(PyModule_GetState(module), args, nargs, kwnames, &device, &err) ||
        moe_cuda_probe_hopper(device, &max_error, &err))
        return raise_error(&err);
    return PyFloat_FromDouble(max_error);
}

static int parse_handle(const char *name, PyObject *object, void **handle, moe_error *err)
{
    if (!PyLong_Check(object))
        return moe_fail(err, MOE_ERROR_TYPE, "%s: expected an int from _device_stream", name);
    *handle = PyLong_AsVoidPtr(object);
    if (*handle == NULL && PyErr_Occurred()) {
        PyErr_Clear();
        return moe_fail(err, MOE_ERROR_VALUE, "%s: expected an int from _device_stream", name);
    }
    return MOE_OK;
}

static int parse_stream_and_device(module_state *state, PyObject *const *args, Py_ssize_t nargs,
                                   PyObject *kwnames, void **stream, int32_t *device,
                                   moe_error *err)
{
    PyObject *values[MAX_PARAMETERS];
    error_clear(err);
    PyObject *const *v =
        parse_arguments(state, SIG_DEVICE_STREAM, args, nargs, kwnames, values, err);
    if (v == NULL || parse_handle("stream", v[0], stream, err)) return err->status;
    return parse_int32("device", v[1], 0, device, err);
}

static PyObject *device_graph_begin(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                    PyObject *kwnames)
{
    moe_error err;
    int32_t device;
    void *stream;
    if (parse_stream_and_device(PyModule_GetState(module), args, nargs, kwnames, &stream, &device,
                                &err) ||
        moe_cuda_graph_begin(device, stream, &err))
        return raise_error(&err);
    Py_RETURN_NONE;
}

static const char GRAPH[] = "fusedmoe.graph";

static void destroy_graph(PyObject *capsule)
{
    moe_cuda_graph_destroy(PyCapsule_GetPointer(capsule, GRAPH));
}

static PyObject *device_graph_end(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                  PyObject *kwnames)
{
    moe_error err;
    int32_t device;
    void *stream, *graph = NULL;
    if (parse_stream_and_device(PyModule_GetState(module), args, nargs, kwnames, &stream, &device,
                                &err) ||
        moe_cuda_graph_end(device, stream, &graph, &err))
        return raise_error(&err);
    PyObject *capsule = PyCapsule_New(graph, GRAPH, destroy_graph);
    if (capsule == NULL) moe_cuda_graph_destroy(graph);
    return capsule;
}

static int parse_graph(PyObject *object, void **graph, moe_error *err)
{
    if (!PyCapsule_IsValid(object, GRAPH))
        return moe_fail(err, MOE_ERROR_TYPE, "graph: expected a graph from _device_graph_end");
    *graph = PyCapsule_GetPointer(object, GRAPH);
    return MOE_OK;
}

static PyObject *device_graph_launch(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                     PyObject *kwnames)
{
    PyObject *values[MAX_PARAMETERS];
    moe_error err;
    int32_t device;
    void *stream = NULL, *graph = NULL;
    error_clear(&err);
    PyObject *const *v = parse_arguments(PyModule_GetState(module), SIG_DEVICE_GRAPH, args, nargs,
                                         kwnames, values, &err);
    if (v == NULL || parse_graph(v[0], &graph, &err) ||
        parse_handle("stream", v[1], &stream, &err) ||
        parse_int32("device", v[2], 0, &device, &err))
        return raise_error(&err);
    Py_BEGIN_ALLOW_THREADS
    moe_cuda_graph_launch(device, graph, stream, &err);
    Py_END_ALLOW_THREADS
    if (err.status) return raise_error(&err);
    Py_RETURN_NONE;
}

static PyObject *device_graph_elapsed(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                      PyObject *kwnames)
{
    PyObject *values[MAX_PARAMETERS];
    moe_error err;
    int32_t device, replays = 0;
    void *stream = NULL, *graph = NULL;
    error_clear(&err);
    PyObject *const *v = parse_arguments(PyModule_GetState(module), SIG_DEVICE_ELAPSED, args, nargs,
                                         kwnames, values, &err);
    if (v == NULL || parse_graph(v[0], &graph, &err) ||
        parse_handle("stream", v[1], &stream, &err) ||
        parse_int32("replays", v[2], 1, &replays, &err) ||
        parse_int32("device", v[3], 0, &device, &err))
        return raise_error(&err);
    if (replays < 1 || replays > 1000000) {
        moe_fail(&err, MOE_ERROR_VALUE, "replays: expected 1 .. 1000000, got %" PRId32, replays);
        return raise_error(&err);
    }
    float *milliseconds = calloc((size_t)replays, sizeof *milliseconds);
    if (milliseconds == NULL) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    moe_cuda_elapsed(device, graph, stream, replays, milliseconds, &err);
    Py_END_ALLOW_THREADS
    PyObject *list = err.status ? NULL : PyList_New(0);
    for (int32_t i = 0; list && i < replays; ++i) {
        PyObject *value = PyFloat_FromDouble((double)milliseconds[i]);
        if (value == NULL || PyList_Append(list, value)) Py_CLEAR(list);
        Py_XDECREF(value);
    }
    free(milliseconds);
    return err.status ? raise_error(&err) : list;
}

#define FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL | METH_KEYWORDS

PyMethodDef moe_device_methods[] = {
    {"_device_alloc", FAST(device_alloc),
     "_device_alloc($module, nbytes, device=0)\n--\n\nGPU memory."},
    {"_device_stream", FAST(device_stream),
     "_device_stream($module, device=0)\n--\n\nA new CUstream, as an int."},
    {"_device_synchronize", FAST(device_synchronize),
     "_device_synchronize($module, device=0)\n--\n\nWaits for the GPU."},
    {"_device_probe_hopper", FAST(device_probe_hopper),
     "_device_probe_hopper($module, device=0)\n--\n\nLargest error of the tensor map, TMA and "
     "wgmma probe."},
    {"_device_graph_begin", FAST(device_graph_begin),
     "_device_graph_begin($module, stream, device=0)\n--\n\nStarts capturing the stream."},
    {"_device_graph_end", FAST(device_graph_end),
     "_device_graph_end($module, stream, device=0)\n--\n\nThe captured graph."},
    {"_device_graph_launch", FAST(device_graph_launch),
     "_device_graph_launch($module, graph, stream, device=0)\n--\n\nQueues one replay."},
    {"_device_graph_elapsed", FAST(device_graph_elapsed),
     "_device_graph_elapsed($module, graph, stream, replays, device=0)\n--\n\nMilliseconds of each "
     "replay, by events."},
    {0}};
