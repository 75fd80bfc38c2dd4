/* pipeline.c: runs a plan. The five stages in order, for each chunk of tokens, on the plan's backend.
 *
 *   route -> align -> gate_up -> down -> combine
 *
 * Every pointer a stage gets is made here, from the call's tensors and the workspace offsets of the plan;
 * no decision is taken here. */
#include "cuda/cuda.h"
#include "moe.h"

#include <inttypes.h>
#include <string.h>

/* What one run needs beside its stage structs. */
typedef struct run {
    const moe_call *call;
    const moe_plan *plan;
    char *workspace; /* aligned to MOE_ALIGNMENT */
    int device;
    void *stream;
    moe_error *err;
} run;

static void *offset(const moe_tensor *t, int64_t elements)
{
    return tensor_present(t) && t->data ? (char *)t->data + elements * moe_dtype_bytes(t->dtype)
                                        : NULL;
}

/* Stride from row to row; one row or none leaves it free, and then 0 keeps pointers where they are. */
static int64_t row_stride(const moe_tensor *t)
{
    return t->ndim > 0 && t->shape[0] > 1 ? t->stride[0] : 0;
}

static void *part(const run *r, int64_t at)
{
    return at < 0 ? NULL : r->workspace + at;
}

static bool on_gpu(const run *r)
{
    return r->plan->backend == MOE_CUDA;
}

static int run_route(const run *r, const moe_route_args *a)
{
    return on_gpu(r) ? moe_cuda_route(r->plan, a, r->device, r->stream, r->err)
                     : moe_cpu_route(a, r->err);
}

static int run_align(const run *r, const moe_align_args *a)
{
    return on_gpu(r) ? moe_cuda_align(r->plan, a, r->device, r->stream, r->err)
                     : moe_cpu_align(a, r->err);
}

static int run_route_align(const run *r, const moe_route_args *route, const moe_align_args *align)
{
    if (on_gpu(r) && moe_route_aligns(route))
        return moe_cuda_route_align(r->plan, route, align, r->device, r->stream, r->err);
    if (run_route(r, route)) return r->err->status;
    return run_align(r, align);
}

static int run_gate_up(const run *r, const moe_gate_up_args *a)
{
    return on_gpu(r) ? moe_cuda_gate_up(r->plan, a, r->device, r->stream, r->err)
                     : moe_cpu_gate_up(a, r->err);
}

static int run_down(const run *r, const moe_down_args *a)
{
    return on_gpu(r) ? moe_cuda_down(r->plan, a, r->device, r->stream, r->err)
                     : moe_cpu_down(a, r->err);
}

static int run_experts(const run *r, const moe_gate_up_args *gate_up, const moe_down_args *down)
{
    if (r->plan->one_launch) {
        const moe_experts_args a = {*gate_up, *down};
        return moe_cuda_experts(r->plan, &a, r->device, r->stream, r->err);
    }
    if (run_gate_up(r, gate_up)) return r->err->status;
    return run_down(r, down);
}

static int run_combine(const run *r, const moe_combine_args *a)
{
    return on_gpu(r) ? moe_cuda_combine(r->plan, a, r->device, r->stream, r->err)
                     : moe_cpu_combine(a, r->err);
}

/* What any order of sums allows, on a GPU: out is filled, then down adds its rows. Behind gate_up: out may be
 * hidden_states; where it is not, it is filled while gate_up runs. Of topk 1 only dropped tokens are filled: down writes
 * the others. */
static int run_adding(const run *r, const moe_gate_up_args *gate_up, const moe_down_args *down,
                      const moe_combine_args *combine)
{
    const bool once = combine->topk == 1 && !combine->shared_output;
    const moe_fill_args fill = {
        .shared_output = combine->shared_output,
        .row_of_slot = once ? combine->row_of_slot : NULL,
        .out = combine->out,
        .shared_stride = combine->shared_stride,
        .out_stride = combine->out_stride,
        .num_tokens = combine->num_tokens,
        .hidden_size = combine->hidden_size,
        .wait = r->call->out.data == r->call->hidden_states.data,
    };
    moe_down_add_args add = {*down, combine->scale, (uint32_t)r->plan->down.band_tiles, once};
    add.stage.rows = combine->out;
    add.stage.rows_stride = combine->out_stride;
    if (run_gate_up(r, gate_up) || moe_cuda_fill(r->plan, &fill, r->device, r->stream, r->err))
        return r->err->status;
    return moe_cuda_down_add(r->plan, &add, r->device, r->stream, r->err);
}

