/* tensor.c: Python tensors in and out (tensor.h).
 *
 * Ownership in one paragraph: a capsule from __dlpack__ is ours from the moment it was renamed
 * to used_*; from then on the deleter is called exactly once, by tensor_release, also where the
 * tensor turns out to be unusable. Before that moment the capsule's own destructor does it.
 * Borrowed views own nothing. */
#include "tensor.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* ---- messages -------------------------------------------------------------------------------- */

static void copy_attribute(PyObject *object, const char *attribute, char *text, size_t size)
{
    text[0] = 0;
    PyObject *value = PyObject_GetAttrString(object, attribute);
    if (value && PyUnicode_Check(value)) {
        const char *utf8 = PyUnicode_AsUTF8AndSize(value, NULL);
        if (utf8) snprintf(text, size, "%s", utf8);
    }
    Py_XDECREF(value);
    PyErr_Clear();
}

const char *tensor_type_text(PyObject *object, char *text, size_t size)
{
    char module[64], name[64];
    PyObject *type = (PyObject *)Py_TYPE(object);
    copy_attribute(type, "__module__", module, sizeof module);
    copy_attribute(type, "__qualname__", name, sizeof name);
    if (module[0] == 0 || strcmp(module, "builtins") == 0)
        snprintf(text, size, "%s", name);
    else
        snprintf(text, size, "%s.%s", module, name);
    return text;
}

int tensor_fail_with_exception(moe_error *err, moe_status status, const char *name,
                               const char *expected, PyObject *object)
{
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    char why[400] = "", kind[64], got[128];
    if (!PyErr_Occurred())
        return moe_fail(err, status, "%s: expected %s, got %s", name, expected,
                        tensor_type_text(object, got, sizeof got));
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) {
        err->status = MOE_ERROR_PYTHON;
        return MOE_ERROR_PYTHON;
    }
    PyErr_Fetch(&type, &value, &trace);
    copy_attribute(type, "__name__", kind, sizeof kind);
    PyObject *text = value ? PyObject_Str(value) : NULL;
    const char *utf8 = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
    if (utf8) snprintf(why, sizeof why, "%s", utf8);
    PyErr_Clear();
    char *line = strchr(why, '\n'); /* torch appends its C++ stack */
    if (line) *line = 0;
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    if (strstr(kind, "OutOfMemory")) status = MOE_ERROR_MEMORY;
    return moe_fail(err, status, "%s: expected %s, got %s (%s: %s)", name, expected,
                    tensor_type_text(object, got, sizeof got), kind, why);
}

/* ---- dtypes ---------------------------------------------------------------------------------- */

/* DLPack's name of every dtype; bits are those of one element. */
static const struct {
    uint8_t code, bits;
} DLPACK_TYPES[MOE_DTYPE_COUNT] = {
    [MOE_F32] = {kDLFloat, 32},
    [MOE_BF16] = {kDLBfloat, 16},
    [MOE_F16] = {kDLFloat, 16},
    [MOE_I32] = {kDLInt, 32},
    [MOE_I64] = {kDLInt, 64},
    [MOE_U8] = {kDLUInt, 8},
    [MOE_I8] = {kDLInt, 8},
    [MOE_U16] = {kDLUInt, 16},
    [MOE_I16] = {kDLInt, 16},
    [MOE_F8E4M3] = {kDLFloat8_e4m3fn, 8},
    [MOE_F8E5M2] = {kDLFloat8_e5m2, 8},
    [MOE_F8E8M0] = {kDLFloat8_e8m0fnu, 8},
    [MOE_F4E2M1] = {kDLFloat4_e2m1fn, 4},
    [MOE_F64] = {kDLFloat, 64},
    [MOE_BOOL] = {kDLBool, 8},
    [MOE_U32] = {kDLUInt, 32},
    [MOE_U64] = {kDLUInt, 64},
};

DLDataType tensor_dlpack_dtype(int32_t dtype)
{
    DLDataType type = {DLPACK_TYPES[dtype].code, DLPACK_TYPES[dtype].bits, 1};
    return type;
}

int32_t tensor_dtype_by_name(PyObject *name)
{
    for (int32_t dtype = 1; dtype < MOE_DTYPE_COUNT; ++dtype)
        if (PyUnicode_CompareWithASCIIString(name, moe_dtype_name(dtype)) == 0) return dtype;
    return MOE_DTYPE_NONE;
}

static int32_t dtype_from_dlpack(DLDataType type)
{
    /* the common ones first, without a search */
    if (type.lanes == 1 && type.bits == 16 && type.code == kDLBfloat) return MOE_BF16;
    if (type.lanes == 1 && type.bits == 32 && type.code == kDLFloat) return MOE_F32;
    if (type.lanes != 1 && !(type.lanes == 2 && type.code == kDLFloat4_e2m1fn))
        return MOE_DTYPE_NONE;
    for (int32_t dtype = 1; dtype < MOE_DTYPE_COUNT; ++dtype)
        if (DLPACK_TYPES[dtype].code == type.code && DLPACK_TYPES[dtype].bits == type.bits)
            return dtype;
    return MOE_DTYPE_NONE;
}

