/* xla_call.h: our handlers for XLA (xla_ffi.c), as the binding registers them. */
#ifndef MOE_XLA_CALL_H
#define MOE_XLA_CALL_H

#include "xla_ffi.h"

/* One for each function and platform; named "fusedmoe_<function>" in XLA. */
typedef struct moe_xla_handler {
    const char *function, *platform;
    XLA_FFI_Handler *handler;
} moe_xla_handler;

enum { MOE_XLA_HANDLERS = 6 };
extern const moe_xla_handler moe_xla_handlers[MOE_XLA_HANDLERS];

/* The attribute that has to match: who reads the other ones must be who wrote them. */
#define MOE_XLA_VERSION_ATTRIBUTE "abi"

#endif
