"""The kernels for a few tokens on a GPU, which read topk_ids themselves and leave out align and
combine, against the oracle. On the CPU the same layers, by the stages."""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import _C, reference
from fusedmoe.models import BF16_MODELS, MODELS
from support import (
    BF16,
    F16,
    F32,
    check_layer,
    make_layer,
    padded,
    put_layer,
    rms_of_unfused,
    run_layer,
    same_bits,
)
from test_gate_up import ALL_ACTIVATIONS

SIZES = [
    # num_tokens, hidden_size, intermediate_size, num_experts, topk: multiples of 8 only
    (1, 8, 8, 1, 1),
    (1, 2048, 768, 8, 8),
    (2, 64, 64, 4, 2),  # one stage, one unit
    (3, 72, 40, 5, 3),  # nothing but tails in down, a tail in gate_up
    (4, 2880, 720, 4, 4),  # tails behind many stages
    (5, 520, 136, 40, 7),  # more than 32 slots
    (8, 256, 1792, 4, 2),  # four pieces of K in a copy
    (8, 4096, 192, 16, 8),
    (8, 7168, 64, 6, 2),  # more columns than SMs: two tiles a thread block
    (7, 128, 128, 1024, 32),  # every word of the experts' bits
    (16, 512, 256, 4, 2),  # two groups of eight tokens
    (13, 136, 328, 3, 3),
    (16, 1024, 64, 10, 32),
    # I = 128: a stage of down brings several experts, and both kernels stand on an SM at a time
    (1, 2048, 128, 16, 10),  # fewer stages than warps, two experts in each
    (2, 2048, 128, 24, 10),  # the last stage is not full
    (4, 2048, 128, 48, 10),  # more stages than the ring has
    (8, 2048, 128, 64, 10),
    (3, 512, 120, 12, 5),  # the same with a tail
    (4, 256, 64, 20, 6),  # six experts in a stage
    # each warp of down brings the token rows of its own stages, of which it has more than two
    (8, 256, 512, 40, 4),
    (7, 264, 520, 30, 5),  # with a tail
    (8, 4096, 192, 48, 5),  # 32 columns a thread block
    (8, 136, 512, 17, 17),  # eight rows an expert
    (12, 2048, 128, 40, 10),  # two groups of tokens, 16 columns a thread block
    (16, 512, 512, 30, 8),  # token rows leave room for eight stages of half a copy
]


@pytest.fixture(autouse=True)
def decode():
    """Plans decode wherever these kernels can: layers as small as here are faster without."""
    _C._fix_plans(-2, -2)
    yield
    _C._fix_plans(-1, -1)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(backend, seed, sizes, dtype):
    check_layer(backend, make_layer(seed, *sizes, dtype))


def test_these_layers_are_decoded():
    """Else the other tests here would say nothing of these kernels."""
    for tokens, *sizes in SIZES[1:]:
        p = fusedmoe.plan(tokens, *sizes, device="cuda", num_sms=132)
        for stage in ("gate_up", "down"):
            assert p[stage]["name"].endswith("_sm90a_decode_bare"), (tokens, sizes)


def test_up_to_16_tokens_are_decoded():
    """Unless the token rows of down leave its ring no room (qwen3_30b), or an expert's rows of w2
    are no whole number of pieces (gptoss)."""
    for name in BF16_MODELS:
        p = fusedmoe.plan(16, *MODELS[name], device="cuda", num_sms=132)
        decoded = p["down"]["name"].endswith("_sm90a_decode_bare")
        assert decoded == (name not in ("qwen3_30b", "gptoss_120b_tp4")), name


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 8])
def test_small_rows_of_w2_put_both_kernels_on_an_sm(num_tokens):
    """Else down's weights would not follow gate_up's without a gap; one KiB a block is the SM's."""
    p = fusedmoe.plan(num_tokens, 2048, 128, 512, 10, device="cuda", num_sms=132)
    assert sum(p[stage]["smem_bytes"] + 1024 for stage in ("gate_up", "down")) <= 228 * 1024