/* ---- layout ---------------------------------------------------------------------------------- */

int tensor_describe(const char *name, void *data, int32_t dtype, int32_t ndim, const int64_t *shape,
                    const int64_t *strides, moe_tensor *tensor, moe_error *err)
{
    if (ndim < 0 || ndim > MOE_MAX_DIMS)
        return moe_fail(err, MOE_ERROR_VALUE, "%s: expected at most %d dimensions, got %d", name,
                        MOE_MAX_DIMS, ndim);
    bool empty = false;
    for (int i = 0; i < ndim; ++i) {
        if (shape[i] < 0)
            return moe_fail(err, MOE_ERROR_VALUE,
                            "%s: expected extents of at least 0, got %" PRId64 " in dimension %d",
                            name, shape[i], i);
        empty |= shape[i] == 0;
    }
    const int64_t bytes = moe_dtype_bytes(dtype);
    int64_t compact = 1; /* stride that a compact tensor has here */
    int64_t last = 0;    /* offset of the last element */
    int64_t total = bytes, span, reach;
    for (int i = ndim - 1; i >= 0; --i) {
        /* An extent of 1 leaves its stride free (producers put anything there), and so does a
         * tensor without elements. */
        bool is_free = strides == NULL || empty || shape[i] == 1;
        int64_t stride = is_free ? compact : strides[i];
        if (stride < 0)
            return moe_fail(err, MOE_ERROR_VALUE,
                            "%s: expected strides of at least 0, got %" PRId64
                            " in dimension %d; make a copy",
                            name, stride, i);
        tensor->shape[i] = shape[i];
        tensor->stride[i] = stride;
        if (empty) { /* any strides will do, as long as the last one is 1 */
            if (i == ndim - 1 && shape[i] > 0) compact = shape[i];
            continue;
        }
        if (__builtin_mul_overflow(total, shape[i], &total) ||
            __builtin_mul_overflow(shape[i] - 1, stride, &span) ||
            __builtin_add_overflow(last, span, &last) ||
            __builtin_mul_overflow(last, bytes, &reach) || reach > INT64_MAX - bytes ||
            __builtin_mul_overflow(stride, shape[i], &compact))
            return moe_fail(err, MOE_ERROR_VALUE,
                            "%s: expected a size below 2^63 bytes, got extent %" PRId64
                            " with stride %" PRId64 " in dimension %d, which overflows",
                            name, shape[i], stride, i);
    }
    if (!empty && data == NULL)
        return moe_fail(err, MOE_ERROR_VALUE, "%s: expected memory, got a null pointer", name);
    if (!empty && (uintptr_t)data > UINTPTR_MAX - (uintptr_t)(last * bytes + bytes))
        return moe_fail(err, MOE_ERROR_VALUE,
                        "%s: expected memory inside the address space, got strides that leave it",
                        name);
    tensor->data = data;
    tensor->ndim = ndim;
    tensor->dtype = dtype;
    tensor->lanes_packed = 1;
    tensor->backend = MOE_CPU;
    tensor->device = 0;
    tensor->span_bytes = empty ? 0 : last * bytes + bytes;
    tensor->readonly = false;
    return MOE_OK;
}

/* Two fp4 share a byte. Torch counts bytes (2 lanes of 4 bits), JAX counts elements (1 lane):
 * bytes here. */
static int describe_fp4(const char *name, void *data, const DLTensor *dl, bool padded,
                        moe_tensor *tensor, moe_error *err)
{
    int64_t shape[MOE_MAX_DIMS], strides[MOE_MAX_DIMS];
    if (dl->dtype.lanes == 2 || padded || dl->ndim < 1 || dl->ndim > MOE_MAX_DIMS) {
        if (tensor_describe(name, data, MOE_F4E2M1, dl->ndim, dl->shape, dl->strides, tensor, err))
            return err->status;
    } else {
        const int last = dl->ndim - 1;
        for (int i = 0; i <= last; ++i) {
            shape[i] = i == last ? dl->shape[i] / 2 : dl->shape[i];
            strides[i] = i == last || !dl->strides ? 1 : dl->strides[i] / 2;
            bool odd = i == last ? dl->shape[i] % 2 ||
                                       (dl->strides && dl->shape[i] > 1 && dl->strides[i] != 1)
                                 : dl->strides && dl->shape[i] > 1 && dl->strides[i] % 2;
            if (odd)
                return moe_fail(
                    err, MOE_ERROR_VALUE,
                    "%s: expected rows of whole bytes of two float4_e2m1fn, got extent %" PRId64
                    " in dimension %d",
                    name, dl->shape[i], i);
        }
        if (tensor_describe(name, data, MOE_F4E2M1, dl->ndim, shape, dl->strides ? strides : NULL,
                            tensor, err))
            return err->status;
    }
    tensor->lanes_packed = padded ? 1 : 2;
    return MOE_OK;
}

