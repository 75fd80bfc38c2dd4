"""Stage 2, align: slots grouped by expert, exactly reference.align."""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import reference
from support import Guarded, make_ids, padded

ROUTINGS = ("uniform", "same", "half", "dropped", "none", "duplicates")


def assert_aligned(backend, ids, num_experts, *, put=None, **kwargs):
    """All three outputs, exactly; sorted_token_ids below num_rows, the rest is not written."""
    want = reference.align(ids, num_experts, **kwargs)
    if kwargs.get("expert_map") is not None:
        kwargs["expert_map"] = backend.put(np.asarray(kwargs["expert_map"], np.int32))
    ids = backend.put(ids) if put is None else put
    offsets, sorted_token_ids, row_of_slot = fusedmoe.align(ids, num_experts, **kwargs)
    assert tuple(sorted_token_ids.shape) == (want[2].size,)
    rows = backend.get(sorted_token_ids[: int(want[0][-1])])
    got = [backend.get(offsets), rows, backend.get(row_of_slot)]
    assert [t.dtype for t in got] == [np.int32] * 3
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[2], want[2])
    return got


@pytest.mark.small
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    "num_tokens, num_experts, topk", [(1, 1, 1), (1, 8, 8), (5, 3, 2), (33, 16, 4), (70, 130, 8)]
)
def test_matches_oracle(backend, rng, routing, ids_dtype, num_tokens, num_experts, topk):
    ids = make_ids(rng, num_tokens, topk, num_experts, routing).astype(ids_dtype)
    assert_aligned(backend, ids, num_experts)


@pytest.mark.parametrize(
    "num_tokens, num_experts, topk",
    [(2048, 128, 8), (4096, 1024, 32), (16384, 8, 2), (3000, 257, 9), (40000, 2, 1)],
)
@pytest.mark.parametrize("routing", ["uniform", "same", "dropped"])
def test_large(backend, rng, routing, num_tokens, num_experts, topk):
    ids = make_ids(rng, num_tokens, topk, num_experts, routing).astype(np.int32)
    assert_aligned(backend, ids, num_experts)


@pytest.mark.parametrize(
    "num_tokens, num_experts, topk",
    [
        (639, 8, 1),  # every slot compared with all; not a multiple of 4
        (80, 512, 8),  # the most of that
        (641, 8, 1),  # blocks that place their own and count all
        (513, 128, 2),
        (1024, 256, 8),  # the most of that
        (1025, 256, 8),  # clusters of blocks that share the counting out
        (8193, 1, 1),  # of one expert
        (1280, 512, 8),  # later where there are many
        (1281, 512, 8),
        (4097, 64, 8),  # more of them
        (6144, 512, 8),  # the most of that
        (6145, 64, 8),  # two launches
        (3072, 513, 8),  # the most that one launch does where there are many experts
        (3073, 513, 8),
        (8193, 200, 8),  # more blocks that count
        (32769, 9, 8),  # more again; above, a block has more slots than it sorts at once
        (40000, 1024, 17),
    ],
)
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_around_the_limits_of_a_launch(backend, rng, ids_dtype, num_tokens, num_experts, topk):
    ids = make_ids(rng, num_tokens, topk, num_experts, "dropped").astype(ids_dtype)
    assert_aligned(backend, ids, num_experts)
    assert_aligned(backend, ids, num_experts, put=padded(backend, ids, topk + 3))
    assert_aligned(backend, ids, max(num_experts - 5, 1), expert_start=3)
    assert_aligned(backend, ids, 7, expert_map=np.arange(num_experts, dtype=np.int32) % 9 - 1)


@pytest.mark.small
@pytest.mark.parametrize("num_tokens", [1300, 8000])  # clusters; two launches
@pytest.mark.parametrize("routing", ROUTINGS)
def test_many_slots(backend, rng, routing, num_tokens):
    ids = make_ids(rng, num_tokens, 7, 33, routing).astype(np.int32)
    assert_aligned(backend, ids, 33)


