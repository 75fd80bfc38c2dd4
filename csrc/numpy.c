/* numpy.c: ndarrays through NumPy's C API, which is loaded when the first ndarray appears and
 * not before.
 *
 * Why not __dlpack__: NumPy before 2.5 refuses to export bfloat16 and the other types of
 * ml_dtypes, and an ndarray's __dlpack__ refuses read-only arrays before 2.1. Built against
 * NumPy 2 headers, runs with 1.23 and newer.
 *
 * This is the only file that sees NumPy's headers: their function table PyArray_API is a static
 * of the file that includes them, the one global of the extension, written once. */
#include "tensor.h"

#include <stdio.h>
#include <string.h>

#define NPY_NO_DEPRECATED_API NPY_1_23_API_VERSION
#define NPY_TARGET_VERSION    NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>

/* sys.modules[module].attribute as a type, borrowed from its module; NULL where it is not
 * loaded. */
static PyTypeObject *loaded_type(const char *module_name, const char *attribute)
{
    PyObject *modules = PyImport_GetModuleDict();
    PyObject *module = modules ? PyDict_GetItemString(modules, module_name) : NULL;
    PyObject *type = module && module != Py_None ? PyObject_GetAttrString(module, attribute) : NULL;
    PyErr_Clear();
    if (type && !PyType_Check(type)) Py_CLEAR(type);
    Py_XDECREF(type); /* its module keeps it */
    return (PyTypeObject *)type;
}

int numpy_is_ndarray_type(tensor_context *ctx, PyObject *type, tensor_door *door, moe_error *err)
{
    PyTypeObject *ndarray = loaded_type("numpy", "ndarray");
    if (ndarray == NULL || !PyType_IsSubtype((PyTypeObject *)type, ndarray)) return 0;
    if (!ctx->numpy_loaded) {
        if (PyArray_ImportNumPyAPI() < 0) {
            tensor_fail_with_exception(err, MOE_ERROR_RUNTIME, "numpy", "NumPy 1.23 or newer",
                                       Py_None);
            return -1;
        }
        ctx->numpy_loaded = true;
    }
    PyTypeObject *masked = loaded_type("numpy.ma", "MaskedArray");
    *door = masked && PyType_IsSubtype((PyTypeObject *)type, masked) ? DOOR_MASKED : DOOR_NUMPY;
    return 1;
}

/* ml_dtypes registers its types at run time; their numbers differ from process to process, their
 * names do not. */
static int32_t registered_dtype(tensor_context *ctx, PyArray_Descr *descr)
{
    static const int32_t KNOWN[] = {MOE_BF16, MOE_F8E4M3, MOE_F8E5M2, MOE_F8E8M0, MOE_F4E2M1};
    for (int i = 0; i < ctx->num_numpy_types; ++i)
        if (ctx->numpy_types[i].number == descr->type_num) return ctx->numpy_types[i].dtype;
    int32_t dtype = MOE_DTYPE_NONE;
    PyObject *name = PyObject_GetAttrString((PyObject *)descr->typeobj, "__name__");
    if (name && PyUnicode_Check(name))
        for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; ++i)
            if (PyUnicode_CompareWithASCIIString(name, moe_dtype_name(KNOWN[i])) == 0)
                dtype = KNOWN[i];
    Py_XDECREF(name);
    PyErr_Clear();
    if (dtype != MOE_DTYPE_NONE && moe_dtype_bytes(dtype) != (int64_t)PyDataType_ELSIZE(descr))
        dtype = MOE_DTYPE_NONE;
    if (dtype != MOE_DTYPE_NONE && ctx->num_numpy_types < NUMPY_TYPES) {
        ctx->numpy_types[ctx->num_numpy_types].number = descr->type_num;
        ctx->numpy_types[ctx->num_numpy_types++].dtype = dtype;
    }
    return dtype;
}

static int32_t array_dtype(tensor_context *ctx, PyArray_Descr *descr)
{
    switch (descr->type_num) {
    case NPY_BOOL:
        return MOE_BOOL;
    case NPY_BYTE:
        return MOE_I8;
    case NPY_UBYTE:
        return MOE_U8;
    case NPY_SHORT:
        return MOE_I16;
    case NPY_USHORT:
        return MOE_U16;
    case NPY_INT:
        return MOE_I32;
    case NPY_UINT:
        return MOE_U32;
    case NPY_LONG:
        return sizeof(long) == 8 ? MOE_I64 : MOE_I32;
    case NPY_ULONG:
        return sizeof(long) == 8 ? MOE_U64 : MOE_U32;
    case NPY_LONGLONG:
        return MOE_I64;
    case NPY_ULONGLONG:
        return MOE_U64;
    case NPY_HALF:
        return MOE_F16;
    case NPY_FLOAT:
        return MOE_F32;
    case NPY_DOUBLE:
        return MOE_F64;
    default:
        return descr->type_num >= NPY_USERDEF ? registered_dtype(ctx, descr) : MOE_DTYPE_NONE;
    }
}