int tensor_from_dltensor(const char *name, const DLTensor *dl, uint64_t flags, moe_tensor *tensor,
                         moe_error *err)
{
    int32_t dtype = dtype_from_dlpack(dl->dtype);
    if (dtype == MOE_DTYPE_NONE)
        return moe_fail(err, MOE_ERROR_TYPE,
                        "%s: expected a dtype that this library knows, got DLPack type code %d "
                        "with %d bits and %d lanes%s",
                        name, dl->dtype.code, dl->dtype.bits, dl->dtype.lanes,
                        dl->dtype.code == kDLComplex ? " (complex)" : "");
    if (dl->ndim > 0 && dl->shape == NULL)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "%s: expected a shape of %d extents, got a null pointer", name,
                        (int)dl->ndim);
    if (dl->byte_offset > UINTPTR_MAX - (uintptr_t)dl->data)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "%s: expected memory inside the address space, got byte offset %" PRIu64
                        ", which leaves it",
                        name, dl->byte_offset);
    void *data = dl->data ? (char *)dl->data + dl->byte_offset : NULL;
    if (dtype == MOE_F4E2M1) {
        if (describe_fp4(name, data, dl, (flags & DLPACK_FLAG_BITMASK_IS_SUBBYTE_TYPE_PADDED) != 0,
                         tensor, err))
            return err->status;
    } else if (tensor_describe(name, data, dtype, dl->ndim, dl->shape, dl->strides, tensor, err)) {
        return err->status;
    }
    switch (dl->device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
        break;
    case kDLCUDA:
    case kDLCUDAManaged:
        tensor->backend = MOE_CUDA;
        tensor->device = dl->device.device_id;
        break;
    default:
        return moe_fail(err, MOE_ERROR_VALUE,
                        "%s: expected a CPU or CUDA tensor, got DLPack device type %d", name,
                        (int)dl->device.device_type);
    }
    /* What is written into a copy is lost: as good as read-only. */
    tensor->readonly =
        (flags & (DLPACK_FLAG_BITMASK_READ_ONLY | DLPACK_FLAG_BITMASK_IS_COPIED)) != 0;
    return MOE_OK;
}

/* ---- the door of a type ---------------------------------------------------------------------- */

static PyObject *attribute_or_null(PyObject *object, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(object, name);
    if (value == NULL) PyErr_Clear();
    return value;
}

/* sys.modules[name], borrowed, or NULL. Nothing is imported: a type exists only once its module
 * does. */
static PyObject *loaded_module(const char *name)
{
    PyObject *modules = PyImport_GetModuleDict(),
             *module = modules ? PyDict_GetItemString(modules, name) : NULL;
    return module == Py_None ? NULL : module;
}

static const DLPackExchangeAPI *find_table(tensor_context *ctx, PyObject *type)
{
    PyObject *capsule = attribute_or_null(type, ctx->names.exchange_api);
    const DLPackExchangeAPI *api = NULL;
    if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
        api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_XDECREF(capsule);
    while (api && api->header.version.major != DLPACK_MAJOR_VERSION)
        api = (const DLPackExchangeAPI *)(const void *)api->header.prev_api;
    if (api && !(api->managed_tensor_allocator && api->managed_tensor_from_py_object_no_sync &&
                 api->managed_tensor_to_py_object_no_sync && api->current_work_stream))
        return NULL;
    return api;
}

/* torch.Tensor and Parameter carry the disabled implementation; whoever brings another one has
 * no usable memory. */
static bool overrides_dispatch(PyObject *dispatch)
{
    PyObject *torch = loaded_module("torch");
    PyObject *c = torch ? PyObject_GetAttrString(torch, "_C") : NULL;
    PyObject *disabled = c ? PyObject_GetAttrString(c, "_disabled_torch_dispatch_impl") : NULL;
    bool overrides = disabled != NULL && dispatch != disabled;
    Py_XDECREF(disabled);
    Py_XDECREF(c);
    PyErr_Clear();
    return overrides;
}

static void find_jax(tensor_context *ctx, PyObject *type, bool *array, bool *tracer)
{
    *array = *tracer = false;
    PyObject *mro = attribute_or_null(type, ctx->names.mro);
    Py_ssize_t count = mro && PyTuple_Check(mro) ? PyTuple_Size(mro) : 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
        char module[64], name[64];
        PyObject *base = PyTuple_GetItem(mro, i);
        copy_attribute(base, "__module__", module, sizeof module);
        if (strncmp(module, "jax", 3) != 0) continue;
        copy_attribute(base, "__name__", name, sizeof name);
        *array = true;
        *tracer |= strcmp(name, "Tracer") == 0;
    }
    Py_XDECREF(mro);
}

