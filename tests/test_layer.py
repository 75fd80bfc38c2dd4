"""The layer, fused_experts and fused_moe, on both backends against the oracle.

A matrix: shapes, activations, options, routings, strides, dtypes, each alone and the combinations
that meet in the code (order x bias, weight on input x no_combine, chunks x everything per token).
"""

import itertools

import fusedmoe
import ml_dtypes
import numpy as np
import pytest
from fusedmoe import Experts, Routing, fused_experts, fused_moe, reference
from support import (
    BF16,
    F16,
    F32,
    Guarded,
    assert_close,
    check_layer,
    make_layer,
    padded,
    put_layer,
    rms_of_unfused,
    run_layer,
    same_bits,
    workspace_bytes,
)
from test_gate_up import ACTIVATIONS, ALL_ACTIVATIONS

DTYPES = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)

SHAPES = [
    # num_tokens, hidden_size, intermediate_size, num_experts, topk
    (1, 1, 1, 1, 1),
    (1, 2, 3, 2, 2),
    (2, 64, 48, 4, 2),
    (3, 511, 129, 3, 2),  # K = 511
    (16, 128, 64, 8, 2),
    (17, 129, 65, 8, 3),
    (33, 256, 192, 5, 4),  # I = 192
    (5, 2880, 100, 4, 4),  # H = 2880
    (7, 72, 2880, 2, 2),
    (64, 40, 24, 1, 1),
    (130, 96, 80, 2, 2),
    (4, 24, 16, 1024, 8),
    (3, 32, 16, 64, 32),
    (257, 32, 32, 16, 6),
    (90, 520, 264, 2, 1),  # more than one K step, tiles of rows that end inside
]


def skip_unless(backend, dtype):
    if dtype not in backend.dtypes:
        pytest.skip("float32 is computed on the CPU only")


# -------------------------------------------------------------------------------------------------
# Shapes and routings
# -------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, seed, dtype, shape):
    skip_unless(backend, dtype)
    check_layer(backend, make_layer(seed, *shape, dtype))


