"""Stage 4, down: GEMM, bias, topk weight, against reference.down."""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import reference
from support import BF16, F16, F32, Guarded, assert_close, make_layer, padded, same_bits


def random_intermediate(layer):
    """Rows below num_rows are random; the others are NaN and must not matter."""
    rng = np.random.default_rng(layer.seed + 1)
    num_rows = int(reference.align(layer.topk_ids, layer.w2.shape[0])[0][-1])
    rows = np.full((layer.topk_ids.size, layer.w2.shape[2]), np.nan, np.float32)
    rows[:num_rows] = rng.standard_normal((num_rows, rows.shape[1]), dtype=np.float32)
    return rows.astype(layer.dtype)


def down(backend, layer, values, *, weighted=True, **replaced):
    offsets, sorted_token_ids, _ = reference.align(layer.topk_ids, layer.w2.shape[0])
    num_slots, num_rows = layer.topk_ids.size, int(offsets[-1])
    padded_ids = np.full(num_slots, 2**31 - 1, np.int32)
    padded_ids[:num_rows] = sorted_token_ids
    tensors = {
        "intermediate": values,
        "w2": layer.w2,
        "expert_offsets": offsets,
        "sorted_token_ids": padded_ids,
    }
    if weighted:
        tensors["topk_weights"] = layer.topk_weights
    if layer.options.get("w2_bias") is not None:
        tensors["w2_bias"] = layer.options["w2_bias"]
    tensors = {k: replaced[k] if k in replaced else backend.put(v) for k, v in tensors.items()}
    out = Guarded(backend, (num_slots, layer.w2.shape[1]), layer.dtype)
    before = backend.get(out.tensor)
    result = fusedmoe.down(**tensors, topk=layer.topk_ids.shape[1], out=out.tensor)
    assert result is out.tensor
    got = backend.get(result)
    out.check("out")
    assert same_bits(got[num_rows:], before[num_rows:]), "rows from num_rows on were written"
    return got[:num_rows]


def check(backend, layer, *, weighted=True, **replaced):
    values = random_intermediate(layer)
    got = down(backend, layer, values, weighted=weighted, **replaced)
    offsets, sorted_token_ids, _ = reference.align(layer.topk_ids, layer.w2.shape[0])
    args = values, layer.w2, offsets, sorted_token_ids, layer.topk_ids.shape[1]
    kwargs = {
        "topk_weights": layer.topk_weights if weighted else None,
        "w2_bias": layer.options.get("w2_bias"),
    }
    want = reference.down(*args, **kwargs)
    assert_close(got, want, reference.down_error(*args, **kwargs), seed=layer.seed)
    return got


@pytest.mark.small
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("bias", [None, F32, "own"], ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_biases_and_weights(backend, seed, dtype, bias, weighted):
    if dtype not in backend.dtypes:
        pytest.skip("float32 is computed on the CPU only")
    bias = dtype if bias == "own" else bias
    check(backend, make_layer(seed, 18, 72, 40, 5, 2, dtype, w2_bias=bias), weighted=weighted)


@pytest.mark.parametrize("weights_dtype", [F32, BF16, F16], ids=str)
def test_weights_dtype(backend, seed, weights_dtype):
    check(backend, make_layer(seed, 18, 72, 40, 5, 2, weights_dtype=weights_dtype))


@pytest.mark.parametrize(
    "num_tokens, hidden_size, intermediate_size, num_experts, topk",
    [
        (1, 1, 1, 1, 1),
        (2, 5, 3, 2, 1),
        (17, 129, 511, 3, 2),
        (64, 64, 64, 2, 1),
        (65, 192, 256, 1, 1),
        (130, 72, 136, 2, 2),
        (300, 16, 40, 2, 1),
        (9, 24, 2880, 4, 4),
        (40, 8, 24, 300, 6),
    ],
)
def test_sizes(backend, seed, num_tokens, hidden_size, intermediate_size, num_experts, topk):
    check(backend, make_layer(seed, num_tokens, hidden_size, intermediate_size, num_experts, topk))


@pytest.mark.parametrize("routing", ["same", "half", "dropped", "none", "duplicates"])
def test_routings(backend, seed, routing):
    check(backend, make_layer(seed, 37, 64, 32, 6, 3, routing=routing, w2_bias=F32))


def test_strides_and_alignment(backend, seed):
    layer = make_layer(seed, 23, 80, 48, 4, 2, w2_bias=BF16)
    for pad, offset in [(8, 0), (3, 0), (0, 1), (5, 3)]:
        check(
            backend,
            layer,
            intermediate=padded(backend, random_intermediate(layer), pad, offset=offset),
            w2=padded(backend, layer.w2, pad, offset=offset),
            w2_bias=padded(backend, layer.options["w2_bias"], pad, offset=offset),
            topk_weights=padded(backend, layer.topk_weights, pad, offset=offset),
        )


def test_zero_weight_of_a_finite_row_is_zero(backend, seed):
    layer = make_layer(seed, 10, 32, 16, 2, 2, weights_dtype=BF16)
    layer.topk_weights[3:5] = 0
    check(backend, layer)


def test_nan_and_infinite_weights_touch_their_row_only(backend, seed):
    layer = make_layer(seed, 10, 32, 16, 2, 2)
    layer.topk_weights[3, 0], layer.topk_weights[7, 1] = np.nan, np.inf
    check(backend, layer)