static moe_route_args route_args(const run *r, int64_t first_token, int64_t num_tokens)
{
    const moe_tensor *logits = &r->call->router_logits;
    const moe_problem *p = &r->plan->problem;
    moe_route_args a;
    const moe_call *c = r->call;
    const moe_options *o = &c->options;
    const moe_route_method *method = &moe_route_methods[o->method];
    memset(&a, 0, sizeof a);
    a.router_logits = offset(logits, first_token * row_stride(logits));
    a.logits_stride = row_stride(logits);
    a.correction_bias = offset(&c->correction_bias, 0);
    a.bias_dtype = c->correction_bias.dtype;
    a.expert_scale = offset(&c->expert_scale, 0);
    a.num_token_non_padded = offset(&c->num_token_non_padded, 0);
    if (tensor_present(&c->replica_map)) {
        a.replica_map = c->replica_map.data;
        a.replica_stride = row_stride(&c->replica_map);
        a.num_replicas = (int32_t)c->replica_map.shape[1];
    }
    if (tensor_present(&c->routing_map)) {
        a.expert_map = c->routing_map.data;
        a.expert_map_size = c->routing_map.shape[0];
    }
    if (tensor_present(&c->tid2eid)) {
        a.tid2eid = c->tid2eid.data;
        a.tid_dtype = c->tid2eid.dtype;
        a.tid_stride = row_stride(&c->tid2eid);
        a.tid_rows = c->tid2eid.shape[0];
        a.token_ids = offset(&c->token_ids, first_token);
        a.token_ids_dtype = c->token_ids.dtype;
        if (a.token_ids == NULL && a.tid_stride) { /* a row for each token */
            a.tid2eid = offset(&c->tid2eid, first_token * a.tid_stride);
            a.tid_rows -= first_token;
        }
    }
    a.topk_weights = part(r, r->plan->workspace.topk_weights);
    a.topk_ids = part(r, r->plan->workspace.topk_ids);
    a.weights_stride = a.ids_stride = p->topk;
    a.num_tokens = num_tokens;
    a.first_token = first_token;
    a.num_experts = p->router_experts;
    a.num_slots = p->topk;
    a.topk = (int32_t)o->topk;
    a.num_zero_experts = (int32_t)o->num_zero_experts;
    a.num_groups = (int32_t)o->num_groups;
    a.topk_groups = (int32_t)o->topk_groups;
    a.logits_dtype = logits->dtype;
    a.weights_dtype = MOE_F32;
    a.ids_dtype = MOE_I32;
    a.method = o->method;
    a.score = method->score;
    a.key = method->key;
    a.bias = method->bias;
    a.groups = method->groups;
    a.ids = method->ids;
    a.renormalize = o->renormalize >= 0 ? o->renormalize : method->renormalize % 2;
    a.shared = o->shared;
    a.shared_weight = (float)o->shared_weight;
    a.softcap = (float)o->softcap;
    a.scale = (float)o->routing_scale;
    a.shared_id = o->first_shared_id < 0 ? p->router_experts : (int32_t)o->first_shared_id;
    a.general = !(method->score == MOE_SCORE_SOFTMAX && method->key == MOE_KEY_LOGIT &&
                  method->bias == MOE_BIAS_NONE && method->groups == MOE_GROUPS_NONE &&
                  method->ids == MOE_IDS_LARGEST) ||
                a.num_slots > a.topk || a.num_zero_experts || o->softcap != 0 || a.expert_scale ||
                a.num_token_non_padded || a.replica_map || a.expert_map;
    return a;
}