@pytest.mark.parametrize("num_tokens", [*range(0, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_num_tokens(backend, seed, num_tokens):
    check_layer(backend, make_layer(seed, num_tokens, 64, 40, 4, 2))


@pytest.mark.parametrize("hidden_size", [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 129])
def test_hidden_size(backend, seed, hidden_size):
    check_layer(backend, make_layer(seed, 5, hidden_size, 24, 3, 2))


@pytest.mark.parametrize("intermediate_size", [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 129])
def test_intermediate_size(backend, seed, intermediate_size):
    check_layer(backend, make_layer(seed, 5, 24, intermediate_size, 3, 2))


@pytest.mark.parametrize("topk", range(1, 33))
def test_topk(backend, seed, topk):
    check_layer(backend, make_layer(seed, 6, 32, 16, 33, topk))


@pytest.mark.small
@pytest.mark.parametrize("routing", ["uniform", "same", "half", "dropped", "none", "duplicates"])
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_routings(backend, seed, routing, ids_dtype):
    layer = make_layer(
        seed, 41, 72, 40, 6, 3, routing=routing, ids_dtype=ids_dtype, w13_bias=F32, w2_bias=F32
    )
    got = check_layer(backend, layer)
    valid = (layer.topk_ids >= 0) & (layer.topk_ids < 6)
    zeros = got[~valid.any(axis=1)].astype(np.float32)
    assert (zeros == 0).all() and not np.signbit(zeros).any(), "dropped tokens are exact zeros"


@pytest.mark.small
@pytest.mark.parametrize("num_tokens", [200, 1300, 8000])  # one launch of align, clusters, two
@pytest.mark.parametrize("routing", ["uniform", "same", "half", "dropped"])
def test_tiles_of_many_slots(backend, seed, routing, num_tokens):
    check_layer(backend, make_layer(seed, num_tokens, 24, 16, 33, 7, routing=routing))


def test_64_bit_ids_are_not_cut_to_32(backend, seed):
    layer = make_layer(seed, 9, 32, 16, 4, 2, ids_dtype=np.int64)
    layer.topk_ids[2, 0] += 2**32
    layer.topk_ids[5] -= 2**32
    layer.topk_ids[7, 1] = -(2**63)
    check_layer(backend, layer)


@pytest.mark.parametrize("weights_dtype", [F32, BF16, F16], ids=str)
@DTYPES
def test_dtype_of_topk_weights(backend, seed, dtype, weights_dtype):
    skip_unless(backend, dtype)
    check_layer(backend, make_layer(seed, 20, 64, 32, 4, 2, dtype, weights_dtype=weights_dtype))


# -------------------------------------------------------------------------------------------------
# Formulas
# -------------------------------------------------------------------------------------------------


@pytest.mark.small
@pytest.mark.parametrize("activation, alpha, limit, clamp, gated", ALL_ACTIVATIONS)
@DTYPES
def test_activations(backend, seed, dtype, activation, alpha, limit, clamp, gated):
    skip_unless(backend, dtype)
    options = {"activation_alpha": alpha, "activation_limit": limit, "clamp": clamp}
    layer = make_layer(
        seed, 12, 64, 40, 4, 2, dtype, activation=activation, gated=gated, w13_bias=F32, **options
    )
    check_layer(backend, layer)


@DTYPES
@pytest.mark.parametrize("order", reference.ORDERS)
@pytest.mark.parametrize("w13_bias, w2_bias", [(None, "own"), (F32, None), ("own", F32)], ids=str)
def test_orders_and_biases(backend, seed, dtype, order, w13_bias, w2_bias):
    skip_unless(backend, dtype)
    w13_bias, w2_bias = (dtype if b == "own" else b for b in (w13_bias, w2_bias))
    check_layer(
        backend,
        make_layer(
            seed, 21, 56, 33, 4, 3, dtype, w13_bias=w13_bias, w2_bias=w2_bias, w13_order=order
        ),
    )


@pytest.mark.parametrize("order", reference.ORDERS)
@pytest.mark.parametrize("activation", ["swiglu_oai", "gelu"])
@pytest.mark.parametrize("intermediate_size", [1, 7, 64, 100])
def test_orders_off_tile(backend, seed, order, activation, intermediate_size):
    layer = make_layer(
        seed, 70, 72, intermediate_size, 2, 2, w13_order=order, activation=activation, w13_bias=F32
    )
    check_layer(backend, layer)


OPTIONS = [
    dict(zip(("on_input", "no_combine", "scale", "shared"), values, strict=True))
    for values in itertools.product(
        (False, True), (False, "weighted", "unweighted"), (None, 2.5), (False, True)
    )
    if not (values[1] and values[3])  # no sum to add a shared output to
]


@pytest.mark.small
@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_options(backend, seed, option):
    layer = make_layer(
        seed,
        23,
        72,
        40,
        5,
        3,
        routing="dropped",
        shared_output=option["shared"],
        apply_router_weight_on_input=option["on_input"],
        no_combine=option["no_combine"],
        routed_scaling_factor=option["scale"],
        w2_bias=F32,
    )
    check_layer(backend, layer)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.0, 1e-3, 16.0, 1])
def test_routed_scaling_factor(backend, seed, scale):
    check_layer(
        backend,
        make_layer(seed, 11, 32, 24, 4, 2, routed_scaling_factor=scale, shared_output=True),
    )


@pytest.mark.parametrize("no_combine", ["weighted", "unweighted"])
@pytest.mark.parametrize("topk", [1, 4])
@DTYPES
def test_no_combine(backend, seed, dtype, topk, no_combine):
    skip_unless(backend, dtype)
    layer = make_layer(seed, 19, 40, 24, 6, topk, dtype, routing="dropped", no_combine=no_combine)
    got = check_layer(backend, layer)
    dropped = (layer.topk_ids < 0) | (layer.topk_ids >= 6)
    assert dropped.any() and (got[dropped].astype(np.float32) == 0).all()


def test_no_combine_sums_to_the_layer(backend, seed):
    """The rows that no_combine shows are the rows that combine sums: of more tokens than a GPU
    has kernels for that sum without rounding rows."""
    layer = make_layer(seed, 40, 48, 32, 6, 3, routing="dropped")
    rows = run_layer(backend, layer.with_options(no_combine="weighted"))
    row_of_slot = np.arange(120, dtype=np.int32).reshape(40, 3)
    summed = fusedmoe.combine(backend.put(rows.reshape(120, 48)), backend.put(row_of_slot))
    assert same_bits(backend.get(summed), run_layer(backend, layer))


def test_shared_output_survives_dropped_tokens(backend, seed):
    layer = make_layer(seed, 9, 48, 16, 3, 2, routing="none", shared_output=True)
    layer = layer.with_options(routed_scaling_factor=7.0)
    assert same_bits(run_layer(backend, layer), layer.options["shared_output"])


# -------------------------------------------------------------------------------------------------
# Expert parallelism
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 4, 28])
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_expert_start(backend, seed, start, ids_dtype):
    layer = make_layer(
        seed, 31, 40, 24, 4, 6, num_ids=32, expert_start=start, ids_dtype=ids_dtype, w2_bias=BF16
    )
    check_layer(backend, layer)


