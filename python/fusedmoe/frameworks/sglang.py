"""SGLang: its MoE functions, argument for argument, over the library's own.

Every function here has the name, the arguments, the order and the defaults of SGLang's, and does
what SGLang's does to torch tensors on a GPU or on the CPU. Where SGLang asserts, these raise the
errors of the direct call (`fusedmoe.fused_experts` and its kin). What is not built raises
NotImplementedError. SGLang itself is not imported: `sglang_plugin` makes it use the library.

What differs, on purpose: a slot whose id is outside 0 .. E-1 is dropped whatever `filter_expert`
says, rows need not be contiguous, and the intermediate is rounded once less.
"""

from __future__ import annotations

import functools
from importlib import metadata

from .. import ops
from ..routing import Routing

TESTED = "sglang 0.5.23"


def status():
    """(version of SGLang found or None, why it cannot be used or None)."""
    try:
        return metadata.version("sglang"), None
    except metadata.PackageNotFoundError:
        return None, "sglang is not installed"


# -------------------------------------------------------------------------------------------------
# The layer
# -------------------------------------------------------------------------------------------------


def fused_experts(
    hidden_states,
    w1,
    w2,
    topk_output,
    moe_runner_config,
    b1=None,
    b2=None,
    use_fp8_w8a8=False,
    use_int8_w8a8=False,
    use_int8_w8a16=False,
    use_int4_w4a16=False,
    per_channel_quant=False,
    w1_scale=None,
    w2_scale=None,
    w1_zp=None,
    w2_zp=None,
    a1_scale=None,
    a2_scale=None,
    block_shape=None,
    a1_q=None,
    fuse_swiglu_interleaved=False,
):
    """The layer as `moe_runner_config` describes it: `fused_experts_impl` with its fields.

    Args:
        topk_output: (topk_weights [T, k] float32, topk_ids [T, k] int32, ...).
        moe_runner_config: an object with the fields of SGLang's MoeRunnerConfig. `inplace`: the
            result is written into hidden_states.
        All others: as `fused_experts_impl`.

    Returns:
        hidden_states where inplace, else a new tensor.

    Raises:
        ValueError: inplace together with no_combine. Else as `fusedmoe.fused_experts`.
    """
    config = moe_runner_config
    return fused_experts_impl(
        hidden_states,
        w1,
        w2,
        topk_output[0],
        topk_output[1],
        b1,
        b2,
        config.inplace,
        config.activation,
        config.is_gated,
        config.apply_router_weight_on_input,
        use_fp8_w8a8,
        use_int8_w8a8,
        use_int8_w8a16,
        use_int4_w4a16,
        per_channel_quant,
        w1_scale,
        w2_scale,
        w1_zp,
        w2_zp,
        a1_scale,
        a2_scale,
        block_shape,
        config.no_combine,
        config.routed_scaling_factor,
        config.gemm1_alpha,
        config.gemm1_clamp_limit,
        swiglu_limit=config.swiglu_limit,
        gate_up_interleaved=config.gate_up_interleaved,
        a1_q=a1_q,
        fuse_swiglu_interleaved=fuse_swiglu_interleaved,
        no_combine_keep_router_weight=config.no_combine_keep_router_weight,
    )


