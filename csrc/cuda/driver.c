/* driver.c: libcuda by dlopen, primary contexts, kernels loaded once per device and never unloaded.
 *
 * Nothing links libcuda: importing the package works with no driver, and the first use that needs one says so.
 * A library is loaded outside any stream capture where possible (fusedmoe.load does it early); when the first
 * call of a process arrives during a capture, the thread's capture mode is relaxed around the load. */
#include "driver.h"

#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "fatbins.h"

static moe_driver driver_table;
static pthread_once_t driver_once = PTHREAD_ONCE_INIT;
static moe_error driver_error; /* of the one attempt */
static atomic_int forked;      /* 1 in a child forked after cuInit */

/* Per-device table, filled under the lock, read without it once `ready` is set. */
static struct {
    atomic_int opened, ready;
    moe_device state;
} devices[MOE_MAX_DEVICES];
static pthread_mutex_t devices_lock = PTHREAD_MUTEX_INITIALIZER;

static void mark_fork(void)
{
    atomic_store_explicit(&forked, 1, memory_order_relaxed);
}

int moe_cuda_fail(const moe_driver *driver, CUresult code, const char *what, moe_error *err)
{
    const char *name = NULL, *text = NULL;
    driver->cuGetErrorName(code, &name);
    driver->cuGetErrorString(code, &text);
    moe_fail(err, code == CUDA_ERROR_OUT_OF_MEMORY ? MOE_ERROR_MEMORY : MOE_ERROR_RUNTIME,
             "%s: %s (%s)", what, name ? name : "unknown CUDA error",
             text ? text : "no description");
    if (!err->cuda_code) err->cuda_code = (int)code;
    return err->status;
}

static void open_driver(void)
{
    moe_error *err = &driver_error;
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        moe_fail(err, MOE_ERROR_RUNTIME,
                 "device: expected an NVIDIA driver, found none (%s); CPU tensors work without one",
                 dlerror());
        return;
    }
    CUresult (*get)(const char *, void **, int, cuuint64_t, CUdriverProcAddressQueryResult *) =
        NULL;
    void *symbol = dlsym(library, "cuGetProcAddress_v2");
    memcpy(&get, &symbol, sizeof get);
    if (!get) {
        moe_fail(err, MOE_ERROR_RUNTIME,
                 "device: the NVIDIA driver is too old; CUDA 12.0 (driver 525) or newer is needed, "
                 "and driver 580 or newer for the kernels of this build");
        return;
    }
    const struct {
        const char *name;
        int version;
        void *slot;
    } wanted[] = {
#define MOE_WANT(name, version) {#name, version, &driver_table.name},
        MOE_DRIVER_FUNCTIONS(MOE_WANT)
#undef MOE_WANT
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; ++i) {
        void *function = NULL;
        CUdriverProcAddressQueryResult found = CU_GET_PROC_ADDRESS_SUCCESS;
        if (get(wanted[i].name, &function, wanted[i].version, CU_GET_PROC_ADDRESS_DEFAULT,
                &found) != CUDA_SUCCESS ||
            !function) {
            moe_fail(err, MOE_ERROR_RUNTIME,
                     "device: the NVIDIA driver is too old: it has no %s of CUDA %d.%d",
                     wanted[i].name, wanted[i].version / 1000, wanted[i].version % 1000 / 10);
            return;
        }
        memcpy(wanted[i].slot, &function, sizeof function);
    }
    CUresult code = driver_table.cuInit(0);
    if (code == CUDA_ERROR_NO_DEVICE) {
        moe_fail(err, MOE_ERROR_RUNTIME,
                 "device: expected a GPU, the driver sees none (is CUDA_VISIBLE_DEVICES empty?)");
        err->cuda_code = (int)code;
        return;
    }
    if (code != CUDA_SUCCESS) {
        moe_cuda_fail(&driver_table, code, "cuInit", err);
        return;
    }
    pthread_atfork(NULL, NULL, mark_fork);
}

int moe_cuda_survived_fork(moe_error *err)
{
    if (!atomic_load_explicit(&forked, memory_order_relaxed)) return MOE_OK;
    return moe_fail(err, MOE_ERROR_RUNTIME,
                    "device: this process was forked after CUDA was initialised, and CUDA does not "
                    "survive a fork; start the child with the 'spawn' method");
}