@pytest.mark.small
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_expert_map(backend, seed, rng, ids_dtype):
    table = np.full(32, -1)
    table[rng.permutation(32)[:8]] = rng.permutation(8)
    layer = make_layer(seed, 31, 40, 24, 8, 6, num_ids=40, expert_map=table, ids_dtype=ids_dtype)
    check_layer(backend, layer)


def test_ranks_sum_to_the_whole_layer(backend, seed):
    """Eight experts on one rank, or two on each of four: the same but for the parts' rounding."""
    layer = make_layer(seed, 20, 48, 32, 8, 3, F16)
    want, error = layer.expected()
    total = np.zeros_like(want)
    for start in range(0, 8, 2):
        part = make_layer(seed, 20, 48, 32, 2, 3, F16, expert_start=start)
        part.hidden_states, part.topk_ids = layer.hidden_states, layer.topk_ids
        part.topk_weights = layer.topk_weights
        part.w13, part.w2 = layer.w13[start : start + 2], layer.w2[start : start + 2]
        total += run_layer(backend, part).astype(np.float64)
    slack = 4 * reference.unit_roundoff(F16) * np.abs(want).max()
    assert (np.abs(total - want) <= error.absolute + slack).all()


# -------------------------------------------------------------------------------------------------
# Strides, alignment, memory
# -------------------------------------------------------------------------------------------------


@pytest.mark.small
@pytest.mark.parametrize("pad, offset", [(8, 0), (64, 0), (1, 0), (0, 1), (3, 5)])
@DTYPES
def test_padded_and_unaligned_tensors(backend, seed, dtype, pad, offset):
    skip_unless(backend, dtype)
    layer = make_layer(
        seed, 27, 80, 48, 4, 2, dtype, w13_bias=F32, w2_bias=dtype, shared_output=True
    )
    views = {
        name: padded(backend, array, pad, offset=offset)
        for name, array in {**layer.tensors(), **layer.options}.items()
    }
    check_layer(backend, layer, **views)


@pytest.mark.parametrize("name", ["hidden_states", "w13", "w2"])
@pytest.mark.parametrize("offset", [1, 2, 4, 7, 8])
def test_one_unaligned_tensor(backend, seed, name, offset):
    layer = make_layer(seed, 18, 64, 32, 3, 2)
    check_layer(backend, layer, **{name: padded(backend, getattr(layer, name), 0, offset=offset)})


@pytest.mark.parametrize("pad, offset", [(8, 0), (1, 0), (0, 1), (3, 5)])
@pytest.mark.parametrize("no_combine", [False, "weighted"])
def test_padded_out(backend, seed, pad, offset, no_combine):
    layer = make_layer(seed, 13, 56, 24, 4, 2, no_combine=no_combine)
    out = padded(backend, np.zeros(layer.out_shape, BF16), pad, offset=offset)
    tensors, options = put_layer(backend, layer)
    assert fused_experts(**tensors, **options, out=out) is out
    want, error = layer.expected()
    assert_close(backend.get(out), want, error, seed=seed)
    whole = backend.get(backend.owner(out))
    assert np.isnan(whole.astype(np.float32)).sum() == whole.size - want.size, "padding written"


def test_weights_that_several_experts_share(backend, seed):
    """Expert stride 0: four experts with the same weights."""
    layer = make_layer(seed, 20, 48, 32, 4, 2)
    layer.w13, layer.w2 = (np.repeat(w[:1], 4, axis=0) for w in (layer.w13, layer.w2))
    check_layer(
        backend,
        layer,
        w13=backend.broadcast(backend.put(layer.w13[0]), layer.w13.shape),
        w2=backend.broadcast(backend.put(layer.w2[0]), layer.w2.shape),
    )


def test_tokens_that_share_a_row(backend, seed):
    """Row stride 0 of hidden_states, topk_weights and topk_ids."""
    layer = make_layer(seed, 20, 48, 32, 4, 2)
    views = {}
    for name in ("hidden_states", "topk_weights", "topk_ids"):
        row = getattr(layer, name)[0]
        setattr(layer, name, np.repeat(row[None], 20, axis=0))
        views[name] = backend.broadcast(backend.put(row), (20, len(row)))
    check_layer(backend, layer, **views)