def inplace_fused_experts(
    hidden_states,
    w1,
    w2,
    topk_weights,
    topk_ids,
    b1=None,
    b2=None,
    activation="silu",
    is_gated=True,
    apply_router_weight_on_input=False,
    use_fp8_w8a8=False,
    use_int8_w8a8=False,
    use_int8_w8a16=False,
    use_int4_w4a16=False,
    per_channel_quant=False,
    w1_scale=None,
    w2_scale=None,
    w1_zp=None,
    w2_zp=None,
    a1_scale=None,
    a2_scale=None,
    block_shape=None,
    routed_scaling_factor=None,
    gemm1_alpha=None,
    gemm1_limit=None,
    filter_expert=True,
    swiglu_limit=None,
    gate_up_interleaved=True,
    a1_q=None,
    fuse_swiglu_interleaved=False,
):
    """`fused_experts_impl` with the result written into hidden_states. Returns None."""
    fused_experts_impl(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        b1,
        b2,
        True,
        activation,
        is_gated,
        apply_router_weight_on_input,
        use_fp8_w8a8,
        use_int8_w8a8,
        use_int8_w8a16,
        use_int4_w4a16,
        per_channel_quant,
        w1_scale,
        w2_scale,
        w1_zp,
        w2_zp,
        a1_scale,
        a2_scale,
        block_shape,
        False,
        routed_scaling_factor,
        gemm1_alpha,
        gemm1_limit,
        filter_expert,
        swiglu_limit,
        gate_up_interleaved,
        a1_q,
        fuse_swiglu_interleaved,
    )


def outplace_fused_experts(
    hidden_states,
    w1,
    w2,
    topk_weights,
    topk_ids,
    b1=None,
    b2=None,
    activation="silu",
    is_gated=True,
    apply_router_weight_on_input=False,
    use_fp8_w8a8=False,
    use_int8_w8a8=False,
    use_int8_w8a16=False,
    use_int4_w4a16=False,
    per_channel_quant=False,
    w1_scale=None,
    w2_scale=None,
    w1_zp=None,
    w2_zp=None,
    a1_scale=None,
    a2_scale=None,
    block_shape=None,
    no_combine=False,
    routed_scaling_factor=None,
    gemm1_alpha=None,
    gemm1_limit=None,
    filter_expert=True,
    swiglu_limit=None,
    gate_up_interleaved=True,
    a1_q=None,
    fuse_swiglu_interleaved=False,
    no_combine_keep_router_weight=False,
):
    """`fused_experts_impl` with the result in a new tensor, which is returned."""
    return fused_experts_impl(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        b1,
        b2,
        False,
        activation,
        is_gated,
        apply_router_weight_on_input,
        use_fp8_w8a8,
        use_int8_w8a8,
        use_int8_w8a16,
        use_int4_w4a16,
        per_channel_quant,
        w1_scale,
        w2_scale,
        w1_zp,
        w2_zp,
        a1_scale,
        a2_scale,
        block_shape,
        no_combine,
        routed_scaling_factor,
        gemm1_alpha,
        gemm1_limit,
        filter_expert,
        swiglu_limit,
        gate_up_interleaved,
        a1_q,
        fuse_swiglu_interleaved,
        False,
        no_combine_keep_router_weight,
    )