static int find_door(tensor_context *ctx, PyObject *type, tensor_type *found, moe_error *err)
{
    bool jax = false, tracer = false;
    found->door = DOOR_NOT_A_TENSOR;
    if (type == ctx->view_type) {
        found->door = DOOR_VIEW;
        return MOE_OK;
    }
    PyObject *dispatch = attribute_or_null(type, ctx->names.torch_dispatch);
    if (dispatch) {
        found->torch = true;
        bool overrides = overrides_dispatch(dispatch);
        Py_DECREF(dispatch);
        if (overrides) {
            found->door = DOOR_DISPATCH_SUBCLASS;
            return MOE_OK;
        }
    }
    found->api = find_table(ctx, type);
    if (found->api) {
        found->door = DOOR_TABLE;
        return MOE_OK;
    }
    if (found->torch) {
        found->door = DOOR_TORCH;
        return MOE_OK;
    }
    int ndarray = numpy_is_ndarray_type(ctx, type, &found->door, err);
    if (ndarray < 0) return err->status;
    if (ndarray) return MOE_OK;
    find_jax(ctx, type, &jax, &tracer);
    if (tracer) {
        found->door = DOOR_TRACER;
        return MOE_OK;
    }
    PyObject *dlpack = attribute_or_null(type, ctx->names.dlpack);
    if (dlpack) found->door = jax ? DOOR_JAX : DOOR_DLPACK;
    Py_XDECREF(dlpack);
    return MOE_OK;
}

static tensor_type *slot_of(tensor_context *ctx, PyObject *type)
{
    size_t at =
        ((uintptr_t)type >> 4) * (size_t)0x9E3779B97F4A7C15u >> 58; /* 6 bits: TENSOR_TYPES */
    while (ctx->types[at].type && ctx->types[at].type != type)
        at = (at + 1) % TENSOR_TYPES;
    return &ctx->types[at];
}
_Static_assert(TENSOR_TYPES == 64, "slot_of takes 6 bits of the hash");

/* A program that makes tensor types without end must not make the cache grow without end. */
static void forget_types(tensor_context *ctx)
{
    PyObject *old[TENSOR_TYPES];
    for (int i = 0; i < TENSOR_TYPES; ++i)
        old[i] = ctx->types[i].type;
    memset(ctx->types, 0, sizeof ctx->types);
    ctx->num_types = 0;
    ctx->last = NULL;
    for (int i = 0; i < TENSOR_TYPES; ++i)
        Py_XDECREF(old[i]);
}

const tensor_type *tensor_find_type(tensor_context *ctx, PyObject *object, moe_error *err)
{
    PyObject *type = (PyObject *)Py_TYPE(object);
    if (ctx->last && ctx->last->type == type) return ctx->last;
    tensor_type *slot = slot_of(ctx, type);
    if (slot->type == NULL) {
        tensor_type found = {0};
        if (find_door(ctx, type, &found, err)) return NULL;
        if (ctx->num_types >= TENSOR_TYPES / 2) forget_types(ctx);
        slot = slot_of(ctx, type); /* anew: Python ran, another thread may have filled it */
        if (slot->type == NULL) {
            found.type = Py_NewRef(type);
            *slot = found;
            ++ctx->num_types;
        }
    }
    ctx->last = slot;
    return slot;
}

/* ---- in -------------------------------------------------------------------------------------- */

static int refuse(tensor_door door, PyObject *object, const char *name, moe_error *err)
{
    char got[128];
    tensor_type_text(object, got, sizeof got);
    switch (door) {
    case DOOR_MASKED:
        return moe_fail(err, MOE_ERROR_TYPE, "%s: expected a tensor without a mask, got %s", name,
                        got);
    case DOOR_DISPATCH_SUBCLASS:
        return moe_fail(
            err, MOE_ERROR_TYPE,
            "%s: expected a tensor with memory of its own, got %s, a subclass that intercepts "
            "operations (__torch_dispatch__)",
            name, got);
    case DOOR_TRACER:
        return moe_fail(err, MOE_ERROR_TYPE,
                        "%s: expected an array with values, got %s, a tracer; inside of jax.jit, "
                        "vmap and shard_map call the function of this name in "
                        "fusedmoe.frameworks.jax",
                        name, got);
    default:
        return moe_fail(
            err, MOE_ERROR_TYPE,
            "%s: expected a tensor (torch, NumPy, CuPy, JAX or anything with __dlpack__), got %s",
            name, got);
    }
}

static int import_managed(const char *name, DLManagedTensorVersioned *managed, moe_tensor *tensor,
                          tensor_hold *hold, moe_error *err)
{
    hold->versioned = managed;
    if (managed->version.major != DLPACK_MAJOR_VERSION)
        return moe_fail(err, MOE_ERROR_VALUE, "%s: expected DLPack version %d, got %u.%u", name,
                        DLPACK_MAJOR_VERSION, (unsigned)managed->version.major,
                        (unsigned)managed->version.minor);
    return tensor_from_dltensor(name, &managed->dl_tensor, managed->flags, tensor, err);
}