def test_weights_sliced_from_a_larger_tensor(backend, seed):
    """A tensor-parallel share: w13 rows and w2 columns cut out of full weights."""
    full = make_layer(seed, 12, 64, 96, 4, 2)
    share = make_layer(seed, 12, 64, 32, 4, 2, w13_order="gate_up")
    share.hidden_states = full.hidden_states
    share.w13 = full.w13[:, 32:96]
    share.w2 = full.w2[:, :, 32:64]
    check_layer(
        backend,
        share,
        w13=backend.put(full.w13)[:, 32:96],
        w2=backend.put(full.w2)[:, :, 32:64],
    )


@pytest.mark.small
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x7F, 0xA5])
def test_content_of_the_workspace_does_not_matter(backend, seed, fill):
    layer = make_layer(seed, 50, 64, 40, 6, 3, routing="dropped", w13_bias=F32)
    clean = run_layer(backend, layer, fill=0)
    assert same_bits(run_layer(backend, layer, fill=fill), clean)


def test_a_larger_workspace_will_do(backend, seed):
    layer = make_layer(seed, 10, 64, 40, 6, 3)
    tensors, options = put_layer(backend, layer)
    size = workspace_bytes(backend, layer) + 4096
    out = fused_experts(**tensors, **options, workspace=Guarded(backend, (size,), np.uint8).tensor)
    assert same_bits(backend.get(out), run_layer(backend, layer))


def test_nothing_outlives_the_call_in_the_workspace(backend, seed):
    """One workspace for layers of different sizes, in turn."""
    layers = [make_layer(seed + i, 9 + i, 64 - 8 * i, 40, 4 + i, 2) for i in range(3)]
    size = max(workspace_bytes(backend, layer) for layer in layers)
    workspace = Guarded(backend, (size,), np.uint8)
    for layer in layers * 2:
        tensors, options = put_layer(backend, layer)
        out = fused_experts(**tensors, **options, workspace=workspace.tensor)
        want, error = layer.expected()
        assert_close(backend.get(out), want, error, seed=layer.seed)
        workspace.check("workspace")


@pytest.mark.small
@DTYPES
def test_out_is_hidden_states(backend, seed, dtype):
    skip_unless(backend, dtype)
    layer = make_layer(seed, 37, 64, 40, 4, 2, dtype, routing="dropped")
    apart = run_layer(backend, layer)
    tensors, options = put_layer(backend, layer)
    out = fused_experts(**tensors, **options, out=tensors["hidden_states"])
    assert out is tensors["hidden_states"]
    assert same_bits(backend.get(out), apart)


def test_out_is_shared_output(backend, seed):
    layer = make_layer(seed, 37, 64, 40, 4, 2, shared_output=True)
    apart = run_layer(backend, layer)
    tensors, options = put_layer(backend, layer)
    fused_experts(**tensors, **options, out=options["shared_output"])
    assert same_bits(backend.get(options["shared_output"]), apart)


def test_shared_output_is_hidden_states(backend, seed):
    """A residual connection: read twice, and written in place."""
    layer = make_layer(seed, 12, 64, 40, 4, 2)
    layer = layer.with_options(shared_output=layer.hidden_states)
    want, error = layer.expected()
    tensors, options = put_layer(backend, layer)
    x = options["shared_output"] = tensors["hidden_states"]
    assert_close(backend.get(fused_experts(**tensors, **options)), want, error, seed=seed)
    fused_experts(**tensors, **options, out=x)
    assert_close(backend.get(x), want, error, seed=seed)


def test_allocates_what_is_not_given(backend, seed):
    layer = make_layer(seed, 8, 48, 24, 4, 2)
    tensors, options = put_layer(backend, layer)
    out = fused_experts(**tensors, **options)
    assert type(out) is type(tensors["hidden_states"])
    assert same_bits(backend.get(out), run_layer(backend, layer))


@pytest.mark.parametrize("no_combine", [False, "weighted"])
def test_no_tokens(backend, no_combine):
    layer = make_layer(0, 0, 32, 16, 4, 2, no_combine=no_combine)
    tensors, options = put_layer(backend, layer)
    out = backend.get(fused_experts(**tensors, **options))
    assert out.shape == layer.out_shape and out.dtype == BF16


# -------------------------------------------------------------------------------------------------
# NaN and infinity
# -------------------------------------------------------------------------------------------------


