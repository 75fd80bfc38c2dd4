/* dlpack.h: the DLPack ABI, as far as this extension speaks it: the tensor structs of versions
 * 0.8 and 1.x and the C exchange table of 1.3. A frozen ABI, written down here so that a build
 * needs no other package; tests/test_dlpack_abi.py compares sizes and offsets with an upstream
 * header where one is installed.
 *
 * Lifetimes. A managed tensor is owned: its deleter is called exactly once. A plain DLTensor
 * filled by the exchange table is borrowed: shape, strides and data belong to the producer and
 * are valid until control returns to Python. */
#ifndef MOE_DLPACK_H
#define MOE_DLPACK_H

#include <stddef.h>
#include <stdint.h>

#define DLPACK_MAJOR_VERSION 1
#define DLPACK_MINOR_VERSION 3

/* DLDevice.device_type */
enum {
    kDLCPU = 1,
    kDLCUDA = 2,
    kDLCUDAHost = 3, /* pinned: CPU memory to us */
    kDLCUDAManaged = 13
};

/* DLDataType.code */
enum {
    kDLInt = 0,
    kDLUInt = 1,
    kDLFloat = 2,
    kDLBfloat = 4,
    kDLComplex = 5,
    kDLBool = 6,
    kDLFloat8_e3m4 = 7,
    kDLFloat8_e4m3 = 8,
    kDLFloat8_e4m3b11fnuz = 9,
    kDLFloat8_e4m3fn = 10,
    kDLFloat8_e4m3fnuz = 11,
    kDLFloat8_e5m2 = 12,
    kDLFloat8_e5m2fnuz = 13,
    kDLFloat8_e8m0fnu = 14,
    kDLFloat6_e2m3fn = 15,
    kDLFloat6_e3m2fn = 16,
    kDLFloat4_e2m1fn = 17
};

/* DLManagedTensorVersioned.flags */
#define DLPACK_FLAG_BITMASK_READ_ONLY              ((uint64_t)1 << 0)
#define DLPACK_FLAG_BITMASK_IS_COPIED              ((uint64_t)1 << 1)
#define DLPACK_FLAG_BITMASK_IS_SUBBYTE_TYPE_PADDED ((uint64_t)1 << 2)

typedef struct DLPackVersion {
    uint32_t major, minor;
} DLPackVersion;

typedef struct DLDevice {
    int32_t device_type; /* an enum of int size upstream */
    int32_t device_id;
} DLDevice;

typedef struct DLDataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} DLDataType;

typedef struct DLTensor {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides; /* elements; NULL before 1.2: compact */
    uint64_t byte_offset;
} DLTensor;

/* capsule "dltensor", after it was taken "used_dltensor" */
typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;

/* capsule "dltensor_versioned", after it was taken "used_dltensor_versioned". With another major
 * version only version and deleter may be touched. */
typedef struct DLManagedTensorVersioned {
    DLPackVersion version;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensorVersioned *self);
    uint64_t flags;
    DLTensor dl_tensor;
} DLManagedTensorVersioned;

/* The exchange table: capsule "dlpack_exchange_api" in the attribute __dlpack_c_exchange_api__
 * of a tensor type. It lives as long as the process. No function synchronises; int results are 0
 * or -1. */
typedef struct DLPackExchangeAPIHeader {
    DLPackVersion version;
    struct DLPackExchangeAPIHeader *prev_api; /* an older table, or NULL */
} DLPackExchangeAPIHeader;

typedef struct DLPackExchangeAPI {
    DLPackExchangeAPIHeader header;
    /* A new tensor with the prototype's dtype, shape and device. set_error is called where it
     * fails. */
    int (*managed_tensor_allocator)(DLTensor *prototype, DLManagedTensorVersioned **out,
                                    void *error_ctx,
                                    void (*set_error)(void *error_ctx, const char *kind,
                                                      const char *message));
    int (*managed_tensor_from_py_object_no_sync)(void *py_object, DLManagedTensorVersioned **out);
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *tensor,
                                               void **out_py_object); /* steals */
    int (*dltensor_from_py_object_no_sync)(void *py_object,
                                           DLTensor *out); /* borrowed; may be NULL */
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out_stream);
} DLPackExchangeAPI;

/* What "frozen ABI" means on the 64-bit platforms that this builds for. */
_Static_assert(sizeof(void *) == 8, "written for 64-bit pointers");
_Static_assert(sizeof(DLTensor) == 48 && offsetof(DLTensor, shape) == 24 &&
                   offsetof(DLTensor, byte_offset) == 40,
               "DLTensor has the layout of DLPack");
_Static_assert(sizeof(DLManagedTensor) == 64 && offsetof(DLManagedTensor, deleter) == 56,
               "DLManagedTensor has the layout of DLPack");
_Static_assert(sizeof(DLManagedTensorVersioned) == 80 &&
                   offsetof(DLManagedTensorVersioned, flags) == 24 &&
                   offsetof(DLManagedTensorVersioned, dl_tensor) == 32,
               "DLManagedTensorVersioned has the layout of DLPack");
_Static_assert(sizeof(DLPackExchangeAPI) == 56, "DLPackExchangeAPI has the layout of DLPack");

#endif