/* Takes the tensor out of the capsule. */
static int import_capsule(const char *name, PyObject *capsule, moe_tensor *tensor,
                          tensor_hold *hold, moe_error *err)
{
    char got[128];
    if (!PyCapsule_CheckExact(capsule))
        return moe_fail(err, MOE_ERROR_TYPE, "%s: expected a capsule from __dlpack__, got %s", name,
                        tensor_type_text(capsule, got, sizeof got));
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned"))
            return tensor_fail_with_exception(err, MOE_ERROR_VALUE, name,
                                              "a capsule that can be taken", capsule);
        return import_managed(name, managed, tensor, hold, err);
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor"))
            return tensor_fail_with_exception(err, MOE_ERROR_VALUE, name,
                                              "a capsule that can be taken", capsule);
        hold->legacy = managed;
        return tensor_from_dltensor(name, &managed->dl_tensor, 0, tensor, err);
    }
    const char *capsule_name = PyCapsule_GetName(capsule);
    PyErr_Clear();
    return moe_fail(
        err, MOE_ERROR_VALUE,
        "%s: expected a capsule named dltensor or dltensor_versioned, got one named %.64s", name,
        capsule_name ? capsule_name : "NULL");
}

static int dlpack_device(tensor_context *ctx, PyObject *object, const char *name, long *device_type,
                         moe_error *err)
{
    static const char EXPECTED[] = "(device_type, device_id) from __dlpack_device__";
    int status = MOE_OK;
    PyObject *method = PyObject_GetAttr(object, ctx->names.dlpack_device);
    PyObject *pair = method ? PyObject_Call(method, ctx->no_arguments, NULL) : NULL;
    *device_type = kDLCPU;
    if (pair && PyTuple_Check(pair) && PyTuple_Size(pair) == 2)
        *device_type = PyLong_AsLong(PyTuple_GetItem(pair, 0));
    else if (pair)
        status =
            moe_fail(err, MOE_ERROR_TYPE, "%s: expected %s, got something else", name, EXPECTED);
    if (PyErr_Occurred())
        status = tensor_fail_with_exception(err, MOE_ERROR_VALUE, name, EXPECTED, object);
    Py_XDECREF(pair);
    Py_XDECREF(method);
    return status;
}

static int import_dlpack(tensor_context *ctx, tensor_door door, PyObject *object, const char *name,
                         moe_tensor *tensor, tensor_hold *hold, moe_error *err)
{
    static const char EXPECTED[] = "a tensor that exports its memory (__dlpack__)";
    PyObject *detached = NULL, *method = NULL, *capsule = NULL;
    long device_type;
    if (door == DOOR_TORCH) { /* __dlpack__ refuses whatever requires a gradient */
        detached = PyObject_CallMethodObjArgs(object, ctx->names.detach, NULL);
        if (detached == NULL)
            return tensor_fail_with_exception(err, MOE_ERROR_VALUE, name, EXPECTED, object);
        object = detached;
    }
    if (dlpack_device(ctx, object, name, &device_type, err)) goto done;
    bool cpu = device_type == kDLCPU || device_type == kDLCUDAHost;
    if (door == DOOR_JAX && !cpu) {
        moe_fail(err, MOE_ERROR_NOT_IMPLEMENTED,
                 "%s: expected a JAX array on the CPU, got one on a GPU: call the function of this "
                 "name in fusedmoe.frameworks.jax, which runs on XLA's stream",
                 name);
        goto done;
    }
    method = PyObject_GetAttr(object, ctx->names.dlpack);
    /* -1: no synchronisation, the kernels run on the producer's current stream */
    if (method)
        capsule =
            PyObject_Call(method, ctx->no_arguments, cpu ? ctx->keywords_cpu : ctx->keywords_cuda);
    if (method && capsule == NULL &&
        PyErr_ExceptionMatches(PyExc_TypeError)) { /* older than max_version */
        PyErr_Clear();
        capsule = PyObject_Call(method, ctx->no_arguments, cpu ? NULL : ctx->keywords_old_cuda);
    }
    if (capsule == NULL) {
        tensor_fail_with_exception(err, MOE_ERROR_VALUE, name, EXPECTED, object);
        goto done;
    }
    import_capsule(name, capsule, tensor, hold, err);
    if (door == DOOR_JAX)
        tensor->readonly = true; /* JAX arrays are immutable, and the old capsule cannot say so */
done:
    Py_XDECREF(capsule);
    Py_XDECREF(method);
    Py_XDECREF(detached);
    return err->status;
}

