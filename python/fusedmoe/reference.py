"""The oracle: what every function of fusedmoe computes, in float64, in the order of the formulas.

NumPy only; nothing else of the package is imported, so that it can be read, copied and trusted by
itself. Arrays of any real dtype come in (ml_dtypes bfloat16 too) and are widened; nothing is
rounded inside. The five stages

    route     topk_weights, topk_ids = select(router_logits)
    align     expert_offsets, sorted_token_ids, row_of_slot = group(topk_ids)
    gate_up   intermediate[r] = act(x[token(r)] . w13[e]^T + w13_bias[e])
    down      rows[r] = topk_weights[slot(r)] * (intermediate[r] . w2[e]^T + w2_bias[e])
    combine   out[t] = routed_scaling_factor * sum over s of rows[row_of_slot[t, s]]
                       + shared_output[t]

make `fused_experts` (the last four) and `fused_moe` (all five). `tokens=` evaluates some tokens
only and widens only the experts that these need: a layer of a gigabyte is checked in a second.

How far a correct backend may be from here is computed, not guessed: `gate_up_error`, `down_error`,
`combine_error`, `fused_experts_error` and `fused_moe_error` return an `Error` for the same
arguments, and `compare` holds a result against it.

Shapes: num_tokens T, hidden_size H, intermediate_size I (after gating), num_experts E (that is
w13.shape[0]), topk k, num_rows <= T * k (slots that were not dropped).
"""

import math
from typing import NamedTuple

import numpy as np

__all__ = [
    "ACTIVATIONS",
    "METHODS",
    "ORDERS",
    "Error",
    "Report",
    "activate",
    "align",
    "align_block_size",
    "combine",
    "combine_error",
    "compare",
    "down",
    "down_error",
    "fused_experts",
    "fused_experts_error",
    "fused_moe",
    "fused_moe_error",
    "gate_up",
    "gate_up_error",
    "route",
    "route_choice",
    "route_keys",
    "route_scores",
    "unit_roundoff",
]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai", "situ")
ORDERS = ("gate_up", "up_gate", "interleaved")


class _Method(NamedTuple):
    score: str
    key: str
    bias: str
    groups: str
    ids: str
    renormalize: str


# fmt: off
METHODS = {
    "softmax_topk":          _Method("softmax", "logit", "none", "none", "largest", "off"),
    "topk_softmax":          _Method("softmax", "logit", "none", "none", "largest", "always"),
    "sigmoid":               _Method("sigmoid", "score", "none", "none", "largest", "on"),
    "topk_sigmoid":          _Method("sigmoid", "logit", "none", "none", "largest", "off"),
    "llama4":                _Method("sigmoid", "logit", "none", "none", "largest", "never"),
    "sigmoid_bias":          _Method("sigmoid", "score", "key", "none", "largest", "on"),
    "sigmoid_grouped":       _Method("sigmoid", "score", "none", "max", "largest", "on"),
    "sigmoid_bias_grouped":  _Method("sigmoid", "score", "key", "top2", "largest", "on"),
    "sigmoid_bias_sink":     _Method("sigmoid", "score", "key", "none", "largest", "always"),
    "softmax_grouped":       _Method("softmax", "score", "none", "max", "largest", "off"),
    "softmax_bias_grouped":  _Method("softmax", "score", "key", "top2", "largest", "off"),
    "sqrt_softplus":         _Method("sqrt_softplus", "score", "none", "none", "largest", "on"),
    "sqrt_softplus_bias":    _Method("sqrt_softplus", "score", "key", "none", "largest", "on"),
    "hash":                  _Method("sqrt_softplus", "logit", "none", "none", "table", "on"),
    "softmax_bias":          _Method("softmax", "score", "key", "none", "largest", "off"),
    "softmax_of_biased":     _Method("softmax", "logit", "logit", "none", "largest", "off"),
    "softmax_biased_choice": _Method("softmax", "logit", "key", "none", "largest", "off"),
    "softmax_quota":         _Method("softmax", "score", "none", "quota", "largest", "off"),
    "sparsemixer":           _Method("sparsemixer", "logit", "none", "none", "largest", "never"),
    "forced":                _Method("softmax", "logit", "none", "none", "table", "off"),
    "simulated_uniform":     _Method("constant", "uniform", "none", "none", "largest", "always"),
    "simulated_round_robin": _Method("constant", "logit", "none", "none", "round_robin", "always"),
    "simulated_zipf":        _Method("constant", "zipf", "none", "none", "largest", "always"),
}
# fmt: on


# -------------------------------------------------------------------------------------------------
# The five stages
# -------------------------------------------------------------------------------------------------