@pytest.mark.small
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@DTYPES
def test_weights_of_unused_experts_do_not_matter(backend, seed, dtype, bad):
    skip_unless(backend, dtype)
    layer = make_layer(seed, 30, 64, 40, 6, 2, dtype, routing="half", w13_bias=F32, w2_bias=F32)
    clean = run_layer(backend, layer)
    for array in (layer.w13, layer.w2, *(layer.options[b] for b in ("w13_bias", "w2_bias"))):
        array[1::2] = bad
    assert same_bits(run_layer(backend, layer), clean)


@pytest.mark.small
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("topk, num_experts", [(2, 4), (1, 1)])
def test_bad_token_touches_its_row_only(backend, seed, bad, topk, num_experts):
    layer = make_layer(seed, 35, 64, 40, num_experts, topk)
    clean = run_layer(backend, layer)
    layer.hidden_states[[4, 17], [0, 63]] = bad
    got = run_layer(backend, layer)
    others = np.delete(np.arange(35), [4, 17])
    assert same_bits(got[others], clean[others])
    assert not np.isfinite(got[[4, 17]].astype(np.float32)).any()


@pytest.mark.parametrize("activation, alpha, limit, clamp", ACTIVATIONS)
def test_nan_is_not_clamped_away(backend, seed, activation, alpha, limit, clamp):
    layer = make_layer(
        seed,
        9,
        32,
        16,
        2,
        1,
        activation=activation,
        activation_alpha=alpha,
        activation_limit=limit,
        clamp=clamp,
    )
    layer.hidden_states[3, 5] = np.nan
    got = run_layer(backend, layer)
    assert np.isnan(got[3].astype(np.float32)).all()
    assert np.isfinite(np.delete(got, 3, axis=0).astype(np.float32)).all()


def test_nan_weights_of_one_expert_touch_its_tokens_only(backend, seed):
    layer = make_layer(seed, 40, 64, 40, 8, 1)
    clean = run_layer(backend, layer)
    layer.w13[2, 5, 7] = np.nan
    layer.w2[6, 9, 3] = np.inf
    got = run_layer(backend, layer)
    others = ~np.isin(layer.topk_ids[:, 0], [2, 6])
    assert others.any() and same_bits(got[others], clean[others])
    assert np.isnan(got[layer.topk_ids[:, 0] == 2].astype(np.float32)).all()


def test_topk_weights_of_dropped_slots_do_not_matter(backend, seed):
    layer = make_layer(seed, 30, 64, 40, 4, 3, routing="dropped")
    clean = run_layer(backend, layer)
    layer.topk_weights[(layer.topk_ids < 0) | (layer.topk_ids >= 4)] = np.nan
    assert same_bits(run_layer(backend, layer), clean)
    layer = layer.with_options(apply_router_weight_on_input=True)
    assert np.isfinite(run_layer(backend, layer).astype(np.float32)).all()


def test_nan_topk_weight_touches_its_token_only(backend, seed):
    layer = make_layer(seed, 30, 64, 40, 4, 3)
    clean = run_layer(backend, layer)
    layer.topk_weights[11, 2] = np.nan
    got = run_layer(backend, layer)
    assert np.isnan(got[11].astype(np.float32)).all()
    assert same_bits(np.delete(got, 11, axis=0), np.delete(clean, 11, axis=0))


def test_results_beyond_the_dtype_are_infinite(backend):
    """65504 is fp16's largest number; the sum of two rows of 40000 is not one of its numbers."""
    layer = make_layer(0, 1, 1, 1, 2, 2, F16, gated=False, activation="relu2")
    layer.hidden_states[:] = 1
    layer.w13[:], layer.w2[:] = 1, 40000
    layer.topk_ids[:], layer.topk_weights[:] = [0, 1], 1
    assert np.isposinf(run_layer(backend, layer)).all()


# -------------------------------------------------------------------------------------------------
# Repeatability
# -------------------------------------------------------------------------------------------------


@pytest.mark.small
@pytest.mark.parametrize("num_tokens", [1, 40, 300])
@DTYPES
def test_same_bits_every_time(backend, seed, dtype, num_tokens):
    skip_unless(backend, dtype)
    layer = make_layer(seed, num_tokens, 136, 72, 8, 4, dtype, routing="duplicates")
    first = run_layer(backend, layer)
    for fill in (0, 0xFF, 0x3C):
        assert same_bits(run_layer(backend, layer, fill=fill), first)


def test_deterministic_false_is_accepted(backend, seed):
    layer = make_layer(seed, 40, 64, 32, 4, 2)
    want, error = layer.expected()
    tensors, options = put_layer(backend, layer)
    out = fused_experts(**tensors, **options, deterministic=False)
    assert_close(backend.get(out), want, error, seed=seed)


