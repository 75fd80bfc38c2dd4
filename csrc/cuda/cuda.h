/* cuda.h: the CUDA backend as C sees it. In a CPU-only build (MOE_CUDA_BUILT 0) csrc/cuda is left out and
 * every function here fails with a sentence. Nothing here synchronises but the helpers of device.c. */
#ifndef MOE_CUDA_H
#define MOE_CUDA_H

#include "../moe.h"

#ifndef MOE_CUDA_BUILT
#define MOE_CUDA_BUILT 0
#endif

enum { MOE_COPY_TO_DEVICE = 0, MOE_COPY_TO_HOST = 1 };

#if MOE_CUDA_BUILT

/* driver.c: libcuda by dlopen, primary contexts, kernels. */
int moe_cuda_device_count(int *count, moe_error *err); /* 0 devices is no error; no driver is one */
int moe_cuda_device_info(int device, moe_device_info *info, moe_error *err);
int moe_cuda_driver_version(int *version, moe_error *err); /* 13000 for CUDA 13.0 */
int moe_cuda_load(int device, moe_error *err);             /* every kernel of the device, once */
int moe_cuda_stream_device(void *stream, int *device, moe_error *err); /* of a CUstream */
/* Fails in a child forked after CUDA was initialised; a flag, nothing else. For before a framework allocates. */
int moe_cuda_survived_fork(moe_error *err);

/* launch.c: the stages. Every one only launches. */
/* FUSEDMOE_SYNC and FUSEDMOE_NO_LAUNCH; with the GIL, since another thread may write os.environ. */
void moe_cuda_read_environment(void);
int moe_cuda_route(const moe_plan *plan, const moe_route_args *args, int device, void *stream,
                   moe_error *err);
int moe_cuda_align(const moe_plan *plan, const moe_align_args *args, int device, void *stream,
                   moe_error *err);
/* Both in one launch, where moe_route_aligns(...). */
int moe_cuda_route_align(const moe_plan *plan, const moe_route_args *route,
                         const moe_align_args *align, int device, void *stream, moe_error *err);
/* tiles and num_tiles from expert_offsets that somebody else made */
int moe_cuda_align_pad(const moe_plan *plan, const moe_pad_args *args, int device, void *stream,
                       moe_error *err);
int moe_cuda_align_tiles(const moe_plan *plan, const moe_align_args *args, int device, void *stream,
                         moe_error *err);
int moe_cuda_gate_up(const moe_plan *plan, const moe_gate_up_args *args, int device, void *stream,
                     moe_error *err);
int moe_cuda_down(const moe_plan *plan, const moe_down_args *args, int device, void *stream,
                  moe_error *err);
/* Where plan->adds: fill in front, then the rows of down are added into out. */
int moe_cuda_fill(const moe_plan *plan, const moe_fill_args *args, int device, void *stream,
                  moe_error *err);
int moe_cuda_down_add(const moe_plan *plan, const moe_down_add_args *args, int device, void *stream,
                      moe_error *err);
/* Both in one launch, where plan->one_launch. */
int moe_cuda_experts(const moe_plan *plan, const moe_experts_args *args, int device, void *stream,
                     moe_error *err);
int moe_cuda_combine(const moe_plan *plan, const moe_combine_args *args, int device, void *stream,
                     moe_error *err);
int moe_cuda_gate_up_decode(const moe_plan *plan, const moe_gate_up_decode_args *args, int device,
                            void *stream, moe_error *err);
int moe_cuda_down_decode(const moe_plan *plan, const moe_down_decode_args *args, int device,
                         void *stream, moe_error *err);
/* Runs the Hopper probe (tensor map, TMA, wgmma) and returns the largest absolute error, or fails. Synchronises. */
int moe_cuda_probe_hopper(int device, double *max_error, moe_error *err);

/* device.c: for demo, check and bench only, never on the call path. These synchronise. */
int moe_cuda_alloc(int device, int64_t bytes, void **ptr, moe_error *err);
int moe_cuda_free(int device, void *ptr);
int moe_cuda_copy(int device, void *dst, const void *src, int64_t bytes, int kind, moe_error *err);
int moe_cuda_synchronize(int device, moe_error *err);
int moe_cuda_stream_create(int device, void **stream, moe_error *err);
int moe_cuda_graph_begin(int device, void *stream, moe_error *err);
int moe_cuda_graph_end(int device, void *stream, void **graph_exec, moe_error *err);
int moe_cuda_graph_launch(int device, void *graph_exec, void *stream, moe_error *err);
int moe_cuda_graph_destroy(void *graph_exec);
/* Replays a graph with an event on each side, ms_each[0 .. replays). */
int moe_cuda_elapsed(int device, void *graph_exec, void *stream, int replays, float *ms_each,
                     moe_error *err);

#else

#define MOE_CUDA_ABSENT(err)                                                                       \
    moe_fail(err, MOE_ERROR_RUNTIME,                                                               \
             "device: this build of fusedmoe has no GPU code (built with FUSEDMOE_CUDA=0); "       \
             "reinstall without "                                                                  \
             "that setting to use a GPU")

