/* call_fields.c: the tensors and scalars of a moe_call by name. */
#include "moe.h"

#define TENSOR(field) {#field, offsetof(moe_call, field)}

const moe_call_tensor moe_call_tensors[MOE_CALL_TENSORS] = {
    TENSOR(hidden_states),
    TENSOR(w13),
    TENSOR(w2),
    TENSOR(topk_weights),
    TENSOR(topk_ids),
    TENSOR(router_logits),
    TENSOR(w13_bias),
    TENSOR(w2_bias),
    TENSOR(shared_output),
    TENSOR(expert_map),
    TENSOR(correction_bias),
    TENSOR(expert_scale),
    TENSOR(num_token_non_padded),
    {"expert_map", offsetof(moe_call, routing_map)}, /* as Routing calls it */
    TENSOR(replica_map),
    TENSOR(tid2eid),
    TENSOR(token_ids),
    TENSOR(expert_offsets),
    TENSOR(sorted_token_ids),
    TENSOR(row_of_slot),
    TENSOR(intermediate),
    TENSOR(rows),
    TENSOR(expert_ids),
    TENSOR(num_tokens_post_padded),
    TENSOR(counts),
    TENSOR(out),
    TENSOR(workspace),
    TENSOR(packed),
};

_Static_assert(sizeof(moe_call) - sizeof(moe_options) < (MOE_CALL_TENSORS + 1) * sizeof(moe_tensor),
               "every tensor of moe_call is in moe_call_tensors");

#define OPTION(field)              offsetof(moe_message, call.options.field)
#define CHOICE(field, first, last) {#field, MOE_SCALAR_I32, OPTION(field), first, last}
#define FLAG(field)                CHOICE(field, 0, 1)
#define COUNT(field)               {#field, MOE_SCALAR_I64, OPTION(field), INT64_MIN, INT64_MAX}
#define NUMBER(field)              {#field, MOE_SCALAR_F64, OPTION(field), 0, 0}
#define HEADER(field)              {#field, MOE_SCALAR_I64, offsetof(moe_message, field), 0, INT64_MAX}

/* What fused_experts, fused_moe and route are described by. Runtimes hand attributes over sorted by
 * name. */
const moe_call_scalar moe_call_scalars[MOE_CALL_SCALARS] = {
    CHOICE(activation, 0, MOE_ACT_COUNT - 1),
    NUMBER(activation_alpha),
    NUMBER(activation_limit),
    FLAG(apply_router_weight_on_input),
    FLAG(batch_invariant),
    CHOICE(clamp, MOE_CLAMP_NONE, MOE_CLAMP_BEFORE),
    CHOICE(combine, MOE_COMBINE_SUM, MOE_NO_COMBINE_UNWEIGHTED),
    FLAG(deterministic),
    COUNT(expert_start),
    COUNT(first_shared_id),
    FLAG(gated),
    FLAG(has_alpha),
    FLAG(has_expert_start),
    FLAG(has_limit),
    CHOICE(method, 0, MOE_ROUTE_COUNT - 1),
    COUNT(num_groups),
    COUNT(num_shared),
    COUNT(num_zero_experts),
    HEADER(operands),
    CHOICE(renormalize, -1, 1),
    HEADER(results),
    NUMBER(routed_scaling_factor),
    NUMBER(routing_scale),
    CHOICE(shared, MOE_SHARED_SUM, MOE_SHARED_SINK),
    NUMBER(shared_weight),
    NUMBER(softcap),
    COUNT(topk),
    COUNT(topk_groups),
    CHOICE(w13_order, MOE_ORDER_GATE_UP, MOE_ORDER_INTERLEAVED),
    CHOICE(weights_dtype, MOE_DTYPE_NONE, MOE_DTYPE_COUNT - 1),
    HEADER(workspace_limit),
};