static moe_align_args align_args(const run *r, int64_t first_token, int64_t num_tokens)
{
    const moe_call *c = r->call;
    const moe_plan *plan = r->plan;
    const moe_problem *p = &plan->problem;
    moe_align_args a;
    memset(&a, 0, sizeof a);
    if (p->routed) {
        a.topk_ids = part(r, plan->workspace.topk_ids);
        a.ids_stride = p->topk;
    } else {
        a.topk_ids = offset(&c->topk_ids, first_token * row_stride(&c->topk_ids));
        a.ids_stride = row_stride(&c->topk_ids);
    }
    if (tensor_present(&c->expert_map)) {
        a.expert_map = c->expert_map.data;
        a.expert_map_size = c->expert_map.shape[0];
    }
    a.expert_start = c->options.has_expert_start ? c->options.expert_start : 0;
    a.expert_offsets = part(r, plan->workspace.expert_offsets);
    a.sorted_token_ids = part(r, plan->workspace.sorted_token_ids);
    a.row_of_slot = part(r, plan->workspace.row_of_slot);
    a.tiles = part(r, plan->workspace.tiles);
    a.num_tiles = part(r, plan->workspace.num_tiles);
    a.counts = part(r, plan->workspace.counts);
    a.num_tokens = num_tokens;
    a.topk = p->topk;
    a.num_experts = p->num_experts;
    a.ids_dtype = (int16_t)p->ids_dtype;
    a.tile_rows = plan->tile_rows;
    a.max_tiles = plan->max_tiles;
    a.high_rows = plan->high_rows;
    a.high_cost = plan->high_cost;
    a.num_blocks = (int16_t)plan->align.blocks;
    a.count_blocks = (int16_t)plan->align.count_blocks;
    a.piece_slots = (int16_t)plan->align.piece_slots;
    return a;
}

/* The topk weights of a chunk: routed ones lie in the workspace. */
static const void *chunk_weights(const run *r, int64_t first_token, int64_t *stride, int32_t *dtype)
{
    if (r->plan->problem.routed) {
        *stride = r->plan->problem.topk;
        *dtype = MOE_F32;
        return part(r, r->plan->workspace.topk_weights);
    }
    *stride = row_stride(&r->call->topk_weights);
    *dtype = r->call->topk_weights.dtype;
    return offset(&r->call->topk_weights, first_token * *stride);
}

static moe_gate_up_args gate_up_args(const run *r, int64_t first_token, int64_t num_tokens)
{
    const moe_call *c = r->call;
    const moe_plan *plan = r->plan;
    const moe_problem *p = &plan->problem;
    const moe_options *o = &c->options;
    moe_gate_up_args a;
    memset(&a, 0, sizeof a);
    a.hidden_states = offset(&c->hidden_states, first_token * row_stride(&c->hidden_states));
    a.hidden_stride = row_stride(&c->hidden_states);
    a.w13 = c->w13.data;
    a.w13_expert_stride = row_stride(&c->w13);
    a.w13_row_stride = c->w13.stride[1];
    if (tensor_present(&c->w13_bias)) {
        a.w13_bias = c->w13_bias.data;
        a.w13_bias_stride = row_stride(&c->w13_bias);
        a.w13_bias_dtype = c->w13_bias.dtype;
    }
    if (o->apply_router_weight_on_input)
        a.topk_weights = chunk_weights(r, first_token, &a.weights_stride, &a.weights_dtype);
    a.expert_offsets = part(r, plan->workspace.expert_offsets);
    a.sorted_token_ids = part(r, plan->workspace.sorted_token_ids);
    a.tiles = part(r, plan->workspace.tiles);
    a.num_tiles = part(r, plan->workspace.num_tiles);
    a.max_tiles = plan->max_tiles;
    a.intermediate = part(r, plan->workspace.intermediate);
    a.intermediate_stride = plan->intermediate_stride;
    a.num_tokens = num_tokens;
    a.num_slots = num_tokens * p->topk;
    a.num_experts = p->num_experts;
    a.topk = p->topk;
    a.hidden_size = p->hidden_size;
    a.intermediate_size = p->intermediate_size;
    a.dtype = p->dtype;
    a.activation = o->activation;
    a.gated = o->gated;
    a.w13_order = o->w13_order;
    a.clamp = o->activation == MOE_ACT_SILU && o->has_limit ? o->clamp : MOE_CLAMP_NONE;
    a.activation_alpha = o->has_alpha                          ? (float)o->activation_alpha
                         : o->activation == MOE_ACT_SWIGLU_OAI ? 1.702f
                                                               : 4.0f;
    a.activation_limit = o->has_limit                          ? (float)o->activation_limit
                         : o->activation == MOE_ACT_SWIGLU_OAI ? 7.0f
                                                               : 0.0f;
    return a;
}