def fused_experts_impl(
    hidden_states,
    w1,
    w2,
    topk_weights,
    topk_ids,
    b1=None,
    b2=None,
    inplace=False,
    activation="silu",
    is_gated=True,
    apply_router_weight_on_input=False,
    use_fp8_w8a8=False,
    use_int8_w8a8=False,
    use_int8_w8a16=False,
    use_int4_w4a16=False,
    per_channel_quant=False,
    w1_scale=None,
    w2_scale=None,
    w1_zp=None,
    w2_zp=None,
    a1_scale=None,
    a2_scale=None,
    block_shape=None,
    no_combine=False,
    routed_scaling_factor=None,
    gemm1_alpha=None,
    gemm1_limit=None,
    filter_expert=True,
    swiglu_limit=None,
    gate_up_interleaved=True,
    a1_q=None,
    fuse_swiglu_interleaved=False,
    defer_sum=False,
    no_combine_keep_router_weight=False,
):
    """`fusedmoe.fused_experts` under SGLang's names.

    Args:
        hidden_states, w1, w2, topk_weights, topk_ids: hidden_states, w13, w2, topk_weights and
            topk_ids of `fusedmoe.fused_experts`; ids are local, -1 drops a slot.
        b1, b2: w13_bias, w2_bias.
        inplace: write the result into hidden_states and return it.
        activation: "silu", "gelu", "gelu_tanh", "situ", or with is_gated=False "silu", "gelu",
            "relu2". "silu" means, in this order: with gemm1_alpha and gemm1_limit gpt-oss's
            swiglu; with gemm1_limit alone min(silu(g), limit) and clipped u; with swiglu_limit
            silu(min(g, limit)) and clipped u.
        gate_up_interleaved: w1 of gpt-oss's swiglu has gate and up rows in turn; not looked at
            elsewhere, as in SGLang.
        fuse_swiglu_interleaved: w1 has gate and up rows in turn, with plain silu.
        no_combine: return [T, k, H], not summed and, but for no_combine_keep_router_weight, not
            weighted. defer_sum: the same, weighted; routed_scaling_factor is left to the caller.
        filter_expert: not looked at.
        use_*, per_channel_quant, *_scale, *_zp, block_shape, a1_q: quantised weights, not built.

    Returns:
        [T, H], or [T, k, H], dtype of hidden_states.

    Raises:
        ValueError: inplace with no_combine or defer_sum. Else as `fusedmoe.fused_experts`.

    Oracle: reference.fused_experts.
    """
    if inplace and (no_combine or defer_sum):
        name = "no_combine" if no_combine else "defer_sum"
        raise ValueError(f"{name}: expected False where inplace, got True")
    rows = "weighted" if defer_sum or no_combine_keep_router_weight else "unweighted"
    return ops.fused_experts(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        quant=_quant(use_fp8_w8a8, use_int8_w8a8, use_int8_w8a16, use_int4_w4a16, block_shape),
        w13_scale=w1_scale,
        w2_scale=w2_scale,
        w13_zero_point=w1_zp,
        w2_zero_point=w2_zp,
        hidden_states_scale=a1_scale if a1_q is None else a1_q,
        intermediate_scale=a2_scale,
        w13_bias=b1,
        w2_bias=b2,
        apply_router_weight_on_input=apply_router_weight_on_input,
        routed_scaling_factor=routed_scaling_factor,
        no_combine=rows if no_combine or defer_sum else False,
        out=hidden_states if inplace else None,
        **activation_keywords(
            activation,
            is_gated,
            gemm1_alpha,
            gemm1_limit,
            swiglu_limit,
            gate_up_interleaved,
            fuse_swiglu_interleaved,
        ),
    )


def _quant(fp8, int8, int8_weights, int4_weights, block_shape):
    if fp8:
        return "fp8_tensor" if block_shape is None else "fp8_block"
    if int8 or int8_weights:
        return "int8"
    return "int4_g128" if int4_weights else None


@functools.lru_cache(maxsize=64)  # of a handful of layers, each asked for at every call
def activation_keywords(
    activation,
    is_gated,
    gemm1_alpha,
    gemm1_limit,
    swiglu_limit,
    gate_up_interleaved,
    fuse_swiglu_interleaved,
):
    """The keywords of `fusedmoe.fused_experts` for SGLang's activation and its modifiers."""
    order = "interleaved" if fuse_swiglu_interleaved else "gate_up"
    keywords = {"activation": activation, "gated": is_gated, "w13_order": order}
    if not is_gated:
        return keywords  # the modifiers are not looked at, as in SGLang
    modified = [v for v in (gemm1_alpha, gemm1_limit, swiglu_limit) if v is not None]
    if fuse_swiglu_interleaved and (activation != "silu" or modified):
        raise ValueError(
            "fuse_swiglu_interleaved: expected False but with plain silu, got True with "
            f"activation {activation!r} and modifiers {modified}"
        )
    if activation == "silu_rounded":
        raise NotImplementedError("activation: 'silu_rounded' is not built")
    if activation != "silu":
        keywords.update(activation_alpha=gemm1_alpha, activation_limit=gemm1_limit)
    elif gemm1_alpha is not None:
        if gemm1_limit is None:
            raise ValueError("gemm1_limit: expected a number with gemm1_alpha, got None")
        keywords.update(
            activation="swiglu_oai",
            activation_alpha=gemm1_alpha,
            activation_limit=gemm1_limit,
            w13_order="interleaved" if gate_up_interleaved else "gate_up",
        )
    elif gemm1_limit is not None:
        keywords.update(activation_limit=gemm1_limit, clamp="after")
    elif swiglu_limit is not None:
        keywords.update(activation_limit=swiglu_limit, clamp="before")
    return keywords


