"""deterministic=False on a GPU: down adds its rows into out, in any order, each sum rounded.

Held by the oracle's bound for that. Plans are held to one row of the table, as in
tests/test_variants.py, since small layers would not get these kernels.
"""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import _C, fused_experts, reference
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
    run_layer,
    same_bits,
    workspace_bytes,
)  # fmt: skip

TILES = ("128x256", "128x128", "192x192")  # of both stages
SHORT = {BF16: "bf16", F16: "f16"}


def hold(tile, dtype):
    kernels = _C.info()["kernels"]
    rows = (f"moe_{s}_{SHORT[dtype]}_{tile}_sm90a" for s in ("gate_up", "down"))
    _C._fix_plans(*(kernels.index(name) for name in rows))


@pytest.fixture(params=TILES)
def tile(request, gpu):
    hold(request.param, BF16)
    yield request.param
    _C._fix_plans(-1, -1)


def test_plan_says_so():
    sizes = 4096, 4096, 192, 128, 8
    p, default = fusedmoe.plan(*sizes, deterministic=False), fusedmoe.plan(*sizes)
    assert p["down"]["name"].startswith("moe_down_add_") and not p["deterministic"]
    assert not default["down"]["name"].startswith("moe_down_add_") and default["deterministic"]
    assert p["workspace"] == default["workspace"]


@pytest.mark.parametrize(
    "num_tokens, sizes, band_tiles",
    [
        (2048, (4096, 192, 128, 8), 0),  # 17 MB: stays in L2
        (16384, (4096, 192, 128, 8), 2),  # 134 MB, 17 MB a band
        (16384, (2048, 768, 128, 8), 0),  # every band would read 201 MB of intermediate
    ],
    ids=str,
)
def test_bands_of_a_plan(num_tokens, sizes, band_tiles):
    p = fusedmoe.plan(num_tokens, *sizes, num_sms=132, deterministic=False)
    assert not p["deterministic"] and p["down"]["band_tiles"] == band_tiles


@pytest.mark.parametrize(
    "change", [{"no_combine": "weighted"}, {"vector_bytes": 2}, {"device": "cpu"}], ids=str
)
def test_what_cannot_add_stays_deterministic(change):
    p = fusedmoe.plan(4096, 4096, 192, 128, 8, deterministic=False, **change)
    assert p["deterministic"] and not p["down"]["name"].startswith("moe_down_add_")


@pytest.mark.gpu
@pytest.mark.small
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 8, 8, 1, 1), (40, 64, 128, 3, 2), (300, 520, 40, 2, 1), (257, 264, 264, 9, 8)],
    ids=str,
)
def test_sizes(gpu, tile, seed, sizes, dtype):
    hold(tile, dtype)
    layer = make_layer(seed, *sizes, dtype, deterministic=False)
    for fill in (0xFF, 0x3C):
        check_layer(gpu, layer, fill=fill)


@pytest.mark.gpu
@pytest.mark.small
@pytest.mark.parametrize("routing", ["same", "half", "dropped", "none", "duplicates"])
@pytest.mark.parametrize("shared_output", [False, True])
def test_routings(gpu, tile, seed, routing, shared_output):
    layer = make_layer(
        seed, 150, 136, 72, 5, 3, routing=routing, w2_bias=F32, shared_output=shared_output,
        routed_scaling_factor=2.5, deterministic=False,
    )  # fmt: skip
    check_layer(gpu, layer)


@pytest.mark.gpu
@pytest.mark.small
def test_weights_on_input_and_padded_rows(gpu, tile, seed):
    layer = make_layer(
        seed, 140, 136, 72, 3, 2, apply_router_weight_on_input=True, deterministic=False
    )
    names = ("hidden_states", "w13", "w2")
    check_layer(gpu, layer, **{name: padded(gpu, getattr(layer, name), 8) for name in names})


@pytest.mark.gpu
@pytest.mark.small
def test_in_place(gpu, tile, seed):
    """out is hidden_states: filled only once gate_up has read it."""
    layer = make_layer(seed, 200, 264, 72, 4, 3, deterministic=False)
    want, error = layer.expected()
    tensors, options = put_layer(gpu, layer)
    out = fused_experts(**tensors, **options, out=tensors["hidden_states"])
    assert_close(gpu.get(out), want, error, seed=seed)


@pytest.mark.gpu
@pytest.mark.small
def test_unaligned_out_keeps_the_sums_of_combine(gpu, tile, seed):
    layer = make_layer(seed, 100, 136, 72, 4, 3)
    want = run_layer(gpu, layer)
    tensors, options = put_layer(gpu, layer)
    flat = Guarded(gpu, (100 * 136,), BF16, offset=1)
    out = fused_experts(
        **tensors, **options, out=flat.tensor.reshape(100, 136), deterministic=False
    )
    assert same_bits(gpu.get(out), want)
    flat.check("out")