@pytest.mark.parametrize("num_tokens", [*range(0, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 257])
def test_every_small_count(backend, rng, num_tokens):
    ids = make_ids(rng, num_tokens, 3, 7, "dropped").astype(np.int32)
    assert_aligned(backend, ids, 7)


def test_no_tokens(backend):
    offsets, sorted_token_ids, row_of_slot = assert_aligned(backend, np.zeros((0, 4), np.int32), 5)
    assert offsets.tolist() == [0] * 6
    assert sorted_token_ids.shape == (0,) and row_of_slot.shape == (0, 4)


def test_rows_of_an_expert_keep_the_order_of_the_slots(backend, rng):
    ids = rng.integers(0, 4, (5000, 2)).astype(np.int32)
    offsets, sorted_token_ids, _ = assert_aligned(backend, ids, 4)
    for e in range(4):
        assert (np.diff(sorted_token_ids[offsets[e] : offsets[e + 1]]) > 0).all()


@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_any_bit_pattern_is_an_id(backend, rng, ids_dtype):
    info = np.iinfo(ids_dtype)
    ids = rng.integers(info.min, info.max, (64, 4), dtype=ids_dtype, endpoint=True)
    ids[::3, 1] = rng.integers(0, 6, len(ids[::3]))
    ids[0] = info.min, info.max, -1, 6
    assert_aligned(backend, ids, 6)
    assert_aligned(backend, ids, 6, expert_start=2)
    assert_aligned(backend, ids, 6, expert_map=np.arange(6)[::-1])


def test_64_bit_ids_are_not_cut_to_32(backend):
    ids = np.array([[2**32, 2**32 + 1, -(2**32), 1, 2**31]], np.int64)
    offsets, _, row_of_slot = assert_aligned(backend, ids, 4)
    assert offsets[-1] == 1 and row_of_slot.tolist() == [[-1, -1, -1, 0, -1]]


@pytest.mark.parametrize("start", [0, 1, 8, 24, 100, 2**31 - 1])
def test_expert_start(backend, rng, start):
    ids = rng.integers(0, 32, (40, 4)).astype(np.int64)
    assert_aligned(backend, ids, 8, expert_start=start)


def test_expert_start_does_not_wrap_around(backend):
    ids = np.array([[-(2**31), 2**31 - 1, -1, 0]], np.int32)
    assert_aligned(backend, ids, 4, expert_start=2**31 - 1)
    assert_aligned(backend, ids, 4, expert_start=2**31 - 4)


@pytest.mark.small
def test_expert_map(backend, rng):
    table = np.full(32, -1, np.int32)
    here = rng.permutation(32)[:8]
    table[here] = rng.permutation(8)
    ids = rng.integers(-3, 36, (50, 6)).astype(np.int32)
    assert_aligned(backend, ids, 8, expert_map=table)


def test_expert_map_may_send_many_ids_to_one_expert(backend, rng):
    table = np.array([0, 0, 0, 1, 1, -1], np.int32)
    assert_aligned(backend, rng.integers(0, 6, (30, 3)).astype(np.int32), 2, expert_map=table)


def test_expert_map_with_values_out_of_range(backend, rng):
    table = np.array([5, -5, 2**31 - 1, -(2**31), 1, 0], np.int32)
    assert_aligned(backend, rng.integers(0, 6, (30, 3)).astype(np.int64), 5, expert_map=table)


def test_strides(backend, rng):
    ids = make_ids(rng, 21, 3, 9, "dropped").astype(np.int64)
    assert_aligned(backend, ids, 9, put=padded(backend, ids, 5))


@pytest.mark.small
@pytest.mark.parametrize("num_tokens", [1, 17, 600])
def test_out(backend, rng, num_tokens):
    ids = make_ids(rng, num_tokens, 4, 12, "dropped").astype(np.int32)
    want = reference.align(ids, 12)
    outs = [
        Guarded(backend, shape, np.int32) for shape in [(13,), (num_tokens * 4,), (num_tokens, 4)]
    ]
    got = fusedmoe.align(
        backend.put(ids),
        12,
        out_expert_offsets=outs[0].tensor,
        out_sorted_token_ids=outs[1].tensor,
        out_row_of_slot=outs[2].tensor,
    )
    num_rows = int(want[0][-1])
    names = ("expert_offsets", "sorted_token_ids", "row_of_slot")
    for name, out, tensor, array in zip(names, outs, got, want, strict=True):
        assert tensor is out.tensor
        stop = num_rows if name == "sorted_token_ids" else None
        np.testing.assert_array_equal(backend.get(tensor)[:stop], array, err_msg=name)
        out.check(name)