static moe_down_args down_args(const run *r, int64_t first_token, int64_t num_tokens)
{
    const moe_call *c = r->call;
    const moe_plan *plan = r->plan;
    const moe_problem *p = &plan->problem;
    moe_down_args a;
    memset(&a, 0, sizeof a);
    a.intermediate = part(r, plan->workspace.intermediate);
    a.intermediate_stride = plan->intermediate_stride;
    a.w2 = c->w2.data;
    a.w2_expert_stride = row_stride(&c->w2);
    a.w2_row_stride = c->w2.stride[1];
    if (tensor_present(&c->w2_bias)) {
        a.w2_bias = c->w2_bias.data;
        a.w2_bias_stride = row_stride(&c->w2_bias);
        a.w2_bias_dtype = c->w2_bias.dtype;
    }
    if (!c->options.apply_router_weight_on_input && p->combine != MOE_NO_COMBINE_UNWEIGHTED)
        a.topk_weights = chunk_weights(r, first_token, &a.weights_stride, &a.weights_dtype);
    a.expert_offsets = part(r, plan->workspace.expert_offsets);
    a.sorted_token_ids = part(r, plan->workspace.sorted_token_ids);
    a.tiles = part(r, plan->workspace.tiles);
    a.num_tiles = part(r, plan->workspace.num_tiles);
    a.max_tiles = plan->max_tiles;
    a.rows = part(r, plan->workspace.rows);
    a.rows_stride = plan->rows_stride;
    a.num_tokens = num_tokens;
    a.num_slots = num_tokens * p->topk;
    a.num_experts = p->num_experts;
    a.topk = p->topk;
    a.hidden_size = p->hidden_size;
    a.intermediate_size = p->intermediate_size;
    a.dtype = p->dtype;
    return a;
}

static moe_combine_args combine_args(const run *r, int64_t first_token, int64_t num_tokens)
{
    const moe_call *c = r->call;
    const moe_plan *plan = r->plan;
    const moe_problem *p = &plan->problem;
    moe_combine_args a;
    memset(&a, 0, sizeof a);
    a.rows = part(r, plan->workspace.rows);
    a.rows_stride = plan->rows_stride;
    a.num_rows = num_tokens * p->topk;
    a.row_of_slot = part(r, plan->workspace.row_of_slot);
    a.out = offset(&c->out, first_token * row_stride(&c->out));
    a.hidden_size = p->hidden_size;
    a.dtype = p->dtype;
    if (p->combine == MOE_COMBINE_SUM) {
        a.out_stride = row_stride(&c->out);
        a.num_tokens = num_tokens;
        a.topk = p->topk;
        a.scale = (float)c->options.routed_scaling_factor;
        if (tensor_present(&c->shared_output)) {
            a.shared_output =
                offset(&c->shared_output, first_token * row_stride(&c->shared_output));
            a.shared_stride = row_stride(&c->shared_output);
        }
    } else { /* [num_tokens, topk, H] is the same stage with one slot per "token" */
        a.out_stride = p->topk > 1 ? c->out.stride[1] : row_stride(&c->out);
        a.num_tokens = num_tokens * p->topk;
        a.topk = 1;
        a.scale = 1.0f;
    }
    return a;
}

