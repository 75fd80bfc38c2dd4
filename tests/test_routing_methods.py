"""Every routing method and what can be added to it, against reference.route."""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import Routing, fused_experts, fused_moe, reference
from fusedmoe.routing import METHODS
from support import (
    BF16,
    F16,
    F32,
    Guarded,
    assert_choice,
    make_layer,
    padded,
    put_layer,
    same_bits,
)

# Fields that a method needs, with the names of reference.route.
GROUPED = [name for name, row in METHODS.items() if row.groups != "none"]
RANDOM = ("simulated_uniform", "simulated_zipf")
SCORED = [name for name in METHODS if name not in RANDOM]


def fields_of(method, rng, num_tokens, num_experts, topk, bias=0.5):
    """(topk, the fields of Routing that `method` has to be given)."""
    row, fields = METHODS[method], {}
    if row.bias != "none":
        fields["correction_bias"] = (rng.uniform(-bias, bias, num_experts)).astype(F32)
    if row.groups != "none":
        fields["num_groups"] = 4 if row.groups != "quota" else 2
        topk += -topk % 2 if row.groups == "quota" else 0
    if row.groups in ("max", "top2"):
        fields["topk_groups"] = 2
    if row.ids == "table":
        rows = num_tokens if method == "forced" else 100
        fields["tid2eid"] = np.argsort(rng.random((rows, num_experts)), axis=1)[:, :topk].astype(
            np.int32
        )
    if method == "hash":
        fields["token_ids"] = rng.integers(0, 100, num_tokens).astype(np.int64)
    if method == "sigmoid_bias_sink":
        fields.update(num_fused_shared_experts=2, shared_weight="sink")
        topk = min(topk, 30)
    if method == "llama4":
        topk = 1
    if method == "sparsemixer":
        topk = min(topk, 2)
    return topk, fields


ORACLE_NAMES = {"num_fused_shared_experts": "num_shared", "routed_scaling_factor": "scale"}
NOT_ORACLE = ("ids_dtype", "weights_dtype")


def oracle(logits, topk, method, fields, **more):
    known = {ORACLE_NAMES.get(k, k): v for k, v in fields.items() if k not in NOT_ORACLE}
    return reference.route(logits, topk, method=method, **known, **more)


def run(backend, logits, topk, method, fields, **kwargs):
    on_device = {k: backend.put(v) if isinstance(v, np.ndarray) else v for k, v in fields.items()}
    routing = Routing(topk, method=method, **on_device)
    weights, ids = fusedmoe.route(backend.put(logits), routing, **kwargs)
    weights, ids = backend.get(weights), backend.get(ids)
    assert weights.shape == ids.shape == (len(logits), routing.num_slots)
    return weights, ids


def draw(rng, num_tokens, num_experts, fields, dtype=F32, spread=2.0):
    gates = fields.get("shared_weight") in ("gate", "sink")
    columns = num_experts + (fields["num_fused_shared_experts"] if gates else 0)
    return (rng.standard_normal((num_tokens, columns)) * spread).astype(dtype)


def assert_weights(logits, num_experts, topk, method, fields, weights, ids, plain_ids=None):
    """The oracle's weights and mapped ids for the choice that was made."""
    chosen = (ids if plain_ids is None else plain_ids)[:, :topk]
    if METHODS[method].ids == "largest":
        known = np.where(chosen < 0, 0, chosen)  # padding
        want, want_ids = oracle(logits, topk, method, fields, topk_ids=known)
    else:
        want, want_ids = oracle(logits, topk, method, fields)
    assert (ids == want_ids).all()
    unit = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}[weights.dtype]
    finite = logits.astype(np.float64)
    finite = finite[np.isfinite(finite)]
    spread = float(np.ptp(finite)) if finite.size else 0.0
    relative = 2.0**-24 * (num_experts + 64 + 2 * spread) + unit
    bound = relative * np.abs(want) + (2.0**-24 if unit == 2.0**-11 else 2.0**-120)
    off = np.abs(weights.astype(np.float64) - want)
    bad = np.argwhere(~(off <= bound))
    assert not len(bad), f"{bad[0]}: got {weights[tuple(bad[0])]}, want {want[tuple(bad[0])]}"


