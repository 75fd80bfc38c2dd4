/* xla_ffi.c: the layer as a custom call of XLA. No Python here, and no lock of Python's is taken.
 *
 * A handler takes the call out of XLA's frame (buffers in the order of moe_call_tensors, scalars by
 * name) and goes the way of every call: moe_validate, plan, moe_run_layer or moe_run_stage. The
 * Python side (abstract.c) has checked the same call by its shapes when it was traced; here it is
 * checked again, since a program may come from a file.
 *
 * The plan depends on shapes only and nothing waits for the device, so what is launched is the same
 * every time: XLA may record it into a command buffer (a CUDA graph). */
#include "cuda/cuda.h"
#include "moe.h"
#include "xla_call.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#ifndef MOE_VERSION
#define MOE_VERSION "unknown"
#endif

/* Bytes of a struct up to and with a field: what its struct_size has to reach. */
#define SIZE_THROUGH(type, field) (offsetof(type, field) + sizeof(((type *)0)->field))

/* Handlers run on XLA's threads, without the GIL that guards the plans of module state. */
static moe_plan_cache plans;
static pthread_mutex_t plans_lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- versions and traits --------------------------------------------------------------------- */

static int check_frame(const XLA_FFI_CallFrame *frame, moe_error *err)
{
    if (frame->struct_size < SIZE_THROUGH(XLA_FFI_CallFrame, attrs) ||
        frame->api->struct_size < SIZE_THROUGH(XLA_FFI_Api, XLA_FFI_Stream_Get) ||
        frame->api->api_version.major_version != XLA_FFI_API_MAJOR)
        return moe_fail(err, MOE_ERROR_RUNTIME,
                        "XLA: expected its foreign function interface %d.%d or newer of the same "
                        "major version, got %d.%d with a call frame of %zu bytes",
                        XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR, frame->api->api_version.major_version,
                        frame->api->api_version.minor_version, frame->struct_size);
    return MOE_OK;
}

static void answer_metadata(const XLA_FFI_Extension_Base *extension, uint32_t traits)
{
    XLA_FFI_Metadata *metadata =
        ((const XLA_FFI_Metadata_Extension *)(const void *)extension)->metadata;
    if (metadata->struct_size < SIZE_THROUGH(XLA_FFI_Metadata, traits)) return;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = traits;
}

static XLA_FFI_Error *xla_error(const XLA_FFI_Api *api, const moe_error *err)
{
    XLA_FFI_Error_Create_Args args = {sizeof args, NULL, err->text, XLA_FFI_Error_Code_INTERNAL};
    switch (err->status) {
    case MOE_ERROR_TYPE:
    case MOE_ERROR_VALUE:
        args.errc = XLA_FFI_Error_Code_INVALID_ARGUMENT;
        break;
    case MOE_ERROR_NOT_IMPLEMENTED:
        args.errc = XLA_FFI_Error_Code_UNIMPLEMENTED;
        break;
    case MOE_ERROR_MEMORY:
        args.errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED;
        break;
    case MOE_OK:
    case MOE_ERROR_RUNTIME:
    case MOE_ERROR_PYTHON:
        break;
    }
    return api->XLA_FFI_Error_Create(&args);
}

/* ---- scalars --------------------------------------------------------------------------------- */

static bool named(const XLA_FFI_ByteSpan *span, const char *name)
{
    return span->len == strlen(name) && memcmp(span->ptr, name, span->len) == 0;
}

static int fail_attribute(const char *name, const char *expected, moe_error *err)
{
    return moe_fail(err, MOE_ERROR_VALUE, "%s: expected %s as an attribute of the custom call",
                    name, expected);
}

static int check_version(const XLA_FFI_Attrs *attrs, moe_error *err)
{
    const XLA_FFI_ByteSpan *text = NULL;
    if (attrs->size > 0 && named(attrs->names[0], MOE_XLA_VERSION_ATTRIBUTE) &&
        attrs->types[0] == XLA_FFI_AttrType_STRING)
        text = attrs->attrs[0];
    if (text && named(text, MOE_VERSION) && attrs->size == 1 + MOE_CALL_SCALARS) return MOE_OK;
    return moe_fail(err, MOE_ERROR_VALUE,
                    "fusedmoe: expected a program that was traced with version %s, got one of "
                    "version %.*s; trace and compile it again",
                    MOE_VERSION, text ? (int)(text->len < 40 ? text->len : 40) : 7,
                    text ? text->ptr : "unknown");
}

static int read_scalar(const moe_call_scalar *row, const XLA_FFI_Scalar *scalar, void *field,
                       moe_error *err)
{
    if (row->kind == MOE_SCALAR_F64) {
        if (scalar->dtype != XLA_FFI_DataType_F64)
            return fail_attribute(row->name, "a float64", err);
        memcpy(field, scalar->value, sizeof(double));
        return MOE_OK;
    }
    int64_t value;
    if (scalar->dtype != XLA_FFI_DataType_S64) return fail_attribute(row->name, "an int64", err);
    memcpy(&value, scalar->value, sizeof value);
    if (value < row->low || value > row->high)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "%s: expected %" PRId64 " to %" PRId64 ", got %" PRId64, row->name,
                        row->low, row->high, value);
    if (row->kind == MOE_SCALAR_I32) {
        const int32_t narrow = (int32_t)value;
        memcpy(field, &narrow, sizeof narrow);
    } else {
        memcpy(field, &value, sizeof value);
    }
    return MOE_OK;
}