static moe_slot_args slot_args(const run *r, int64_t first_token, int64_t num_tokens)
{
    const moe_align_args align = align_args(r, first_token, num_tokens);
    moe_slot_args a;
    memset(&a, 0, sizeof a);
    a.topk_ids = align.topk_ids;
    a.expert_map = align.expert_map;
    a.ids_stride = align.ids_stride;
    a.expert_start = align.expert_start;
    a.expert_map_size = align.expert_map_size;
    a.ids_dtype = align.ids_dtype;
    a.num_experts = align.num_experts;
    a.topk = align.topk;
    a.num_slots = (int32_t)(num_tokens * align.topk);
    int64_t stride = 0;
    int32_t dtype = 0;
    a.topk_weights = chunk_weights(r, first_token, &stride, &dtype);
    a.weights_stride_bytes = stride * moe_dtype_bytes(dtype);
    return a;
}

/* A few tokens, on a GPU: align is part of the GEMMs, combine of down. */
static int run_decode(const run *r, int64_t first_token, int64_t num_tokens)
{
    moe_gate_up_decode_args up;
    memset(&up, 0, sizeof up);
    up.stage = gate_up_args(r, first_token, num_tokens);
    up.slots = slot_args(r, first_token, num_tokens);
    up.ring_stages = r->plan->gate_up.ring_stages;
    up.stages_left = r->plan->gate_up.stages_left;
    if (moe_cuda_gate_up_decode(r->plan, &up, r->device, r->stream, r->err)) return r->err->status;

    const moe_combine_args combine = combine_args(r, first_token, num_tokens);
    moe_down_decode_args down;
    memset(&down, 0, sizeof down);
    down.stage = down_args(r, first_token, num_tokens);
    down.slots = up.slots;
    down.shared_output = combine.shared_output;
    down.shared_stride = combine.shared_stride;
    down.out = combine.out;
    down.out_stride = combine.out_stride;
    down.scale = combine.scale;
    down.vector = r->plan->combine_vector_bytes == 16;
    down.box_chunks = r->plan->down.box_chunks;
    down.copies = r->plan->down.copies;
    down.ring_stages = r->plan->down.ring_stages;
    return moe_cuda_down_decode(r->plan, &down, r->device, r->stream, r->err);
}

static int run_chunk(const run *r, int64_t first_token, int64_t num_tokens)
{
    moe_align_args align = align_args(r, first_token, num_tokens);
    if (r->plan->problem.routed) {
        moe_route_args route = route_args(r, first_token, num_tokens);
        if (r->plan->decode ? run_route(r, &route) : run_route_align(r, &route, &align))
            return r->err->status;
    } else if (!r->plan->decode && run_align(r, &align)) {
        return r->err->status;
    }
    if (r->plan->decode) return run_decode(r, first_token, num_tokens);
    const moe_gate_up_args gate_up = gate_up_args(r, first_token, num_tokens);
    const moe_down_args down = down_args(r, first_token, num_tokens);
    const moe_combine_args combine = combine_args(r, first_token, num_tokens);
    if (r->plan->adds) return run_adding(r, &gate_up, &down, &combine);
    if (run_experts(r, &gate_up, &down)) return r->err->status;
    return run_combine(r, &combine);
}

int moe_check_workspace(const moe_call *call, const moe_plan *plan, moe_error *err)
{
    const moe_tensor *workspace = &call->workspace;
    const int64_t required = plan->workspace.total, got = workspace->shape[0];
    const int64_t lost = (int64_t)(-(uintptr_t)workspace->data % MOE_ALIGNMENT);
    if (required == 0 || got - lost >= required) return MOE_OK;
    if (lost == 0)
        return moe_fail(err, MOE_ERROR_VALUE,
                        "workspace: expected at least %" PRId64 " bytes, got %" PRId64, required,
                        got);
    return moe_fail(err, MOE_ERROR_VALUE,
                    "workspace: expected at least %" PRId64 " bytes, got %" PRId64 " (%" PRId64
                    " of them to reach an address that is a multiple of 256)",
                    required + lost, got, lost);
}

static char *align_up(void *address)
{
    return (char *)(((uintptr_t)address + MOE_ALIGNMENT - 1) / MOE_ALIGNMENT * MOE_ALIGNMENT);
}