def check(backend, logits, num_experts, topk, method, fields):
    weights, ids = run(backend, logits, topk, method, fields)
    assert np.isfinite(weights.astype(np.float64)).all()
    assert_choice(logits, num_experts, topk, method, fields, ids)
    assert_weights(logits, num_experts, topk, method, fields, weights, ids)
    return weights, ids


# -------------------------------------------------------------------------------------------------
# The methods
# -------------------------------------------------------------------------------------------------

SHAPES = [
    (1, 8, 2),
    (7, 60, 4),
    (33, 128, 8),
    (5, 256, 8),
    (3, 384, 6),
    (2, 512, 22),
    (2, 1024, 32),
]


def test_the_oracle_has_the_same_table():
    assert {name: tuple(row) for name, row in reference.METHODS.items()} == {
        name: tuple(row) for name, row in METHODS.items()
    }


@pytest.mark.small
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("method", SCORED)
def test_method(backend, rng, method, dtype):
    for num_tokens, num_experts, topk in SHAPES:
        k, fields = fields_of(method, rng, num_tokens, num_experts, topk)
        logits = draw(rng, num_tokens, num_experts, fields, dtype)
        check(backend, logits, num_experts, k, method, fields)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("method", SCORED)
def test_renormalize_and_scale(backend, rng, method, renormalize, scale):
    if renormalize == {"never": True, "always": False}.get(METHODS[method].renormalize):
        pytest.skip("not free with this method")
    k, fields = fields_of(method, rng, 9, 64, 6)
    fields.update(renormalize=renormalize, routed_scaling_factor=scale)
    logits = draw(rng, 9, 64, fields)
    weights, _ = check(backend, logits, 64, k, method, fields)
    if renormalize:
        assert np.allclose(weights.astype(np.float64).sum(axis=1), scale, rtol=1e-5)


@pytest.mark.parametrize("bias", [12.0, 1e-3])
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].bias != "none"])
def test_bias(backend, rng, method, bias):
    """A bias of 12 leaves few bits of the score in the key; the weight has all of them."""
    k, fields = fields_of(method, rng, 20, 96, 8, bias)
    values = fields["correction_bias"] / 64 + 12 if bias == 12 else fields["correction_bias"]
    for dtype in (F32, BF16, F16):
        fields["correction_bias"] = values.astype(dtype)
        check(backend, draw(rng, 20, 96, fields), 96, k, method, fields)


def test_bias_of_minus_infinity_is_a_dead_expert(backend, rng):
    k, fields = fields_of("sigmoid_bias", rng, 20, 64, 8)
    fields["correction_bias"][rng.permutation(64)[:40]] = -np.inf
    logits = draw(rng, 20, 64, fields)
    weights, ids = run(backend, logits, k, "sigmoid_bias", fields)
    assert np.isfinite(fields["correction_bias"][ids]).all()
    # Fewer live experts than topk: the dead ones fill up, in order of their ids.
    fields["correction_bias"][:] = -np.inf
    fields["correction_bias"][[5, 9]] = 0
    weights, ids = run(backend, logits, k, "sigmoid_bias", fields)
    assert (np.sort(ids[:, :2]) == [5, 9]).all() and (ids[:, 2:] == [0, 1, 2, 3, 4, 6]).all()
    assert_weights(logits, 64, k, "sigmoid_bias", fields, weights, ids)


@pytest.mark.parametrize("method", ["softmax_topk", "sigmoid", "softmax_bias", "topk_softmax"])
@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_softcap(backend, rng, method, cap):
    k, fields = fields_of(method, rng, 30, 64, 6)
    fields["softcap"] = cap
    check(backend, draw(rng, 30, 64, fields, spread=1.0), 64, k, method, fields)


@pytest.mark.parametrize("method", ["topk_softmax", "sigmoid_bias_grouped", "hash"])
def test_expert_scale(backend, rng, method):
    k, fields = fields_of(method, rng, 30, 64, 6)
    fields["expert_scale"] = rng.uniform(0.5, 2, 64).astype(F32)
    check(backend, draw(rng, 30, 64, fields), 64, k, method, fields)


