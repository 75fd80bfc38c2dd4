/* tensor.h: Python tensors in and out. All of it needs the GIL.
 *
 * A tensor comes in by the door of its exact type, found once per type and cached:
 *   table    the DLPack C exchange table: a borrowed view, no reference count, no allocation
 *   numpy    the NumPy C API (numpy.c)
 *   view     our own _DeviceView
 *   dlpack   __dlpack__: an owned view, released at the end of the call
 * and is described by a moe_tensor (moe.h). What a call has to give back lies in its
 * tensor_holds. */
#ifndef MOE_TENSOR_H
#define MOE_TENSOR_H

#include <Python.h>

#include "dlpack.h"
#include "moe.h"

typedef enum tensor_door {
    DOOR_NONE = 0, /* an empty entry of the cache */
    DOOR_TABLE,
    DOOR_NUMPY,
    DOOR_VIEW,
    DOOR_DLPACK,
    DOOR_TORCH,             /* torch without the table: __dlpack__ of the detached tensor */
    DOOR_JAX,               /* __dlpack__; immutable, CPU only */
    DOOR_NOT_A_TENSOR,      /* the rest are refused */
    DOOR_MASKED,            /* numpy.ma: the mask would be ignored */
    DOOR_DISPATCH_SUBCLASS, /* FakeTensor, FunctionalTensor, DTensor: no memory of their own */
    DOOR_TRACER             /* jax.jit and friends */
} tensor_door;

typedef struct tensor_type {
    PyObject *type;               /* strong: an address must not be reused by another type */
    const DLPackExchangeAPI *api; /* of DOOR_TABLE */
    tensor_door door;
    bool torch;
} tensor_type;

enum { TENSOR_TYPES = 64, TENSOR_HOLDS = 24, NUMPY_TYPES = 8 };

typedef struct tensor_names {
    PyObject *dlpack, *dlpack_device, *exchange_api, *torch_dispatch, *mro, *detach, *new_empty;
} tensor_names;

/* Caches and constants of module state. */
typedef struct tensor_context {
    tensor_type
        types[TENSOR_TYPES]; /* open addressing by the type's address; never more than half full */
    int num_types;
    const tensor_type *last; /* the entry that answered last: most tensors of a call share a type */
    PyObject *view_type;     /* _DeviceView */
    tensor_names names;      /* interned */
    PyObject *no_arguments;  /* () */
    PyObject *keywords_cpu;  /* {"max_version": (1, 3)} */
    PyObject *keywords_cuda; /* {"max_version": (1, 3), "stream": -1} */
    PyObject *keywords_old_cuda; /* {"stream": -1} */
    PyObject *allocate;          /* fusedmoe.frameworks.allocate, imported at first use */
    /* numpy.c */
    bool numpy_loaded;
    int num_numpy_types;
    struct {
        int number; /* of a dtype registered at run time (ml_dtypes) */
        int32_t dtype;
    } numpy_types[NUMPY_TYPES];
} tensor_context;

/* One owned thing. Zeroed: nothing. */
typedef struct tensor_hold {
    DLManagedTensorVersioned *versioned;
    DLManagedTensor *legacy;
    PyObject *object;
} tensor_hold;

typedef struct tensor_holds {
    int count;
    tensor_hold items[TENSOR_HOLDS]; /* only the first count are set */
} tensor_holds;

int tensor_context_init(tensor_context *ctx, moe_error *err);
int tensor_context_traverse(tensor_context *ctx, visitproc visit, void *arg);
void tensor_context_clear(tensor_context *ctx);

/* The cached verdict on type(object), NULL with err set only where Python failed. Valid until
 * the next call of this function or of Python code, whichever comes first: copy what is needed. */
const tensor_type *tensor_find_type(tensor_context *ctx, PyObject *object, moe_error *err);

/* object as a tensor, for the duration of the call; name is the argument in messages. */
int tensor_import(tensor_context *ctx, PyObject *object, const char *name, moe_tensor *tensor,
                  tensor_holds *holds, moe_error *err);
/* The same, owned by hold until tensor_release. */
int tensor_import_owned(tensor_context *ctx, PyObject *object, const char *name, moe_tensor *tensor,
                        tensor_hold *hold, moe_error *err);
void tensor_release(tensor_hold *hold); /* safe on {0}; keeps a pending exception */
void tensor_release_all(tensor_holds *holds);

static inline void tensor_absent(moe_tensor *tensor)
{
    tensor->data = NULL;
    tensor->ndim = -1;
}

/* A new compact tensor beside prototype (imported as `beside`), by prototype's framework. Where
 * result is NULL only memory is wanted: hold owns it. Else *result is what the user gets once
 * *wrap (if any) was called with it. */
int tensor_allocate(tensor_context *ctx, PyObject *prototype, const moe_tensor *beside,
                    const char *name, int32_t dtype, int32_t ndim, const int64_t *shape,
                    moe_tensor *tensor, tensor_hold *hold, PyObject **result, PyObject **wrap,
                    moe_error *err);

int tensor_from_dltensor(const char *name, const DLTensor *dl, uint64_t flags, moe_tensor *tensor,
                         moe_error *err);
DLDataType tensor_dlpack_dtype(int32_t dtype);
/* MOE_DTYPE_NONE where the name is no dtype. */
int32_t tensor_dtype_by_name(PyObject *name);

/* numpy.c. 1 and the door where type is an ndarray (and then NumPy's C API is loaded), 0 where
 * it is not, -1 with err set. Imports nothing where NumPy is not imported already. */
int numpy_is_ndarray_type(tensor_context *ctx, PyObject *type, tensor_door *door, moe_error *err);
int numpy_import(tensor_context *ctx, PyObject *array, const char *name, moe_tensor *tensor,
                 moe_error *err);
int numpy_allocate(tensor_context *ctx, PyObject *prototype, const char *name, int32_t dtype,
                   int32_t ndim, const int64_t *shape, moe_tensor *tensor, PyObject **result,
                   moe_error *err);

/* device_buffer.c */
int device_view_import(PyObject *view, const char *name, moe_tensor *tensor, moe_error *err);

/* The pending Python exception as the error of an argument: "<name>: expected <expected>, got
 * <type>: <text>". MemoryError and whatever is no Exception (KeyboardInterrupt) stay as they
 * are. */
int tensor_fail_with_exception(moe_error *err, moe_status status, const char *name,
                               const char *expected, PyObject *object);
/* Name of type(object) for messages, "torch.Tensor"; text is returned. */
const char *tensor_type_text(PyObject *object, char *text, size_t size);

#endif