static run make_run(const moe_call *call, const moe_plan *plan, const moe_tensor *like,
                    void *stream, moe_error *err)
{
    run r = {call, plan, NULL, like->device, stream, err};
    if (tensor_present(&call->workspace) && call->workspace.data)
        r.workspace = align_up(call->workspace.data);
    return r;
}

int moe_run_layer(const moe_call *call, const moe_plan *plan, void *stream, moe_error *err)
{
    const int64_t num_tokens = plan->problem.num_tokens;
    const run r = make_run(call, plan, &call->hidden_states, stream, err);
    if (!on_gpu(&r) && !plan->problem.routed) { /* all of them, before the first chunk writes out */
        const moe_align_args ids = align_args(&r, 0, num_tokens);
        if (moe_cpu_check_ids(&ids, err)) return err->status;
    }
    for (int64_t first = 0; first < num_tokens; first += plan->chunk_tokens) {
        int64_t left = num_tokens - first;
        if (run_chunk(&r, first, left < plan->chunk_tokens ? left : plan->chunk_tokens))
            return err->status;
    }
    return MOE_OK;
}

/* Alone, a stage reads and writes the caller's tensors where the layer would use its workspace. */
static moe_route_args route_alone_args(const run *r)
{
    const moe_call *c = r->call;
    moe_route_args a = route_args(r, 0, r->plan->problem.num_tokens);
    a.topk_weights = c->topk_weights.data;
    a.weights_stride = row_stride(&c->topk_weights);
    a.topk_ids = c->topk_ids.data;
    a.ids_stride = row_stride(&c->topk_ids);
    a.ids_dtype = c->topk_ids.dtype;
    a.weights_dtype = c->topk_weights.dtype;
    a.packed = offset(&c->packed, 0);
    a.packed_stride = row_stride(&c->packed);
    a.counts = offset(&c->counts, 0);
    a.general |= a.weights_dtype != MOE_F32 || a.packed || a.counts;
    return a;
}

static int run_route_alone(const run *r)
{
    const moe_route_args a = route_alone_args(r);
    return run_route(r, &a);
}

static moe_align_args align_alone_args(const run *r)
{
    const moe_call *c = r->call;
    moe_align_args a = align_args(r, 0, r->plan->problem.num_tokens);
    a.topk_ids = c->topk_ids.data;
    a.ids_stride = row_stride(&c->topk_ids);
    a.ids_dtype = (int16_t)c->topk_ids.dtype;
    a.expert_offsets = c->expert_offsets.data;
    a.sorted_token_ids = c->sorted_token_ids.data;
    a.row_of_slot = c->row_of_slot.data;
    return a;
}

static int run_align_alone(const run *r)
{
    const moe_align_args a = align_alone_args(r);
    return run_align(r, &a);
}

static int run_route_align_alone(const run *r)
{
    const moe_route_args route = route_alone_args(r);
    const moe_align_args align = align_alone_args(r);
    return route.num_tokens ? run_route_align(r, &route, &align) : run_align(r, &align);
}

static int run_align_block(const run *r)
{
    const moe_call *c = r->call;
    const moe_align_args align = align_args(r, 0, r->plan->problem.num_tokens);
    if (run_align(r, &align)) return r->err->status;
    moe_pad_args a;
    memset(&a, 0, sizeof a);
    a.expert_offsets = align.expert_offsets;
    a.rows = align.sorted_token_ids;
    a.num_slots = align.num_tokens * align.topk;
    a.num_experts = align.num_experts;
    a.block_size = c->block_size ? (int32_t)c->block_size : 1;
    a.fill = c->fill;
    a.counts = offset(&c->counts, 0);
    if (c->block_size) {
        a.sorted_token_ids = c->sorted_token_ids.data;
        a.capacity = c->sorted_token_ids.shape[0];
        a.expert_ids = c->expert_ids.data;
        a.num_blocks = c->expert_ids.shape[0];
        a.num_tokens_post_padded = c->num_tokens_post_padded.data;
    }
    return on_gpu(r) ? moe_cuda_align_pad(r->plan, &a, r->device, r->stream, r->err)
                     : moe_cpu_align_pad(&a, r->err);
}