/* Both sides are sorted by name. */
static int read_scalars(const XLA_FFI_Attrs *attrs, moe_message *message, moe_error *err)
{
    if (check_version(attrs, err)) return err->status;
    for (int i = 0; i < MOE_CALL_SCALARS; ++i) {
        const moe_call_scalar *row = &moe_call_scalars[i];
        if (!named(attrs->names[i + 1], row->name) ||
            attrs->types[i + 1] != XLA_FFI_AttrType_SCALAR)
            return fail_attribute(row->name, "a number", err);
        if (read_scalar(row, attrs->attrs[i + 1], (char *)message + row->offset, err))
            return err->status;
    }
    return MOE_OK;
}

/* ---- tensors --------------------------------------------------------------------------------- */

static int32_t dtype_from_xla(XLA_FFI_DataType dtype)
{
    switch (dtype) {
    case XLA_FFI_DataType_PRED:
        return MOE_BOOL;
    case XLA_FFI_DataType_S8:
        return MOE_I8;
    case XLA_FFI_DataType_S16:
        return MOE_I16;
    case XLA_FFI_DataType_S32:
        return MOE_I32;
    case XLA_FFI_DataType_S64:
        return MOE_I64;
    case XLA_FFI_DataType_U8:
        return MOE_U8;
    case XLA_FFI_DataType_U16:
        return MOE_U16;
    case XLA_FFI_DataType_U32:
        return MOE_U32;
    case XLA_FFI_DataType_U64:
        return MOE_U64;
    case XLA_FFI_DataType_F16:
        return MOE_F16;
    case XLA_FFI_DataType_F32:
        return MOE_F32;
    case XLA_FFI_DataType_F64:
        return MOE_F64;
    case XLA_FFI_DataType_BF16:
        return MOE_BF16;
    case XLA_FFI_DataType_F8E5M2:
        return MOE_F8E5M2;
    case XLA_FFI_DataType_F8E4M3FN:
        return MOE_F8E4M3;
    case XLA_FFI_DataType_F8E8M0FNU:
        return MOE_F8E8M0;
    default:
        return MOE_DTYPE_NONE;
    }
}

/* XLA's buffers are compact and row-major. */
static int read_tensor(const char *name, const XLA_FFI_Buffer *buffer, moe_backend backend,
                       int32_t device, moe_tensor *tensor, moe_error *err)
{
    const int32_t dtype = dtype_from_xla(buffer->dtype);
    if (dtype == MOE_DTYPE_NONE)
        return moe_fail(err, MOE_ERROR_TYPE,
                        "%s: expected a dtype that this library knows, got XLA's number %d", name,
                        buffer->dtype);
    const int32_t rank = buffer->rank > MOE_MAX_DIMS ? MOE_MAX_DIMS + 1 : (int32_t)buffer->rank;
    if (tensor_describe(name, buffer->data, dtype, rank, buffer->dims, NULL, tensor, err))
        return err->status;
    tensor->backend = backend;
    tensor->device = device;
    return MOE_OK;
}

/* The buffers of one list are the tensors of `mask`. */
static int read_tensors(const char *list, int64_t mask, int64_t count, const int *types,
                        void *const *buffers, moe_backend backend, int32_t device, moe_call *call,
                        moe_error *err)
{
    int64_t used = 0;
    for (int i = 0; i < MOE_CALL_TENSORS; ++i) {
        if (!(mask >> i & 1)) continue;
        if (used >= count || types[used] != XLA_FFI_ArgType_BUFFER)
            return moe_fail(err, MOE_ERROR_VALUE, "%s: expected an array for %s, got none", list,
                            moe_call_tensors[i].name);
        if (read_tensor(moe_call_tensors[i].name, buffers[used++], backend, device,
                        moe_tensor_of(call, i), err))
            return err->status;
    }
    if (used == count && mask >> MOE_CALL_TENSORS == 0) return MOE_OK;
    return moe_fail(err, MOE_ERROR_VALUE, "%s: expected %" PRId64 " arrays, got %" PRId64, list,
                    used, count);
}