@pytest.mark.gpu
@pytest.mark.small
@pytest.mark.parametrize("routing", ["uniform", "dropped", "none"])
def test_one_row_a_token_has_the_bits_of_combine(gpu, tile, seed, routing):
    """topk 1: down writes out itself, also by default; an out of unaligned rows goes through combine."""
    layer = make_layer(seed, 300, 264, 136, 3, 1, routing=routing)
    tensors, options = put_layer(gpu, layer)
    flat = Guarded(gpu, (300 * 264,), BF16, offset=1)
    through_combine = gpu.get(fused_experts(**tensors, **options, out=flat.tensor.reshape(300, 264)))
    flat.check("out")
    for deterministic in (True, False):
        got = run_layer(gpu, layer.with_options(deterministic=deterministic))
        assert (got == through_combine).all()


@pytest.mark.gpu
@pytest.mark.small
@pytest.mark.parametrize("shared_output", [False, True])
def test_one_row_a_token_is_the_same_in_every_run(gpu, tile, seed, shared_output):
    layer = make_layer(
        seed, 200, 136, 72, 4, 1, routing="dropped", shared_output=shared_output,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    check_layer(gpu, layer)
    first = run_layer(gpu, layer)
    assert all(same_bits(run_layer(gpu, layer), first) for _ in range(10))


def test_plan_of_one_row_a_token():
    p = fusedmoe.plan(4422, 4016, 120, 13, 1, num_sms=132)
    assert p["deterministic"] and p["down"]["name"].startswith("moe_down_add_")
    assert p["down"]["band_tiles"] == 0
    few = fusedmoe.plan(64, 4016, 120, 13, 1, num_sms=132)
    assert few["deterministic"] and not few["down"]["name"].startswith("moe_down_add_")


@pytest.mark.gpu
def test_bands(gpu, seed):
    """An out that does not stay in L2 is done a band of columns after the other."""
    layer = make_layer(seed, 8192, 2056, 64, 4, 2, deterministic=False)
    tokens = np.linspace(0, 8191, 40).astype(int)
    want, error = layer.expected(tokens)
    for tile in TILES:
        hold(tile, BF16)
        try:
            got = run_layer(gpu, layer)
        finally:
            _C._fix_plans(-1, -1)
        assert_close(got[tokens], want, error, seed=seed)
        assert not np.isnan(got.astype(F32)).any()


@pytest.mark.gpu
@pytest.mark.small
def test_replays_of_a_graph(gpu, tile, seed):
    """out is filled anew in each: the adds of the one before are gone."""
    torch = gpu.torch
    layer = make_layer(seed, 200, 264, 72, 4, 3, shared_output=True, deterministic=False)
    want, error = layer.expected()
    tensors, options = put_layer(gpu, layer)
    out = gpu.empty(layer.out_shape, BF16)
    workspace = gpu.empty((workspace_bytes(gpu, layer),), np.uint8)
    call = lambda: fused_experts(**tensors, **options, out=out, workspace=workspace)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(20):
        graph.replay()
        assert_close(gpu.get(out), want, error, seed=seed)


def test_bound_grows_with_the_roundings():
    """More slots, more roundings, a wider bound; never narrower than the default's."""
    layers = [make_layer(1, 16, 64, 48, 8, topk) for topk in (1, 2, 8)]
    ratios = []
    for layer in layers:
        (_, usual), (_, error) = (
            layer.with_options(deterministic=d).expected() for d in (True, False)
        )
        assert (error.absolute >= usual.absolute).all()
        assert (error.variance >= usual.variance).all()
        ratios.append(error.absolute.sum() / usual.absolute.sum())
    assert ratios[0] == pytest.approx(1) and ratios[0] < ratios[1] < ratios[2]


def test_bound_holds_for_sums_in_any_order(rng):
    """The oracle's own rows, added in bf16 in random orders."""
    rows = rng.standard_normal((64 * 8, 32)).astype(BF16)
    slots = np.arange(64 * 8).reshape(64, 8)
    shared = rng.standard_normal((64, 32)).astype(BF16)
    want = reference.combine(rows, slots, shared_output=shared)
    error = reference.combine_error(rows, slots, shared_output=shared, deterministic=False)
    for _ in range(10):
        total = shared.copy()
        for slot in rng.permutation(8):
            total = (total.astype(F32) + rows[slots[:, slot]].astype(F32)).astype(BF16)
        assert_close(total, want, error)
