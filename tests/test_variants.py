"""Every row of the table of GEMM variants on a GPU, against the oracle.

The plan takes the large tiles for large layers only, which an oracle in float64 cannot follow; here
plans are held to one row for gate_up and one for down, so that each meets small layers of every
kind.
"""

import re
import threading

import numpy as np
import pytest
from fusedmoe import _C, reference
from support import BF16, F16, F32, check_layer, make_layer, padded, run_layer, same_bits
from test_gate_up import ALL_ACTIVATIONS

ROW = re.compile(r"moe_(gate_up|down)_bf16_(\d+)(x\d+(?:_sm90a(?:_swap|_split)?)?)$")


def pairs():
    """(gate_up, down), names without stage and dtype, of one height: each row at least once."""
    found = {}
    for name in _C.info()["kernels"]:
        if row := ROW.match(name):
            found.setdefault(int(row[2]), {"gate_up": [], "down": []})[row[1]].append(
                row[2] + row[3]
            )
    for stages in found.values():
        up, down = stages.values()
        for i in range(max(len(up), len(down))):
            yield up[min(i, len(up) - 1)], down[min(i, len(down) - 1)]


def hold(pair, dtype):
    """Plans of aligned tensors of dtype take these rows."""
    kernels, short = _C.info()["kernels"], {BF16: "bf16", F16: "f16"}[dtype]
    names = (f"moe_{of[0]}_{short}_{of[1]}" for of in zip(("gate_up", "down"), pair, strict=True))
    _C._fix_plans(*(kernels.index(name) for name in names))


@pytest.fixture(params=dict.fromkeys(pairs()), ids="-".join)
def pair(request):
    return request.param


@pytest.fixture
def variant(pair, backend):
    """The backend while plans have one pair of rows; on the CPU the same tests, once."""
    if backend.name == "cpu" and pair != next(pairs()):
        pytest.skip("no variants on the CPU")
    hold(pair, BF16)
    yield backend
    _C._fix_plans(-1, -1)


SIZES = [
    # num_tokens, hidden_size, intermediate_size, num_experts, topk: multiples of 8 only
    (1, 8, 8, 1, 1),
    (40, 64, 128, 3, 2),  # one K step
    (300, 72, 40, 2, 1),  # tiles of 128, 128 and some rows
    (257, 520, 264, 3, 2),  # K and columns end inside a tile
    (64, 2880, 136, 2, 1),  # more K steps than any ring has stages
    (700, 136, 520, 3, 2),  # more tiles than SMs in down
    (90, 264, 768, 40, 2),  # experts of few rows
]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(variant, pair, seed, sizes, dtype):
    hold(pair, dtype)
    check_layer(variant, make_layer(seed, *sizes, dtype))


def test_many_tiles_per_block(variant, seed):
    """Each block of a persistent grid walks over several tiles of one, two or three K steps."""
    for hidden_size in (64, 128, 192):
        check_layer(variant, make_layer(seed, 1500, hidden_size, 2304, 2, 1))


def test_groups_wait_for_stages_in_turn(variant, seed):
    """Items of more K steps than the ring has stages, several a block: a barrier's parity says
    which phase it is only to whoever knows that the one before has passed."""
    check_layer(variant, make_layer(seed, 3000, 768, 768, 2, 1))


@pytest.mark.small
@pytest.mark.parametrize("routing", ["same", "half", "dropped", "none", "duplicates"])
def test_routings(variant, seed, routing):
    layer = make_layer(seed, 150, 136, 72, 5, 3, routing=routing, w13_bias=F32, w2_bias=BF16)
    check_layer(variant, layer)


@pytest.mark.parametrize("activation, alpha, limit, clamp, gated", ALL_ACTIVATIONS)
def test_activations(variant, seed, activation, alpha, limit, clamp, gated):
    options = {"activation_alpha": alpha, "activation_limit": limit, "clamp": clamp}
    layer = make_layer(seed, 70, 136, 168, 2, 2, activation=activation, gated=gated, **options)
    check_layer(variant, layer)


@pytest.mark.small
@pytest.mark.parametrize("weights_dtype", [F32, BF16, F16], ids=str)
def test_weights_dtypes(variant, seed, weights_dtype):
    """Several tiles a block, full ones and ones with padding: down of sm90a has float32 weights
    copied to shared memory, by slots that it asked for a tile before, and loads others."""
    layer = make_layer(seed, 900, 4104, 72, 7, 2, routing="dropped", weights_dtype=weights_dtype)
    check_layer(variant, layer)


@pytest.mark.small
@pytest.mark.parametrize("order", reference.ORDERS)
@pytest.mark.parametrize("bias", [None, F32], ids=str)
def test_orders_and_biases(variant, seed, order, bias):
    layer = make_layer(
        seed, 70, 136, 264, 2, 2, w13_order=order, w13_bias=bias, w2_bias=bias,
        apply_router_weight_on_input=True,
    )  # fmt: skip
    check_layer(variant, layer)


def test_no_combine_without_weights(variant, seed):
    check_layer(variant, make_layer(seed, 70, 136, 264, 2, 2, no_combine="unweighted"))


def test_padded_rows(variant, seed):
    layer = make_layer(seed, 140, 136, 72, 2, 2)
    more = {
        name: padded(variant, getattr(layer, name), 8) for name in ("hidden_states", "w13", "w2")
    }
    check_layer(variant, layer, **more)


@pytest.mark.small
@pytest.mark.parametrize("bias", [None, F32, BF16], ids=str)
def test_columns_that_end_inside_a_box(variant, seed, bias):
    """Down of sm90a takes w2's rows in an order that gives a thread eight neighbouring columns.
    Behind an expert's rows lie others, NaN here."""
    for hidden_size in (8, 24, 136, 264, 312):
        layer = make_layer(seed, 200, hidden_size, 72, 3, 2, w2_bias=bias)
        experts, _, inner = layer.w2.shape
        rows = np.full((experts, hidden_size + 40, inner), np.nan, layer.w2.dtype)
        rows[:, :hidden_size] = layer.w2
        check_layer(variant, layer, w2=variant.put(rows)[:, :hidden_size])


def test_bad_token_touches_its_row_only(variant, seed):
    layer = make_layer(seed, 140, 136, 72, 2, 1)
    layer.hidden_states[77] = np.nan
    check_layer(variant, layer)


def test_thread_without_context(variant, seed):
    """Tensor maps are encoded in a thread that never made a CUDA context current."""
    layer, results = make_layer(seed, 140, 136, 72, 2, 2), []
    want = run_layer(variant, layer)
    thread = threading.Thread(target=lambda: results.append(run_layer(variant, layer)))
    thread.start()
    thread.join()
    assert same_bits(results[0], want)


def test_same_bits_every_time(variant, seed):
    layer = make_layer(seed, 400, 520, 264, 4, 2)
    first = run_layer(variant, layer)
    assert all(same_bits(run_layer(variant, layer), first) for _ in range(5))