def test_simulated(backend):
    logits = np.zeros((4000, 64), F32)
    for method in RANDOM:
        weights, ids = run(backend, logits, 4, method, {})
        assert (weights == 0.25).all()
        assert all(len(set(row)) == 4 for row in ids.tolist()) and ids.min() >= 0
        share = np.bincount(ids[:, 0], minlength=64) / 4000
        want = np.ones(64) if method == "simulated_uniform" else 1 / np.arange(1, 65)
        want /= want.sum()
        assert np.abs(share - want).max() < 5 * np.sqrt(want.max() / 4000)
    _, ids = run(backend, logits, 4, "simulated_round_robin", {})
    assert (ids == np.arange(16000).reshape(4000, 4) % 64).all()


# -------------------------------------------------------------------------------------------------
# Ties and bit patterns
# -------------------------------------------------------------------------------------------------


@pytest.mark.small
@pytest.mark.parametrize("method", [m for m in SCORED if METHODS[m].ids == "largest"])
def test_ties_go_to_the_lower_id(backend, rng, method):
    k, fields = fields_of(method, rng, 4, 64, 4)
    if "correction_bias" in fields:
        fields["correction_bias"][:] = 0.25
    logits = draw(rng, 4, 64, fields)
    logits[0] = 0  # every expert, every group
    logits[1] = np.arange(logits.shape[1]) % 7 == 0
    logits[2] = -1
    logits[2, [3, 17, 40, 63]] = 2
    logits[3, :64] = np.repeat([1.0, 2.0, 1.0, 2.0], 16)
    _, ids = run(backend, logits, k, method, fields)
    _, want = oracle(logits, k, method, fields)
    assert (ids == want).all()


def bit_patterns(rng, columns):
    special = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e-42, -1e-42, 3e38, -3e38, 1], F32)
    rows = [np.full(columns, value, F32) for value in special]
    rows += [rng.standard_normal(columns).astype(F32) for _ in special]
    for row, value in zip(rows[len(special) :], special, strict=True):
        row[rng.integers(columns)] = value
    rows += [rng.choice(special, columns) for _ in range(20)]
    with np.errstate(all="ignore"):
        rows += list(rng.integers(0, 2**32, (40, columns), np.uint32).view(F32))
    rows.append(np.where(np.arange(columns) % 2, 0.0, -0.0).astype(F32))
    return np.stack(rows)


@pytest.mark.small
@pytest.mark.parametrize("method", list(METHODS))
def test_any_bit_pattern(backend, rng, method):
    """ids in range and distinct, weights finite, other rows untouched."""
    num_experts = 48
    k, fields = fields_of(method, rng, 200, num_experts, 8)
    bad = bit_patterns(rng, draw(rng, 1, num_experts, fields).shape[1])
    k, fields = fields_of(method, rng, 2 * len(bad), num_experts, 8)
    logits = draw(rng, 2 * len(bad), num_experts, fields)
    clean = run(backend, logits, k, method, fields)
    logits[::2] = bad
    weights, ids = run(backend, logits, k, method, fields)
    assert np.isfinite(weights).all()
    assert all(len(set(row)) == ids.shape[1] for row in ids.tolist())
    assert ids[:, :k].min() >= 0 and ids[:, :k].max() < num_experts
    assert same_bits(weights[1::2], clean[0][1::2]) and same_bits(ids[1::2], clean[1][1::2])
    row = METHODS[method]
    if row.key in ("logit", "score") and row.ids == "largest" and row.groups == "none":
        nan = np.isnan(bad[:, :num_experts])
        chosen = np.take_along_axis(nan, ids[::2, :k].astype(np.int64), axis=1)
        assert (chosen.sum(axis=1) == np.maximum(k - (~nan).sum(axis=1), 0)).all()
        assert (np.diff(chosen.astype(int), axis=1) >= 0).all()  # NaN comes last
    if row.key == "logit" and row.bias == "none" and row.score != "sparsemixer":
        want_weights, want_ids = oracle(logits, k, method, fields)
        assert (ids == want_ids).all()
        assert ((weights == 0) == (np.abs(want_weights) < 1e-37)).mean() > 0.98


# -------------------------------------------------------------------------------------------------
# Shared experts, padding, maps, dtypes
# -------------------------------------------------------------------------------------------------


