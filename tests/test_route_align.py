"""route_align: route, then align, whatever number of launches that takes."""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import Routing, fused_experts, fused_moe, reference
from support import BF16, F16, F32, Guarded, make_layer, put_layer, same_bits
from test_routing_methods import draw, fields_of

CASES = [
    ("topk_softmax", 128, 8, BF16, {}),
    ("topk_softmax", 256, 8, F16, {}),
    ("softmax_topk", 60, 4, F32, {}),
    ("topk_softmax", 512, 10, BF16, {}),
    ("sigmoid_bias", 384, 8, F32, {}),
    ("sigmoid_bias", 896, 16, BF16, {}),
    ("sigmoid_bias_grouped", 256, 8, F32, {"num_groups": 8, "topk_groups": 4}),
    ("sigmoid_bias_grouped", 128, 4, F32, {"num_groups": 4, "topk_groups": 2}),
    ("sqrt_softplus_bias", 256, 6, F32, {}),
    ("sqrt_softplus_bias", 384, 6, BF16, {}),
    ("softmax_bias", 64, 6, F32, {"num_fused_shared_experts": 1}),
    ("hash", 96, 6, F32, {}),
]


def make(backend, rng, method, num_tokens, num_experts, topk, dtype, more):
    topk, fields = fields_of(method, rng, num_tokens, num_experts, topk)
    fields.update(more)
    logits = backend.put(draw(rng, num_tokens, num_experts, fields, dtype))
    fields = {k: backend.put(v) if isinstance(v, np.ndarray) else v for k, v in fields.items()}
    return logits, topk, fields


def assert_aligned(backend, got, ids, num_experts, **local):
    want = reference.align(ids, num_experts, **local)
    num_rows = int(want[0][-1])
    assert (backend.get(got[2]) == want[0]).all()
    assert (backend.get(got[3])[:num_rows] == want[1]).all()
    assert (backend.get(got[4]) == want[2]).all()


@pytest.mark.small
@pytest.mark.parametrize("method, num_experts, topk, dtype, more", CASES)
def test_is_route_then_align(backend, rng, method, num_experts, topk, dtype, more):
    for num_tokens in (1, 2, 5, 8, 9, 16, 17, 33, 64, 100, 128, 129):
        logits, k, fields = make(backend, rng, method, num_tokens, num_experts, topk, dtype, more)
        routing = Routing(k, method=method, **fields)
        want = fusedmoe.route(logits, routing)
        got = fusedmoe.route_align(logits, routing)
        for ours, theirs in zip(got[:2], want, strict=True):
            assert same_bits(backend.get(ours), backend.get(theirs)), num_tokens
        held = num_experts + fields.get("num_fused_shared_experts", 0)
        assert_aligned(backend, got, backend.get(want[1]), held)


@pytest.mark.small
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
def test_out_and_one_rank(backend, rng, num_tokens, ids_dtype):
    """Own buffers, nothing written beside them; the experts of one rank; padding."""
    logits, k, fields = make(backend, rng, "sigmoid_bias", num_tokens, 64, 6, F32, {})
    fields["num_token_non_padded"] = backend.put(np.array([max(num_tokens - 3, 0)], np.int32))
    routing = Routing(k, method="sigmoid_bias", ids_dtype=ids_dtype, **fields)
    shapes = [(num_tokens, k)] * 2 + [(17,), (num_tokens * k,), (num_tokens, k)]
    dtypes = [F32, np.dtype(ids_dtype)] + [np.dtype(np.int32)] * 3
    outs = [Guarded(backend, s, d) for s, d in zip(shapes, dtypes, strict=True)]
    names = ("weights", "ids", "expert_offsets", "sorted_token_ids", "row_of_slot")
    got = fusedmoe.route_align(
        logits,
        routing,
        num_experts=16,
        expert_start=16,
        **{f"out_{name}": out.tensor for name, out in zip(names, outs, strict=True)},
    )
    for name, out, tensor in zip(names, outs, got, strict=True):
        assert tensor is out.tensor
        out.check(name)
    ids = backend.get(got[1])
    assert (ids[max(num_tokens - 3, 0) :] == -1).all()
    assert_aligned(backend, got, ids, 16, expert_start=16)
    table = np.full(64, -1, np.int32)
    table[::4] = np.arange(16)
    got = fusedmoe.route_align(logits, routing, num_experts=16, expert_map=backend.put(table))
    assert_aligned(backend, got, backend.get(got[1]), 16, expert_map=table)