/* gate_up and down alone bring their groups; on the GPU the work list is made from them first. */
static int make_tiles(const run *r)
{
    if (!on_gpu(r)) return MOE_OK;
    moe_align_args a = align_args(r, 0, r->plan->problem.num_tokens);
    a.expert_offsets = r->call->expert_offsets.data;
    return moe_cuda_align_tiles(r->plan, &a, r->device, r->stream, r->err);
}

static int run_gate_up_alone(const run *r)
{
    const moe_call *c = r->call;
    if (make_tiles(r)) return r->err->status;
    moe_gate_up_args a = gate_up_args(r, 0, r->plan->problem.num_tokens);
    a.topk_weights = c->topk_weights.data;
    a.weights_stride = row_stride(&c->topk_weights);
    a.weights_dtype = c->topk_weights.dtype;
    a.expert_offsets = c->expert_offsets.data;
    a.sorted_token_ids = c->sorted_token_ids.data;
    a.intermediate = c->out.data;
    a.intermediate_stride = row_stride(&c->out);
    return run_gate_up(r, &a);
}

static int run_down_alone(const run *r)
{
    const moe_call *c = r->call;
    if (make_tiles(r)) return r->err->status;
    moe_down_args a = down_args(r, 0, r->plan->problem.num_tokens);
    a.intermediate = c->intermediate.data;
    a.intermediate_stride = row_stride(&c->intermediate);
    a.topk_weights = c->topk_weights.data;
    a.weights_stride = row_stride(&c->topk_weights);
    a.weights_dtype = c->topk_weights.dtype;
    a.expert_offsets = c->expert_offsets.data;
    a.sorted_token_ids = c->sorted_token_ids.data;
    a.rows = c->out.data;
    a.rows_stride = row_stride(&c->out);
    return run_down(r, &a);
}

static int run_combine_alone(const run *r)
{
    const moe_call *c = r->call;
    moe_combine_args a = combine_args(r, 0, r->plan->problem.num_tokens);
    a.rows = c->rows.data;
    a.rows_stride = row_stride(&c->rows);
    a.num_rows = c->rows.shape[0];
    a.row_of_slot = c->row_of_slot.data;
    return run_combine(r, &a);
}

int moe_run_stage(const moe_call *call, const moe_plan *plan, void *stream, moe_error *err)
{
    const moe_tensor *like = call->operation == MOE_OP_ROUTE         ? &call->router_logits
                             : call->operation == MOE_OP_ROUTE_ALIGN ? &call->router_logits
                             : call->operation == MOE_OP_ALIGN       ? &call->topk_ids
                             : call->operation == MOE_OP_ALIGN_BLOCK ? &call->topk_ids
                             : call->operation == MOE_OP_GATE_UP     ? &call->hidden_states
                             : call->operation == MOE_OP_DOWN        ? &call->intermediate
                                                                     : &call->rows;
    const run r = make_run(call, plan, like, stream, err);
    switch (call->operation) {
    case MOE_OP_ALIGN:
        return run_align_alone(&r); /* also of no tokens: expert_offsets are written */
    case MOE_OP_ALIGN_BLOCK:
        return run_align_block(&r);
    case MOE_OP_ROUTE_ALIGN:
        return run_route_align_alone(&r);
    case MOE_OP_ROUTE:
        return plan->problem.num_tokens ? run_route_alone(&r) : MOE_OK;
    case MOE_OP_GATE_UP:
        return plan->problem.num_tokens ? run_gate_up_alone(&r) : MOE_OK;
    case MOE_OP_DOWN:
        return plan->problem.num_tokens ? run_down_alone(&r) : MOE_OK;
    case MOE_OP_COMBINE:
        return plan->problem.num_tokens ? run_combine_alone(&r) : MOE_OK;
    case MOE_OP_FUSED_EXPERTS:
    case MOE_OP_FUSED_MOE:
        break;
    }
    return moe_fail(err, MOE_ERROR_RUNTIME, "operation: expected a stage, got %d",
                    (int)call->operation);
}