def route(
    router_logits,
    topk,
    *,
    method="topk_softmax",
    scale=1.0,
    renormalize=None,
    correction_bias=None,
    num_groups=None,
    topk_groups=None,
    num_shared=0,
    shared_weight=None,
    num_zero_experts=0,
    num_token_non_padded=None,
    expert_map=None,
    replica_map=None,
    tid2eid=None,
    token_ids=None,
    expert_scale=None,
    softcap=None,
    topk_ids=None,
):
    """Pick topk experts for each token.

    x = softcap tanh(router_logits / softcap) where softcap is given; METHODS[method] is its score,
    key, bias, groups, ids, renormalize: see `route_scores` and `route_choice`. Then

    w = s[topk_ids]; renormalised: w / sum(w), zeros where the sum is not above 0 and finite
    w * expert_scale[topk_ids] * scale; what is not finite becomes 0

    router_logits  [T, E]; shared_weight "gate" and "sink": [T, E + num_shared]
    topk_ids       [T, k] the choice, where it is known already (before any map)
    num_shared     slots behind the topk ones, ids E, E + 1, ... Their weight: shared_weight a
                   number; None or "sum": the sum of the routed w, 1 where renormalised; "gate": the
                   sigmoid of the column; "sink": the same, renormalised together with w

    Order: descending key, equal keys by ascending id, NaN after every number. Returns topk_weights
    float64 [T, k + num_shared] and topk_ids int64 of the same shape; -1: dropped.
    """
    row = METHODS[method]
    own_columns = num_shared if shared_weight in ("gate", "sink") else 0
    columns = _f64(router_logits)
    num_tokens, num_experts = columns.shape[0], columns.shape[1] - own_columns
    x, score = route_scores(columns[:, :num_experts], method, correction_bias, softcap)
    with np.errstate(all="ignore"):
        if topk_ids is None:
            key = None
            if row.ids == "largest":
                key = route_keys(x, score, method, correction_bias)
            topk_ids = route_choice(
                key, x.shape, topk, method, num_groups, topk_groups, tid2eid, token_ids
            )
        ids = np.asarray(topk_ids).astype(np.int64)
        if row.score == "sparsemixer":
            w = _sparsemixer(x, ids)
        else:
            w = np.take_along_axis(score, np.maximum(ids, 0), axis=-1)
        if row.bias == "key":
            key = route_keys(x, score, method, correction_bias)
            w = np.where(np.isnan(np.take_along_axis(key, ids, axis=-1)), 0, w)
        w = np.where((ids < 0) | np.isnan(w), 0, w)
        gates = 1 / (1 + np.exp(-columns[:, num_experts:]))
        gates = np.where(np.isnan(gates), 0, gates)
        routed = w.sum(axis=-1, keepdims=True)
        total = routed + gates.sum(axis=-1, keepdims=True) if shared_weight == "sink" else routed
        if renormalize is None:
            renormalize = row.renormalize in ("always", "on")
        if renormalize:
            w = np.where((total > 0) & np.isfinite(total), w / total, 0)
            gates = gates / total if shared_weight == "sink" else gates
        if expert_scale is not None:
            w = w * np.where(ids < 0, 1, _f64(expert_scale)[np.maximum(ids, 0)])
        w = w * scale
        if shared_weight == "sink":
            shared = gates * scale
        elif shared_weight == "gate":
            shared = gates
        else:
            weight = routed if not renormalize else np.ones_like(routed)
            weight = weight if shared_weight in (None, "sum") else np.full_like(w, shared_weight)
            shared = np.repeat(weight[:, :1], num_shared, axis=1)
    tokens = np.arange(num_tokens)
    ids = np.where(ids < num_experts - num_zero_experts, ids, -1)
    if replica_map is not None:
        ids = _replica(np.asarray(replica_map).astype(np.int64), tokens, ids)
    if expert_map is not None:
        table = np.asarray(expert_map).astype(np.int64)
        known = (ids >= 0) & (ids < len(table))
        ids = np.where(known, table[np.where(known, ids, 0)], -1)
    ids = np.where(ids < 0, -1, ids)
    shared_ids = np.broadcast_to(num_experts + np.arange(num_shared), (num_tokens, num_shared))
    weights = np.concatenate([w, shared], axis=1)
    ids = np.concatenate([ids, shared_ids], axis=1)
    weights[~np.isfinite(weights)] = 0
    if num_token_non_padded is not None:
        padded = tokens >= int(np.asarray(num_token_non_padded).reshape(()))
        weights[padded], ids[padded] = 0, -1
    return weights, ids


def route_scores(router_logits, method, correction_bias=None, softcap=None):
    """(x, s): the logits after softcap (and bias, where the method adds it there), their scores.

    softmax        exp(x - max) / sum over the experts that are not NaN; 0 in a row with NaN, +inf
                   or only -inf
    sigmoid        1 / (1 + exp(-x))
    sqrt_softplus  sqrt(log(1 + exp(x)))
    sparsemixer    made from the choice
    constant       1
    """
    x = _f64(router_logits)
    row = METHODS[method]
    with np.errstate(all="ignore"):
        if softcap is not None:
            x = softcap * np.tanh(x / softcap)
        if row.bias == "logit":
            x = x + _f64(correction_bias)
        if row.score == "softmax":
            p = _softmax(x)
            bad = ~np.isfinite(x.max(axis=-1, keepdims=True))  # NaN wins a maximum
            return x, np.where(bad, 0, p)
        if row.score == "sigmoid":
            return x, np.where(x < 0, np.exp(x) / (1 + np.exp(x)), 1 / (1 + np.exp(-x)))
        if row.score == "sqrt_softplus":
            return x, np.sqrt(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))
    return x, np.ones_like(x)


def _softmax(x):
    maximum = np.where(np.isnan(x), -np.inf, x).max(axis=-1, keepdims=True)
    exp = np.where(x == maximum, 1, np.exp(x - maximum))
    return exp / np.nansum(exp, axis=-1, keepdims=True)


def route_keys(x, score, method, correction_bias=None):
    """What the choice is made by: the logit or the score, + the bias where the method has one.

    A score has more bits here than in float32, and a tie there is none here: keys that are scores
    are rounded to float32 first, as any backend has them.
    """
    row = METHODS[method]
    if row.key == "logit":
        key = x
    elif row.key == "score":
        key = _softmax(x) if row.score == "softmax" else score
        key = key.astype(np.float32).astype(np.float64)
    else:
        raise ValueError(f"method: {method!r} is random, only its weights are defined here")
    return key + _f64(correction_bias) if row.bias == "key" else key