int moe_driver_get(const moe_driver **driver, moe_error *err)
{
    if (moe_cuda_survived_fork(err)) return err->status;
    pthread_once(&driver_once, open_driver);
    if (driver_error.status) {
        *err = driver_error;
        return err->status;
    }
    *driver = &driver_table;
    return MOE_OK;
}

int moe_cuda_driver_version(int *version, moe_error *err)
{
    const moe_driver *driver = NULL;
    *version = 0;
    if (moe_driver_get(&driver, err)) return err->status;
    CUresult code = driver->cuDriverGetVersion(version);
    return code == CUDA_SUCCESS ? MOE_OK : moe_cuda_fail(driver, code, "cuDriverGetVersion", err);
}

int moe_cuda_device_count(int *count, moe_error *err)
{
    const moe_driver *driver = NULL;
    *count = 0;
    if (moe_driver_get(&driver, err)) return err->status;
    CUresult code = driver->cuDeviceGetCount(count);
    return code == CUDA_SUCCESS ? MOE_OK : moe_cuda_fail(driver, code, "cuDeviceGetCount", err);
}

int moe_context_enter(const moe_driver *driver, const moe_device *state, int *pushed,
                      moe_error *err)
{
    CUcontext current = NULL;
    *pushed = 0;
    if (driver->cuCtxGetCurrent(&current) == CUDA_SUCCESS && current == state->context)
        return MOE_OK;
    CUresult code = driver->cuCtxPushCurrent(state->context);
    if (code != CUDA_SUCCESS) return moe_cuda_fail(driver, code, "cuCtxPushCurrent", err);
    *pushed = 1;
    return MOE_OK;
}

void moe_context_leave(const moe_driver *driver, int pushed)
{
    CUcontext popped = NULL;
    if (pushed) driver->cuCtxPopCurrent(&popped);
}

static int attribute(const moe_driver *driver, CUdevice handle, CUdevice_attribute which,
                     int *value, moe_error *err)
{
    CUresult code = driver->cuDeviceGetAttribute(value, which, handle);
    return code == CUDA_SUCCESS ? MOE_OK : moe_cuda_fail(driver, code, "cuDeviceGetAttribute", err);
}

static int describe(const moe_driver *driver, CUdevice handle, int device, moe_device_info *info,
                    moe_error *err)
{
    int major = 0, minor = 0, l2 = 0, memory_khz = 0, bus_bits = 0, sm_khz = 0;
    memset(info, 0, sizeof *info);
    info->backend = MOE_CUDA;
    info->device = device;
    CUresult code = driver->cuDeviceGetName(info->name, (int)sizeof info->name, handle);
    if (code != CUDA_SUCCESS) return moe_cuda_fail(driver, code, "cuDeviceGetName", err);
    if (attribute(driver, handle, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &major, err) ||
        attribute(driver, handle, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &minor, err) ||
        attribute(driver, handle, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &info->num_sms, err) ||
        attribute(driver, handle, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                  &info->smem_per_block, err) ||
        attribute(driver, handle, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
                  &info->smem_per_sm, err) ||
        attribute(driver, handle, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, &l2, err) ||
        attribute(driver, handle, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, &memory_khz, err) ||
        attribute(driver, handle, CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, &bus_bits, err) ||
        attribute(driver, handle, CU_DEVICE_ATTRIBUTE_CLOCK_RATE, &sm_khz, err))
        return err->status;
    info->capability = 10 * major + minor;
    info->hopper = info->capability == 90 && !moe_cuda_ptx_only(); /* there is no PTX of these */
    info->l2_bytes = l2;
    /* double data rate; of the datasheet's rate about 0.96 is readable (4.65 of 4.8 TB/s on an H200) */
    info->read_bytes_per_us = fmax(1.0, 0.96 * 2.0 * memory_khz * 1e-3 * bus_bits / 8.0);
    /* the dense 16-bit matrix rate: 2048 multiply-adds per clock and SM on Hopper, half of that on sm_80 */
    /* at the clock that such work sustains, about three quarters of the boost clock */
    info->flops_per_us =
        fmax(1.0, 0.74 * 2.0 * (major >= 9 ? 2048.0 : 1024.0) * info->num_sms * sm_khz * 1e-3);
    return MOE_OK;
}

