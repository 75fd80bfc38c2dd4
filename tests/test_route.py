"""Stage 1, route: softmax and the topk largest, against reference.route."""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import Routing, reference
from support import BF16, F16, F32, Guarded, padded, same_bits

METHODS = ("softmax_topk", "topk_softmax")
# One unit of f32 for each addition of the softmax, a few for exp and the division.
EXP_ULP = 32


def assert_routed(logits, topk, method, weights, ids, scale=1.0):
    """ids exactly, weights to the f32 error of a softmax over num_experts terms."""
    want_weights, want_ids = reference.route(logits, topk, method=method, scale=scale)
    assert weights.shape == want_weights.shape and ids.shape == want_ids.shape
    wrong = np.argwhere(ids != want_ids)
    assert not len(wrong), f"ids differ at {wrong[0]}: {ids[wrong[0][0]]}, {want_ids[wrong[0][0]]}"
    assert np.isfinite(weights).all()
    finite = logits.astype(np.float64)
    finite = finite[np.isfinite(finite)]
    spread = float(np.ptp(finite)) if finite.size else 0.0
    relative = 2.0**-24 * (logits.shape[1] + EXP_ULP + 2 * spread)
    # Weights below the least normal f32 may be flushed.
    bound = relative * np.abs(want_weights) + 2.0**-126 * max(1.0, abs(scale))
    off = np.abs(weights.astype(np.float64) - want_weights)
    bad = np.argwhere(off > bound)
    assert not len(bad), (
        f"{bad[0]}: got {weights[tuple(bad[0])]}, want {want_weights[tuple(bad[0])]}"
    )


def route(backend, logits, topk, method="topk_softmax", **kwargs):
    renormalize = method == "topk_softmax"
    weights, ids = fusedmoe.route(
        backend.put(logits),
        Routing(topk, method="softmax_topk", renormalize=renormalize, **kwargs),
    )
    weights, ids = backend.get(weights), backend.get(ids)
    assert weights.dtype == np.float32
    return weights, ids


@pytest.mark.small
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "num_tokens, num_experts, topk",
    [(1, 1, 1), (3, 2, 2), (5, 8, 2), (33, 60, 4), (7, 128, 8), (2, 257, 9), (4, 512, 10)],
)
def test_matches_oracle(backend, rng, method, dtype, num_tokens, num_experts, topk):
    logits = (rng.standard_normal((num_tokens, num_experts)) * 3).astype(dtype)
    weights, ids = route(backend, logits, topk, method)
    assert ids.dtype == np.int32
    assert_routed(logits, topk, method, weights, ids)


@pytest.mark.parametrize("num_tokens, num_experts, topk", [(300, 1024, 32), (1000, 128, 8)])
@pytest.mark.parametrize("method", METHODS)
def test_large(backend, rng, method, num_tokens, num_experts, topk):
    logits = rng.standard_normal((num_tokens, num_experts)).astype(F32)
    assert_routed(logits, topk, method, *route(backend, logits, topk, method))


@pytest.mark.parametrize("topk", range(1, 33))
def test_every_topk(backend, rng, topk):
    logits = rng.standard_normal((9, 40)).astype(BF16)
    assert_routed(logits, topk, "topk_softmax", *route(backend, logits, topk))


@pytest.mark.small
def test_ties_go_to_the_lower_id(backend):
    logits = np.zeros((3, 70), F32)
    logits[1, ::7] = 1
    logits[2, 69] = logits[2, 3] = 5
    weights, ids = route(backend, logits, 4)
    assert ids.tolist() == [[0, 1, 2, 3], [0, 7, 14, 21], [3, 69, 0, 1]]
    assert_routed(logits, 4, "topk_softmax", weights, ids)