def route_choice(
    key, shape, topk, method, num_groups=None, topk_groups=None, tid2eid=None, token_ids=None
):
    """topk_ids: the topk largest keys of the groups kept, or from a table. shape is [T, E]."""
    row = METHODS[method]
    num_tokens, num_experts = shape
    if row.ids == "round_robin":
        return np.arange(num_tokens * topk).reshape(num_tokens, topk) % num_experts
    if row.ids == "table":
        table = np.asarray(tid2eid).astype(np.int64)
        at = np.arange(num_tokens) if token_ids is None else np.asarray(token_ids).astype(np.int64)
        known = ((at >= 0) & (at < len(table)))[:, None]
        ids = np.where(known, table[np.where(known[:, 0], at, 0)], -1)
        return np.where((ids >= 0) & (ids < num_experts), ids, -1)
    dropped = np.zeros(key.shape, bool)
    if row.groups != "none":
        groups = key.reshape(num_tokens, num_groups, -1)
        best = np.take_along_axis(groups, _descending(groups), axis=-1)
        if row.groups == "quota":
            order = _descending(groups)[..., : topk // num_groups]
            kept = np.zeros(groups.shape, bool)
            np.put_along_axis(kept, order, True, axis=-1)
        else:
            with np.errstate(all="ignore"):
                of_group = best[..., 0] + best[..., 1] if row.groups == "top2" else best[..., 0]
            kept = np.zeros(of_group.shape, bool)
            np.put_along_axis(kept, _descending(of_group)[:, :topk_groups], True, axis=-1)
            kept = np.broadcast_to(kept[..., None], groups.shape)
        dropped = ~kept.reshape(key.shape)
    return _descending(key, dropped)[:, :topk].astype(np.int64)


def _descending(key, dropped=None):
    """Indices by falling key, ascending index among equals; NaN after the numbers, dropped last."""
    nan = np.isnan(key)
    value = -np.where(nan, -np.inf, key)
    # lexsort: the last key is the first criterion; stable.
    return np.lexsort((value, nan) if dropped is None else (value, nan, dropped), axis=-1)


def _sparsemixer(x, ids):
    """1 / sum of exp(x[e] - x[chosen]) over the experts not chosen before that are within the
    jitter: (x[chosen] - x[e]) / max(|x[e]|, x[chosen]) <= 2 * 0.01."""
    left = np.ones(x.shape, bool)
    weights = np.zeros(ids.shape)
    for s in range(ids.shape[1]):
        chosen = np.take_along_axis(x, ids[:, s : s + 1], axis=-1)
        seen = left & ~((chosen - x) / np.maximum(np.abs(x), chosen) > 0.02)
        weights[:, s] = 1 / np.where(seen, np.exp(x - chosen), 0).sum(axis=-1)
        np.put_along_axis(left, ids[:, s : s + 1], False, axis=-1)
    return weights


def _replica(replica_map, tokens, ids):
    """One of the replicas of each id, by a hash of the token; -1 where there is none."""
    count = (np.cumprod(replica_map >= 0, axis=1)).sum(axis=1)
    n = np.where(ids >= 0, count[np.maximum(ids, 0)], 0)
    which = (tokens * 2654435769 % 2**32)[:, None] % np.maximum(n, 1)
    return np.where(n > 0, replica_map[np.maximum(ids, 0), which], -1)


def align(topk_ids, num_experts, *, expert_map=None, expert_start=None):
    """Group the slots (token, s) by the expert they go to: stable, compact, no padding.

    local(id) = expert_map[id] where expert_map is given (an id outside it is dropped), else
    id - expert_start. A slot whose local id is outside [0, num_experts) is dropped.

    topk_ids      [T, k] integers, any value
    expert_map    [number of global experts] or None; -1: not here

    Returns int32 arrays: expert_offsets [E + 1], the exclusive scan of rows per expert;
    sorted_token_ids [num_rows], row -> token * k + slot; row_of_slot [T, k], -1 where dropped.
    """
    ids = np.asarray(topk_ids).astype(np.int64)
    if expert_map is not None:
        table = np.asarray(expert_map).astype(np.int64)
        known = (ids >= 0) & (ids < len(table))
        local = np.full(ids.shape, -1, np.int64)
        local[known] = table[ids[known]]
    else:
        # As Python integers would: no wrap-around at the ends of int64.
        start = int(expert_start or 0)
        known = (ids >= max(start, -(2**63))) & (ids <= min(start + num_experts - 1, 2**63 - 1))
        local = np.where(known, ids - np.int64(start), -1)
    local = np.where((local >= 0) & (local < num_experts), local, num_experts)  # dropped go last
    flat = local.reshape(-1)
    counts = np.bincount(flat, minlength=num_experts + 1)[:num_experts]
    expert_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    sorted_token_ids = np.argsort(flat, kind="stable")[: expert_offsets[-1]].astype(np.int32)
    row_of_slot = np.full(flat.shape, -1, np.int32)
    row_of_slot[sorted_token_ids] = np.arange(len(sorted_token_ids), dtype=np.int32)
    return expert_offsets, sorted_token_ids, row_of_slot.reshape(ids.shape)


def align_block_size(topk_ids, block_size, num_experts, *, expert_map=None, expert_start=None):
    """`align`, each expert's rows padded to blocks.

    Returns int32 arrays: sorted_token_ids, a multiple of block_size long, T * k where padded;
    expert_ids, one for each block; num_tokens_post_padded [1], the length of the first.
    """
    offsets, rows, row_of_slot = align(
        topk_ids, num_experts, expert_map=expert_map, expert_start=expert_start
    )
    blocks, expert_ids = [np.empty(0, np.int32)], []
    for e in range(num_experts):
        mine = rows[offsets[e] : offsets[e + 1]]
        fill = np.full(-len(mine) % block_size, row_of_slot.size, np.int32)
        blocks += [mine, fill]
        expert_ids += [e] * ((len(mine) + len(fill)) // block_size)
    padded = np.concatenate(blocks).astype(np.int32)
    return padded, np.array(expert_ids, np.int32), np.array([len(padded)], np.int32)


def activate(gate, up=None, *, activation="silu", alpha=None, limit=None, clamp="after"):
    """f(gate) * up, or f(gate) where up is None (not gated). NaN stays NaN.

    silu        g sigmoid(g); with a limit L: clamp="after"  min(silu(g), L) * clamp(u, -L, L)
                                              clamp="before" silu(min(g, L)) * clamp(u, -L, L)
    gelu        g (1 + erf(g / sqrt(2))) / 2
    gelu_tanh   g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2
    relu2       max(g, 0)^2
    swiglu_oai  g = min(g, L), u = clamp(u, -L, L): g sigmoid(alpha g) * (u + 1); alpha 1.702, L 7
    situ        alpha tanh(g / alpha) sigmoid(g); u = L tanh(u / L) where L is given; alpha 4
    """
    with np.errstate(all="ignore"):
        f, u = _activate(
            _f64(gate), None if up is None else _f64(up), activation, alpha, limit, clamp
        )
        return f if u is None else f * u


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
):
    """intermediate[r] = act(x[token(r)] . w13[e]^T + w13_bias[e]).

    hidden_states  [T, H]
    w13            [E, 2 I, H], or [E, I, H] where not gated
    w13_order      gate_up: gate rows, then up rows; up_gate: the other way round; interleaved:
                   gate i is row 2 i, up i row 2 i + 1. w13_bias [E, 2 I] has the same order.
    topk_weights   [T, k] or None: multiplies (x . w13 + bias) before the activation

    Returns float64 [num_rows, I].
    """
    x = np.asarray(hidden_states)
    num_rows = int(np.asarray(expert_offsets)[-1])
    intermediate = np.zeros((num_rows, w13.shape[1] // (2 if gated else 1)))
    for e, rows, slots in _experts(expert_offsets, sorted_token_ids):
        with np.errstate(all="ignore"):
            y = _matmul(_f64(x[slots // topk]), _f64(w13[e]))
            if w13_bias is not None:
                y = y + _f64(w13_bias[e])
            if topk_weights is not None:
                y = y * _f64(np.asarray(topk_weights).reshape(-1)[slots])[:, None]
        gate, up = _split(y, gated, w13_order)
        intermediate[rows] = activate(
            gate,
            up,
            activation=activation,
            alpha=activation_alpha,
            limit=activation_limit,
            clamp=clamp,
        )
    return intermediate


def down(
    intermediate, w2, expert_offsets, sorted_token_ids, topk, *, topk_weights=None, w2_bias=None
):
    """rows[r] = topk_weights[slot(r)] * (intermediate[r] . w2[e]^T + w2_bias[e]).

    intermediate  [num_rows, I] (more rows are not read)
    w2            [E, H, I]
    topk_weights  [T, k] or None: weight 1

    Returns float64 [num_rows, H].
    """
    num_rows = int(np.asarray(expert_offsets)[-1])
    out = np.zeros((num_rows, w2.shape[1]))
    for e, rows, slots in _experts(expert_offsets, sorted_token_ids):
        with np.errstate(all="ignore"):
            z = _matmul(_f64(intermediate[rows]), _f64(w2[e]))
            if w2_bias is not None:
                z = z + _f64(w2_bias[e])
            if topk_weights is not None:
                z = z * _f64(np.asarray(topk_weights).reshape(-1)[slots])[:, None]
        out[rows] = z
    return out


def combine(rows, row_of_slot, *, routed_scaling_factor=None, shared_output=None):
    """out[t] = routed_scaling_factor * sum over s of rows[row_of_slot[t, s]] + shared_output[t].

    row_of_slot    [T, k]; -1: dropped, adds exact zeros
    shared_output  [T, H] or None; not scaled

    Returns float64 [T, H].
    """
    rows = _f64(rows)
    row_of_slot = np.asarray(row_of_slot)
    out = np.zeros((row_of_slot.shape[0], rows.shape[1]))
    scale = 1.0 if routed_scaling_factor is None else float(routed_scaling_factor)
    with np.errstate(all="ignore"):
        for s in range(row_of_slot.shape[1]):
            kept = row_of_slot[:, s] >= 0
            out[kept] += rows[row_of_slot[kept, s]]
        out *= scale
        if shared_output is not None:
            out += _f64(shared_output)
    return out


# -------------------------------------------------------------------------------------------------
# The layer
# -------------------------------------------------------------------------------------------------


def fused_experts(
    hidden_states,
    w13,
    w2,
    topk_weights,
    topk_ids,
    *,
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
    tokens=None,
):
    """The layer after routing: align, gate_up, down, combine.

    apply_router_weight_on_input  the weight multiplies x . w13 + bias; down's weight is then 1
    no_combine                    "weighted" or "unweighted": the rows [T, k, H] themselves, dropped
                                  slots zero; routed_scaling_factor and shared_output have no part
    tokens                        indices of tokens, or None: all

    Returns float64 [T, H] or, with no_combine, [T, k, H]; T = len(tokens) where given.
    """
    x, weights, ids, shared = _sample(tokens, hidden_states, topk_weights, topk_ids, shared_output)
    topk = ids.shape[1]
    expert_offsets, sorted_token_ids, row_of_slot = align(
        ids, w13.shape[0], expert_map=expert_map, expert_start=expert_start
    )
    intermediate = gate_up(
        x,
        w13,
        expert_offsets,
        sorted_token_ids,
        topk,
        topk_weights=weights if apply_router_weight_on_input else None,
        w13_bias=w13_bias,
        activation=activation,
        activation_alpha=activation_alpha,
        activation_limit=activation_limit,
        clamp=clamp,
        gated=gated,
        w13_order=w13_order,
    )
    rows = down(
        intermediate,
        w2,
        expert_offsets,
        sorted_token_ids,
        topk,
        topk_weights=_down_weights(weights, apply_router_weight_on_input, no_combine),
        w2_bias=w2_bias,
    )
    if no_combine:
        return combine(rows, row_of_slot.reshape(-1, 1)).reshape(*row_of_slot.shape, rows.shape[1])
    return combine(
        rows, row_of_slot, routed_scaling_factor=routed_scaling_factor, shared_output=shared
    )


def fused_moe(
    hidden_states,
    w13,
    w2,
    router_logits,
    topk,
    *,
    method="topk_softmax",
    routing_scale=1.0,
    routing=None,
    tokens=None,
    shared_output=None,
    **layer,
):
    """route, with the keyword arguments `routing`, then fused_experts."""
    x, logits, shared = _sample(tokens, hidden_states, router_logits, shared_output)
    topk_weights, topk_ids = route(
        logits, topk, method=method, scale=routing_scale, **(routing or {})
    )
    return fused_experts(x, w13, w2, topk_weights, topk_ids, shared_output=shared, **layer)


# -------------------------------------------------------------------------------------------------
# How far a correct result may be away
# -------------------------------------------------------------------------------------------------
#
# Model of a backend: products and sums in f32 in any order, the activation in f32, and one rounding
# to the dtype where a stage ends (intermediate, rows, out). `absolute` is a worst case, element by
# element, nothing neglected but second-order terms; `variance` is what independent rounding errors
# give, and is the sharper test of a whole tensor.

# One accumulation in f32. Twice the unit roundoff: tensor cores cut instead of rounding.
_ACCUMULATE = 2.0**-23
# An activation in f32, relative to |g * u|: exp, tanh or erf of a few ulp and three operations.
_ACTIVATE = 2.0**-21
# Relative rms error of rounding to nearest, in unit roundoffs: uniform errors, significands spread
# as those of products are (log-uniform). The worst significand, 1, gives 0.577: compare() has that
# room.
_ROUND_RMS = math.sqrt(0.375 / math.log(2) / 3)

# dtype: (unit roundoff, half the least subnormal or what flushing it loses, largest number)
_DTYPES = {
    "float32": (2.0**-24, 2.0**-126, (2 - 2.0**-23) * 2.0**127),
    "bfloat16": (2.0**-8, 2.0**-126, (2 - 2.0**-7) * 2.0**127),
    "float16": (2.0**-11, 2.0**-25, 65504.0),
}


class Error(NamedTuple):
    """Distance from the oracle that a correct backend stays within.

    absolute  float64, the result's shape: worst case of |got - want|
    variance  float64, the result's shape: of got - want for independent roundings
    freedom   how many independent roundings are in the whole result, at least
    """

    absolute: np.ndarray
    variance: np.ndarray
    freedom: int


def unit_roundoff(dtype):
    """2^-24, 2^-8, 2^-11 for float32, bfloat16, float16: largest relative error of one rounding."""
    return _DTYPES[_dtype_name(dtype)][0]


def gate_up_error(
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
    dtype=None,
):
    """Error of `gate_up` with the same arguments, stored in `dtype` (default: hidden_states').

    y = x . w13 + b is off by gamma_K (|x| . |w13| + |b|); the activation passes that on with its
    slope.
    """
    dtype = _dtype_name(dtype or np.asarray(hidden_states).dtype)
    x = np.asarray(hidden_states)
    num_rows, terms = int(np.asarray(expert_offsets)[-1]), x.shape[1] + 2
    shape = (num_rows, w13.shape[1] // (2 if gated else 1))
    absolute, variance = np.zeros(shape), np.zeros(shape)
    for e, rows, slots in _experts(expert_offsets, sorted_token_ids):
        with np.errstate(all="ignore"):
            x_e, w_e = _f64(x[slots // topk]), _f64(w13[e])
            y, size = _matmul(x_e, w_e), _matmul(np.abs(x_e), np.abs(w_e))
            if w13_bias is not None:
                b = _f64(w13_bias[e])
                y, size = y + b, size + np.abs(b)
            if topk_weights is not None:
                weight = _f64(np.asarray(topk_weights).reshape(-1)[slots])[:, None]
                y, size = y * weight, size * np.abs(weight)
            y_abs = _gamma(terms) * size
            y_var = _ACCUMULATE**2 * (terms * y * y + size * size)
            gate, up = _split(y, gated, w13_order)
            gate_abs, up_abs = _split(y_abs, gated, w13_order)
            gate_var, up_var = _split(y_var, gated, w13_order)
            args = activation, activation_alpha, activation_limit, clamp
            f, u = _activate(gate, up, *args)
            # A step of one error to each side: the slope that this error meets, also at a kink.
            f_abs = _swing(gate, f, gate_abs, args)
            f_std = _swing(gate, f, np.sqrt(gate_var), args)
            size = np.abs(gate) * (np.abs(gate) if activation == "relu2" else 1.0)
            if u is None:
                h, h_abs = f, f_abs + _ACTIVATE * size
                h_var = f_std**2 + (_ACTIVATE / 4 * size) ** 2
            else:
                # u is u + 1, clamped or bent, by now; none of that is steeper than 1.
                h = f * u
                h_abs = np.abs(f) * up_abs + np.abs(u) * f_abs + f_abs * up_abs
                h_abs = h_abs + _ACTIVATE * np.maximum(size, np.abs(f)) * (np.abs(u) + up_abs)
                h_var = f * f * up_var + u * u * f_std**2
                h_var = h_var + (_ACTIVATE / 4 * size * u) ** 2
            absolute[rows], variance[rows] = _round(h, h_abs, h_var, dtype)
    return Error(absolute, variance, max(1, absolute.size))


def down_error(
    intermediate,
    w2,
    expert_offsets,
    sorted_token_ids,
    topk,
    *,
    topk_weights=None,
    w2_bias=None,
    dtype=None,
    intermediate_error=None,
    weights_relative=0.0,
):
    """Error of `down` with the same arguments, stored in `dtype` (default: that of intermediate).

    intermediate_error  Error of `intermediate`, carried on through |w2|; None: it is exact
    weights_relative    relative error of topk_weights
    """
    dtype = _dtype_name(dtype or np.asarray(intermediate).dtype)
    num_rows, terms = int(np.asarray(expert_offsets)[-1]), w2.shape[2] + 2
    absolute, variance = np.zeros((num_rows, w2.shape[1])), np.zeros((num_rows, w2.shape[1]))
    for e, rows, slots in _experts(expert_offsets, sorted_token_ids):
        with np.errstate(all="ignore"):
            h, w_e = _f64(intermediate[rows]), _f64(w2[e])
            w_size = np.abs(w_e)
            h_abs = intermediate_error.absolute[rows] if intermediate_error else np.zeros_like(h)
            z, size = _matmul(h, w_e), _matmul(np.abs(h), w_size)
            if w2_bias is not None:
                b = _f64(w2_bias[e])
                z, size = z + b, size + np.abs(b)
            z_abs = _matmul(h_abs, w_size) + _gamma(terms) * size
            z_var = _ACCUMULATE**2 * (terms * z * z + size * size)
            if intermediate_error:
                z_var = z_var + _matmul(intermediate_error.variance[rows], w_e * w_e)
                z_abs = z_abs + _gamma(terms) * _matmul(h_abs, w_size)
            if topk_weights is not None:
                weight = _f64(np.asarray(topk_weights).reshape(-1)[slots])[:, None]
                z, z_abs, z_var = z * weight, z_abs * np.abs(weight), z_var * weight**2
                z_abs = z_abs + (weights_relative + _ACCUMULATE) * np.abs(z)
                z_var = z_var + ((weights_relative + _ACCUMULATE) * z) ** 2
            absolute[rows], variance[rows] = _round(z, z_abs, z_var, dtype)
    freedom = intermediate_error.freedom if intermediate_error else absolute.size
    return Error(absolute, variance, max(1, min(freedom, absolute.size)))


def combine_error(
    rows,
    row_of_slot,
    *,
    routed_scaling_factor=None,
    shared_output=None,
    dtype=None,
    rows_error=None,
    dependent=None,
    deterministic=True,
):
    """Error of `combine` with the same arguments, stored in `dtype` (default: that of rows).

    rows_error     Error of `rows`; None: they are exact
    dependent      bool [T] or None: tokens whose slots share their errors (the same expert twice)
    deterministic  False: rows are added in memory, in any order, and each sum is rounded
    """
    dtype = _dtype_name(dtype or np.asarray(rows).dtype)
    rows = _f64(rows)
    row_of_slot = np.asarray(row_of_slot)
    num_tokens, topk = row_of_slot.shape
    scale = 1.0 if routed_scaling_factor is None else float(routed_scaling_factor)
    shape = (num_tokens, rows.shape[1])
    out, size, absolute, variance, deviation, squares = (np.zeros(shape) for _ in range(6))
    with np.errstate(all="ignore"):
        for s in range(topk):
            kept = row_of_slot[:, s] >= 0
            row = row_of_slot[kept, s]
            out[kept] += rows[row]
            size[kept] += np.abs(rows[row])
            squares[kept] += (rows[row] * scale) ** 2
            if rows_error:
                absolute[kept] += rows_error.absolute[row]
                variance[kept] += rows_error.variance[row]
                deviation[kept] += np.sqrt(rows_error.variance[row])
        if dependent is not None:
            variance = np.where(np.asarray(dependent)[:, None], deviation**2, variance)
        # The scaling factor travels as f32: one more rounding, and one for the product.
        out, size, absolute = out * scale, size * abs(scale), absolute * abs(scale)
        variance = variance * scale**2
        shared = 0.0 if shared_output is None else _f64(shared_output)
        if not deterministic:
            absolute, variance = _round_sums(
                shared, out, squares, size + np.abs(shared), absolute, variance, topk, dtype
            )
        if shared_output is not None:
            out, size = out + shared, size + np.abs(shared)
        absolute = absolute + _gamma(topk + 3) * (size + absolute)
        variance = variance + (topk + 3) * (_ACCUMULATE * size) ** 2
        absolute, variance = _round(out, absolute, variance, dtype)
    freedom = rows_error.freedom if rows_error else absolute.size
    return Error(absolute, variance, max(1, min(freedom, absolute.size)))


def fused_experts_error(
    hidden_states,
    w13,
    w2,
    topk_weights,
    topk_ids,
    *,
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
    tokens=None,
    dtype=None,
    weights_relative=0.0,
    deterministic=True,
):
    """(want, Error) of `fused_experts` with the same arguments: three roundings, carried through.

    dtype  of the activations (default: that of hidden_states); deterministic: as combine_error.
    Returns the oracle's result too, because it is computed on the way.
    """
    x, weights, ids, shared = _sample(tokens, hidden_states, topk_weights, topk_ids, shared_output)
    dtype = _dtype_name(dtype or x.dtype)
    num_experts, topk = w13.shape[0], ids.shape[1]
    expert_offsets, sorted_token_ids, row_of_slot = align(
        ids, num_experts, expert_map=expert_map, expert_start=expert_start
    )
    grouping = expert_offsets, sorted_token_ids, topk
    up_args = dict(
        topk_weights=weights if apply_router_weight_on_input else None,
        w13_bias=w13_bias,
        activation=activation,
        activation_alpha=activation_alpha,
        activation_limit=activation_limit,
        clamp=clamp,
        gated=gated,
        w13_order=w13_order,
    )
    down_args = dict(
        topk_weights=_down_weights(weights, apply_router_weight_on_input, no_combine),
        w2_bias=w2_bias,
    )
    intermediate = gate_up(x, w13, *grouping, **up_args)
    intermediate_error = gate_up_error(x, w13, *grouping, **up_args, dtype=dtype)
    if apply_router_weight_on_input and weights_relative:
        # Weights act inside the activation; its slope is at most about 1.1 in each factor.
        extra = 4 * weights_relative * np.abs(intermediate)
        intermediate_error = intermediate_error._replace(
            absolute=intermediate_error.absolute + extra,
            variance=intermediate_error.variance + extra**2,
        )
    rows = down(intermediate, w2, *grouping, **down_args)
    rows_error = down_error(
        intermediate,
        w2,
        *grouping,
        **down_args,
        dtype=dtype,
        intermediate_error=intermediate_error,
        weights_relative=weights_relative,
    )
    if no_combine:
        shape = (*row_of_slot.shape, rows.shape[1])
        each_slot = row_of_slot.reshape(-1, 1)
        want = combine(rows, each_slot).reshape(shape)
        error = combine_error(rows, each_slot, dtype=dtype, rows_error=rows_error)
        return want, Error(
            error.absolute.reshape(shape), error.variance.reshape(shape), error.freedom
        )
    expert = np.where(row_of_slot >= 0, np.searchsorted(expert_offsets, row_of_slot, "right"), -1)
    expert = np.sort(expert, axis=1)
    twice = ((expert[:, 1:] == expert[:, :-1]) & (expert[:, 1:] >= 0)).any(axis=1)
    last = dict(routed_scaling_factor=routed_scaling_factor, shared_output=shared)
    want = combine(rows, row_of_slot, **last)
    last.update(rows_error=rows_error, dependent=twice, deterministic=deterministic)
    return want, combine_error(rows, row_of_slot, **last, dtype=dtype)


def fused_moe_error(
    hidden_states,
    w13,
    w2,
    router_logits,
    topk,
    *,
    method="topk_softmax",
    routing_scale=1.0,
    routing=None,
    tokens=None,
    shared_output=None,
    **layer,
):
    """(want, Error) of `fused_moe`: that of fused_experts, and the router's own f32 arithmetic."""
    x, logits, shared = _sample(tokens, hidden_states, router_logits, shared_output)
    topk_weights, topk_ids = route(
        logits, topk, method=method, scale=routing_scale, **(routing or {})
    )
    # A sum of num_experts positive terms, two exp whose argument was rounded, a quotient.
    finite = np.where(np.isfinite(logits.astype(np.float64)), logits, 0).astype(np.float64)
    spread = float(finite.max() - finite.min()) if finite.size else 0.0
    relative = _ACCUMULATE * (logits.shape[1] + 2 * spread + 16)
    return fused_experts_error(
        x, w13, w2, topk_weights, topk_ids, shared_output=shared, weights_relative=relative, **layer
    )


# -------------------------------------------------------------------------------------------------
# Holding a result against the oracle
# -------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """What `compare` found. `ok` is the verdict, `message` says why in a line or three."""

    ok: bool
    message: str
    rel_rms: float  # |got - want| / |want|, 2-norms over the finite elements
    rel_rms_bound: float
    worst: float  # largest |got - want| / bound
    worst_index: tuple


def compare(got, want, error, *, name="out"):
    """Compare a result with the oracle: shape, NaN and infinities, each element, relative norm.

    got    array, any real dtype
    want   float64 from a function above
    error  Error from its `_error` twin

    An element whose worst case passes the dtype's largest number is not compared. Returns a Report.
    """
    got = _f64(got)
    want = _f64(want)
    if got.shape != want.shape:
        return Report(False, f"{name}: shape {got.shape}, want {want.shape}", *_NO_NUMBERS)
    if want.size == 0:
        return Report(True, f"{name}: no elements", 0.0, 0.0, 0.0, ())
    free = np.isposinf(error.absolute) & np.isfinite(want)
    for kind, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = (test(got) != test(want)) & ~free
        if wrong.any():
            at = np.unravel_index(int(np.argmax(wrong)), want.shape)
            at = tuple(int(i) for i in at)
            text = (
                f"{name}: {kind} at {int(wrong.sum())} of {want.size} elements differs, first at "
            )
            text += f"{list(at)}: got {got[at]!r}, want {want[at]!r}"
            return Report(False, text, *_NO_NUMBERS)
    used = np.isfinite(want) & ~free
    if not used.any():
        return Report(True, f"{name}: no finite element to compare", 0.0, 0.0, 0.0, ())
    distance = np.where(used, np.abs(np.where(used, got, 0) - np.where(used, want, 0)), 0)
    with np.errstate(all="ignore"):
        # An exact zero (dropped slots) has bound 0 and allows nothing but zero.
        ratio = np.where(distance == 0, 0.0, distance / np.where(used, error.absolute, 1.0))
    at = np.unravel_index(int(np.argmax(ratio)), want.shape)
    at = tuple(int(i) for i in at)
    norm = math.sqrt(float(np.sum(np.where(used, want, 0) ** 2)))
    rms = math.sqrt(float(np.sum(distance**2)))
    # Half again over the expected norm, and room for chance where there are few roundings: numbers
    # that occur often, such as a clamp's limit, are rounded to the same side every time.
    _, counts = np.unique(np.where(used, want, 0), return_counts=True)
    distinct = want.size**2 / float(np.sum(counts.astype(np.float64) ** 2))
    allowed = (1.5 + 3 / math.sqrt(min(error.freedom, distinct))) * math.sqrt(
        float(np.sum(np.where(used, error.variance, 0)))
    )
    worst = float(ratio[at])
    ok = worst <= 1 and rms <= allowed
    rel_rms, rel_bound = (rms / norm, allowed / norm) if norm else (rms, allowed)
    text = (
        f"{name}: {'agrees' if ok else 'DIFFERS'}; worst element {list(at)}: got {got[at]!r}, "
        f"want {want[at]!r}, off {distance[at]:.3g}, allowed {error.absolute[at]:.3g} "
        f"({int((ratio > 1).sum())} of {want.size} over); relative rms {rel_rms:.3g}, "
        f"allowed {rel_bound:.3g}"
    )
    return Report(ok, text, rel_rms, rel_bound, worst, at)


_NO_NUMBERS = (math.nan, math.nan, math.nan, ())


def unfused_rms(hidden_states, w13, w2, topk_weights, topk_ids, *, tokens=None):
    """Relative RMS error of a layer whose kernels hand each other rounded tensors, as those of
    SGLang do: gate and up, the activation's result, down's weighted rows, and at last the sum. All
    else is exact; silu, gated.

    Arguments as `fused_experts`; rounded to the dtype of hidden_states. Returns a float.
    """
    x, weights, ids = _sample(tokens, hidden_states, topk_weights, topk_ids)

    def rounded(value):
        return _f64(value.astype(x.dtype))

    offsets, slots, row_of_slot = align(ids, w13.shape[0])
    stored = np.zeros((int(offsets[-1]), w2.shape[1]))
    for e, rows, of in _experts(offsets, slots):
        gate, up = _split(rounded(_f64(x[of // ids.shape[1]]) @ _f64(w13[e]).T), True, "gate_up")
        inner = rounded(gate * _sigmoid(gate) * up)
        stored[rows] = rounded(inner @ _f64(w2[e]).T * _f64(weights).reshape(-1)[of][:, None])
    want = fused_experts(x, w13, w2, weights, ids)
    off = rounded(combine(stored, row_of_slot)) - want
    return float(np.sqrt((off**2).sum() / (want**2).sum()))


# -------------------------------------------------------------------------------------------------
# Helpers
# -------------------------------------------------------------------------------------------------


def _f64(x):
    with np.errstate(invalid="ignore"):  # NaN of any kind may come
        return np.asarray(x).astype(np.float64)


def _matmul(x, w):
    """x . w^T. NaN or inf in one row of x stays in that row, which BLAS does not promise."""
    bad = ~np.isfinite(x).all(axis=-1)
    y = np.where(bad[:, None], 0.0, x) @ w.T
    for row in np.flatnonzero(bad):
        y[row] = (x[row] * w).sum(axis=-1)
    return y


def _dtype_name(dtype):
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _DTYPES:
        raise ValueError(f"dtype: expected one of {tuple(_DTYPES)}, got {name!r}")
    return name


def _experts(expert_offsets, sorted_token_ids):
    """(expert, its rows as a slice, their slots token * topk + s), empty experts left out."""
    offsets, slots = np.asarray(expert_offsets), np.asarray(sorted_token_ids)
    for e in np.flatnonzero(np.diff(offsets)):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        yield int(e), rows, slots[rows]


def _split(y, gated, w13_order):
    """The gate and up columns of y; up is None where not gated."""
    half = y.shape[-1] // 2
    if not gated:
        return y, None
    if w13_order == "gate_up":
        return y[..., :half], y[..., half:]
    if w13_order == "up_gate":
        return y[..., half:], y[..., :half]
    if w13_order == "interleaved":
        return y[..., 0::2], y[..., 1::2]
    raise ValueError(f"w13_order: expected one of {ORDERS}, got {w13_order!r}")


def _activate(g, u, activation, alpha, limit, clamp):
    """(f(g), what u becomes): the two factors of `activate`."""
    if limit is not None and limit <= 0:
        limit = None
    if activation == "silu":
        if limit is None:
            return g * _sigmoid(g), u
        u = None if u is None else np.clip(u, -limit, limit)
        if clamp == "before":
            g = np.minimum(g, limit)
            return g * _sigmoid(g), u
        if clamp == "after":
            return np.minimum(g * _sigmoid(g), limit), u
        raise ValueError(f"clamp: expected 'after' or 'before', got {clamp!r}")
    if activation == "gelu":
        return g * (1 + _erf(g / math.sqrt(2))) / 2, u
    if activation == "gelu_tanh":
        return g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2, u
    if activation == "relu2":
        return np.maximum(g, 0) ** 2, u
    if activation == "swiglu_oai":
        alpha, limit = 1.702 if alpha is None else alpha, 7.0 if limit is None else limit
        g = np.minimum(g, limit)
        return g * _sigmoid(alpha * g), None if u is None else np.clip(u, -limit, limit) + 1
    if activation == "situ":
        alpha = 4.0 if alpha is None else alpha
        u = u if u is None or limit is None else limit * np.tanh(u / limit)
        return alpha * np.tanh(g / alpha) * _sigmoid(g), u
    raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")


def _sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sample(tokens, hidden_states, *others):
    """The given tokens of each tensor (None stays None)."""
    tensors = [None if t is None else np.asarray(t) for t in (hidden_states, *others)]
    if tokens is None:
        return tensors
    return [None if t is None else t[np.asarray(tokens)] for t in tensors]


def _down_weights(topk_weights, apply_router_weight_on_input, no_combine):
    return None if apply_router_weight_on_input or no_combine == "unweighted" else topk_weights


def _gamma(terms):
    """n u / (1 - n u): error of a sum of n products, relative to the sum of absolute values."""
    return terms * _ACCUMULATE / (1 - terms * _ACCUMULATE)


def _swing(g, f, error, args):
    """Largest |f(g +- error) - f(g)|."""
    above, below = (_activate(g + d, None, *args)[0] for d in (error, -error))
    return np.maximum(np.abs(above - f), np.abs(below - f))


def _round_sums(begin, total, squares, size, absolute, variance, topk, dtype):
    """Error after the roundings of all sums but the last, in any order: of begin and topk terms
    whose sum, squares and magnitudes add up to total, squares and size (begin included). Expected
    square of a sum of j of them: over all orders."""
    u = _DTYPES[dtype][0]
    for j in range(1, topk):
        share, both = j / topk, j * (j - 1) / (topk * (topk - 1))
        square = begin**2 + 2 * share * begin * total + share * squares
        square = square + both * (total**2 - squares)
        absolute, _ = _round(size, absolute, variance, dtype)
        variance = variance + (_ROUND_RMS * u) ** 2 * np.maximum(square, 0)
    return absolute, variance


def _round(value, absolute, variance, dtype):
    """Error after one rounding to dtype of a value whose error is given. Overflow: infinite."""
    u, tiny, largest = _DTYPES[dtype]
    reach = np.abs(value) + absolute
    # Exact zeros that nothing disturbs stay exact zeros.
    absolute = absolute + np.where(reach > 0, u * reach + tiny, 0.0)
    variance = variance + (_ROUND_RMS * u * value) ** 2 + np.where(reach > 0, tiny**2, 0.0)
    over = ~(reach < largest)  # NaN too
    return np.where(over, np.inf, absolute), np.where(over, 0.0, variance)
