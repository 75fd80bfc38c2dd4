"""Few tiles of long K: K split over the thread blocks of a cluster, whose sums are added up in its
order. The plan says by how many; here layers for which it does so by itself. Layers of every other
kind: tests/test_variants.py."""

import pytest
from fusedmoe import ops
from support import (
    BF16,
    F16,
    F32,
    check_layer,
    check_streams,
    make_layer,
    run_layer,
    same_bits,
)

UP, DOWN = "gate_up", "down"
SIZES = [
    # num_tokens, hidden_size, intermediate_size, num_experts, topk; which stage is split
    ((300, 4040, 72, 2, 2), UP),  # K ends inside a step
    ((200, 4040, 136, 3, 3), UP),  # two column tiles, one half empty
    ((90, 256, 3976, 2, 2), DOWN),
    ((60, 328, 2048, 3, 1), DOWN),  # half of each tile is padding
]


def split_stages(sizes, dtype):
    plan = ops.plan(*sizes, dtype=dtype, num_sms=132)
    return [stage for stage in (UP, DOWN) if plan[stage]["name"].endswith("_split")]


@pytest.mark.parametrize("sizes, stage", SIZES, ids=str)
def test_the_plan_splits(sizes, stage):
    for dtype in ("bfloat16", "float16"):
        assert stage in split_stages(sizes, dtype)
        blocks = ops.plan(*sizes, dtype=dtype, num_sms=132)[stage]["cluster_blocks"]
        assert 2 <= blocks <= 8


@pytest.mark.gpu
@pytest.mark.small
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("sizes, stage", SIZES, ids=str)
def test_sizes(gpu, seed, sizes, stage, dtype):
    layer = make_layer(seed, *sizes, dtype)
    got = check_layer(gpu, layer)
    for fill in (0, 1, 0x7F):  # of the workspace
        assert same_bits(run_layer(gpu, layer, fill=fill), got)


@pytest.mark.gpu
@pytest.mark.small
@pytest.mark.parametrize("routing", ["same", "half", "dropped", "none", "duplicates"])
@pytest.mark.parametrize("sizes", [SIZES[1][0], SIZES[2][0]], ids=str)
def test_routings(gpu, seed, sizes, routing):
    """Fewer tiles than there may be: clusters that find none leave."""
    layer = make_layer(seed, *sizes, routing=routing, w13_bias=F32, w2_bias=BF16)
    check_layer(gpu, layer)


@pytest.mark.gpu
def test_two_streams(gpu, seed):
    """Clusters of two calls beside each other."""
    layer = make_layer(seed, *SIZES[0][0])
    want = run_layer(gpu, layer)
    check_streams(gpu, layer, want, num_streams=2)
