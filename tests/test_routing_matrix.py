"""route over the product of what callers combine: sizes, dtypes, biases, padding, ids.

Every size of a router with every number of tokens and every bias; the other factors go round, so
that any two of their values meet somewhere. Rows repeat from 64 on and have to repeat in bits;
a few of them are held against the oracle.
"""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import Routing
from support import BF16, F16, F32, assert_choice, same_bits
from test_routing_methods import assert_weights

TOKENS = (0, 1, 2, 7, 8, 31, 32, 33, 64, 128, 255, 256, 257, 1024, 4096, 8192)
ROUTERS = [  # num_experts, topk, what else
    (8, 2, {}),
    (16, 1, {}),
    (60, 4, {}),
    (64, 6, {}),
    (72, 6, {}),
    (128, 8, {}),
    (144, 6, {}),
    (160, 6, {"num_groups": 8, "topk_groups": 3, "routed_scaling_factor": 16.0}),
    (160, 8, {}),
    (256, 6, {}),
    (256, 8, {"num_groups": 8, "topk_groups": 4, "routed_scaling_factor": 2.5}),
    (
        256,
        8,
        {
            "num_groups": 8,
            "topk_groups": 4,
            "routed_scaling_factor": 2.5,
            "num_fused_shared_experts": 1,
        },
    ),
    (288, 8, {}),
    (384, 6, {}),
    (384, 8, {"routed_scaling_factor": 2.827}),
    (512, 10, {}),
    (512, 22, {}),
    (768, 12, {"num_zero_experts": 256}),
    (896, 16, {}),
    (1024, 32, {}),
]
BIASES = ("none", "small", "large", "dead")
DISTINCT = 64  # rows that differ
HELD = 6  # of them against the oracle


def make_logits(rng, num_experts, dtype):
    """Rows of four kinds: random, near-ties, ties at every seventh expert, all equal."""
    rows = rng.standard_normal((DISTINCT, num_experts)) * 2
    rows[1::4] *= 1e-4
    rows[2::4, ::7] = 1.5
    rows[3::4] = rows[3::4, :1]
    return rows.astype(dtype)


def make_bias(rng, kind, num_experts):
    bias = rng.uniform(-0.5, 0.5, num_experts)
    if kind == "large":
        bias = 12 + bias / 64
    if kind == "dead":  # every third expert; as many are left as any topk here takes
        bias[::3] = -np.inf
    return bias.astype(F32)


# By whether there is a bias and whether there are groups.
METHODS = {
    (False, False): ("softmax_topk", "sigmoid"),
    (False, True): ("softmax_grouped", "sigmoid_grouped"),
    (True, False): ("sigmoid_bias", "softmax_bias"),
    (True, True): ("sigmoid_bias_grouped", "softmax_bias_grouped"),
}


def run(backend, logits, topk, method, fields, **kwargs):
    fields = {n: backend.put(v) if isinstance(v, np.ndarray) else v for n, v in fields.items()}
    routing = Routing(topk, method=method, **fields)
    weights, ids = fusedmoe.route(backend.put(logits), routing, **kwargs)
    return backend.get(weights), backend.get(ids)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("num_experts, topk, more", ROUTERS)
def test_matrix(backend, rng, num_experts, topk, more, bias):
    distinct = {dtype: make_logits(rng, num_experts, dtype) for dtype in (F32, BF16, F16)}
    for turn, num_tokens in enumerate(TOKENS):
        dtype = (F32, BF16, F16)[turn % 3]
        method = METHODS[bias != "none", "num_groups" in more][turn // 2 % 2]
        fields = {**more, "renormalize": bool(turn // 3 % 2)}
        if bias != "none":
            fields["correction_bias"] = make_bias(rng, bias, num_experts)
        known = max((num_tokens, 0, 1, num_tokens - 1, num_tokens)[turn % 5], 0)
        known = min(known, num_tokens)
        once = {"ids_dtype": ("int32", "int64")[turn // 2 % 2]}
        if turn % 5:
            once["num_token_non_padded"] = np.array([known], np.int32)
        packed = turn % 4 == 3
        num_slots = topk + more.get("num_fused_shared_experts", 0)
        words = backend.put(np.zeros((num_tokens, num_slots), np.int32)) if packed else None
        logits = distinct[dtype][np.arange(num_tokens) % DISTINCT]
        weights, ids = run(backend, logits, topk, method, {**fields, **once}, out_packed=words)
        case = f"{method}, {num_tokens} tokens, {dtype}, {known} of them known"
        assert np.isfinite(weights).all(), case
        if packed:
            words = backend.get(words).view(np.uint32)
            assert ((words >> 16).astype(np.uint16) == ids.astype(np.uint16)).all(), case
            low = (words & 0xFFFF).astype(np.uint16)
            assert (low.view(BF16) == weights.astype(BF16)).all(), case
        assert (ids[known:] == -1).all() and (weights[known:] == 0).all(), case
        first = np.arange(known) % DISTINCT
        assert same_bits(weights[:known], weights[first]), case
        assert same_bits(ids[:known], ids[first]), case
        held = rng.permutation(min(known, DISTINCT))[:HELD]
        if not len(held):
            continue
        logits, weights, ids = logits[held], weights[held], ids[held]
        zero = fields.pop("num_zero_experts", 0)
        if zero:  # the ids before -1 stood for some of them
            _, plain = run(backend, logits, topk, method, fields)
            assert (np.where(plain < num_experts - zero, plain, -1) == ids).all(), case
            ids = plain
        assert_choice(logits, num_experts, topk, method, fields, ids)
        assert_weights(logits, num_experts, topk, method, fields, weights, ids)