static int fail_dtype(PyArray_Descr *descr, const char *name, const char *expected, moe_error *err)
{
    char got[64] = "an unknown one";
    PyObject *text = PyObject_Str((PyObject *)descr);
    const char *utf8 = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
    if (utf8) snprintf(got, sizeof got, "%s", utf8);
    Py_XDECREF(text);
    PyErr_Clear();
    return moe_fail(err, MOE_ERROR_TYPE, "%s: expected %s, got NumPy dtype %s", name, expected,
                    got);
}

int numpy_import(tensor_context *ctx, PyObject *object, const char *name, moe_tensor *tensor,
                 moe_error *err)
{
    PyArrayObject *array = (PyArrayObject *)object;
    PyArray_Descr *descr = PyArray_DESCR(array);
    int32_t dtype = array_dtype(ctx, descr);
    if (dtype == MOE_DTYPE_NONE)
        return fail_dtype(descr, name, "a dtype that this library knows", err);
    if (descr->byteorder == NPY_OPPBYTE) return fail_dtype(descr, name, "native byte order", err);

    const int ndim = PyArray_NDIM(array);
    const npy_intp bytes = PyArray_ITEMSIZE(array);
    int64_t shape[MOE_MAX_DIMS], strides[MOE_MAX_DIMS];
    for (int i = 0; i < ndim && i < MOE_MAX_DIMS; ++i) {
        npy_intp stride = PyArray_STRIDE(array, i);
        shape[i] = PyArray_DIM(array, i);
        strides[i] = stride / bytes;
        if (stride % bytes && shape[i] > 1)
            return moe_fail(err, MOE_ERROR_VALUE,
                            "%s: expected strides of whole elements, got %ld bytes in dimension %d "
                            "with elements of %ld bytes",
                            name, (long)stride, i, (long)bytes);
    }
    if (tensor_describe(name, PyArray_DATA(array), dtype, ndim, shape, strides, tensor, err))
        return err->status;
    tensor->readonly = !PyArray_ISWRITEABLE(array);
    return MOE_OK;
}

/* The dtype of a result: that of the prototype where it is the same, or holds such numbers as
 * integers. */
static PyArray_Descr *result_descr(tensor_context *ctx, PyObject *prototype, int32_t dtype)
{
    PyArray_Descr *beside = PyArray_DESCR((PyArrayObject *)prototype);
    int32_t like = array_dtype(ctx, beside);
    bool floats = dtype == MOE_BF16 || dtype == MOE_F16 || dtype == MOE_F32;
    bool integers = like == MOE_I16 || like == MOE_U16 || like == MOE_I32 || like == MOE_U32;
    if (like == dtype || (floats && integers && moe_dtype_bytes(like) == moe_dtype_bytes(dtype))) {
        Py_INCREF(beside);
        return beside;
    }
    switch (dtype) {
    case MOE_F32:
        return PyArray_DescrFromType(NPY_FLOAT);
    case MOE_F16:
        return PyArray_DescrFromType(NPY_HALF);
    case MOE_I32:
        return PyArray_DescrFromType(NPY_INT32);
    case MOE_I64:
        return PyArray_DescrFromType(NPY_INT64);
    case MOE_U8:
        return PyArray_DescrFromType(NPY_UBYTE);
    default:
        return NULL;
    }
}

int numpy_allocate(tensor_context *ctx, PyObject *prototype, const char *name, int32_t dtype,
                   int32_t ndim, const int64_t *shape, moe_tensor *tensor, PyObject **result,
                   moe_error *err)
{
    npy_intp extents[MOE_MAX_DIMS];
    for (int i = 0; i < ndim; ++i)
        extents[i] = (npy_intp)shape[i];
    PyArray_Descr *descr = result_descr(ctx, prototype, dtype);
    if (descr == NULL)
        return moe_fail(err, MOE_ERROR_TYPE,
                        "%s: expected a dtype that NumPy can allocate here, got %s", name,
                        moe_dtype_name(dtype));
    PyObject *array =
        PyArray_NewFromDescr(&PyArray_Type, descr, ndim, extents, NULL, NULL, 0, NULL);
    if (array == NULL)
        return tensor_fail_with_exception(err, MOE_ERROR_MEMORY, name, "room for an array",
                                          Py_None);
    if (numpy_import(ctx, array, name, tensor, err)) {
        Py_DECREF(array);
        return err->status;
    }
    *result = array;
    return MOE_OK;
}