# -------------------------------------------------------------------------------------------------
# Routing
# -------------------------------------------------------------------------------------------------


def topk_softmax(
    topk_weights,
    topk_ids,
    gating_output,
    renormalize=False,
    moe_softcapping=0.0,
    correction_bias=None,
):
    """topk_weights, topk_ids = the topk largest of softmax(softcap(gating_output) + bias).

    Args:
        topk_weights, topk_ids: [T, k] float32 and int32, written.
        gating_output: [T, E] float32, bfloat16 or float16.
        renormalize: divide the weights by their sum.
        moe_softcapping: c of c tanh(x / c); 0: none.
        correction_bias: [E]. The weights are with it.

    Returns None. Raises as `fusedmoe.route`. Oracle: reference.route.
    """
    routing = Routing(
        topk=topk_ids.shape[1],
        method="softmax_topk" if correction_bias is None else "softmax_of_biased",
        renormalize=bool(renormalize),
        correction_bias=correction_bias,
        softcap=moe_softcapping or None,
    )
    ops.route(gating_output, routing, out_weights=topk_weights, out_ids=topk_ids)


def topk_sigmoid(
    topk_weights,
    topk_ids,
    gating_output,
    renormalize=False,
    correction_bias=None,
    routed_scaling_factor=1.0,
    num_fused_shared_experts=0,
):
    """topk_weights, topk_ids = the topk largest of sigmoid(gating_output) + bias, weights without
    the bias.

    Args:
        topk_weights, topk_ids: [T, k] float32 and int32, written; the last
            num_fused_shared_experts (0 or 1) columns are the shared expert E, of weight 1 where
            renormalised, else the sum of the others.
        gating_output: [T, E] float32, bfloat16 or float16.
        renormalize: weights = routed_scaling_factor * weights / their sum. Without it
            routed_scaling_factor divides the shared weight and does nothing else, as in SGLang.
        correction_bias: [E].

    Returns None. Raises as `fusedmoe.route`; NotImplementedError for a shared expert with a scale
    and without renormalize. Oracle: reference.route.
    """
    shared = num_fused_shared_experts
    if shared and not renormalize and routed_scaling_factor != 1.0:
        raise NotImplementedError(
            "routed_scaling_factor: expected 1 with a shared expert and without renormalize, got "
            f"{routed_scaling_factor}"
        )
    routing = Routing(
        topk=topk_ids.shape[1] - shared,
        method="sigmoid" if correction_bias is None else "sigmoid_bias",
        renormalize=bool(renormalize),
        routed_scaling_factor=float(routed_scaling_factor) if renormalize else 1.0,
        correction_bias=correction_bias,
        num_fused_shared_experts=shared,
    )
    ops.route(gating_output, routing, out_weights=topk_weights, out_ids=topk_ids)