/* Everything but the fast way of tensor_import. */
static int import_into(tensor_context *ctx, PyObject *object, const char *name, bool owned,
                       moe_tensor *tensor, tensor_hold *hold, moe_error *err)
{
    static const char EXPECTED[] = "a dense tensor with memory";
    memset(hold, 0, sizeof *hold);
    const tensor_type *found = tensor_find_type(ctx, object, err);
    if (found == NULL) return err->status;
    const tensor_type type = *found;
    switch (type.door) {
    case DOOR_TABLE: {
        DLTensor borrowed;
        DLManagedTensorVersioned *managed = NULL;
        if (!owned && type.api->dltensor_from_py_object_no_sync) {
            if (type.api->dltensor_from_py_object_no_sync(object, &borrowed))
                return tensor_fail_with_exception(err, MOE_ERROR_VALUE, name, EXPECTED, object);
            return tensor_from_dltensor(name, &borrowed, 0, tensor, err);
        }
        if (type.api->managed_tensor_from_py_object_no_sync(object, &managed))
            return tensor_fail_with_exception(err, MOE_ERROR_VALUE, name, EXPECTED, object);
        import_managed(name, managed, tensor, hold, err);
        break;
    }
    case DOOR_NUMPY:
        if (numpy_import(ctx, object, name, tensor, err)) return err->status;
        if (owned) hold->object = Py_NewRef(object);
        break;
    case DOOR_VIEW:
        if (device_view_import(object, name, tensor, err)) return err->status;
        if (owned) hold->object = Py_NewRef(object);
        break;
    case DOOR_DLPACK:
    case DOOR_TORCH:
    case DOOR_JAX:
        import_dlpack(ctx, type.door, object, name, tensor, hold, err);
        break;
    default:
        return refuse(type.door, object, name, err);
    }
    if (err->status) tensor_release(hold);
    return err->status;
}

int tensor_import(tensor_context *ctx, PyObject *object, const char *name, moe_tensor *tensor,
                  tensor_holds *holds, moe_error *err)
{
    tensor_hold hold;
    const tensor_type *last = ctx->last;
    DLTensor borrowed;
    if (last && last->type == (PyObject *)Py_TYPE(object) && last->api &&
        last->api->dltensor_from_py_object_no_sync &&
        last->api->dltensor_from_py_object_no_sync(object, &borrowed) == 0)
        return tensor_from_dltensor(name, &borrowed, 0, tensor, err);
    PyErr_Clear(); /* import_into meets the same failure and tells it */
    if (import_into(ctx, object, name, false, tensor, &hold, err)) return err->status;
    if (hold.versioned || hold.legacy || hold.object) {
        if (holds->count == TENSOR_HOLDS) {
            tensor_release(&hold);
            return moe_fail(err, MOE_ERROR_RUNTIME, "%s: too many tensors in one call", name);
        }
        holds->items[holds->count++] = hold;
    }
    return MOE_OK;
}

int tensor_import_owned(tensor_context *ctx, PyObject *object, const char *name, moe_tensor *tensor,
                        tensor_hold *hold, moe_error *err)
{
    return import_into(ctx, object, name, true, tensor, hold, err);
}

void tensor_release(tensor_hold *hold)
{
    const tensor_hold old = *hold;
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    memset(hold, 0, sizeof *hold);
    if (!(old.versioned || old.legacy || old.object)) return;
    PyErr_Fetch(&type, &value, &trace); /* a deleter may run Python code */
    if (old.versioned && old.versioned->deleter) old.versioned->deleter(old.versioned);
    if (old.legacy && old.legacy->deleter) old.legacy->deleter(old.legacy);
    Py_XDECREF(old.object);
    PyErr_Restore(type, value, trace);
}

void tensor_release_all(tensor_holds *holds)
{
    while (holds->count > 0)
        tensor_release(&holds->items[--holds->count]);
}

/* ---- out ------------------------------------------------------------------------------------- */

static PyObject *shape_tuple(int32_t ndim, const int64_t *shape)
{
    PyObject *tuple = PyTuple_New(ndim);
    for (int i = 0; tuple && i < ndim; ++i) {
        PyObject *extent = PyLong_FromLongLong(shape[i]);
        if (extent == NULL || PyTuple_SetItem(tuple, i, extent)) Py_CLEAR(tuple);
    }
    return tuple;
}

static int fail_to_allocate_beside(PyObject *prototype, const char *name, moe_error *err)
{
    char beside[128];
    return moe_fail(err, MOE_ERROR_TYPE,
                    "%s: expected a tensor, got None, and nothing can be allocated beside %s", name,
                    tensor_type_text(prototype, beside, sizeof beside));
}

/* For the allocator's error callback. */
typedef struct table_failure {
    moe_error *err;
    bool no_allocator; /* the table has one that only says so (cuda.core) */
} table_failure;

static void set_table_error(void *context, const char *kind, const char *message)
{
    table_failure *failure = context;
    char why[400];
    if (kind && strcmp(kind, "NotImplementedError") == 0) {
        failure->no_allocator = true;
        return;
    }
    snprintf(why, sizeof why, "%s", message ? message : "no reason given");
    char *line = strchr(why, '\n');
    if (line) *line = 0;
    moe_fail(failure->err, MOE_ERROR_MEMORY, "allocation by the tensor's framework failed: %s",
             why);
}