/* The device with its primary context; caller holds the lock. */
static int open_device(const moe_driver *driver, int device, moe_device *state, moe_error *err)
{
    int count = 0;
    CUresult code = driver->cuDeviceGetCount(&count);
    if (code != CUDA_SUCCESS) return moe_cuda_fail(driver, code, "cuDeviceGetCount", err);
    if (device < 0 || device >= count || device >= MOE_MAX_DEVICES)
        return moe_fail(err, MOE_ERROR_RUNTIME, "device: expected a GPU in 0 .. %d, got %d",
                        count - 1, device);
    code = driver->cuDeviceGet(&state->handle, device);
    if (code != CUDA_SUCCESS) return moe_cuda_fail(driver, code, "cuDeviceGet", err);
    if (describe(driver, state->handle, device, &state->info, err)) return err->status;
    if (state->info.capability < 80)
        return moe_fail(err, MOE_ERROR_NOT_IMPLEMENTED,
                        "device: expected compute capability 8.0 or newer, got %d.%d (%s)",
                        state->info.capability / 10, state->info.capability % 10, state->info.name);
    code = driver->cuDevicePrimaryCtxRetain(&state->context, state->handle);
    return code == CUDA_SUCCESS ? MOE_OK
                                : moe_cuda_fail(driver, code, "cuDevicePrimaryCtxRetain", err);
}

static CUresult load_kernel(const moe_driver *driver, CUlibrary library, const moe_kernel_row *row,
                            moe_device *state, int slot)
{
    CUfunction *function = &state->kernels[slot].function;
    CUkernel kernel = NULL;
    int smem_bytes = row->smem_bytes, smem_static = 0;
    CUresult code = driver->cuLibraryGetKernel(&kernel, library, row->name);
    if (code == CUDA_SUCCESS && smem_bytes == MOE_SMEM_ALL) {
        code = driver->cuKernelGetAttribute(&smem_static, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                                            kernel, state->handle);
        smem_bytes = state->info.smem_per_block - smem_static;
    }
    if (code == CUDA_SUCCESS && smem_bytes > 48 * 1024)
        code = driver->cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                            smem_bytes, kernel, state->handle);
    /* An SM changes how it divides its memory between L1 and shared only when it is empty: kernels of few blocks an SM all
     * ask for the same, so that the next in a chain of dependent launches can start beside the one before. */
    if (code == CUDA_SUCCESS && 2 * smem_bytes > state->info.smem_per_sm)
        code =
            driver->cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
                                         CU_SHAREDMEM_CARVEOUT_MAX_SHARED, kernel, state->handle);
    /* asking for the function loads the code now, so that no later launch has to do it inside a capture */
    if (code == CUDA_SUCCESS) code = driver->cuKernelGetFunction(function, kernel);
    /* griddepcontrol is there in code made from compute_90 on, not in the compute_80 PTX compiled for a newer GPU */
    int ptx = 0;
    if (code == CUDA_SUCCESS)
        code = driver->cuKernelGetAttribute(&ptx, CU_FUNC_ATTRIBUTE_PTX_VERSION, kernel,
                                            state->handle);
    state->kernels[slot].dependent = ptx >= 90;
    size_t offset = 0, bytes = 0;
    if (code == CUDA_SUCCESS && row->param_bytes) {
        code = driver->cuKernelGetParamInfo(kernel, 0, &offset, &bytes);
        /* a stale object: C and this kernel were compiled from different moe_kernels.h */
        if (code == CUDA_SUCCESS && bytes != (size_t)row->param_bytes)
            code = CUDA_ERROR_INVALID_SOURCE;
        for (int i = 0; i < row->maps && code == CUDA_SUCCESS; ++i) {
            code = driver->cuKernelGetParamInfo(kernel, (size_t)i + 1, &offset, &bytes);
            if (code == CUDA_SUCCESS && bytes != sizeof(CUtensorMap))
                code = CUDA_ERROR_INVALID_SOURCE;
        }
    }
    return code;
}