@pytest.mark.small
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64], ids=lambda t: t.__name__)
@pytest.mark.parametrize("routing", ["same", "half", "dropped", "none", "duplicates"])
@pytest.mark.parametrize("num_tokens, topk", [(1, 4), (6, 4), (8, 5), (8, 17), (15, 4)])
def test_routings(backend, seed, num_tokens, topk, routing, ids_dtype):
    """Up to 32 slots a warp finds the experts by comparison, up to 64 by a table; above, all do."""
    layer = make_layer(
        seed, num_tokens, 136, 72, topk, topk, routing=routing, ids_dtype=ids_dtype,
        w13_bias=F32, w2_bias=BF16, shared_output=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    check_layer(backend, layer)


@pytest.mark.small
@pytest.mark.parametrize("order", reference.ORDERS)
@pytest.mark.parametrize("routing", ["uniform", "half", "dropped", "none", "duplicates"])
@pytest.mark.parametrize("sizes", [(1, 264, 128, 24, 10), (2, 520, 72, 9, 4)], ids=str)
def test_one_and_two_tokens(backend, seed, sizes, routing, order):
    """16 lanes write a token's outputs of gate_up, and no warp of down has two stages."""
    check_layer(backend, make_layer(seed, *sizes, routing=routing, w13_order=order))


@pytest.mark.parametrize("activation, alpha, limit, clamp, gated", ALL_ACTIVATIONS)
def test_activations(backend, seed, activation, alpha, limit, clamp, gated):
    options = {"activation_alpha": alpha, "activation_limit": limit, "clamp": clamp}
    layer = make_layer(seed, 5, 136, 168, 3, 2, activation=activation, gated=gated, **options)
    check_layer(backend, layer)


@pytest.mark.small
@pytest.mark.parametrize("order", reference.ORDERS)
@pytest.mark.parametrize("bias", [None, F32], ids=str)
@pytest.mark.parametrize("routing", ["uniform", "duplicates"])
def test_orders_and_biases(backend, seed, order, bias, routing):
    """With the weight on the input, two slots of a token on one expert differ before down."""
    layer = make_layer(
        seed, 6, 136, 264, 2, 2, w13_order=order, w13_bias=bias, w2_bias=bias, routing=routing,
        apply_router_weight_on_input=True,
    )  # fmt: skip
    check_layer(backend, layer)


@pytest.mark.parametrize("routing", ["same", "dropped", "duplicates"])
def test_routings_with_several_experts_in_a_stage(backend, seed, routing):
    check_layer(backend, make_layer(seed, 3, 256, 128, 14, 6, routing=routing))


@pytest.mark.small
@pytest.mark.parametrize("routing", ["uniform", "half", "dropped", "duplicates"])
@pytest.mark.parametrize("sizes", [(8, 136, 520, 20, 4), (5, 264, 768, 24, 6)], ids=str)
def test_warps_that_bring_their_own_token_rows(backend, seed, sizes, routing):
    """Experts of one to eight tokens; duplicates: there all warps bring all rows."""
    check_layer(backend, make_layer(seed, *sizes, routing=routing, w2_bias=BF16))


@pytest.mark.parametrize("weights_dtype", [F32, BF16, F16], ids=str)
def test_expert_maps(backend, seed, weights_dtype):
    own = np.full(64, -1, np.int32)
    own[10:14] = [2, 0, 3, 1]
    kinds = [{"expert_map": own, "num_ids": 64}, {"expert_start": 12, "num_ids": 20}]
    for kind in kinds:
        layer = make_layer(seed, 8, 264, 136, 4, 4, weights_dtype=weights_dtype, **kind)
        check_layer(backend, layer)


def test_padded_rows(backend, seed):
    layer = make_layer(seed, 7, 136, 72, 3, 2)
    more = {
        name: padded(backend, getattr(layer, name), 8) for name in ("hidden_states", "w13", "w2")
    }
    check_layer(backend, layer, **more)


def test_bad_token_touches_its_row_only(backend, seed):
    for num_tokens in (8, 14):
        layer = make_layer(seed, num_tokens, 136, 72, 2, 1)
        layer.hidden_states[5] = np.nan
        check_layer(backend, layer)


def test_bad_weights_touch_their_tokens_only(backend, seed):
    """All tokens are columns of every expert's product; those without a slot take nothing of it."""
    layer = make_layer(seed, 6, 136, 72, 3, 1)
    layer.topk_ids[:] = [[0], [1], [0], [1], [0], [1]]
    layer.w13[0], layer.w2[0] = np.nan, np.inf
    check_layer(backend, layer)


@pytest.mark.parametrize("sizes", [(8, 520, 264, 16, 4), (2, 2048, 128, 24, 10)], ids=str)
def test_same_bits_every_time(backend, seed, sizes):
    layer = make_layer(seed, *sizes)
    first = run_layer(backend, layer)
    assert all(same_bits(run_layer(backend, layer), first) for _ in range(100))


@pytest.mark.parametrize(
    "num_tokens, intermediate_size", [(1, 192), (8, 192), (16, 192), (1, 128), (2, 128)]
)
def test_back_to_back_with_one_workspace(gpu, seed, num_tokens, intermediate_size):
    """Calls that share their scratch overlap (each kernel starts before the one in front of it has
    ended): none of 10,000 may read or write it too early. Every call has its own routing."""
    import torch

    layers = [make_layer(seed + i, num_tokens, 512, intermediate_size, 16, 4) for i in range(20)]
    tensors, _ = put_layer(gpu, layers[0])
    routings = [(gpu.put(layer.topk_weights), gpu.put(layer.topk_ids)) for layer in layers]
    shape = layers[0].hidden_states.shape
    outs = [gpu.empty(shape, BF16) for _ in layers]
    size = fusedmoe.workspace_size(num_tokens, 512, intermediate_size, 16, 4, device="cuda")
    workspace = gpu.empty((size,), np.uint8)

    def run():
        for (weights, ids), out in zip(routings, outs, strict=True):
            fusedmoe.fused_experts(
                tensors["hidden_states"], tensors["w13"], tensors["w2"], weights, ids,
                out=out, workspace=workspace,
            )  # fmt: skip

    run()
    torch.cuda.synchronize()
    first = [out.clone() for out in outs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    differ = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(500):
        graph.replay()
        for out, want in zip(outs, first, strict=True):
            differ += (out.view(torch.int16) != want.view(torch.int16)).sum()
    assert differ.item() == 0
    for layer, out in zip(layers[:3], outs, strict=False):
        layer.hidden_states, layer.w13, layer.w2 = (
            layers[0].hidden_states, layers[0].w13, layers[0].w2,
        )  # fmt: skip
        want, error = layer.expected()
        report = reference.compare(gpu.get(out), want, error)
        assert report.ok, report.message


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 8])
def test_rounds_twice(gpu, seed, dtype, num_tokens):
    """Where rows of down are never stored: two roundings, unfused kernels have five."""
    layer = make_layer(seed, num_tokens, 2048, 256, 8, 4, dtype)
    plan = fusedmoe.plan(num_tokens, *layer.sizes[1:], dtype=str(dtype), device="cuda")
    decoded = plan["down"]["name"].endswith("_decode")
    assert rms_of_unfused(gpu, layer) <= (0.7 if decoded else 0.8)
