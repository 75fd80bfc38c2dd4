"""Tiles of 128 rows behind the middle kernels, in their launch, where few experts have most of the
rows: which tiles there are only align knows."""

from dataclasses import replace

import fusedmoe
import numpy as np
import pytest
from fusedmoe import _C
from support import BF16, F16, F32, assert_close, check_layer, make_layer, run_layer, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.small]

ALWAYS, NEVER = 1, 1 << 20  # high_cost: sixteenths of a low tile's
SIZES = [
    # num_tokens, hidden_size, intermediate_size, num_experts, topk
    (300, 1032, 264, 12, 3),  # columns that end inside a tile, K inside a stage
    (700, 512, 320, 130, 2),  # more items than blocks
    (150, 264, 1544, 5, 3),  # few items: token rows of down wait
    (3000, 64, 64, 600, 9),  # two launches of align; with 32 rows the wider tiles
]
ROWS = [32, 64]  # of the low tiles


def choose(cost, rows):
    """Plans have these kernels for every layer; -1: those of before."""
    _C._restrict_plans(False, rows, False, cost)
    name = fusedmoe.plan(40, 264, 136, 3, 2)["gate_up"]["name"]
    kind = "plain" if cost < 0 else {32: "high", 64: "wide"}[rows]
    assert name == f"moe_experts_bf16_{rows}x128_sm90a_{kind}"


@pytest.fixture(autouse=True)
def low_tiles():
    yield
    _C._restrict_plans(False, 0)


def same_experts(layer, rng, share):
    """The first tokens, of that share, on the same experts."""
    num_tokens, topk = layer.topk_ids.shape
    ids = layer.topk_ids.copy()
    ids[: int(num_tokens * share)] = rng.permutation(layer.w13.shape[0])[:topk]
    return replace(layer, topk_ids=ids)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_against_the_oracle(gpu, rng, seed, sizes, share, rows):
    """The same bits whatever memory held, and within the bounds of the oracle."""
    layer = same_experts(make_layer(seed, *sizes), rng, share)
    choose(ALWAYS, rows)
    got = run_layer(gpu, layer)
    for fill in (0, 0xFF, 1, 0x7F):
        assert same_bits(run_layer(gpu, layer, fill=fill), got)
    want, error = layer.expected()
    assert_close(got, want, error, seed=seed)


@pytest.mark.parametrize("rows", ROWS)
def test_align_chooses_by_the_number_of_tiles(gpu, rng, seed, rows):
    """Low tiles times 16 against high tiles times the cost; on either side the bits of one kind."""
    layer = same_experts(make_layer(seed, 640, 1024, 256, 16, 3), rng, 1)
    choose(NEVER, rows)
    low = run_layer(gpu, layer)
    choose(ALWAYS, rows)
    high = run_layer(gpu, layer)
    choose(16 * 128 // rows, rows)
    assert same_bits(run_layer(gpu, layer), high)
    choose(16 * 128 // rows + 1, rows)
    assert same_bits(run_layer(gpu, layer), low)
    choose(-1, rows)
    assert same_bits(run_layer(gpu, layer), low)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("routing", ["uniform", "same", "dropped", "none", "duplicates"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_routings(gpu, seed, routing, dtype, rows):
    choose(ALWAYS, rows)
    more = {"shared_output": True, "expert_start": 2}
    layer = make_layer(seed, 200, 264, 136, 5, 3, dtype, routing=routing, **more)
    check_layer(gpu, replace(layer, topk_ids=np.where(layer.topk_ids < 0, -1, layer.topk_ids + 2)))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("order", ["up_gate", "interleaved"])
def test_orders(gpu, seed, order, rows):
    choose(ALWAYS, rows)
    check_layer(gpu, make_layer(seed, 200, 264, 136, 5, 3, w13_order=order))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "options",
    [
        {"w13_bias": F32, "w2_bias": F32},
        {"w2_bias": F32},
        {"activation": "gelu"},
        {"activation_limit": 0.5},
        {"gated": False},
        {"apply_router_weight_on_input": True},
    ],
    ids=str,
)
def test_layers_that_are_not_plain_have_other_kernels(gpu, seed, options, rows):
    """They know no options: whatever the cost, align makes no high tiles for such layers."""
    choose(ALWAYS, rows)
    layer = make_layer(seed, 200, 264, 136, 5, 3, routing="same", **options)
    check_layer(gpu, layer)
    got = run_layer(gpu, layer)
    choose(-1, rows)
    assert same_bits(run_layer(gpu, layer), got)