@pytest.mark.small
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("weight", [None, "sum", 0.4, "gate"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("method", ["softmax_topk", "sigmoid_bias_grouped"])
def test_shared_experts(backend, rng, method, renormalize, weight, count):
    k, fields = fields_of(method, rng, 21, 64, 6)
    fields.update(
        renormalize=renormalize,
        routed_scaling_factor=2.5,
        num_fused_shared_experts=count,
        shared_weight=weight,
    )
    logits = draw(rng, 21, 64, fields)
    weights, ids = check(backend, logits, 64, k, method, fields)
    assert (ids[:, k:] == 64 + np.arange(count)).all()
    if renormalize and weight in (None, "sum"):
        assert (weights[:, k:] == 1).all()


@pytest.mark.small
@pytest.mark.parametrize("padding", [0, 1, 12, 13, 50])
@pytest.mark.parametrize("method", ["softmax_topk", "sigmoid_bias_grouped", "hash"])
def test_padding(backend, rng, method, padding):
    k, fields = fields_of(method, rng, 13, 64, 6)
    logits = draw(rng, 13, 64, fields)
    logits[padding:] = np.nan
    fields.update(num_token_non_padded=np.array([padding], np.int32), num_fused_shared_experts=1)
    weights, ids = run(backend, logits, k, method, fields)
    assert (ids[padding:] == -1).all() and (weights[padding:] == 0).all()
    assert_weights(logits, 64, k, method, fields, weights, ids)


@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
@pytest.mark.parametrize("method", ["topk_softmax", "sigmoid_bias", "forced"])
def test_maps(backend, rng, method, ids_dtype):
    k, fields = fields_of(method, rng, 50, 40, 6)
    logits = draw(rng, 50, 40, fields)
    _, plain = run(backend, logits, k, method, fields)
    fields.update(ids_dtype=ids_dtype, num_fused_shared_experts=1)
    replicas = np.full((40, 3), -1, np.int32)
    replicas[:, 0] = rng.permutation(40)
    replicas[::2, 1] = 40 + np.arange(20)
    replicas[::4, 2] = 60 + np.arange(10)
    replicas[7] = -1  # an expert without a place
    local = rng.permutation(70).astype(np.int32)
    local[::5] = -1
    for more in (
        {"expert_map": local},
        {"replica_map": replicas},
        {"replica_map": replicas, "expert_map": local},
        {"expert_map": local[:40], "num_zero_experts": 8},
    ):
        weights, ids = run(backend, logits, k, method, {**fields, **more})
        assert ids.dtype == np.dtype(ids_dtype)
        assert_weights(logits, 40, k, method, {**fields, **more}, weights, ids, plain)


def test_zero_experts(backend, rng):
    """Columns of experts that return their input: id -1, with their weight."""
    k, fields = fields_of("softmax_bias", rng, 40, 96, 8)
    logits = draw(rng, 40, 96, fields)
    all_weights, all_ids = run(backend, logits, k, "softmax_bias", fields)
    fields["num_zero_experts"] = 32
    weights, ids = run(backend, logits, k, "softmax_bias", fields)
    assert same_bits(weights, all_weights)
    assert (ids == np.where(all_ids < 64, all_ids, -1)).all() and (ids == -1).any()


def test_foreign_ids_in_a_table_are_dropped(backend, rng):
    k, fields = fields_of("hash", rng, 30, 16, 4)
    fields["tid2eid"][:, 1] = 16
    fields["tid2eid"][:, 3] = -5
    fields["token_ids"][::3] = 100  # outside the vocabulary
    fields["token_ids"][1::3] = -1
    logits = draw(rng, 30, 16, fields)
    weights, ids = run(backend, logits, k, "hash", fields)
    assert (ids[:, [1, 3]] == -1).all() and (ids[::3] == -1).all() and (ids[1::3] == -1).all()
    assert_weights(logits, 16, k, "hash", fields, weights, ids)


@pytest.mark.parametrize("weights_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("method", ["softmax_topk", "sigmoid"])
def test_weights_dtype(backend, rng, method, weights_dtype):
    k, fields = fields_of(method, rng, 30, 64, 6)
    logits = draw(rng, 30, 64, fields)
    full = run(backend, logits, k, method, {**fields, "weights_dtype": "float32"})
    dtype = {"bfloat16": BF16, "float16": F16, "float32": F32}[weights_dtype]
    out = Guarded(backend, (30, k), dtype)
    weights, ids = run(backend, logits, k, method, fields, out_weights=out.tensor)
    out.check("out_weights")
    assert weights.dtype == dtype and (ids == full[1]).all()
    assert_weights(logits, 64, k, method, fields, weights, ids)


def test_strides(backend, rng):
    k, fields = fields_of("sigmoid_bias_grouped", rng, 13, 64, 6)
    logits = draw(rng, 13, 64, fields)
    want = run(backend, logits, k, "sigmoid_bias_grouped", fields)
    out_weights = padded(backend, np.zeros((13, k), F32), 3)
    out_ids = padded(backend, np.zeros((13, k), np.int64), 5)
    routing = Routing(
        k,
        method="sigmoid_bias_grouped",
        **{n: backend.put(v) if isinstance(v, np.ndarray) else v for n, v in fields.items()},
    )
    fusedmoe.route(
        padded(backend, logits, 7, offset=1), routing, out_weights=out_weights, out_ids=out_ids
    )
    assert same_bits(backend.get(out_weights), want[0])
    assert (backend.get(out_ids) == want[1]).all()


@pytest.mark.parametrize("method", list(METHODS))
def test_no_tokens(backend, rng, method):
    k, fields = fields_of(method, rng, 0, 64, 6)
    run(backend, draw(rng, 0, 64, fields), k, method, fields)


# -------------------------------------------------------------------------------------------------
# CPU against GPU
# -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("method", list(METHODS))
def test_the_gpu_chooses_as_the_cpu_does(gpu, cpu, rng, method):
    """The same bits in every key: the same ids, near-ties included. The weights too, but for the
    softmax methods of the short kernel, which has its own exp."""
    for num_experts, topk in [(8, 2), (64, 6), (160, 6), (256, 8), (512, 22), (1024, 30)]:
        k, fields = fields_of(method, rng, 333, num_experts, topk)
        for spread, dtype in [(1.0, F32), (1e-4, F32), (4.0, BF16)]:
            logits = draw(rng, 333, num_experts, fields, dtype, spread)
            ours, theirs = (run(b, logits, k, method, fields) for b in (cpu, gpu))
            assert same_bits(ours[1], theirs[1])
            if method not in ("softmax_topk", "topk_softmax"):
                assert same_bits(ours[0], theirs[0])
    k, fields = fields_of(method, rng, 400, 64, 6)
    bad = bit_patterns(rng, draw(rng, 1, 64, fields).shape[1])
    k, fields = fields_of(method, rng, len(bad), 64, 6)
    ours, theirs = (run(b, bad, k, method, fields) for b in (cpu, gpu))
    assert same_bits(ours[1], theirs[1])


@pytest.mark.gpu
def test_graph_replay_reads_the_padding_anew(gpu, rng):
    """Captured once, replayed with another num_token_non_padded and other logits."""
    torch = gpu.torch
    k, fields = fields_of("sigmoid_bias_grouped", rng, 100, 64, 6)
    on_device = {n: gpu.put(v) if isinstance(v, np.ndarray) else v for n, v in fields.items()}
    count = torch.zeros(1, dtype=torch.int32, device="cuda")
    routing = Routing(k, method="sigmoid_bias_grouped", num_token_non_padded=count, **on_device)
    logits = gpu.put(draw(rng, 100, 64, fields))
    out = fusedmoe.route(logits, routing)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fusedmoe.route(logits, routing, out_weights=out[0], out_ids=out[1])
    for padding in (60, 5, 0, 100):
        fresh = draw(rng, 100, 64, fields)
        logits.copy_(gpu.put(fresh))
        count.fill_(padding)
        graph.replay()
        weights, ids = gpu.get(out[0]), gpu.get(out[1])
        assert (ids[padding:] == -1).all() and (weights[padding:] == 0).all()
        if padding:
            now = {**fields, "num_token_non_padded": np.array([padding])}
            assert_weights(fresh, 64, k, "sigmoid_bias_grouped", now, weights, ids)


# -------------------------------------------------------------------------------------------------
# In the layer
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS))
def test_fused_moe_is_route_and_fused_experts(backend, seed, rng, method):
    k, fields = fields_of(method, rng, 19, 16, 4)
    shared = fields.get("num_fused_shared_experts", 1)
    fields.update(num_fused_shared_experts=shared, num_token_non_padded=np.array([17], np.int32))
    layer = make_layer(seed, 19, 64, 40, 16 + shared, 4)
    logits = backend.put(draw(rng, 19, 16, fields))
    tensors, _ = put_layer(backend, layer)
    x, w13, w2 = tensors["hidden_states"], tensors["w13"], tensors["w2"]
    on_device = {n: backend.put(v) if isinstance(v, np.ndarray) else v for n, v in fields.items()}
    routing = Routing(k, method=method, **on_device)
    together = backend.get(fused_moe(x, w13, w2, logits, routing=routing))
    apart = fused_experts(x, w13, w2, *fusedmoe.route(logits, routing))
    assert same_bits(together, backend.get(apart))
    assert (together[17:] == 0).all() and (together[:17] != 0).any()


def test_fused_moe_maps_ids_to_this_rank(backend, seed, rng):
    """expert_map of the routing or of the layer: the same."""
    layer = make_layer(seed, 20, 48, 32, 8, 4)
    k, fields = fields_of("sigmoid_bias", rng, 20, 24, 4)
    logits = backend.put(draw(rng, 20, 24, fields))
    table = np.full(24, -1, np.int32)
    table[3::3] = np.arange(7)
    table[0] = 7
    tensors, _ = put_layer(backend, layer)
    args = tensors["hidden_states"], tensors["w13"], tensors["w2"], logits
    bias, table = backend.put(fields["correction_bias"]), backend.put(table)
    inside = Routing(k, method="sigmoid_bias", correction_bias=bias, expert_map=table)
    outside = Routing(k, method="sigmoid_bias", correction_bias=bias)
    one = fused_moe(*args, routing=inside)
    two = fused_moe(*args, routing=outside, expert_map=table)
    assert same_bits(backend.get(one), backend.get(two))


# -------------------------------------------------------------------------------------------------
# Refused
# -------------------------------------------------------------------------------------------------


@pytest.mark.small
@pytest.mark.parametrize(
    "method, topk, wrong, name",
    [
        ("sigmoid_bias_grouped", 6, {"num_groups": 5, "topk_groups": 2}, "num_groups"),
        ("sigmoid_bias_grouped", 6, {"num_groups": 32, "topk_groups": 2}, "topk"),
        ("softmax_quota", 5, {"num_groups": 5}, "num_groups"),
        ("sigmoid_bias", 6, {"correction_bias": np.zeros(63, F32)}, "correction_bias"),
        ("sigmoid_bias", 6, {"correction_bias": np.zeros(64, np.int32)}, "correction_bias"),
        ("softmax_topk", 6, {"expert_scale": np.zeros(65, F32)}, "expert_scale"),
        ("softmax_topk", 6, {"expert_map": np.zeros(63, np.int32)}, "expert_map"),
        ("softmax_topk", 6, {"expert_map": np.zeros(64, np.int64)}, "expert_map"),
        ("softmax_topk", 6, {"replica_map": np.zeros((63, 2), np.int32)}, "replica_map"),
        ("softmax_topk", 6, {"num_token_non_padded": np.zeros(2, np.int32)}, "num_token_non_p"),
        ("softmax_topk", 6, {"num_zero_experts": 64}, "num_zero_experts"),
        ("forced", 6, {"tid2eid": np.zeros((8, 6), np.int32)}, "tid2eid"),
        ("hash", 6, {"tid2eid": np.zeros((9, 5), np.int32)}, "tid2eid"),
        ("hash", 6, {"token_ids": np.zeros(8, np.int32)}, "token_ids"),
    ],
)
def test_wrong_for_these_logits(backend, rng, method, topk, wrong, name):
    _, fields = fields_of(method, rng, 9, 64, topk)
    logits = draw(rng, 9, 64, fields)
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        run(backend, logits, topk, method, {**fields, **wrong})


@pytest.mark.small
@pytest.mark.parametrize("method", ["topk_softmax", "sigmoid_bias_grouped", "hash"])
def test_packed_ids_and_weights(backend, rng, method):
    k, fields = fields_of(method, rng, 23, 64, 6)
    fields["num_token_non_padded"] = np.array([20], np.int32)
    logits = draw(rng, 23, 64, fields)
    packed = Guarded(backend, (23, k), np.int32)
    weights, ids = run(backend, logits, k, method, fields, out_packed=packed.tensor)
    words = backend.get(packed.tensor).view(np.uint32)
    assert ((words >> 16).astype(np.uint16) == ids.astype(np.uint16)).all()
    assert ((words & 0xFFFF).astype(np.uint16).view(BF16) == weights.astype(BF16)).all()
    packed.check("out_packed")


@pytest.mark.small
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_counts_of_tokens(backend, rng, num_tokens):
    """Added to, by the routed experts before any map; padding does not count."""
    k, fields = fields_of("sigmoid_bias", rng, num_tokens, 64, 6)
    fields["expert_map"] = np.full(64, -1, np.int32)
    fields["num_fused_shared_experts"] = 1
    fields["num_token_non_padded"] = np.array([num_tokens - 1], np.int32)
    logits = draw(rng, num_tokens, 64, fields)
    _, plain = run(
        backend, logits[:-1], k, "sigmoid_bias", {"correction_bias": fields["correction_bias"]}
    )
    counts = backend.put(np.full(64, 1000, np.int32))
    run(backend, logits, k, "sigmoid_bias", fields, out_counts=counts)
    assert (backend.get(counts) == 1000 + np.bincount(plain.ravel(), minlength=64)).all()


def test_ids_of_shared_experts_elsewhere(backend, rng):
    """Rank 1 of 4 with 16 local experts and one shared: ids in steps of 17."""
    local = np.arange(64, dtype=np.int32)
    fields = {
        "num_fused_shared_experts": 1,
        "first_shared_id": 1 * 17 + 16,
        "expert_map": local + local // 16,
    }
    _, plain = run(backend, np.eye(64, dtype=F32), 4, "softmax_topk", {})
    _, ids = run(backend, np.eye(64, dtype=F32), 4, "softmax_topk", fields)
    assert (ids[:, :4] == plain + plain // 16).all() and (ids[:, 4] == 33).all()
    with pytest.raises(ValueError, match="^first_shared_id"):
        Routing(4, first_shared_id=3)
    with pytest.raises(ValueError, match="^first_shared_id"):
        Routing(4, num_fused_shared_experts=1, first_shared_id=-1)


@pytest.mark.small
@pytest.mark.parametrize(
    "wrong, name",
    [
        ({"out_packed": np.zeros((5, 3), np.int32)}, "out_packed"),
        ({"out_packed": np.zeros((5, 4), np.int64)}, "out_packed"),
        ({"out_counts": np.zeros(15, np.int32)}, "out_counts"),
        ({"out_counts": np.zeros(16, F32)}, "out_counts"),
    ],
)
def test_refuses_other_outputs(backend, wrong, name):
    wrong = {k: backend.put(v) for k, v in wrong.items()}
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        fusedmoe.route(backend.put(np.zeros((5, 16), F32)), Routing(4), **wrong)


@pytest.mark.small
@pytest.mark.parametrize("num_experts, topk", [(96, 8), (256, 8), (384, 8), (512, 10), (1024, 32)])
@pytest.mark.parametrize("method", ["topk_softmax", "sigmoid", "sigmoid_bias"])
def test_many_candidates(backend, rng, method, num_experts, topk):
    """Rows in which many keys are as large as the largest of a lane: the kernel sorts up to 64 of
    them side by side, and takes more one after the other."""
    _, fields = fields_of(method, rng, 8, num_experts, topk, bias=0)
    rows = np.full((8, num_experts), -1, F32)
    rows[0] = 0
    for t, lane in enumerate((1, 2, 3, 5, 8), 1):  # all large keys in a few lanes
        at = np.arange(num_experts)[np.arange(num_experts) % 32 < lane]
        rows[t, at] = np.sort(rng.standard_normal(len(at)))[:: 1 if t % 2 else -1] + 5
    rows[6] = np.arange(num_experts) // 100
    rows[7, ::3] = 1
    check(backend, rows, num_experts, topk, method, fields)
    logits = rows.astype(BF16)  # whose scores are further apart than they round
    _, ids = run(backend, logits, topk, method, fields)
    _, want = oracle(logits, topk, method, fields)
    assert (ids == want).all()
