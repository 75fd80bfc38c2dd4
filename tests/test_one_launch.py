"""gate_up and down in one launch against one launch each, on a GPU: the same bits, whoever waits
for whom. Against the oracle: tests/test_variants.py."""

import fusedmoe
import pytest
from fusedmoe import _C
from support import BF16, F16, F32, check_streams, make_layer, run_layer, same_bits

pytestmark = pytest.mark.gpu

ROUTINGS = ["uniform", "same", "half", "dropped", "none", "duplicates"]
SIZES = [
    # num_tokens, hidden_size, intermediate_size, num_experts, topk
    (200, 1024, 320, 16, 4),  # items of several stages, down's columns taken by several
    (77, 512, 128, 64, 8),  # down: one stage an item
    (64, 256, 2048, 4, 1),  # few tiles: down waits for gate_up
    (400, 136, 192, 2, 1),  # tiles of one expert, K that ends inside a stage
    (1, 8, 8, 1, 1),
]


@pytest.fixture(params=[32, 64, 96])
def height(request, gpu):
    yield request.param
    _C._restrict_plans(False, 0)


def two_launches(gpu, layer, height):
    _C._restrict_plans(False, height, True)
    assert not planned(layer, "experts", height)
    want = run_layer(gpu, layer)
    _C._restrict_plans(False, height)
    assert planned(layer, "experts", height)
    return want


def planned(layer, stage, height):
    num_tokens, hidden_size = layer.hidden_states.shape
    num_experts, _, intermediate_size = layer.w2.shape
    dtype = layer.hidden_states.dtype.name
    sizes = num_tokens, hidden_size, intermediate_size, num_experts, layer.topk_ids.shape[1]
    name = fusedmoe.plan(*sizes, dtype=dtype, device="cuda")["down"]["name"]
    return name.startswith(f"moe_{stage}_") and f"_{height}x128_sm90a_" in name


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_same_bits_as_two(gpu, height, seed, sizes, routing):
    layer = make_layer(seed, *sizes, routing=routing)
    want = two_launches(gpu, layer, height)
    for fill in (0, 0xFF, 1, 0x7F):
        assert same_bits(run_layer(gpu, layer, fill=fill), want)


@pytest.mark.small
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_biases_and_weights_on_input(gpu, height, seed, dtype):
    more = {"w13_bias": F32, "w2_bias": F32, "apply_router_weight_on_input": True}
    layer = make_layer(seed, 150, 264, 136, 5, 2, dtype, **more)
    want = two_launches(gpu, layer, height)
    assert same_bits(run_layer(gpu, layer), want)


def test_two_streams(gpu, height, seed):
    """Each has some of the SMs; neither waits for a thread block that has no room."""
    layer = make_layer(seed, 300, 512, 384, 8, 2)
    want = two_launches(gpu, layer, height)
    check_streams(gpu, layer, want, num_streams=3)
