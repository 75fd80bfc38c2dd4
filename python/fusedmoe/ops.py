"""The functions: the layer, its five stages alone, and planning.

Each is a thin function over the C extension, which takes the same arguments in the same order; all
checks and defaults are in C, which also owns the words of every error. Here are the
signatures and what they mean.

Common to all:
    Tensors are NumPy, PyTorch, CuPy or (on the CPU) JAX arrays, or anything with `__dlpack__`. All
    of one call live on one device. The last dimension is contiguous, the others have any stride.
    None means "not given". On a GPU a call queues kernels on `stream` and returns: no
    synchronisation, no allocation but that of `out` and `workspace` by the caller's framework, so
    it can be captured in a CUDA graph. No gradient is recorded. In code that torch.compile or
    torch.export traces, fused_moe, fused_experts, route and align are torch.ops.fusedmoe.
    A call that raises has written nothing. TypeError: dtype or kind of object. ValueError: shape,
    stride, device, overlap, read-only or too small buffer, number out of range.
    NotImplementedError: no such combination yet. RuntimeError: no GPU, or the driver. MemoryError.
    The same input gives the same bits, every time.
"""

from __future__ import annotations

from functools import wraps
from sys import modules

from . import _C
from .routing import Routing


def _look_for_torch():
    """Whether torch is tracing this call. torch may be loaded later than this module: once it is,
    its own function stands here, the one that costs a third of is_compiling."""
    global _is_traced
    compiler = getattr(modules.get("torch"), "compiler", None)  # None: still loading, for one
    if compiler is None:
        return False
    if compiler.is_compiling():
        return True
    _is_traced = compiler.is_dynamo_compiling
    return False


_is_traced = _look_for_torch


def _is_exported():
    """Whether torch runs this call for real, on tensors without memory."""
    compiler = getattr(modules.get("torch"), "compiler", None)
    return compiler is not None and compiler.is_compiling()


def _torch_ops():
    """What stands for the extension in a graph of torch."""
    from .frameworks import torch_ops

    return torch_ops


def _of_extension(function):
    """The extension's function of this name, under the signature and the documentation of
    `function`, whose body is for code that torch traces.

    What the caller leaves out stays out: Python would look up 22 defaults that the extension knows
    by itself, for a tenth of the time of a call.
    """
    direct = getattr(_C, function.__name__)
    num_positional = function.__code__.co_argcount

    @wraps(function)
    def call(*arguments, **keywords):
        if _is_traced() or len(arguments) > num_positional:  # the latter: Python says what is wrong
            return function(*arguments, **keywords)
        try:
            return direct(*arguments, **keywords)
        except TypeError:
            if not _is_exported():
                raise
        return function(*arguments, **keywords)

    return call