# -------------------------------------------------------------------------------------------------
# fused_moe
# -------------------------------------------------------------------------------------------------


@pytest.mark.small
@pytest.mark.parametrize("method", ["softmax_topk", "topk_softmax"])
@pytest.mark.parametrize("logits_dtype", [F32, BF16, F16], ids=str)
@DTYPES
def test_fused_moe(backend, seed, rng, dtype, logits_dtype, method):
    skip_unless(backend, dtype)
    layer = make_layer(
        seed, 25, 64, 40, 12, 4, dtype, w13_bias=F32, shared_output=True, routed_scaling_factor=1.5
    )
    logits = (rng.standard_normal((25, 12)) * 2).astype(logits_dtype)
    tensors, options = put_layer(backend, layer)
    args = tensors["hidden_states"], tensors["w13"], tensors["w2"], backend.put(logits)
    out = Guarded(backend, layer.out_shape, dtype)
    routing = Routing(4, method=method, routed_scaling_factor=0.75)
    got = fused_moe(*args, routing=routing, **options, out=out.tensor)
    assert got is out.tensor
    out.check("out")
    want, error = reference.fused_moe_error(
        layer.hidden_states,
        layer.w13,
        layer.w2,
        logits,
        4,
        method=method,
        routing_scale=0.75,
        **layer.options,
    )
    assert_close(backend.get(got), want, error, seed=seed)


def test_fused_moe_is_route_and_fused_experts(backend, seed, rng):
    layer = make_layer(seed, 30, 64, 40, 16, 4)
    logits = backend.put(rng.standard_normal((30, 16)).astype(F32))
    tensors, _ = put_layer(backend, layer)
    x, w13, w2 = tensors["hidden_states"], tensors["w13"], tensors["w2"]
    routing = Routing(4)
    together = fused_moe(x, w13, w2, logits, routing=routing)
    apart = fused_experts(x, w13, w2, *fusedmoe.route(logits, routing))
    assert same_bits(backend.get(together), backend.get(apart))


@pytest.mark.parametrize("how", ["expert_map", "expert_start"])
def test_fused_moe_on_one_rank(backend, seed, rng, how):
    """The router knows all 24 experts, this rank holds eight of them."""
    layer = make_layer(seed, 20, 48, 32, 8, 4)
    logits = rng.standard_normal((20, 24)).astype(BF16)
    tensors, _ = put_layer(backend, layer)
    if how == "expert_map":
        table = np.full(24, -1, np.int32)
        table[3::3] = np.arange(7)
        table[0] = 7
        ours, theirs = {"expert_map": backend.put(table)}, {"expert_map": table}
    else:
        ours = theirs = {"expert_start": 8}
    out = fused_moe(
        tensors["hidden_states"],
        tensors["w13"],
        tensors["w2"],
        backend.put(logits),
        routing=Routing(4, renormalize=True),
        **ours,
    )
    want, error = reference.fused_moe_error(
        layer.hidden_states, layer.w13, layer.w2, logits, 4, **theirs
    )
    assert_close(backend.get(out), want, error, seed=seed)


def test_fused_moe_with_bad_logits(backend, seed, rng):
    """NaN logits of one token concern that token alone: its weights are 0, so it gets zeros."""
    layer = make_layer(seed, 20, 48, 32, 8, 4)
    logits = rng.standard_normal((20, 8)).astype(F32)
    tensors, _ = put_layer(backend, layer)
    args = tensors["hidden_states"], tensors["w13"], tensors["w2"]
    clean = backend.get(fused_moe(*args, backend.put(logits), routing=Routing(4)))
    logits[7, 2] = np.nan
    logits[9, :] = np.nan
    got = backend.get(fused_moe(*args, backend.put(logits), routing=Routing(4)))
    assert same_bits(np.delete(got, [7, 9], 0), np.delete(clean, [7, 9], 0))
    assert (got[[7, 9]] == 0).all()


# -------------------------------------------------------------------------------------------------
# Experts
# -------------------------------------------------------------------------------------------------


def pinned(layer, tensors, options, **more):
    """(Experts, what each call takes)."""
    options = dict(options)
    shared_output = options.pop("shared_output", None)
    experts = Experts(tensors["w13"], tensors["w2"], **options, **more)
    return (
        experts,
        (tensors["hidden_states"], tensors["topk_weights"], tensors["topk_ids"]),
        (shared_output),
    )


