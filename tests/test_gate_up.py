"""Stage 3, gate_up: gather, GEMM, bias, activation, against reference.gate_up."""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import reference
from support import BF16, F16, F32, Guarded, assert_close, make_layer, padded, same_bits

# activation, alpha, limit, clamp: every formula, with and without its parameters
ACTIVATIONS = [
    ("silu", None, None, "after"),
    ("silu", None, 0.75, "after"),
    ("silu", None, 0.75, "before"),
    ("gelu", None, None, "after"),
    ("gelu_tanh", None, None, "after"),
    ("relu2", None, None, "after"),
    ("swiglu_oai", None, None, "after"),
    ("swiglu_oai", 1.25, 0.5, "after"),
    ("situ", None, None, "after"),
    ("situ", 0.75, 0.5, "after"),
]
# The same, gated and not; swiglu_oai is gated by definition.
ALL_ACTIVATIONS = [
    (*a, gated) for gated in (True, False) for a in ACTIVATIONS if gated or a[0] != "swiglu_oai"
]


def grouping(layer):
    return reference.align(layer.topk_ids, layer.w13.shape[0])


def gate_up(backend, layer, *, fill=0xFF, apply_weights=False, **replaced):
    """gate_up into poisoned memory between guard zones; the rows below num_rows, as NumPy."""
    offsets, sorted_token_ids, _ = grouping(layer)
    topk = layer.topk_ids.shape[1]
    num_slots, num_rows = layer.topk_ids.size, int(offsets[-1])
    options = dict(layer.options)
    padded_ids = np.full(num_slots, 2**31 - 1, np.int32)  # past num_rows: not to be read
    padded_ids[:num_rows] = sorted_token_ids
    tensors = {
        "hidden_states": layer.hidden_states,
        "w13": layer.w13,
        "expert_offsets": offsets,
        "sorted_token_ids": padded_ids,
    }
    if apply_weights:
        tensors["topk_weights"] = layer.topk_weights
    if options.get("w13_bias") is not None:
        tensors["w13_bias"] = options.pop("w13_bias")
    tensors = {k: replaced[k] if k in replaced else backend.put(v) for k, v in tensors.items()}
    out = Guarded(backend, (num_slots, layer.w2.shape[2]), layer.dtype, fill)
    before = backend.get(out.tensor)
    result = fusedmoe.gate_up(**tensors, topk=topk, **options, out=out.tensor)
    assert result is out.tensor
    got = backend.get(result)
    out.check("out")
    assert same_bits(got[num_rows:], before[num_rows:]), "rows from num_rows on were written"
    return got[:num_rows]


def check(backend, layer, *, apply_weights=False, **replaced):
    got = gate_up(backend, layer, apply_weights=apply_weights, **replaced)
    offsets, sorted_token_ids, _ = grouping(layer)
    args = layer.hidden_states, layer.w13, offsets, sorted_token_ids, layer.topk_ids.shape[1]
    kwargs = dict(layer.options, topk_weights=layer.topk_weights if apply_weights else None)
    want = reference.gate_up(*args, **kwargs)
    assert_close(got, want, reference.gate_up_error(*args, **kwargs), seed=layer.seed)
    return got