def fused_moe(
    hidden_states,
    w13,
    w2,
    router_logits,
    *,
    routing,
    quant=None,
    w13_scale=None,
    w2_scale=None,
    w13_zero_point=None,
    w2_zero_point=None,
    hidden_states_scale=None,
    intermediate_scale=None,
    w13_bias=None,
    w2_bias=None,
    activation="silu",
    activation_alpha=None,
    activation_limit=None,
    clamp="after",
    gated=True,
    w13_order="gate_up",
    apply_router_weight_on_input=False,
    routed_scaling_factor=None,
    shared_output=None,
    no_combine=False,
    expert_map=None,
    expert_start=None,
    deterministic=True,
    batch_invariant=False,
    out=None,
    workspace=None,
    stream=None,
    dtype=None,
):
    """Routing and the layer.

        topk_weights, topk_ids = route(router_logits, routing)
        out = fused_experts(hidden_states, w13, w2, topk_weights, topk_ids, ...)

    Args:
        router_logits: [num_tokens, num_router_experts] float32, bfloat16 or float16.
            num_router_experts is at most 1024; it is num_experts (less the shared experts of
            routing, which are the last), or the number of global experts where expert_map or
            expert_start is given, here or in routing. Not written.
        routing: a `Routing`. Its weights_dtype is not used: inside the layer they are float32.
        All others: as `fused_experts`.

    Returns:
        out, as `fused_experts`.

    Oracle: reference.fused_moe.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a fusedmoe.Routing, got {type(routing).__name__}")
    return (_torch_ops() if _is_traced() or _is_exported() else _C).fused_moe(
        hidden_states,
        w13,
        w2,
        router_logits,
        routing.topk,
        routing.kernel_method,
        routing.routed_scaling_factor,
        routing.knobs,
        quant,
        w13_scale,
        w2_scale,
        w13_zero_point,
        w2_zero_point,
        hidden_states_scale,
        intermediate_scale,
        w13_bias,
        w2_bias,
        activation,
        activation_alpha,
        activation_limit,
        clamp,
        gated,
        w13_order,
        apply_router_weight_on_input,
        routed_scaling_factor,
        shared_output,
        no_combine,
        expert_map,
        expert_start,
        deterministic,
        batch_invariant,
        out,
        workspace,
        stream,
        dtype,
    )


@_of_extension
def fused_experts(
    hidden_states,
    w13,
    w2,
    topk_weights,
    topk_ids,
    *,
    quant=None,
    w13_scale=None,
    w2_scale=None,
    w13_zero_point=None,
    w2_zero_point=None,
    hidden_states_scale=None,
    intermediate_scale=None,
    w13_bias=None,
    w2_bias=None,
    activation="silu",
    activation_alpha=None,
    activation_limit=None,
    clamp="after",
    gated=True,
    w13_order="gate_up",
    apply_router_weight_on_input=False,
    routed_scaling_factor=None,
    shared_output=None,
    no_combine=False,
    expert_map=None,
    expert_start=None,
    deterministic=True,
    batch_invariant=False,
    out=None,
    workspace=None,
    stream=None,
    dtype=None,
):
    """The layer: every token through its topk experts, summed by weight.

        g, u   = x[t] @ w13[e].T + w13_bias[e]                e = topk_ids[t, s]
        h      = round(activation(g) * u)                     to the dtype of hidden_states
        row    = round(topk_weights[t, s] * (h @ w2[e].T + w2_bias[e]))
        out[t] = round(routed_scaling_factor * sum over s of row + shared_output[t])

    T = num_tokens, H = hidden_size, I = intermediate_size, E = num_experts held here, k = topk.
    Products and sums are float32; `round` is to the dtype of hidden_states. The sum over slots
    runs in the order 0 .. k-1.

    Args:
        hidden_states: [T, H] bfloat16, float16, or on the CPU float32. Written only where it is
            `out` as well.
        w13: [E, 2*I, H] (not gated: [E, I, H]), dtype of hidden_states. Rows in the order of
            `w13_order`.
        w2: [E, H, I], dtype of hidden_states.
        topk_weights: [T, k] float32, bfloat16 or float16.
        topk_ids: [T, k] int32 or int64. Local ids 0 .. E-1; global ids where expert_map or
            expert_start is given. A slot whose id is outside its range, -1 for one, is dropped: it
            contributes exact zeros.
        quant, w13_scale, w2_scale, w13_zero_point, w2_zero_point, hidden_states_scale,
            intermediate_scale: reserved for quantised weights; NotImplementedError unless None.
        w13_bias: [E, 2*I] (not gated: [E, I]) float32 or the dtype of hidden_states, rows ordered
            as w13. None: zero.
        w2_bias: [E, H] float32 or the dtype of hidden_states. None: zero.
        activation: "silu" g*sigmoid(g); "gelu" by erf; "gelu_tanh"; "relu2" max(g, 0)**2;
            "swiglu_oai" (gpt-oss) g*sigmoid(alpha*g) * (u + 1) with g and u clipped at limit, g
            from above only; "situ" alpha*tanh(g/alpha)*sigmoid(g) * limit*tanh(u/limit).
        activation_alpha: None, or a number, for swiglu_oai (1.702 by default) and situ (4).
        activation_limit: None, or a positive number, for silu (none by default), swiglu_oai (7)
            and situ (none).
        clamp: where silu applies its limit. "after": min(silu(g), limit); "before": silu(min(g,
            limit)). u is clipped to [-limit, limit] by both.
        gated: False: h = activation(x @ w13.T + w13_bias), no u.
        w13_order: "gate_up": gate rows, then up rows; "up_gate"; "interleaved": gate i is row 2i,
            up i row 2i + 1.
        apply_router_weight_on_input: topk_weights multiply (x @ w13.T + w13_bias) instead of row.
        routed_scaling_factor: None (1) or a finite number; multiplies the sum, not shared_output.
        shared_output: [T, H] dtype of hidden_states, added last, also to tokens whose slots are
            all dropped. None: nothing.
        no_combine: "weighted" or "unweighted": return the rows [T, k, H], not summed, scaled by
            topk_weights or not; routed_scaling_factor belongs to the sum and is not applied.
        expert_map: [num_global_experts] int32, global id -> local id, -1: not here. None: ids are
            local.
        expert_start: first global id held here, for a contiguous range of experts. Not together
            with expert_map.
        deterministic: False: on a Hopper GPU, from about 1024 tokens, rows may be added into out
            in any order, each sum rounded: faster, not repeatable, with 1.5 times the error where
            topk is 8. `plan(..., deterministic=False)["deterministic"]` says whether they are.
        batch_invariant: reserved; NotImplementedError if True.
        out: [T, H] (no_combine: [T, k, H]) dtype of hidden_states, every element is written. It
            may be hidden_states and overlaps no other argument. None: allocated by the framework
            of hidden_states.
        workspace: [n] uint8, 256-byte aligned, n >= workspace_size(...); its content is arbitrary
            before and after. None: allocated by the framework of hidden_states and dropped after
            the call.
        stream: None (the framework's current stream), an int (CUstream) or an object with
            `__cuda_stream__`.
        dtype: "bfloat16", "float16" or "float32" where the arrays are integers of that width that
            hold such numbers.

    Returns:
        out.

    Oracle: reference.fused_experts. Paper: arXiv:1701.06538; the gated form arXiv:2002.05202.
    """
    return _torch_ops().fused_experts(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        quant,
        w13_scale,
        w2_scale,
        w13_zero_point,
        w2_zero_point,
        hidden_states_scale,
        intermediate_scale,
        w13_bias,
        w2_bias,
        activation,
        activation_alpha,
        activation_limit,
        clamp,
        gated,
        w13_order,
        apply_router_weight_on_input,
        routed_scaling_factor,
        shared_output,
        no_combine,
        expert_map,
        expert_start,
        deterministic,
        batch_invariant,
        out,
        workspace,
        stream,
        dtype,
    )


def route(
    router_logits,
    routing=None,
    *,
    out_weights=None,
    out_ids=None,
    out_packed=None,
    out_counts=None,
    stream=None,
    **fields,
):
    """Stage 1: the experts of each token and their weights.

        x = router_logits[t];  s = score(x);  key = x or s, + correction_bias
        topk_ids[t] = the topk largest keys, ties to the lower id
        topk_weights[t] = routing.routed_scaling_factor * s[topk_ids[t]] (/ their sum, renormalised)

    The method of `routing` says which score and which key (docs/routing.md). Any bit pattern gives
    distinct ids in range and finite weights.

    Args:
        router_logits: [num_tokens, num_experts] float32, bfloat16 or float16, num_experts at most
            1024; gates of shared experts are further columns. Not written.
        routing: a `Routing`; its tensors are on the device of router_logits. None: made of fields.
        fields: those of `Routing`, instead of it.
        out_weights: [num_tokens, routing.num_slots] float32, bfloat16 or float16, written. None:
            allocated as routing.weights_dtype.
        out_ids: [num_tokens, routing.num_slots] int32 or int64, written. None: allocated as
            routing.ids_dtype.
        out_packed: [num_tokens, routing.num_slots] int32, written too: the low 16 bits of the id
            above those of the weight as bfloat16. None: not wanted.
        out_counts: [num_experts] int32, added to: the tokens that chose an expert, before any map
            and without shared slots. None: not wanted.
        stream: as `fused_experts`.

    Returns:
        (topk_weights, topk_ids), in falling order of the keys, shared experts last.

    Oracle: reference.route.
    """
    routing = _routing_of(routing, fields)
    return (_torch_ops() if _is_traced() or _is_exported() else _C).route(
        router_logits,
        routing.topk,
        routing.kernel_method,
        routing.routed_scaling_factor,
        routing.knobs,
        routing.ids_dtype,
        out_weights,
        out_ids,
        out_packed,
        out_counts,
        stream,
    )


def _routing_of(routing, fields):
    if routing is None and fields:
        return Routing(**fields)
    if fields:
        raise TypeError(f"routing: expected None where its fields are given ({', '.join(fields)})")
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a fusedmoe.Routing, got {type(routing).__name__}")
    return routing


def route_align(
    router_logits,
    routing,
    *,
    num_experts=None,
    expert_map=None,
    expert_start=None,
    out_weights=None,
    out_ids=None,
    out_expert_offsets=None,
    out_sorted_token_ids=None,
    out_row_of_slot=None,
    workspace=None,
    stream=None,
):
    """Stages 1 and 2, on a GPU in one launch for few tokens.

        topk_weights, topk_ids = route(router_logits, routing)
        expert_offsets, sorted_token_ids, row_of_slot = align(topk_ids, num_experts, ...)

    Args:
        router_logits, routing, out_weights, out_ids: as `route`; topk_weights that are allocated
            are float32.
        num_experts: experts held here, 1 to 1024. None: those of router_logits and the shared ones.
        expert_map, expert_start: as `fused_experts`.
        out_expert_offsets, out_sorted_token_ids, out_row_of_slot: as `align`.
        workspace, stream: as `fused_experts`.

    Returns:
        (topk_weights, topk_ids, expert_offsets, sorted_token_ids, row_of_slot).

    Oracle: reference.route, reference.align.
    """
    routing = _routing_of(routing, {})
    return _C.route_align(
        router_logits,
        routing.topk,
        routing.kernel_method,
        routing.routed_scaling_factor,
        routing.knobs,
        num_experts,
        expert_map,
        expert_start,
        routing.ids_dtype,
        out_weights,
        out_ids,
        out_expert_offsets,
        out_sorted_token_ids,
        out_row_of_slot,
        workspace,
        stream,
    )


@_of_extension
def align(
    topk_ids,
    num_experts,
    *,
    expert_map=None,
    expert_start=None,
    out_expert_offsets=None,
    out_sorted_token_ids=None,
    out_row_of_slot=None,
    workspace=None,
    stream=None,
):
    """Stage 2: slots grouped by expert, without padding.

        rows of expert e are expert_offsets[e] .. expert_offsets[e + 1] - 1
        sorted_token_ids[row] = token * topk + slot;  row_of_slot[token, slot] = row, -1 where the
        slot is dropped

    Stable: within an expert, rows keep the order of the slots.

    Args:
        topk_ids: [num_tokens, topk] int32 or int64, any values: ids outside the range are dropped
            slots. Not written.
        num_experts: experts held here, 1 to 1024.
        expert_map, expert_start: as `fused_experts`.
        out_expert_offsets: [num_experts + 1] int32, written. None: allocated.
        out_sorted_token_ids: [num_tokens * topk] int32, written below num_rows =
            expert_offsets[num_experts]. None: allocated.
        out_row_of_slot: [num_tokens, topk] int32, written. None: allocated.
        workspace, stream: as `fused_experts`.

    Returns:
        (expert_offsets, sorted_token_ids, row_of_slot).

    Oracle: reference.align.
    """
    return _torch_ops().align(
        topk_ids,
        num_experts,
        expert_map,
        expert_start,
        out_expert_offsets,
        out_sorted_token_ids,
        out_row_of_slot,
        workspace,
        stream,
    )


def gate_up(
    hidden_states,
    w13,
    expert_offsets,
    sorted_token_ids,
    topk,
    *,
    topk_weights=None,
    w13_bias=None,
    activation="silu",
    activation_alpha=None,
    activation_limit=None,
    clamp="after",
    gated=True,
    w13_order="gate_up",
    out=None,
    workspace=None,
    stream=None,
    dtype=None,
):
    """Stage 3: gather, first GEMM, bias, activation.

        g, u = x[sorted_token_ids[row] // topk] @ w13[e].T + w13_bias[e];  intermediate[row] =
        round(activation(g) * u)

    Args:
        hidden_states: [num_tokens, hidden_size] bfloat16, float16, or on the CPU float32. Not
            written.
        w13: [num_experts, 2 * intermediate_size (1 * not gated), hidden_size], the same dtype.
        expert_offsets, sorted_token_ids: from `align`.
        topk: slots per token, 1 to 32.
        topk_weights: [num_tokens, topk] float32, bfloat16 or float16, where they multiply (x @
            w13.T + w13_bias); None: they do not (the usual layer).
        w13_bias, activation, activation_alpha, activation_limit, clamp, gated, w13_order: as
            `fused_experts`.
        out: [num_tokens * topk, intermediate_size] dtype of hidden_states, written below num_rows.
            None: allocated.
        workspace, stream, dtype: as `fused_experts`.

    Returns:
        intermediate; rows from num_rows on are not written.

    Oracle: reference.gate_up.
    """
    return _C.gate_up(
        hidden_states,
        w13,
        expert_offsets,
        sorted_token_ids,
        topk,
        topk_weights,
        w13_bias,
        activation,
        activation_alpha,
        activation_limit,
        clamp,
        gated,
        w13_order,
        out,
        workspace,
        stream,
        dtype,
    )


def down(
    intermediate,
    w2,
    expert_offsets,
    sorted_token_ids,
    topk,
    *,
    topk_weights=None,
    w2_bias=None,
    out=None,
    workspace=None,
    stream=None,
    dtype=None,
):
    """Stage 4: second GEMM, bias, weight.

        rows[row] = round(topk_weights[token, slot] * (intermediate[row] @ w2[e].T + w2_bias[e]))

    Args:
        intermediate: [num_tokens * topk, intermediate_size] bfloat16, float16, or on the CPU
            float32; rows from num_rows on are not read. Not written.
        w2: [num_experts, hidden_size, intermediate_size], the same dtype.
        expert_offsets, sorted_token_ids: from `align`.
        topk: slots per token, 1 to 32.
        topk_weights: [num_tokens, topk] float32, bfloat16 or float16. None: weight 1.
        w2_bias: [num_experts, hidden_size] float32 or the dtype of intermediate. None: zero.
        out: [num_tokens * topk, hidden_size] dtype of intermediate, written below num_rows. None:
            allocated.
        workspace, stream, dtype: as `fused_experts`.

    Returns:
        rows; those from num_rows on are not written.

    Oracle: reference.down.
    """
    return _C.down(
        intermediate,
        w2,
        expert_offsets,
        sorted_token_ids,
        topk,
        topk_weights,
        w2_bias,
        out,
        workspace,
        stream,
        dtype,
    )


def combine(
    rows,
    row_of_slot,
    *,
    routed_scaling_factor=None,
    shared_output=None,
    out=None,
    stream=None,
    dtype=None,
):
    """Stage 5: the sum over slots.

        out[t] = round(routed_scaling_factor * sum over s of rows[row_of_slot[t, s]] +
        shared_output[t])

    Args:
        rows: [num_rows or more, hidden_size] bfloat16, float16, or on the CPU float32, from
            `down`. Not written.
        row_of_slot: [num_tokens, topk] int32, from `align`; -1: nothing to add.
        routed_scaling_factor, shared_output: as `fused_experts`.
        out: [num_tokens, hidden_size] dtype of rows, every element is written. None: allocated.
        stream, dtype: as `fused_experts`.

    Returns:
        out.

    Oracle: reference.combine.
    """
    return _C.combine(rows, row_of_slot, routed_scaling_factor, shared_output, out, stream, dtype)


def quantize(x, *, quant, scale=None, out=None, out_scale=None, stream=None):
    """Reserved: activations to fp8 or int8 with their scales. Raises NotImplementedError."""
    raise NotImplementedError(f"quantize: quant={quant!r} is not built yet")


def align_block_size(
    topk_ids,
    block_size,
    num_experts,
    *,
    expert_map=None,
    expert_start=None,
    pad=True,
    out_sorted_token_ids=None,
    out_expert_ids=None,
    out_num_tokens_post_padded=None,
    workspace=None,
    stream=None,
):
    """`align` with every expert's rows padded to a multiple of block_size, the layout that kernels
    of other engines take.

        block b holds slots sorted_token_ids[b * block_size : (b + 1) * block_size] of expert
        expert_ids[b]; num_tokens * topk stands where a block has none

    Stable: within an expert, slots ascend. Dropped slots have no place.

    Args:
        topk_ids: [num_tokens, topk] int32 or int64, any values. Not written.
        block_size: rows of a block, 1 to 256.
        num_experts: experts held here, 1 to 1024.
        expert_map, expert_start: as `fused_experts`.
        pad: False: what is behind num_tokens_post_padded in sorted_token_ids is not written.
        out_sorted_token_ids: [n] int32, written, n >= padded(num_tokens * topk), where padded(s) =
            s + min(s, num_experts) * (block_size - 1) down to a multiple of block_size. None:
            allocated.
        out_expert_ids: [padded(num_tokens * topk) / block_size or more] int32, written; -1 for
            blocks that are not used. None: allocated.
        out_num_tokens_post_padded: [1] int32, written: rows with padding. None: allocated.
        workspace, stream: as `fused_experts`; workspace at least 12 bytes for each slot.

    Returns:
        (sorted_token_ids, expert_ids, num_tokens_post_padded).

    Oracle: reference.align_block_size.
    """
    return _C.align_block_size(
        topk_ids,
        block_size,
        num_experts,
        expert_map,
        expert_start,
        pad,
        out_sorted_token_ids,
        out_expert_ids,
        out_num_tokens_post_padded,
        workspace,
        stream,
    )


def count_tokens_per_expert(
    topk_ids,
    num_experts,
    *,
    expert_map=None,
    expert_start=None,
    out=None,
    workspace=None,
    stream=None,
):
    """How many slots go to each expert.

    Args:
        topk_ids, num_experts, expert_map, expert_start: as `align`.
        out: [num_experts] int32, written. None: allocated.
        workspace, stream: as `align_block_size`.

    Returns:
        out.

    Oracle: numpy.diff of the expert_offsets of reference.align.
    """
    return _C.count_tokens_per_expert(
        topk_ids, num_experts, expert_map, expert_start, out, workspace, stream
    )


def plan(
    num_tokens,
    hidden_size,
    intermediate_size,
    num_experts,
    topk,
    *,
    dtype="bfloat16",
    device="cuda",
    num_sms=0,
    gated=True,
    no_combine=False,
    routed=False,
    router_experts=0,
    vector_bytes=16,
    workspace_limit=0,
    deterministic=True,
):
    """What a call of these sizes does: variants, tiles, chunks, workspace, expected time. Needs no
    GPU, touches no memory.

    Args:
        num_tokens, hidden_size, intermediate_size, num_experts, topk: the sizes of the layer.
        dtype: "bfloat16", "float16" or "float32".
        device: "cuda" or "cpu".
        num_sms: of the GPU (on the CPU: threads). 0: those of the first GPU here, else of an H200.
        gated, no_combine, deterministic: as `fused_experts`.
        routed: the call starts at router_logits (`fused_moe`).
        router_experts: columns of router_logits; 0: num_experts.
        vector_bytes: alignment that every row of hidden_states, w13 and w2 has: 16, or the
            element's size.
        workspace_limit: bytes; more tokens than fit are done in chunks. 0:
            FUSEDMOE_WORKSPACE_LIMIT, else 1.5 GiB.

    Returns:
        A dict, the fields of moe_plan in csrc/moe.h: bytes, FLOPs and microseconds are expected
            values.

    Raises:
        ValueError: a size outside its range.
    """
    return _C.plan(
        num_tokens,
        hidden_size,
        intermediate_size,
        num_experts,
        topk,
        dtype,
        device,
        num_sms,
        gated,
        no_combine,
        routed,
        router_experts,
        vector_bytes,
        workspace_limit,
        deterministic,
    )


def workspace_size(
    num_tokens,
    hidden_size,
    intermediate_size,
    num_experts,
    topk,
    *,
    dtype="bfloat16",
    device="cuda",
    num_sms=0,
    gated=True,
    no_combine=False,
    routed=False,
    router_experts=0,
    vector_bytes=16,
    workspace_limit=0,
    deterministic=True,
):
    """Bytes of workspace a call of these sizes needs. Pure; never falls when num_tokens grows, so
    that the size for the largest batch serves all smaller ones. Arguments as `plan`.

    Returns:
        int, a multiple of 256.
    """
    return _C.workspace_size(
        num_tokens,
        hidden_size,
        intermediate_size,
        num_experts,
        topk,
        dtype,
        device,
        num_sms,
        gated,
        no_combine,
        routed,
        router_experts,
        vector_bytes,
        workspace_limit,
        deterministic,
    )


def load(device=0):
    """Loads the kernels onto a GPU now instead of at the first call there. Needed before a first
    call under graph capture.

    Args:
        device: index of the GPU.

    Raises:
        RuntimeError: no driver, no such GPU, or a GPU older than sm_80.
    """
    return _C.load(device)