def moe_fused_gate(
    scores,
    bias,
    topk,
    scoring_func="sigmoid",
    num_fused_shared_experts=0,
    renormalize=True,
    routed_scaling_factor=1.0,
    apply_routed_scaling_factor_on_output=False,
    moe_softcapping=0.0,
    num_expert_group=1,
    topk_group=1,
    *,
    bias_alt=None,
    input_ids=None,
    bias_alt_token_id=None,
    num_token_non_padded=None,
    renormalize_epsilon=0.0,
    packed_out=None,
    sqrtsoftplus_log1p=False,
):
    """SGLang's router of all models: a score, a bias for the choice, groups, shared slots.

    Args:
        scores: [T, E] float32, bfloat16 or float16 logits.
        bias: [E], added to the scores for the choice; with softmax to the logits, and the weights
            are with it. None: softmax only.
        topk: columns of the result, shared experts included.
        scoring_func: "sigmoid", "sqrtsoftplus" or "softmax".
        num_fused_shared_experts: the last columns, ids E, E + 1, ..., of weight 1 where the scale
            is applied here, else 1 / routed_scaling_factor.
        num_expert_group, topk_group: sigmoid only: groups, the best by their two best experts.
        moe_softcapping: softmax only.
        num_token_non_padded: one int32 on the device; tokens from there on get ids -1, weights 0.
        bias_alt, input_ids, bias_alt_token_id, packed_out, sqrtsoftplus_log1p, and a
            renormalize_epsilon above 0: not built.

    Returns:
        (topk_weights [T, topk] float32, topk_ids [T, topk] int32), in falling order of the keys.

    Raises as `fusedmoe.route`; NotImplementedError for what is not built. Oracle: reference.route.
    """
    for name, value, unset in (
        ("bias_alt", bias_alt, None),
        ("input_ids", input_ids, None),
        ("bias_alt_token_id", bias_alt_token_id, None),
        ("packed_out", packed_out, None),
        ("renormalize_epsilon", renormalize_epsilon, 0),
        ("sqrtsoftplus_log1p", sqrtsoftplus_log1p, False),
    ):
        if value is not unset and not (unset == 0 and value == 0):
            raise NotImplementedError(f"{name}: expected {unset}, got a value; it is not built")
    scoring_func, grouped = scoring_func.lower(), num_expert_group > 1
    if grouped and scoring_func != "sigmoid":
        raise NotImplementedError(
            f"num_expert_group: expected 1 with scoring_func {scoring_func!r}, "
            f"got {num_expert_group}"
        )
    method = {
        "sigmoid": "sigmoid_bias_grouped" if grouped else "sigmoid_bias",
        "sqrtsoftplus": "sqrt_softplus_bias",
        "softmax": "softmax_topk" if bias is None else "softmax_of_biased",
    }.get(scoring_func)
    if method is None:
        raise ValueError(
            f'scoring_func: expected "sigmoid", "sqrtsoftplus" or "softmax", got {scoring_func!r}'
        )
    scale = 1.0 if routed_scaling_factor is None else float(routed_scaling_factor)
    applied = bool(apply_routed_scaling_factor_on_output)
    routing = Routing(
        topk=topk - num_fused_shared_experts,
        method=method,
        renormalize=bool(renormalize),
        routed_scaling_factor=scale if applied else 1.0,
        correction_bias=bias,
        num_groups=num_expert_group if grouped else None,
        topk_groups=topk_group if grouped else None,
        num_fused_shared_experts=num_fused_shared_experts,
        shared_weight=(1.0 if applied else 1.0 / scale) if num_fused_shared_experts else None,
        num_token_non_padded=_one(num_token_non_padded),
        softcap=moe_softcapping or None if scoring_func == "softmax" else None,
    )
    return ops.route(scores, routing)


def hash_topk(
    router_logits,
    input_ids,
    tid2eid,
    num_fused_shared_experts=0,
    routed_scaling_factor=1.0,
    scoring_func="sqrtsoftplus",
):
    """The experts of a token from a table, their weights sqrt(softplus(logit)), renormalised.

    Args:
        router_logits: [T, E] float32, bfloat16 or float16.
        input_ids: [T] token ids. tid2eid: [vocabulary, k] int32.
        num_fused_shared_experts: columns behind these, ids E, E + 1, ..., of weight
            1 / routed_scaling_factor. The routed weights are not scaled.

    Returns:
        (topk_weights float32, topk_ids int32), [T, k + num_fused_shared_experts].

    Raises as `fusedmoe.route`. Oracle: reference.route.
    """
    if scoring_func != "sqrtsoftplus":
        raise ValueError(f'scoring_func: expected "sqrtsoftplus", got {scoring_func!r}')
    routing = Routing(
        topk=tid2eid.shape[1],
        method="hash",
        renormalize=True,
        tid2eid=tid2eid,
        token_ids=input_ids,
        num_fused_shared_experts=num_fused_shared_experts,
        shared_weight=1.0 / routed_scaling_factor if num_fused_shared_experts else None,
    )
    return ops.route(router_logits, routing)