@pytest.mark.small
@pytest.mark.parametrize("activation, alpha, limit, clamp, gated", ALL_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_activations(backend, seed, dtype, activation, alpha, limit, clamp, gated):
    if dtype not in backend.dtypes:
        pytest.skip("float32 is computed on the CPU only")
    options = {"activation": activation, "clamp": clamp, "gated": gated}
    if alpha is not None:
        options["activation_alpha"] = alpha
    if limit is not None:
        options["activation_limit"] = limit
    check(backend, make_layer(seed, 19, 72, 40, 5, 2, dtype, **options))


@pytest.mark.parametrize("activation, alpha, limit, clamp", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_tails_of_the_activations(backend, dtype, activation, alpha, limit, clamp):
    """Gates from -80 to 80 and up 1: exp overflows in neither direction. In float32 what is seen is
    the precision of exp, erf and tanh."""
    if dtype not in backend.dtypes:
        pytest.skip("float32 is computed on the CPU only")
    gates = np.concatenate([np.linspace(-80, 80, 161), np.linspace(-6, 6, 2401)]).astype(dtype)
    x = np.stack([gates, np.ones_like(gates)], axis=1)  # gate = x[0], up = x[1]
    w13 = np.eye(2, dtype=np.float32)[None].astype(dtype)
    layer = make_layer(0, len(gates), 2, 1, 1, 1, dtype)
    layer.hidden_states, layer.w13 = x, w13
    layer.options = {
        "activation": activation,
        "activation_alpha": alpha,
        "activation_limit": limit,
        "clamp": clamp,
    }
    check(backend, layer)


@pytest.mark.parametrize("order", reference.ORDERS)
@pytest.mark.parametrize("bias", [None, F32, "own"], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_orders_and_biases(backend, seed, dtype, bias, order):
    if dtype not in backend.dtypes:
        pytest.skip("float32 is computed on the CPU only")
    bias = dtype if bias == "own" else bias
    check(backend, make_layer(seed, 21, 56, 33, 4, 3, dtype, w13_bias=bias, w13_order=order))


def test_bias_of_plain_layers(backend, seed):
    check(backend, make_layer(seed, 9, 40, 24, 3, 2, w13_bias=F32, gated=False, activation="relu2"))


@pytest.mark.parametrize("weights_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("w13_bias", [None, F32], ids=str)
def test_router_weight_on_input(backend, seed, weights_dtype, w13_bias):
    layer = make_layer(seed, 15, 48, 32, 4, 2, weights_dtype=weights_dtype, w13_bias=w13_bias)
    check(backend, layer, apply_weights=True)


@pytest.mark.parametrize(
    "num_tokens, hidden_size, intermediate_size, num_experts, topk",
    [
        (1, 1, 1, 1, 1),
        (2, 3, 5, 2, 1),
        (17, 511, 129, 3, 2),
        (64, 64, 64, 2, 1),
        (65, 256, 192, 1, 1),
        (130, 136, 72, 2, 2),
        (300, 40, 16, 2, 1),
        (9, 2880, 24, 4, 4),
        (40, 24, 8, 300, 6),
    ],
)
def test_sizes(backend, seed, num_tokens, hidden_size, intermediate_size, num_experts, topk):
    check(backend, make_layer(seed, num_tokens, hidden_size, intermediate_size, num_experts, topk))


@pytest.mark.parametrize("routing", ["same", "half", "dropped", "none", "duplicates"])
def test_routings(backend, seed, routing):
    check(backend, make_layer(seed, 37, 64, 32, 6, 3, routing=routing))


def test_strides_and_alignment(backend, seed):
    layer = make_layer(seed, 23, 80, 48, 4, 2)
    aligned = check(backend, layer)
    for pad, offset in [(8, 0), (3, 0), (0, 1), (5, 3)]:
        got = check(
            backend,
            layer,
            hidden_states=padded(backend, layer.hidden_states, pad, offset=offset),
            w13=padded(backend, layer.w13, pad, offset=offset),
        )
        assert got.shape == aligned.shape


def test_sorted_token_ids_may_be_any_order(backend, seed):
    """The grouping is an input: rows of an expert in another order give rows in that order."""
    layer = make_layer(seed, 12, 32, 16, 1, 1)
    straight = gate_up(backend, layer)
    order = np.random.default_rng(seed).permutation(12).astype(np.int32)
    shuffled = gate_up(backend, layer, sorted_token_ids=backend.put(order))
    assert same_bits(shuffled, straight[order])


def test_allocates_out(backend, seed):
    layer = make_layer(seed, 6, 32, 16, 2, 2)
    offsets, sorted_token_ids, _ = grouping(layer)
    tensors = [backend.put(t) for t in (layer.hidden_states, layer.w13, offsets, sorted_token_ids)]
    got = backend.get(fusedmoe.gate_up(*tensors, 2))
    assert got.shape == (12, 16) and got.dtype == BF16
    assert same_bits(got, gate_up(backend, layer))