@pytest.mark.parametrize("num_experts", [16, 17, 40, 65, 257, 1000])
def test_rows_that_crowd_the_bound(backend, rng, num_experts):
    """The search for the largest begins with a bound that few logits of a random row reach. Here
    many do, up to all of them, or the largest lie where the bound does not see them apart."""
    ramp = np.arange(num_experts)
    rows = [ramp * 0, rng.integers(0, 3, num_experts), ramp, -ramp, ramp % 3, ramp // 16, ramp == 5]
    rows += [np.where(ramp % stride == 3, 9.0 + ramp, ramp) for stride in (8, 16, 32)]
    logits = np.array(rows, np.float64)
    logits = (logits / logits.max(initial=1)).astype(F32)
    for topk in (1, 2, 8, 10, 11, 16, 24, 25, 32):
        if topk <= num_experts:
            assert_routed(logits, topk, "topk_softmax", *route(backend, logits, topk))


def test_negative_zero_ties_with_zero(backend):
    logits = np.array([[-0.0, 0.0, -0.0, 0.0]], F32)
    assert route(backend, logits, 3)[1].tolist() == [[0, 1, 2]]


def test_large_logits_do_not_overflow(backend):
    logits = np.array([[3e38, 2e38, -3e38, 0], [-3e38, -3e38, -3e38, -2.9e38]], F32)
    weights, ids = route(backend, logits, 2, "softmax_topk")
    assert ids.tolist() == [[0, 1], [3, 0]]
    assert weights.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("method", METHODS)
def test_minus_infinity_is_a_masked_expert(backend, rng, method):
    logits = rng.standard_normal((6, 20)).astype(F32)
    logits[:, rng.permutation(20)[:14]] = -np.inf
    weights, ids = route(backend, logits, 8, method)
    assert_routed(logits, 8, method, weights, ids)
    assert (weights[:, 6:] == 0).all()


@pytest.mark.small
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_row(backend, rng, bad):
    logits = rng.standard_normal((5, 24)).astype(F32)
    logits[1, 3] = logits[3, :] = bad
    weights, ids = route(backend, logits, 4)
    clean = [0, 2, 4]
    assert_routed(logits[clean], 4, "topk_softmax", weights[clean], ids[clean])
    # NaN comes after every number, by ascending id.
    assert (ids == reference.route(logits, 4, method="topk_softmax")[1]).all()
    assert (weights[[1, 3]] == 0).all()


@pytest.mark.parametrize("scale", [2.5, -1.0, 0.0, 1e-30])
def test_scale(backend, rng, scale):
    logits = rng.standard_normal((6, 16)).astype(BF16)
    for method in METHODS:
        weights, ids = route(backend, logits, 3, method, routed_scaling_factor=scale)
        assert_routed(logits, 3, method, weights, ids, scale)


def test_renormalised_weights_sum_to_one(backend, rng):
    logits = rng.standard_normal((50, 128)).astype(F32)
    weights, _ = route(backend, logits, 8)
    assert np.abs(weights.astype(np.float64).sum(axis=1) - 1).max() < 2e-6


def test_method_is_the_same_as_renormalize(backend, rng):
    logits = backend.put(rng.standard_normal((9, 32)).astype(F32))
    one = fusedmoe.route(logits, Routing(4, method="topk_softmax"))
    two = fusedmoe.route(logits, Routing(4, renormalize=True))
    assert same_bits(backend.get(one[0]), backend.get(two[0]))
    assert same_bits(backend.get(one[1]), backend.get(two[1]))


@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
def test_ids_dtype(backend, rng, ids_dtype):
    logits = rng.standard_normal((8, 16)).astype(F32)
    weights, ids = route(backend, logits, 5, ids_dtype=ids_dtype)
    assert ids.dtype == np.dtype(ids_dtype)
    assert_routed(logits, 5, "topk_softmax", weights, ids)


@pytest.mark.small
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_out(backend, rng, ids_dtype):
    logits = rng.standard_normal((11, 33)).astype(BF16)
    out_weights = Guarded(backend, (11, 6), F32)
    out_ids = Guarded(backend, (11, 6), ids_dtype)
    weights, ids = fusedmoe.route(
        backend.put(logits),
        Routing(6),
        out_weights=out_weights.tensor,
        out_ids=out_ids.tensor,
    )
    assert weights is out_weights.tensor and ids is out_ids.tensor
    assert_routed(logits, 6, "softmax_topk", backend.get(weights), backend.get(ids))
    out_weights.check("out_weights")
    out_ids.check("out_ids")


def test_strides(backend, rng):
    logits = rng.standard_normal((13, 50)).astype(F32)
    out_weights = padded(backend, np.zeros((13, 4), F32), 3)
    out_ids = padded(backend, np.zeros((13, 4), np.int64), 5)
    fusedmoe.route(
        padded(backend, logits, 7, offset=1), Routing(4), out_weights=out_weights, out_ids=out_ids
    )
    assert_routed(logits, 4, "softmax_topk", backend.get(out_weights), backend.get(out_ids))


def test_fields_instead_of_a_routing(backend, rng):
    logits = backend.put(rng.standard_normal((9, 32)).astype(F32))
    one = fusedmoe.route(logits, Routing(4, method="sigmoid"))
    two = fusedmoe.route(logits, topk=4, method="sigmoid")
    assert same_bits(backend.get(one[0]), backend.get(two[0]))
    with pytest.raises(TypeError, match="^routing: .*topk"):
        fusedmoe.route(logits, Routing(4), topk=4)
    with pytest.raises(TypeError, match="^routing: .*NoneType"):
        fusedmoe.route(logits)


def test_no_tokens(backend):
    weights, ids = route(backend, np.zeros((0, 16), F32), 4)
    assert weights.shape == ids.shape == (0, 4)


def test_same_bits_every_time(backend, rng):
    logits = (rng.standard_normal((200, 128)) * 2).astype(BF16)
    first = route(backend, logits, 8, "softmax_topk")
    for _ in range(3):
        again = route(backend, logits, 8, "softmax_topk")
        assert same_bits(first[0], again[0]) and same_bits(first[1], again[1])


def test_rows_do_not_depend_on_each_other(backend, rng):
    logits = rng.standard_normal((64, 96)).astype(F32)
    weights, ids = route(backend, logits, 6)
    for t in (0, 31, 63):
        one = route(backend, logits[t : t + 1], 6)
        assert same_bits(one[0][0], weights[t]) and same_bits(one[1][0], ids[t])