/* Everything that a function writes has to be there, and nothing of it among what it reads. */
static int check_lists(const moe_message *message, moe_error *err)
{
    const moe_call *call = &message->call;
    const bool layer = moe_is_layer(call->operation);
    int64_t wanted = 0, optional = 0, written = 0; /* written: by no XLA call, but by others */
    for (int i = 0; i < MOE_CALL_TENSORS; ++i) {
        const moe_tensor *tensor =
            (const moe_tensor *)(const void *)((const char *)call + moe_call_tensors[i].offset);
        if (layer ? tensor == &call->out
                  : tensor == &call->topk_weights || tensor == &call->topk_ids)
            wanted |= (int64_t)1 << i;
        if (tensor == &call->workspace) optional |= (int64_t)1 << i;
        if (tensor == &call->packed || tensor == &call->counts) written |= (int64_t)1 << i;
    }
    if ((message->results & ~optional) == wanted &&
        (message->operands & (wanted | optional | written)) == 0)
        return MOE_OK;
    return moe_fail(err, MOE_ERROR_VALUE, "results: expected those of %s", call->function);
}

/* ---- the call -------------------------------------------------------------------------------- */

static int find_plan(const moe_problem *problem, moe_backend backend, int32_t device,
                     moe_plan *plan, moe_error *err)
{
    pthread_mutex_lock(&plans_lock);
    const bool found = moe_plan_find(&plans, problem, backend, device, plan);
    pthread_mutex_unlock(&plans_lock);
    if (found) return MOE_OK;
    moe_device_info info;
    if (backend == MOE_CUDA ? moe_cuda_device_info(device, &info, err)
                            : moe_cpu_device_info(&info, err))
        return err->status;
    if (moe_make_plan(problem, &info, plan, err)) return err->status;
    pthread_mutex_lock(&plans_lock);
    moe_plan_keep(&plans, problem, backend, device, plan);
    pthread_mutex_unlock(&plans_lock);
    return MOE_OK;
}

static int run(const XLA_FFI_CallFrame *frame, moe_operation operation, const char *function,
               moe_backend backend, void *stream, moe_error *err)
{
    moe_message message;
    moe_call *call = &message.call;
    moe_problem problem;
    moe_plan plan;
    int32_t device = 0;
    memset(&message, 0, sizeof message);
    call->operation = operation;
    call->function = function;
    for (int i = 0; i < MOE_CALL_TENSORS; ++i)
        moe_tensor_of(call, i)->ndim = -1;
    if (backend == MOE_CUDA && moe_cuda_stream_device(stream, &device, err)) return err->status;
    if (read_scalars(&frame->attrs, &message, err)) return err->status;
    if (check_lists(&message, err)) return err->status;
    if (read_tensors("operands", message.operands, frame->args.size, frame->args.types,
                     frame->args.args, backend, device, call, err))
        return err->status;
    if (read_tensors("results", message.results, frame->rets.size, frame->rets.types,
                     frame->rets.rets, backend, device, call, err))
        return err->status;
    if (moe_validate(call, &problem, err)) return err->status;
    const bool layer = moe_is_layer(operation);
    if (layer) problem.workspace_limit = message.workspace_limit;
    if (find_plan(&problem, backend, device, &plan, err)) return err->status;
    if (moe_check_workspace(call, &plan, err)) return err->status;
    return layer ? moe_run_layer(call, &plan, stream, err)
                 : moe_run_stage(call, &plan, stream, err);
}

static XLA_FFI_Error *handle(XLA_FFI_CallFrame *frame, moe_operation operation,
                             const char *function, moe_backend backend)
{
    moe_error err = {0};
    for (const XLA_FFI_Extension_Base *e = frame->extension_start; e; e = e->next) {
        if (e->type != XLA_FFI_Extension_Metadata) continue;
        answer_metadata(e,
                        backend == MOE_CUDA ? XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE : 0);
        return NULL;
    }
    if (check_frame(frame, &err)) return xla_error(frame->api, &err);
    if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return NULL;
    XLA_FFI_Stream_Get_Args stream = {sizeof stream, NULL, frame->ctx, NULL};
    if (backend == MOE_CUDA) {
        XLA_FFI_Error *error = frame->api->XLA_FFI_Stream_Get(&stream);
        if (error) return error;
    }
    return run(frame, operation, function, backend, stream.stream, &err)
               ? xla_error(frame->api, &err)
               : NULL;
}

#define HANDLERS(function, operation)                                                              \
    static XLA_FFI_Error *cpu_##function(XLA_FFI_CallFrame *frame)                                 \
    {                                                                                              \
        return handle(frame, operation, #function, MOE_CPU);                                       \
    }                                                                                              \
    static XLA_FFI_Error *cuda_##function(XLA_FFI_CallFrame *frame)                                \
    {                                                                                              \
        return handle(frame, operation, #function, MOE_CUDA);                                      \
    }
HANDLERS(fused_experts, MOE_OP_FUSED_EXPERTS)
HANDLERS(fused_moe, MOE_OP_FUSED_MOE)
HANDLERS(route, MOE_OP_ROUTE)
#undef HANDLERS

const moe_xla_handler moe_xla_handlers[MOE_XLA_HANDLERS] = {
    {"fused_experts", "cpu", cpu_fused_experts},
    {"fused_experts", "CUDA", cuda_fused_experts},
    {"fused_moe", "cpu", cpu_fused_moe},
    {"fused_moe", "CUDA", cuda_fused_moe},
    {"route", "cpu", cpu_route},
    {"route", "CUDA", cuda_route},
};
