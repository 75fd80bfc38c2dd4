/* dtype.c: names of element types, and tensors as text for messages. */
#include "moe.h"

#include <inttypes.h>
#include <stdio.h>

static const char *const NAMES[MOE_DTYPE_COUNT] = {
    [MOE_DTYPE_NONE] = "unknown",
    [MOE_F32] = "float32",
    [MOE_BF16] = "bfloat16",
    [MOE_F16] = "float16",
    [MOE_I32] = "int32",
    [MOE_I64] = "int64",
    [MOE_U8] = "uint8",
    [MOE_I8] = "int8",
    [MOE_U16] = "uint16",
    [MOE_I16] = "int16",
    [MOE_F8E4M3] = "float8_e4m3fn",
    [MOE_F8E5M2] = "float8_e5m2",
    [MOE_F8E8M0] = "float8_e8m0fnu",
    [MOE_F4E2M1] = "float4_e2m1fn",
    [MOE_F64] = "float64",
    [MOE_BOOL] = "bool",
    [MOE_U32] = "uint32",
    [MOE_U64] = "uint64",
};

const char *moe_dtype_name(int32_t dtype)
{
    return NAMES[(uint32_t)dtype < MOE_DTYPE_COUNT ? dtype : MOE_DTYPE_NONE];
}

const char *moe_tensor_text(const moe_tensor *t, char *text, size_t size)
{
    if (!tensor_present(t)) {
        snprintf(text, size, "None");
        return text;
    }
    size_t used = 0;
    int wrote = snprintf(text, size, "%s [", moe_dtype_name(t->dtype));
    used = wrote > 0 ? (size_t)wrote : 0;
    for (int i = 0; i < t->ndim && used < size; ++i) {
        wrote = snprintf(text + used, size - used, i ? ", %" PRId64 : "%" PRId64, t->shape[i]);
        used += wrote > 0 ? (size_t)wrote : 0;
    }
    if (used < size) snprintf(text + used, size - used, "]");
    return text;
}

/* ---- routing methods ------------------------------------------------------------------------- */

const moe_route_method moe_route_methods[MOE_ROUTE_COUNT] = {
#define MOE_ROUTE_METHOD(name, score, key, bias, groups, ids, renormalize)                         \
    {#name,                                                                                        \
     MOE_SCORE_##score,                                                                            \
     MOE_KEY_##key,                                                                                \
     MOE_BIAS_##bias,                                                                              \
     MOE_GROUPS_##groups,                                                                          \
     MOE_IDS_##ids,                                                                                \
     MOE_RENORMALIZE_##renormalize},
#include "../kernels/route_methods.def"
#undef MOE_ROUTE_METHOD
};