@pytest.mark.small
@pytest.mark.parametrize("max_tokens", [None, 64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_output": True, "routed_scaling_factor": 2.0},
        {"no_combine": "unweighted"},
        {"w13_bias": F32, "w2_bias": BF16, "activation": "swiglu_oai", "w13_order": "interleaved"},
        {"expert_start": 2, "num_ids": 10},
        {"expert_map": [3, -1, 0, 1, 2, -1], "num_ids": 6},
        {"gated": False, "activation": "relu2"},
        {"apply_router_weight_on_input": True},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_experts_is_fused_experts(backend, seed, options, max_tokens):
    layer = make_layer(seed, 30, 64, 40, 4, 2, **options)
    want = run_layer(backend, layer)
    tensors, keywords = put_layer(backend, layer)
    experts, args, shared_output = pinned(layer, tensors, keywords, max_tokens=max_tokens)
    got = experts(*args, shared_output=shared_output)
    assert same_bits(backend.get(got), want)
    out = Guarded(backend, layer.out_shape, BF16)
    workspace = Guarded(backend, (workspace_bytes(backend, layer),), np.uint8)
    for _ in range(2):
        result = experts.run(*args, out.tensor, workspace.tensor, shared_output)
        assert result is out.tensor
        assert same_bits(backend.get(out.tensor), want)
    out.check("out")
    workspace.check("workspace")


def test_experts_attributes(backend):
    layer = make_layer(0, 2, 64, 40, 4, 2)
    tensors, _ = put_layer(backend, layer)
    experts = Experts(tensors["w13"], tensors["w2"])
    assert experts.num_experts == 4
    assert experts.hidden_size == 64
    assert experts.intermediate_size == 40
    assert experts.dtype == "bfloat16"
    assert str(experts.device).startswith(backend.name)
    for name in ("num_experts", "hidden_size", "intermediate_size", "dtype", "device"):
        with pytest.raises(AttributeError):
            setattr(experts, name, 1)


def test_experts_see_weights_rewritten_in_place(backend, seed):
    layer = make_layer(seed, 10, 64, 40, 4, 2)
    tensors, options = put_layer(backend, layer)
    experts, args, _ = pinned(layer, tensors, options, max_tokens=10)
    experts(*args)
    other = make_layer(seed + 1, 10, 64, 40, 4, 2)
    tensors["w13"][:] = backend.put(other.w13)
    tensors["w2"][:] = backend.put(other.w2)
    layer.w13, layer.w2 = other.w13, other.w2
    want, error = layer.expected()
    assert_close(backend.get(experts(*args)), want, error, seed=seed)


def test_experts_rebind(backend, seed):
    layer = make_layer(seed, 10, 64, 40, 4, 2, w13_bias=F32, w2_bias=F32)
    tensors, options = put_layer(backend, layer)
    experts, args, _ = pinned(layer, tensors, options)
    experts(*args)
    other = make_layer(seed + 1, 10, 64, 40, 4, 2, w13_bias=F32, w2_bias=F32)
    other.hidden_states, other.topk_ids = layer.hidden_states, layer.topk_ids
    other.topk_weights = layer.topk_weights
    moved, keywords = put_layer(backend, other)
    experts.rebind(moved["w13"], moved["w2"], keywords["w13_bias"], keywords["w2_bias"])
    want, error = other.expected()
    assert_close(backend.get(experts(*args)), want, error, seed=seed)


def test_experts_take_any_number_of_tokens(backend, seed):
    layer = make_layer(seed, 64, 64, 40, 4, 2)
    tensors, options = put_layer(backend, layer)
    experts, args, _ = pinned(layer, tensors, options, max_tokens=16)
    for num_tokens in (1, 16, 0, 5, 16):
        part = [t[:num_tokens] for t in args]
        want, error = layer.expected(tokens=np.arange(num_tokens))
        assert_close(backend.get(experts(*part)), want, error, seed=seed)


# -------------------------------------------------------------------------------------------------
# Beyond 2^31
# -------------------------------------------------------------------------------------------------

FAR = 2**31 + 64  # elements: past any 32-bit offset


@pytest.mark.parametrize("name", ["hidden_states", "w13", "w2", "topk_ids", "out"])
def test_offsets_past_32_bits(backend, seed, name):
    """One stride of more than 2^31 elements. On the CPU only the pages that are used exist."""
    layer = make_layer(seed, 2, 40, 24, 2, 2)
    tensors, options = put_layer(backend, layer)
    array = np.zeros(layer.out_shape, BF16) if name == "out" else getattr(layer, name)
    inner = int(np.prod(array.shape[1:]))
    base = backend.empty((FAR + inner,), array.dtype)
    strides = [FAR, *(int(np.prod(array.shape[i + 1 :])) for i in range(1, array.ndim))]
    far = backend.as_strided(base, array.shape, strides)
    if name == "out":
        options["out"] = far
    else:
        far[:] = tensors[name]
        tensors[name] = far
    got = backend.get(fused_experts(**tensors, **options))
    want, error = layer.expected()
    assert_close(got, want, error, seed=seed)


@pytest.mark.gpu
@pytest.mark.slow
def test_rows_past_2_31_elements(gpu):
    """no_combine writes 37,449 * 8 rows of 7168: more than 2^31 elements."""
    torch = gpu.torch
    num_tokens, hidden_size = 37449 + 8, 7168
    layer = make_layer(5, 64, hidden_size, 64, 8, 8, no_combine="weighted")
    tensors, options = put_layer(gpu, layer)
    repeat = -(-num_tokens // 64)
    for name in ("hidden_states", "topk_weights", "topk_ids"):
        tensors[name] = tensors[name].repeat(repeat, 1)[:num_tokens].contiguous()
    out = fused_experts(**tensors, **options)
    assert out.numel() > 2**31
    for t in (0, 63, 37440, num_tokens - 1):
        want, error = layer.expected(tokens=[t % 64])
        assert_close(gpu.get(out[t : t + 1]), want, error, name=f"token {t}")
    torch.cuda.empty_cache()


class DeviceWeights:
    """Weights on the device for the oracle, which asks for one expert at a time."""

    def __init__(self, backend, tensor):
        self.backend, self.tensor, self.shape = backend, tensor, tuple(tensor.shape)

    def __getitem__(self, expert):
        return self.backend.get(self.tensor[expert])


@pytest.mark.gpu
@pytest.mark.slow
def test_deepseek_v3_with_131072_tokens(gpu):
    """The largest layer there is: 22 GB of weights, 131,072 tokens, chunks of 1.5 GiB."""
    torch = gpu.torch
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    num_tokens, hidden, inter, num_experts, topk = 131072, 7168, 2048, 256, 8
    assert fusedmoe.workspace_size(num_tokens, hidden, inter, num_experts, topk) <= 3 << 29
    torch.manual_seed(3)
    kwargs = {"dtype": torch.bfloat16, "device": gpu.device}
    x = torch.randn(num_tokens, hidden, **kwargs)
    w13 = torch.randn(num_experts, 2 * inter, hidden, **kwargs).mul_(hidden**-0.5)
    w2 = torch.randn(num_experts, hidden, inter, **kwargs).mul_(inter**-0.5)
    logits = torch.randn(num_tokens, num_experts, **kwargs)
    out = fused_moe(x, w13, w2, logits, routing=Routing(topk, method="topk_softmax"))
    tokens = [0, 65535, 65536, num_tokens - 1]
    want, error = reference.fused_moe_error(
        gpu.get(x[tokens]),
        DeviceWeights(gpu, w13),
        DeviceWeights(gpu, w2),
        gpu.get(logits[tokens]),
        topk,
    )
    assert_close(gpu.get(out[tokens]), want, error)
    del x, w13, w2, logits, out
    torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------------
# Integer tensors that hold 16-bit floats
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integer", [np.int16, np.uint16])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_integers_with_an_explicit_dtype(cpu, seed, integer, dtype):
    layer = make_layer(seed, 12, 48, 32, 4, 2, dtype, w2_bias=dtype, shared_output=True)
    want = run_layer(cpu, layer)
    options = {
        k: v.view(integer) if isinstance(v, np.ndarray) else v for k, v in layer.options.items()
    }
    out = fused_experts(
        layer.hidden_states.view(integer),
        layer.w13.view(integer),
        layer.w2.view(integer),
        layer.topk_weights,
        layer.topk_ids,
        **options,
        dtype=dtype.name,
    )
    assert out.dtype == integer
    assert same_bits(out.view(dtype), want)


def test_bfloat16_is_the_ml_dtypes_one(cpu, seed):
    layer = make_layer(seed, 3, 32, 16, 2, 2)
    assert fused_experts(**layer.tensors()).dtype == np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("num_tokens", [20, 100, 1000])
def test_rounds_less_than_unfused_kernels(backend, seed, dtype, num_tokens):
    assert rms_of_unfused(backend, make_layer(seed, num_tokens, 512, 256, 8, 4, dtype)) <= 0.8
