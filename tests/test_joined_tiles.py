"""gate_up and down of tiles of prefill in one launch against one launch each, on a GPU: the same
bits, whoever waits for whom."""

import re

import fusedmoe
import pytest
from fusedmoe import _C
from support import BF16, F16, F32, check_streams, make_layer, run_layer, same_bits

pytestmark = pytest.mark.gpu

# without stage and dtype
ROWS = re.findall(r"moe_experts_bf16_(\w+_joined(?:_bare)?)\b", " ".join(_C.info()["kernels"]))
ROUTINGS = ["uniform", "same", "half", "dropped", "none", "duplicates"]
SIZES = [
    # num_tokens, hidden_size, intermediate_size, num_experts, topk
    (300, 512, 384, 8, 2),
    (900, 1024, 320, 4, 3),  # blocks take several items of both
    (400, 136, 192, 3, 2),  # tiles of one expert, K that ends inside a step
    (64, 256, 2048, 4, 2),  # few tiles: down waits for gate_up
    (1, 8, 8, 2, 2),
]


@pytest.fixture(autouse=True)
def as_planned():
    yield
    _C._fix_plans(-1, -1)


def hold(layer, gate_up, down=None):
    """Plans of this layer take these rows, or one of both stages."""
    dtype = {BF16: "bf16", F16: "f16"}[layer.hidden_states.dtype]
    names = [name.replace("DTYPE", dtype) for name in (gate_up, down or gate_up)]
    kernels = _C.info()["kernels"]
    _C._fix_plans(*(kernels.index(name) for name in names))
    dtype = layer.hidden_states.dtype.name
    plan = fusedmoe.plan(*layer.sizes, dtype=dtype, device="cuda")
    assert [plan[stage]["name"] for stage in ("gate_up", "down")] == names


def two_launches(gpu, layer):
    hold(layer, "moe_gate_up_DTYPE_128x256_sm90a", "moe_down_DTYPE_128x256_sm90a")
    return run_layer(gpu, layer)


def one_launch(gpu, layer, row, **more):
    hold(layer, f"moe_experts_DTYPE_{row}")
    return run_layer(gpu, layer, **more)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_same_bits_as_two(gpu, seed, sizes, routing, row):
    layer = make_layer(seed, *sizes, routing=routing)
    want = two_launches(gpu, layer)
    for fill in (0, 0xFF, 1, 0x7F):
        assert same_bits(one_launch(gpu, layer, row, fill=fill), want)


@pytest.mark.small
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_both_dtypes(gpu, seed, dtype, row):
    layer = make_layer(seed, 210, 264, 136, 5, 2, dtype)
    assert same_bits(one_launch(gpu, layer, row), two_launches(gpu, layer))


@pytest.mark.small
@pytest.mark.parametrize("row", [row for row in ROWS if not row.endswith("bare")])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_biases_and_weights_on_input(gpu, seed, dtype, row):
    more = {"w13_bias": F32, "w2_bias": F32, "apply_router_weight_on_input": True}
    layer = make_layer(seed, 150, 264, 136, 5, 2, dtype, **more)
    assert same_bits(one_launch(gpu, layer, row), two_launches(gpu, layer))


@pytest.mark.parametrize("row", ROWS)
def test_two_streams(gpu, seed, row):
    """Each has some of the SMs; neither waits for a thread block that has no room."""
    layer = make_layer(seed, 900, 512, 384, 8, 2)
    want = two_launches(gpu, layer)
    hold(layer, f"moe_experts_DTYPE_{row}")
    check_streams(gpu, layer, want, num_streams=3)