static int allocate_by_table(const DLPackExchangeAPI *api, PyObject *prototype,
                             const moe_tensor *beside, const char *name, int32_t dtype,
                             int32_t ndim, const int64_t *shape, moe_tensor *tensor,
                             tensor_hold *hold, PyObject **result, moe_error *err)
{
    int64_t extents[MOE_MAX_DIMS];
    for (int i = 0; i < ndim; ++i)
        extents[i] = shape[i];
    DLTensor wanted = {NULL,    {beside->backend == MOE_CPU ? kDLCPU : kDLCUDA, beside->device},
                       ndim,    tensor_dlpack_dtype(dtype),
                       extents, NULL,
                       0};
    DLManagedTensorVersioned *managed = NULL;
    table_failure failure = {err, false};
    if (api->managed_tensor_allocator(&wanted, &managed, &failure, set_table_error) ||
        managed == NULL) {
        PyErr_Clear();
        if (failure.no_allocator) return fail_to_allocate_beside(prototype, name, err);
        return moe_fail(err, MOE_ERROR_MEMORY, "%s: allocation by the tensor's framework failed",
                        name);
    }
    if (import_managed(name, managed, tensor, hold, err)) return err->status;
    if (result == NULL) return MOE_OK;
    void *object = NULL;
    hold->versioned = NULL; /* stolen, also where the conversion fails */
    if (api->managed_tensor_to_py_object_no_sync(managed, &object))
        return tensor_fail_with_exception(err, MOE_ERROR_RUNTIME, name,
                                          "a tensor from the framework's importer", Py_None);
    *result = object;
    return MOE_OK;
}

/* The framework's Python side (fusedmoe.frameworks.allocate). */
static int allocate_by_python(tensor_context *ctx, PyObject *prototype, const char *name,
                              int32_t dtype, int32_t ndim, const int64_t *shape, moe_tensor *tensor,
                              tensor_hold *hold, PyObject **result, PyObject **wrap, moe_error *err)
{
    static const char EXPECTED[] = "a framework that allocates a result beside it";
    PyObject *extents = NULL, *dtype_name = NULL, *pair = NULL;
    if (ctx->allocate == NULL) {
        PyObject *frameworks = PyImport_ImportModule("fusedmoe.frameworks");
        ctx->allocate = frameworks ? PyObject_GetAttrString(frameworks, "allocate") : NULL;
        Py_XDECREF(frameworks);
    }
    if (ctx->allocate) extents = shape_tuple(ndim, shape);
    if (extents) dtype_name = PyUnicode_FromString(moe_dtype_name(dtype));
    if (dtype_name)
        pair = PyObject_CallFunctionObjArgs(ctx->allocate, prototype, extents, dtype_name, NULL);
    if (pair == NULL) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) { /* no framework is known for this type */
            PyErr_Clear();
            fail_to_allocate_beside(prototype, name, err);
        } else {
            tensor_fail_with_exception(err, MOE_ERROR_RUNTIME, name, EXPECTED, prototype);
        }
        goto done;
    }
    if (!PyTuple_Check(pair) || PyTuple_Size(pair) != 2) {
        moe_fail(err, MOE_ERROR_TYPE,
                 "%s: expected (buffer, wrap) from fusedmoe.frameworks.allocate", name);
        goto done;
    }
    PyObject *buffer = PyTuple_GetItem(pair, 0), *wrapper = PyTuple_GetItem(pair, 1);
    if (tensor_import_owned(ctx, buffer, name, tensor, hold, err)) goto done;
    if (result) {
        *result = Py_NewRef(buffer);
        *wrap = wrapper == Py_None ? NULL : Py_NewRef(wrapper);
    }
done:
    Py_XDECREF(pair);
    Py_XDECREF(dtype_name);
    Py_XDECREF(extents);
    return err->status;
}

/* torch's own allocation: a tensor made by the table's importer is not known to the caching
 * allocator, so that Tensor.record_stream on the result would silently do nothing. */
static int allocate_by_torch(tensor_context *ctx, PyObject *prototype, const char *name,
                             int32_t ndim, const int64_t *shape, moe_tensor *tensor,
                             tensor_hold *hold, PyObject **result, moe_error *err)
{
    PyObject *extents = shape_tuple(ndim, shape);
    PyObject *made =
        extents ? PyObject_CallMethodObjArgs(prototype, ctx->names.new_empty, extents, NULL) : NULL;
    Py_XDECREF(extents);
    if (made == NULL)
        return tensor_fail_with_exception(err, MOE_ERROR_RUNTIME, name,
                                          "room for a result beside it", prototype);
    if (import_into(ctx, made, name, false, tensor, hold, err))
        Py_DECREF(made);
    else
        *result = made;
    return err->status;
}

/* What was allocated is written without further checks: an allocator is not taken at its word. */
static bool is_compact(const moe_tensor *tensor, int32_t ndim, const int64_t *shape)
{
    int64_t stride = 1;
    if (tensor->ndim != ndim) return false;
    for (int i = ndim - 1; i >= 0; --i) {
        if (tensor->shape[i] != shape[i]) return false;
        if (shape[i] > 1 && tensor->span_bytes > 0 && tensor->stride[i] != stride) return false;
        stride *= shape[i];
    }
    return true;
}