/* A library is context-free, but loading it twice for two devices is harmless and keeps devices apart. */
static int load_fatbin(const moe_driver *driver, moe_device *state, const moe_fatbin *fatbin,
                       moe_error *err)
{
    int count = 0;
    const moe_kernel_row *table = moe_kernel_table(&count);
    CUlibrary library = NULL;
    CUresult loaded =
        driver->cuLibraryLoadData(&library, fatbin->begin, NULL, NULL, 0, NULL, NULL, 0);
    for (int i = 0; i < count; ++i) {
        if (strcmp(table[i].fatbin, fatbin->name) != 0) continue;
        CUresult code =
            loaded != CUDA_SUCCESS ? loaded : load_kernel(driver, library, &table[i], state, i);
        if (code == CUDA_SUCCESS) continue;
        state->kernels[i].function = NULL;
        /* a Hopper kernel on another GPU, or with CUDA_FORCE_PTX_JIT: absent, and a launch says so */
        if (code == CUDA_ERROR_NO_BINARY_FOR_GPU || code == CUDA_ERROR_INVALID_IMAGE) {
            if (table[i].arch == 90) continue;
        }
        char what[160];
        snprintf(what, sizeof what, "device: loading kernel %s on %s failed", table[i].name,
                 state->info.name);
        return moe_cuda_fail(driver, code, what, err);
    }
    return MOE_OK;
}

static int load_kernels(const moe_driver *driver, moe_device *state, moe_error *err)
{
    int pushed = 0;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    if (moe_context_enter(driver, state, &pushed, err)) return err->status;
    driver->cuThreadExchangeStreamCaptureMode(&mode);
    for (int i = 0; i < moe_num_fatbins && !err->status; ++i)
        load_fatbin(driver, state, &moe_fatbins[i], err);
    driver->cuThreadExchangeStreamCaptureMode(&mode);
    moe_context_leave(driver, pushed);
    return err->status;
}

static int get_device(int device, bool with_kernels, moe_device **state, moe_error *err)
{
    const moe_driver *driver = NULL;
    if (moe_driver_get(&driver, err)) return err->status;
    if (device < 0 || device >= MOE_MAX_DEVICES)
        return moe_fail(err, MOE_ERROR_RUNTIME, "device: expected a GPU below %d, got %d",
                        MOE_MAX_DEVICES, device);
    *state = &devices[device].state;
    if (atomic_load_explicit(with_kernels ? &devices[device].ready : &devices[device].opened,
                             memory_order_acquire))
        return MOE_OK;
    pthread_mutex_lock(&devices_lock);
    if (!atomic_load_explicit(&devices[device].opened, memory_order_relaxed) &&
        !open_device(driver, device, *state, err))
        atomic_store_explicit(&devices[device].opened, 1, memory_order_release);
    if (with_kernels && !err->status &&
        !atomic_load_explicit(&devices[device].ready, memory_order_relaxed) &&
        !load_kernels(driver, *state, err))
        atomic_store_explicit(&devices[device].ready, 1, memory_order_release);
    pthread_mutex_unlock(&devices_lock);
    return err->status;
}

int moe_device_get(int device, moe_device **state, moe_error *err)
{
    return get_device(device, true, state, err);
}

int moe_device_open(int device, moe_device **state, moe_error *err)
{
    return get_device(device, false, state, err);
}

int moe_cuda_device_info(int device, moe_device_info *info, moe_error *err)
{
    moe_device *state = NULL;
    if (moe_device_open(device, &state, err)) return err->status;
    *info = state->info;
    return MOE_OK;
}

int moe_cuda_stream_device(void *stream, int *device, moe_error *err)
{
    const moe_driver *driver = NULL;
    CUcontext context = NULL, popped = NULL;
    CUdevice handle = 0;
    if (moe_driver_get(&driver, err)) return err->status;
    CUresult code = driver->cuStreamGetCtx(stream, &context);
    if (code == CUDA_SUCCESS) code = driver->cuCtxPushCurrent(context);
    if (code == CUDA_SUCCESS) {
        code = driver->cuCtxGetDevice(&handle);
        driver->cuCtxPopCurrent(&popped);
    }
    if (code != CUDA_SUCCESS) return moe_cuda_fail(driver, code, "the device of a stream", err);
    *device = handle; /* a CUdevice is the device's number */
    return MOE_OK;
}

int moe_cuda_load(int device, moe_error *err)
{
    moe_device *state = NULL;
    return moe_device_get(device, &state, err);
}