static inline int moe_cuda_device_count(int *count, moe_error *err)
{
    *count = 0;
    return MOE_CUDA_ABSENT(err);
}
static inline int moe_cuda_device_info(int device, moe_device_info *info, moe_error *err)
{
    (void)device, (void)info;
    return MOE_CUDA_ABSENT(err);
}
static inline int moe_cuda_driver_version(int *version, moe_error *err)
{
    *version = 0;
    return MOE_CUDA_ABSENT(err);
}
static inline int moe_cuda_stream_device(void *stream, int *device, moe_error *err)
{
    (void)stream, (void)device;
    return MOE_CUDA_ABSENT(err);
}
static inline void moe_cuda_read_environment(void) {}
static inline int moe_cuda_survived_fork(moe_error *err)
{
    (void)err;
    return 0;
}
static inline int moe_cuda_load(int device, moe_error *err)
{
    (void)device;
    return MOE_CUDA_ABSENT(err);
}
#define MOE_CUDA_STAGE_STUB(name, type)                                                            \
    static inline int name(const moe_plan *plan, const type *args, int device, void *stream,       \
                           moe_error *err)                                                         \
    {                                                                                              \
        (void)plan, (void)args, (void)device, (void)stream;                                        \
        return MOE_CUDA_ABSENT(err);                                                               \
    }
MOE_CUDA_STAGE_STUB(moe_cuda_route, moe_route_args)
MOE_CUDA_STAGE_STUB(moe_cuda_align, moe_align_args)
MOE_CUDA_STAGE_STUB(moe_cuda_align_pad, moe_pad_args)
MOE_CUDA_STAGE_STUB(moe_cuda_align_tiles, moe_align_args)
MOE_CUDA_STAGE_STUB(moe_cuda_gate_up, moe_gate_up_args)
MOE_CUDA_STAGE_STUB(moe_cuda_down, moe_down_args)
MOE_CUDA_STAGE_STUB(moe_cuda_fill, moe_fill_args)
MOE_CUDA_STAGE_STUB(moe_cuda_down_add, moe_down_add_args)
MOE_CUDA_STAGE_STUB(moe_cuda_experts, moe_experts_args)
MOE_CUDA_STAGE_STUB(moe_cuda_combine, moe_combine_args)
MOE_CUDA_STAGE_STUB(moe_cuda_gate_up_decode, moe_gate_up_decode_args)
MOE_CUDA_STAGE_STUB(moe_cuda_down_decode, moe_down_decode_args)
#undef MOE_CUDA_STAGE_STUB

static inline int moe_cuda_route_align(const moe_plan *plan, const moe_route_args *route,
                                       const moe_align_args *align, int device, void *stream,
                                       moe_error *err)
{
    (void)plan, (void)route, (void)align, (void)device, (void)stream;
    return MOE_CUDA_ABSENT(err);
}
static inline int moe_cuda_probe_hopper(int device, double *max_error, moe_error *err)
{
    (void)device, (void)max_error;
    return MOE_CUDA_ABSENT(err);
}
static inline int moe_cuda_alloc(int device, int64_t bytes, void **ptr, moe_error *err)
{
    (void)device, (void)bytes, (void)ptr;
    return MOE_CUDA_ABSENT(err);
}
static inline int moe_cuda_free(int device, void *ptr)
{
    (void)device, (void)ptr;
    return 0;
}
static inline int moe_cuda_copy(int device, void *dst, const void *src, int64_t bytes, int kind,
                                moe_error *err)
{
    (void)device, (void)dst, (void)src, (void)bytes, (void)kind;
    return MOE_CUDA_ABSENT(err);
}
static inline int moe_cuda_synchronize(int device, moe_error *err)
{
    (void)device;
    return MOE_CUDA_ABSENT(err);
}
static inline int moe_cuda_stream_create(int device, void **stream, moe_error *err)
{
    (void)device, (void)stream;
    return MOE_CUDA_ABSENT(err);
}
static inline int moe_cuda_graph_begin(int device, void *stream, moe_error *err)
{
    (void)device, (void)stream;
    return MOE_CUDA_ABSENT(err);
}
static inline int moe_cuda_graph_end(int device, void *stream, void **graph_exec, moe_error *err)
{
    (void)device, (void)stream, (void)graph_exec;
    return MOE_CUDA_ABSENT(err);
}
static inline int moe_cuda_graph_launch(int device, void *graph_exec, void *stream, moe_error *err)
{
    (void)device, (void)graph_exec, (void)stream;
    return MOE_CUDA_ABSENT(err);
}
static inline int moe_cuda_graph_destroy(void *graph_exec)
{
    (void)graph_exec;
    return 0;
}
static inline int moe_cuda_elapsed(int device, void *graph_exec, void *stream, int replays,
                                   float *ms_each, moe_error *err)
{
    (void)device, (void)graph_exec, (void)stream, (void)replays, (void)ms_each;
    return MOE_CUDA_ABSENT(err);
}

#endif
#endif
