"""The grids on which other engines test their routing ops, on the functions that do the same here.

Which function and method does the work of which op: docs/routing.md. Shapes are those of the public
tests; what is asked is what our own tests ask: the ids of the oracle but for near-ties, weights to
the rounding of float32, not the 1e-2 to 1e-3 that is usual there.
"""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import reference
from support import BF16, F16, F32, assert_close
from test_routing_methods import check, draw, run

BATCHES = (1, 16, 128, 512)


@pytest.mark.parametrize("topk", [1, 2, 4])
@pytest.mark.parametrize("num_experts", [4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("method", ["softmax_topk", "topk_softmax", "sigmoid", "sigmoid_bias"])
def test_topk_softmax_and_topk_sigmoid(backend, rng, method, num_experts, topk):
    for num_tokens, dtype in zip(BATCHES, (F32, BF16, F16, F32), strict=True):
        fields = {}
        if method == "sigmoid_bias":
            fields["correction_bias"] = rng.standard_normal(num_experts).astype(F32)
        if method.startswith("sigmoid"):
            fields["renormalize"] = bool(num_tokens % 3)
        logits = draw(rng, num_tokens, num_experts, fields, dtype)
        check(backend, logits, num_experts, topk, method, fields)


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_topk_softmax_with_moe_softcapping(backend, rng, cap):
    fields = {"softcap": cap} if cap else {}
    check(backend, draw(rng, 64, 8, fields), 8, 2, "softmax_topk", fields)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    "num_experts, num_groups, topk_groups, topk", [(64, 8, 3, 6), (160, 8, 3, 6), (128, 8, 2, 8)]
)
def test_grouped_topk(backend, rng, num_experts, num_groups, topk_groups, topk, renormalize):
    fields = {"num_groups": num_groups, "topk_groups": topk_groups, "renormalize": renormalize}
    for num_tokens in (1, 33, 64):
        logits = draw(rng, num_tokens, num_experts, fields)
        check(backend, logits, num_experts, topk, "softmax_grouped", fields)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("num_shared", [0, 1, 2])
@pytest.mark.parametrize(
    "num_experts, num_groups, topk_groups, topk", [(128, 4, 2, 4), (256, 8, 4, 8), (512, 16, 8, 16)]
)
def test_biased_grouped_topk_and_moe_fused_gate(
    backend, rng, num_experts, num_groups, topk_groups, topk, num_shared, scale
):
    """Here topk counts the routed experts alone, there the shared ones too."""
    fields = {
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "correction_bias": rng.random(num_experts).astype(F32),
        "num_fused_shared_experts": num_shared,
        "routed_scaling_factor": scale,
    }
    for num_tokens in (*range(1, 10), 16, 64, 256):
        logits = draw(rng, num_tokens, num_experts, fields)
        weights, ids = check(backend, logits, num_experts, topk, "sigmoid_bias_grouped", fields)
        assert (ids[:, topk:] == num_experts + np.arange(num_shared)).all()
        assert (weights[:, topk:] == 1).all()


def test_moe_fused_gate_of_many_tokens(backend, rng):
    num_tokens = 65536 if backend.name == "cuda" else 2048
    bias = rng.random(256).astype(F32)
    fields = {"num_groups": 8, "topk_groups": 4, "correction_bias": bias}
    logits = draw(rng, num_tokens, 256, fields)
    weights, ids = run(backend, logits, 8, "sigmoid_bias_grouped", fields)
    some = rng.choice(num_tokens, 64, replace=False)
    one = run(backend, logits[some], 8, "sigmoid_bias_grouped", fields)
    assert (ids[some] == one[1]).all() and (weights[some] == one[0]).all()


@pytest.mark.parametrize("method", ["sigmoid_bias", "sqrt_softplus_bias"])
@pytest.mark.parametrize("num_experts, topk", [(256, 6), (384, 8), (896, 16)])
def test_moe_fused_gate_without_groups(backend, rng, method, num_experts, topk):
    """One group: the gate of Kimi K2 and K3, of DeepSeek-V4."""
    fields = {"correction_bias": rng.random(num_experts).astype(F32)}
    fields["routed_scaling_factor"] = 2.827
    for num_tokens, dtype in ((1, F32), (8, BF16), (65, F32)):
        logits = draw(rng, num_tokens, num_experts, fields, dtype)
        check(backend, logits, num_experts, topk, method, fields)


@pytest.mark.parametrize("num_shared", [0, 1])
@pytest.mark.parametrize("token_dtype", [np.int32, np.int64])
def test_hash_topk(backend, rng, token_dtype, num_shared):
    table = np.argsort(rng.random((1000, 256)), axis=1)[:, :6].astype(np.int32)
    for num_tokens in (1, 7, 128):
        fields = {
            "tid2eid": table,
            "token_ids": rng.integers(0, 1000, num_tokens).astype(token_dtype),
            "num_fused_shared_experts": num_shared,
            "routed_scaling_factor": 1.5,
        }
        check(backend, draw(rng, num_tokens, 256, fields), 256, 6, "hash", fields)


@pytest.mark.parametrize("num_tokens", [1, 33, 222])
@pytest.mark.parametrize("topk", [2, 6])
@pytest.mark.parametrize("hidden_size", [128, 511, 1024])
@pytest.mark.parametrize("scale", [None, 2.5])
def test_moe_sum_and_moe_sum_reduce(backend, rng, num_tokens, topk, hidden_size, scale):
    """`combine` of rows that lie in the order of the slots."""
    for dtype in (d for d in (BF16, F16) if d in backend.dtypes):
        rows = rng.standard_normal((num_tokens * topk, hidden_size)).astype(dtype)
        slots = np.arange(num_tokens * topk, dtype=np.int32).reshape(num_tokens, topk)
        out = fusedmoe.combine(backend.put(rows), backend.put(slots), routed_scaling_factor=scale)
        want = reference.combine(rows, slots, routed_scaling_factor=scale)
        error = reference.combine_error(rows, slots, routed_scaling_factor=scale)
        assert_close(backend.get(out), want, error)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
@pytest.mark.parametrize("topk", [1, 2, 8, 32])
@pytest.mark.parametrize("num_experts", [32, 160, 256, 257])
def test_moe_align_block_size(backend, rng, num_experts, topk, block_size):
    for num_tokens in (1, 3, 256, 2256 if topk == 8 else 64):
        ids = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :topk].astype(np.int32)
        rows, experts, padded = (
            backend.get(t)
            for t in fusedmoe.align_block_size(backend.put(ids), block_size, num_experts)
        )
        want = reference.align_block_size(ids, block_size, num_experts)
        n = int(want[2][0])
        assert padded.tolist() == [n]
        assert (rows[:n] == want[0]).all() and (experts[: n // block_size] == want[1]).all()
