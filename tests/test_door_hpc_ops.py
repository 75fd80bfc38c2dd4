"""The door for callers of hpc-ops: its meaning against the oracle; errors as of the direct call."""

import numpy as np
import pytest
from fusedmoe import fused_experts
from fusedmoe.frameworks.hpc_ops import fuse_moe_bf16, status
from support import BF16, assert_close, make_layer

NAMES = {  # of the layer's tensors, as hpc-ops calls them
    "hidden_states": "x",
    "w13": "gate_up_weight",
    "w2": "down_weight",
    "topk_ids": "topk_ids",
    "topk_weights": "topk_scale",
}


def put(backend, layer):
    return {NAMES[name]: backend.put(array) for name, array in layer.tensors().items()}


def test_status():
    assert status() == (None, None)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_against_the_oracle(backend, ranks, shared, ids_dtype):
    """Every rank alone: global ids, its contiguous experts, the shared output added by rank 0."""
    for rank in range(ranks):
        layer = make_layer(
            seed=rank,
            num_experts=4,
            topk=3,
            ids_dtype=ids_dtype,
            expert_start=4 * rank,
            num_ids=4 * ranks,
            shared_output=shared and rank == 0,
        )
        tensors = put(backend, layer)
        if "shared_output" in layer.options:
            tensors["shared_output"] = backend.put(layer.options["shared_output"])
        want, error = layer.expected()
        out = fuse_moe_bf16(**tensors, rank_ep=rank, num_expert_total=4 * ranks)
        assert_close(backend.get(out), want, error, seed=rank)


def test_positions_and_output(backend):
    """All nine arguments by position, in the order of hpc-ops; output is returned itself."""
    layer = make_layer(expert_start=4, num_ids=8, shared_output=True)
    tensors = put(backend, layer)
    poison = np.full(layer.out_shape, np.nan, np.float32).astype(BF16)
    output = backend.put(poison)
    shared = backend.put(layer.options["shared_output"])
    result = fuse_moe_bf16(
        tensors["x"],
        tensors["gate_up_weight"],
        tensors["down_weight"],
        tensors["topk_ids"],
        tensors["topk_scale"],
        1,
        8,
        shared,
        output,
    )
    assert result is output
    want, error = layer.expected()
    assert_close(backend.get(output), want, error)


def test_ranks_sum_to_the_whole():
    """Weights of 8 experts split over 4 ranks: the oracle of the whole layer."""
    layer = make_layer(num_experts=8, topk=4, num_tokens=9)
    total = np.zeros(layer.out_shape)
    for rank in range(4):
        mine = slice(2 * rank, 2 * rank + 2)
        out = fuse_moe_bf16(
            layer.hidden_states,
            layer.w13[mine],
            layer.w2[mine],
            layer.topk_ids,
            layer.topk_weights,
            rank,
            8,
        )
        total += out.astype(np.float64)
    want, error = layer.expected()
    # Four roundings to bfloat16 instead of one.
    bound = type(error)(error.absolute * 4, error.variance * 4, error.freedom)
    assert_close(total, want, bound)


BAD = {
    "x float64": {"x": lambda a: a.astype(np.float64)},
    "x another dtype": {"x": lambda a: a.astype(np.float16)},
    "x width": {"x": lambda a: a[:, :32]},
    "x dimensions": {"x": lambda a: a[None]},
    "x strides": {"x": lambda a: a[:, ::-1]},
    "x no tensor": {"x": lambda a: "x"},
    "weight dimensions": {"gate_up_weight": lambda a: a[0]},
    "weight no tensor": {"gate_up_weight": lambda a: None},
    "weight width": {"gate_up_weight": lambda a: a[:, :, :32]},
    "down experts": {"down_weight": lambda a: a[:2]},
    "down transposed": {"down_weight": lambda a: a.transpose(0, 2, 1)},
    "ids float": {"topk_ids": lambda a: a.astype(np.float32)},
    "ids rows": {"topk_ids": lambda a: a[:3]},
    "scale int": {"topk_scale": lambda a: a.astype(np.int64)},
    "scale shape": {"topk_scale": lambda a: a[:, :1]},
    "shared shape": {"shared_output": lambda a: np.zeros((2, 2), BF16)},
    "output dtype": {"output": lambda a: np.zeros((7, 64), np.float32)},
    "output read-only": {"output": lambda a: np.frombuffer(bytes(7 * 64 * 2), BF16).reshape(7, 64)},
}


@pytest.mark.parametrize("case", BAD)
def test_the_same_error_as_the_direct_call(case):
    layer = make_layer()
    tensors = {NAMES[name]: array for name, array in layer.tensors().items()}
    for name, change in BAD[case].items():
        tensors[name] = change(tensors.get(name))
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as direct:
        fused_experts(
            **{name: tensors[theirs] for name, theirs in NAMES.items()},
            shared_output=tensors.get("shared_output"),
            out=tensors.get("output"),
            expert_start=0,
        )
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as through:
        fuse_moe_bf16(**tensors, rank_ep=0, num_expert_total=4)
    assert (through.type, str(through.value)) == (direct.type, str(direct.value))


@pytest.mark.parametrize(
    "rank, total, error, words",
    [
        (1, 4, ValueError, r"rank_ep: expected experts of 0 \.\. 3, got 4 \.\. 7 on rank 1"),
        (-1, 8, ValueError, "rank_ep: expected experts"),
        (0, 3, ValueError, "rank_ep: expected experts"),
        (0.0, 8, TypeError, "rank_ep: expected an int, got float"),
        (True, 8, TypeError, "rank_ep: expected an int, got bool"),
        (0, None, TypeError, "num_expert_total: expected an int, got NoneType"),
    ],
)
def test_ranks_that_cannot_be(rank, total, error, words):
    layer = make_layer()
    tensors = {NAMES[name]: array for name, array in layer.tensors().items()}
    with pytest.raises(error, match=words):
        fuse_moe_bf16(**tensors, rank_ep=rank, num_expert_total=total)
