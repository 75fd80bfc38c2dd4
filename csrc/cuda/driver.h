/* driver.h: inside csrc/cuda only. The driver's functions, devices and loaded kernels. */
#ifndef MOE_CUDA_DRIVER_H
#define MOE_CUDA_DRIVER_H

#include <cuda.h>

#include "cuda.h" /* ours */

enum { MOE_MAX_DEVICES = 64, MOE_MAX_KERNELS = 256, MOE_MAX_MAPS = 5 };

/* Every driver function we call: name, CUDA version whose signature we were compiled against. Resolved by
 * cuGetProcAddress, so that a driver without one is an error with a sentence and not a failed import. */
#define MOE_DRIVER_FUNCTIONS(F)                                                                    \
    F(cuInit, 2000)                                                                                \
    F(cuDriverGetVersion, 2020)                                                                    \
    F(cuGetErrorName, 6000)                                                                        \
    F(cuGetErrorString, 6000)                                                                      \
    F(cuDeviceGetCount, 2000)                                                                      \
    F(cuDeviceGet, 2000)                                                                           \
    F(cuDeviceGetName, 2000)                                                                       \
    F(cuDeviceGetAttribute, 2000)                                                                  \
    F(cuDevicePrimaryCtxRetain, 7000)                                                              \
    F(cuCtxGetCurrent, 4000)                                                                       \
    F(cuCtxPushCurrent, 4000)                                                                      \
    F(cuCtxPopCurrent, 4000)                                                                       \
    F(cuCtxGetDevice, 2000)                                                                        \
    F(cuCtxSynchronize, 2000)                                                                      \
    F(cuLibraryLoadData, 12000)                                                                    \
    F(cuLibraryGetKernel, 12000)                                                                   \
    F(cuKernelGetFunction, 12000)                                                                  \
    F(cuKernelGetAttribute, 12000)                                                                 \
    F(cuKernelGetParamInfo, 12040)                                                                 \
    F(cuKernelSetAttribute, 12000)                                                                 \
    F(cuLaunchKernelEx, 11060)                                                                     \
    F(cuStreamSynchronize, 2000)                                                                   \
    F(cuStreamIsCapturing, 10000)                                                                  \
    F(cuStreamGetCtx, 9020)                                                                        \
    F(cuThreadExchangeStreamCaptureMode, 10010)                                                    \
    F(cuTensorMapEncodeTiled, 12000)                                                               \
    F(cuMemAlloc, 3020)                                                                            \
    F(cuMemFree, 3020)                                                                             \
    F(cuMemcpyHtoD, 3020)                                                                          \
    F(cuMemcpyDtoH, 3020)                                                                          \
    F(cuStreamCreate, 2000)                                                                        \
    F(cuStreamBeginCapture, 10010)                                                                 \
    F(cuStreamEndCapture, 10000)                                                                   \
    F(cuGraphInstantiateWithFlags, 11040)                                                          \
    F(cuGraphLaunch, 10000)                                                                        \
    F(cuGraphDestroy, 10000)                                                                       \
    F(cuGraphExecDestroy, 10000)                                                                   \
    F(cuEventCreate, 2000)                                                                         \
    F(cuEventDestroy, 4000)                                                                        \
    F(cuEventRecord, 2000)                                                                         \
    F(cuEventSynchronize, 2000)                                                                    \
    F(cuEventElapsedTime, 2000)

typedef struct moe_driver {
#define MOE_DECLARE(name, version) __typeof__(&name) name;
    MOE_DRIVER_FUNCTIONS(MOE_DECLARE)
#undef MOE_DECLARE
} moe_driver;

/* One CUDA device of this process: its primary context (the one frameworks use) and our kernels in it. */
typedef struct moe_device {
    CUdevice handle;
    CUcontext context; /* NULL until the device is opened */
    moe_device_info info;
    struct {
        CUfunction function;    /* NULL: no code for this device */
        bool dependent;         /* executes griddepcontrol: may start before its predecessor ends */
    } kernels[MOE_MAX_KERNELS]; /* by row of the kernel table */
} moe_device;

enum { MOE_SMEM_ALL = -1 }; /* as much dynamic shared memory as a block of the device can have */

/* One row of the kernel table (launch.c). */
typedef struct moe_kernel_row {
    const char *name;
    const char *fatbin; /* the .cu file that holds it */
    int smem_bytes;     /* dynamic, more than 48 KiB has to be asked for; MOE_SMEM_ALL */
    int arch;           /* 80: any from sm_80 on; 90: sm_90a only */
    int param_bytes;    /* of its stage struct, checked against the code's; 0: none */
    int maps;           /* tensor maps that follow it, 0 .. MOE_MAX_MAPS */
} moe_kernel_row;

/* CUDA_FORCE_PTX_JIT, as it was at import. */
bool moe_cuda_ptx_only(void);
const moe_kernel_row *moe_kernel_table(int *count);

/* The driver, initialised; fails with a sentence where there is none, where it is too old, and in a child
 * that was forked after CUDA was initialised. */
int moe_driver_get(const moe_driver **driver, moe_error *err);
/* The device with its primary context retained and its kernels loaded. */
int moe_device_get(int device, moe_device **state, moe_error *err);
/* The device with its context only. */
int moe_device_open(int device, moe_device **state, moe_error *err);

/* Makes the device's context current where it is not; undo with moe_context_leave(pushed). */
int moe_context_enter(const moe_driver *driver, const moe_device *state, int *pushed,
                      moe_error *err);
void moe_context_leave(const moe_driver *driver, int pushed);

/* What a tensor map is made of: [experts, halves, rows, K], K contiguous. The halves of a gated w13 are its gate
 * rows and its up rows, whatever the order in memory; other tensors have one. A copy brings box_rows rows of
 * box_halves halves: MOE_MAP_COLS of K, or where box_chunks is not 0 so many times MOE_MAP_COLS, one behind the
 * other; K is then taken as a dimension of whole pieces before experts, and what is left of it is out of reach. */
typedef struct moe_tensor_key {
    uint64_t address; /* 16-byte aligned */
    uint64_t dims[4]; /* K, rows, halves, experts */
    uint64_t
        strides[3]; /* bytes, multiples of 16: from row to row, half to half, expert to expert */
    uint16_t dtype; /* MOE_BF16, MOE_F16 */
    uint16_t fetch_bytes; /* that L2 asks memory for at once: 128, 256 */
    uint32_t box_rows, box_halves, box_chunks;
} moe_tensor_key;

/* The map of key, 128-byte swizzle, zeros outside of the dimensions. Any thread that has entered the context: without
 * one the driver encodes nothing. */
int moe_tensor_map_get(const moe_driver *driver, int device, const moe_tensor_key *key,
                       CUtensorMap *map, moe_error *err);

/* `what: CUDA_ERROR_NAME (text)`; MOE_ERROR_MEMORY for out of memory, else MOE_ERROR_RUNTIME. */
int moe_cuda_fail(const moe_driver *driver, CUresult code, const char *what, moe_error *err);

#endif