def _one(scalar):
    """A device scalar as a tensor of one element; a view, nothing is read."""
    return None if scalar is None else scalar.reshape(1)


# -------------------------------------------------------------------------------------------------
# Align and combine
# -------------------------------------------------------------------------------------------------


def moe_align_block_size(
    topk_ids,
    block_size,
    num_experts,
    ignore_invalid_expert=False,
    *,
    return_inactive_prefix_count=False,
    pad_expert_ids=False,
):
    """Slots grouped by expert in blocks of one expert each; see `fusedmoe.align_block_size`.

    Args:
        topk_ids: [T, k] int32 or int64, -1 .. num_experts - 1. Not written.
        block_size: 1 to 256. num_experts: at most 1023.
        ignore_invalid_expert: True: slots of -1 have no place. False: they are the first blocks,
            of expert -1.
        return_inactive_prefix_count: num_tokens_post_padded is [2]: padded rows, and how many of
            the first blocks are of expert -1. Not together with ignore_invalid_expert.
        pad_expert_ids: not looked at: unused blocks always have expert -1.

    Returns:
        (sorted_token_ids, expert_ids, num_tokens_post_padded), int32; in sorted_token_ids slots of
        one expert ascend, and T * k stands where there is none.

    Oracle: reference.align_block_size.
    """
    if ignore_invalid_expert:
        for name, value in (
            ("return_inactive_prefix_count", return_inactive_prefix_count),
            ("pad_expert_ids", pad_expert_ids),
        ):
            if value:
                raise ValueError(f"{name}: expected False with ignore_invalid_expert, got True")
        return ops.align_block_size(topk_ids, block_size, num_experts)
    # One bucket more, the first, for the slots of -1; what is out of range has no place in either.
    buckets = topk_ids + 1
    token_ids, expert_ids, count = ops.align_block_size(buckets, block_size, num_experts + 1)
    expert_ids = expert_ids.sub_(1).clamp_(min=-1)  # -1 stood in the blocks that are not used
    if return_inactive_prefix_count:
        inactive = ops.count_tokens_per_expert(buckets, num_experts + 1)[:1]
        blocks = inactive.add(block_size - 1).div_(block_size, rounding_mode="floor")
        count = _pair(count, blocks)
    return token_ids, expert_ids, count


def _pair(first, second):
    pair = first.new_empty(2)
    pair[:1].copy_(first)
    pair[1:].copy_(second)
    return pair


def moe_sum_reduce(input, output, routed_scaling_factor):
    """output[t] = round(routed_scaling_factor * sum over s of input[t, s]), summed in float32.

    Args:
        input: [T, k, H] contiguous bfloat16, float16, or on the CPU float32. Not written.
        output: [T, H], the same dtype, written.
        routed_scaling_factor: a finite number.

    Returns None. Raises as `fusedmoe.combine`. Oracle: reference.combine.
    """
    if input.ndim != 3:
        raise ValueError(f"input: expected [T, k, H], got {list(input.shape)}")
    import torch

    num_tokens, topk, hidden_size = input.shape
    rows = torch.arange(num_tokens * topk, dtype=torch.int32, device=input.device)
    ops.combine(
        input.view(num_tokens * topk, hidden_size),
        rows.view(num_tokens, topk),
        routed_scaling_factor=routed_scaling_factor,
        out=output,
    )