@pytest.mark.small
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 8, 16, 64])
@pytest.mark.parametrize("same", [False, True])
def test_tiles_of_a_layer(backend, seed, rng, num_tokens, same):
    """64 ids for 5 experts, some of them dropped: many rows, and so tiles, of one. Sizes that no
    kernel without align takes."""
    layer = make_layer(seed, num_tokens, 63, 41, 5, 8)
    tensors, _ = put_layer(backend, layer)
    x, w13, w2 = tensors["hidden_states"], tensors["w13"], tensors["w2"]
    logits = draw(rng, num_tokens, 64, {}, BF16)
    if same:
        logits[:] = logits[0]
    logits = backend.put(logits)
    table = rng.integers(-1, 5, 64).astype(np.int32)
    table[::2] = 3
    table = backend.put(table)
    routing = Routing(8, method="topk_softmax")
    together = fused_moe(x, w13, w2, logits, routing=routing, expert_map=table)
    apart = fused_experts(x, w13, w2, *fusedmoe.route(logits, routing), expert_map=table)
    assert same_bits(backend.get(together), backend.get(apart))


def test_every_token_on_the_same_experts(backend):
    logits = backend.put(np.zeros((128, 128), BF16))
    got = fusedmoe.route_align(logits, Routing(8, method="topk_softmax"))
    ids = backend.get(got[1])
    assert (ids == np.arange(8)).all()
    assert_aligned(backend, got, ids, 128)


def test_same_bits_every_time(backend, rng):
    logits = backend.put(draw(rng, 100, 256, {}, BF16))
    routing = Routing(8, method="topk_softmax")
    first = [backend.get(t) for t in fusedmoe.route_align(logits, routing)]
    for _ in range(3):
        again = fusedmoe.route_align(logits, routing)
        assert all(same_bits(a, backend.get(b)) for a, b in zip(first, again, strict=True))


@pytest.mark.small
@pytest.mark.parametrize(
    "wrong, name",
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 1025}, "num_experts"),
        ({"num_experts": -3}, "num_experts"),
        ({"out_expert_offsets": np.zeros(5, np.int32)}, "out_expert_offsets"),
        ({"out_ids": np.zeros((4, 3), F32)}, "out_ids"),
        ({"out_row_of_slot": np.zeros((4, 2), np.int32)}, "out_row_of_slot"),
        ({"out_sorted_token_ids": np.zeros(12, np.int64)}, "out_sorted_token_ids"),
        ({"expert_map": np.zeros(4, np.int64)}, "expert_map"),
        ({"expert_start": 1.5}, "expert_start"),
        ({"workspace": np.zeros(8, F32)}, "workspace"),
        ({"routing": None}, "routing"),
    ],
)
def test_refuses(backend, wrong, name):
    wrong = {k: backend.put(v) if isinstance(v, np.ndarray) else v for k, v in wrong.items()}
    arguments = {"routing": Routing(3), **wrong}
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        fusedmoe.route_align(backend.put(np.zeros((4, 16), F32)), **arguments)


def test_slots_may_be_more_than_columns(backend, rng):
    """topk and the shared experts together were held against the router's columns."""
    logits = backend.put(rng.standard_normal((3, 2), dtype=np.float32))
    routing = Routing(2, num_fused_shared_experts=1, shared_weight=1.0)
    weights, ids = fusedmoe.route(logits, routing)
    got = fusedmoe.route_align(logits, routing)
    assert same_bits(backend.get(got[0]), backend.get(weights))
    assert_aligned(backend, got, backend.get(ids), 3)