int tensor_allocate(tensor_context *ctx, PyObject *prototype, const moe_tensor *beside,
                    const char *name, int32_t dtype, int32_t ndim, const int64_t *shape,
                    moe_tensor *tensor, tensor_hold *hold, PyObject **result, PyObject **wrap,
                    moe_error *err)
{
    memset(hold, 0, sizeof *hold);
    const tensor_type *found = tensor_find_type(ctx, prototype, err);
    if (found == NULL) return err->status;
    const tensor_type type = *found;
    switch (type.door) {
    case DOOR_TABLE:
        if (type.torch && result && dtype == beside->dtype)
            allocate_by_torch(ctx, prototype, name, ndim, shape, tensor, hold, result, err);
        else if (type.torch && result)
            allocate_by_python(ctx, prototype, name, dtype, ndim, shape, tensor, hold, result, wrap,
                               err);
        else
            allocate_by_table(type.api, prototype, beside, name, dtype, ndim, shape, tensor, hold,
                              result, err);
        break;
    case DOOR_NUMPY: {
        PyObject *array = NULL;
        if (numpy_allocate(ctx, prototype, name, dtype, ndim, shape, tensor, &array, err)) break;
        if (result)
            *result = array;
        else
            hold->object = array;
        break;
    }
    case DOOR_VIEW:
        return moe_fail(
            err, MOE_ERROR_TYPE,
            "%s: expected a tensor, got None; a device view has no framework to allocate one",
            name);
    default:
        allocate_by_python(ctx, prototype, name, dtype, ndim, shape, tensor, hold, result, wrap,
                           err);
        break;
    }
    if (err->status) {
        tensor_release(hold);
        return err->status;
    }
    if (moe_dtype_bytes(tensor->dtype) != moe_dtype_bytes(dtype) ||
        tensor->backend != beside->backend || tensor->device != beside->device ||
        tensor->readonly || !is_compact(tensor, ndim, shape)) {
        tensor_release(hold);
        if (result) Py_CLEAR(*result);
        if (wrap) Py_CLEAR(*wrap);
        return moe_fail(err, MOE_ERROR_RUNTIME,
                        "%s: expected the framework to allocate a writable, compact %s tensor of "
                        "the shape it was asked for, on the same device",
                        name, moe_dtype_name(dtype));
    }
    tensor->dtype = dtype; /* 16-bit integers that hold bf16 get 16-bit integers back */
    return MOE_OK;
}

/* ---- state ----------------------------------------------------------------------------------- */

int tensor_context_init(tensor_context *ctx, moe_error *err)
{
    const struct {
        PyObject **where;
        const char *text;
    } names[] = {{&ctx->names.dlpack, "__dlpack__"},
                 {&ctx->names.dlpack_device, "__dlpack_device__"},
                 {&ctx->names.exchange_api, "__dlpack_c_exchange_api__"},
                 {&ctx->names.torch_dispatch, "__torch_dispatch__"},
                 {&ctx->names.mro, "__mro__"},
                 {&ctx->names.detach, "detach"},
                 {&ctx->names.new_empty, "new_empty"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; ++i)
        if ((*names[i].where = PyUnicode_InternFromString(names[i].text)) == NULL) goto failed;
    if ((ctx->no_arguments = PyTuple_New(0)) == NULL) goto failed;
    const int major = DLPACK_MAJOR_VERSION, minor = DLPACK_MINOR_VERSION;
    if ((ctx->keywords_cpu = Py_BuildValue("{s(ii)}", "max_version", major, minor)) == NULL)
        goto failed;
    if ((ctx->keywords_cuda =
             Py_BuildValue("{s(ii)si}", "max_version", major, minor, "stream", -1)) == NULL)
        goto failed;
    if ((ctx->keywords_old_cuda = Py_BuildValue("{si}", "stream", -1)) == NULL) goto failed;
    return MOE_OK;
failed:
    err->status = MOE_ERROR_PYTHON;
    return MOE_ERROR_PYTHON;
}

int tensor_context_traverse(tensor_context *ctx, visitproc visit, void *arg)
{
    for (int i = 0; i < TENSOR_TYPES; ++i)
        Py_VISIT(ctx->types[i].type);
    Py_VISIT(ctx->view_type);
    Py_VISIT(ctx->keywords_cpu);
    Py_VISIT(ctx->keywords_cuda);
    Py_VISIT(ctx->keywords_old_cuda);
    Py_VISIT(ctx->allocate);
    return 0;
}

void tensor_context_clear(tensor_context *ctx)
{
    forget_types(ctx);
    Py_CLEAR(ctx->view_type);
    Py_CLEAR(ctx->no_arguments);
    Py_CLEAR(ctx->keywords_cpu);
    Py_CLEAR(ctx->keywords_cuda);
    Py_CLEAR(ctx->keywords_old_cuda);
    Py_CLEAR(ctx->allocate);
    Py_CLEAR(ctx->names.dlpack);
    Py_CLEAR(ctx->names.dlpack_device);
    Py_CLEAR(ctx->names.exchange_api);
    Py_CLEAR(ctx->names.torch_dispatch);
    Py_CLEAR(ctx->names.mro);
    Py_CLEAR(ctx->names.detach);
    Py_CLEAR(ctx->names.new_empty);
}
