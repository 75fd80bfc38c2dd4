/* device.c: memory, copies, streams and graphs for demo, check and bench, which run without any framework.
 * Never on the call path of a layer: these allocate and synchronise. */
#include "driver.h"

#include <string.h>

/* What every helper does first; leave with moe_context_leave(driver, pushed). */
static int enter(int device, const moe_driver **driver, int *pushed, moe_error *err)
{
    moe_device *state = NULL;
    if (moe_driver_get(driver, err) || moe_device_open(device, &state, err)) return err->status;
    return moe_context_enter(*driver, state, pushed, err);
}

static int leave(const moe_driver *driver, int pushed, CUresult code, const char *what,
                 moe_error *err)
{
    moe_context_leave(driver, pushed);
    return code == CUDA_SUCCESS ? MOE_OK : moe_cuda_fail(driver, code, what, err);
}

int moe_cuda_alloc(int device, int64_t bytes, void **ptr, moe_error *err)
{
    const moe_driver *driver = NULL;
    int pushed = 0;
    CUdeviceptr memory = 0;
    if (bytes < 1)
        return moe_fail(err, MOE_ERROR_VALUE, "nbytes: expected at least 1, got %lld",
                        (long long)bytes);
    if (enter(device, &driver, &pushed, err)) return err->status;
    CUresult code = driver->cuMemAlloc(&memory, (size_t)bytes);
    *ptr = (void *)(uintptr_t)memory;
    return leave(driver, pushed, code, "cuMemAlloc", err);
}

int moe_cuda_free(int device, void *ptr)
{
    const moe_driver *driver = NULL;
    moe_error err = {0};
    int pushed = 0;
    if (!ptr) return MOE_OK;
    if (enter(device, &driver, &pushed, &err)) return err.status;
    CUresult code = driver->cuMemFree((CUdeviceptr)(uintptr_t)ptr);
    return leave(driver, pushed, code, "cuMemFree", &err);
}

int moe_cuda_copy(int device, void *dst, const void *src, int64_t bytes, int kind, moe_error *err)
{
    const moe_driver *driver = NULL;
    int pushed = 0;
    if (bytes < 0)
        return moe_fail(err, MOE_ERROR_VALUE, "nbytes: expected at least 0, got %lld",
                        (long long)bytes);
    if (bytes == 0) return MOE_OK;
    if (enter(device, &driver, &pushed, err)) return err->status;
    CUdeviceptr to = (CUdeviceptr)(uintptr_t)dst, from = (CUdeviceptr)(uintptr_t)src;
    CUresult code = kind == MOE_COPY_TO_DEVICE ? driver->cuMemcpyHtoD(to, src, (size_t)bytes)
                                               : driver->cuMemcpyDtoH(dst, from, (size_t)bytes);
    return leave(driver, pushed, code, "copy", err);
}

int moe_cuda_synchronize(int device, moe_error *err)
{
    const moe_driver *driver = NULL;
    int pushed = 0;
    if (enter(device, &driver, &pushed, err)) return err->status;
    CUresult code = driver->cuCtxSynchronize();
    return leave(driver, pushed, code, "cuCtxSynchronize", err);
}

int moe_cuda_stream_create(int device, void **stream, moe_error *err)
{
    const moe_driver *driver = NULL;
    int pushed = 0;
    CUstream made = NULL;
    if (enter(device, &driver, &pushed, err)) return err->status;
    CUresult code = driver->cuStreamCreate(&made, CU_STREAM_NON_BLOCKING);
    *stream = made;
    return leave(driver, pushed, code, "cuStreamCreate", err);
}

int moe_cuda_graph_begin(int device, void *stream, moe_error *err)
{
    const moe_driver *driver = NULL;
    int pushed = 0;
    if (enter(device, &driver, &pushed, err)) return err->status;
    CUresult code = driver->cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    return leave(driver, pushed, code, "cuStreamBeginCapture", err);
}

int moe_cuda_graph_end(int device, void *stream, void **graph_exec, moe_error *err)
{
    const moe_driver *driver = NULL;
    int pushed = 0;
    CUgraph graph = NULL;
    CUgraphExec exec = NULL;
    if (enter(device, &driver, &pushed, err)) return err->status;
    CUresult code = driver->cuStreamEndCapture(stream, &graph);
    if (code == CUDA_SUCCESS) code = driver->cuGraphInstantiateWithFlags(&exec, graph, 0);
    if (graph) driver->cuGraphDestroy(graph);
    *graph_exec = exec;
    return leave(driver, pushed, code, "ending a graph capture", err);
}

int moe_cuda_graph_launch(int device, void *graph_exec, void *stream, moe_error *err)
{
    const moe_driver *driver = NULL;
    int pushed = 0;
    if (enter(device, &driver, &pushed, err)) return err->status;
    CUresult code = driver->cuGraphLaunch(graph_exec, stream);
    return leave(driver, pushed, code, "cuGraphLaunch", err);
}

int moe_cuda_graph_destroy(void *graph_exec)
{
    const moe_driver *driver = NULL;
    moe_error err = {0};
    if (!graph_exec) return MOE_OK;
    if (moe_driver_get(&driver, &err)) return err.status;
    return driver->cuGraphExecDestroy(graph_exec) == CUDA_SUCCESS ? MOE_OK : MOE_ERROR_RUNTIME;
}

/* One replay between two events. */
static CUresult time_replay(const moe_driver *driver, CUstream stream, void *graph_exec, float *ms)
{
    CUevent begin = NULL, end = NULL;
    CUresult code = driver->cuEventCreate(&begin, CU_EVENT_DEFAULT);
    if (code == CUDA_SUCCESS) code = driver->cuEventCreate(&end, CU_EVENT_DEFAULT);
    if (code == CUDA_SUCCESS) code = driver->cuEventRecord(begin, stream);
    if (code == CUDA_SUCCESS) code = driver->cuGraphLaunch(graph_exec, stream);
    if (code == CUDA_SUCCESS) code = driver->cuEventRecord(end, stream);
    if (code == CUDA_SUCCESS) code = driver->cuEventSynchronize(end);
    if (code == CUDA_SUCCESS) code = driver->cuEventElapsedTime(ms, begin, end);
    if (begin) driver->cuEventDestroy(begin);
    if (end) driver->cuEventDestroy(end);
    return code;
}

int moe_cuda_elapsed(int device, void *graph_exec, void *stream, int replays, float *ms_each,
                     moe_error *err)
{
    const moe_driver *driver = NULL;
    int pushed = 0;
    CUresult code = CUDA_SUCCESS;
    if (enter(device, &driver, &pushed, err)) return err->status;
    for (int i = 0; i < replays && code == CUDA_SUCCESS; ++i)
        code = time_replay(driver, stream, graph_exec, &ms_each[i]);
    return leave(driver, pushed, code, "timing a graph", err);
}
