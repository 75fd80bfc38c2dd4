"""align_block_size and count_tokens_per_expert against the oracle."""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import reference
from support import Guarded

I32, I64 = np.int32, np.int64


def capacity(num_slots, num_experts, block_size):
    hit = min(num_slots, num_experts)
    return (num_slots + hit * (block_size - 1)) // block_size * block_size


def assert_aligned(got, ids, block_size, num_experts, **local):
    rows, expert_ids, padded = got
    want_rows, want_ids, want_padded = reference.align_block_size(
        ids, block_size, num_experts, **local
    )
    n = int(want_padded[0])
    assert padded.tolist() == [n]
    assert (rows[:n] == want_rows).all()
    assert (expert_ids[: n // block_size] == want_ids).all()
    assert (expert_ids[n // block_size :] == -1).all()
    return n


def run(backend, ids, block_size, num_experts, **kwargs):
    got = fusedmoe.align_block_size(backend.put(ids), block_size, num_experts, **kwargs)
    return tuple(backend.get(t) for t in got)


@pytest.mark.small
@pytest.mark.parametrize("block_size", [1, 4, 16, 17, 64, 128, 256])
@pytest.mark.parametrize(
    "num_tokens, topk, num_experts",
    [(1, 1, 1), (1, 8, 256), (3, 2, 4), (33, 6, 64), (300, 8, 128), (700, 4, 1024), (2, 32, 7)],
)
def test_matches_oracle(backend, rng, num_tokens, topk, num_experts, block_size):
    ids = rng.integers(-1, num_experts, (num_tokens, topk)).astype(I32)
    got = run(backend, ids, block_size, num_experts)
    n = assert_aligned(got, ids, block_size, num_experts)
    assert len(got[0]) == capacity(ids.size, num_experts, block_size)
    assert len(got[1]) == len(got[0]) // block_size
    assert (got[0][n:] == ids.size).all()


def test_large(backend, rng):
    ids = rng.integers(0, 256, (20000, 8)).astype(I32)
    assert_aligned(run(backend, ids, 64, 256), ids, 64, 256)


@pytest.mark.parametrize("dtype", [I32, I64])
def test_foreign_and_repeated_ids(backend, rng, dtype):
    ids = rng.integers(-5, 40, (50, 6)).astype(dtype)
    ids[3] = np.iinfo(dtype).max
    ids[4] = np.iinfo(dtype).min
    ids[5] = 7
    assert_aligned(run(backend, ids, 16, 24), ids, 16, 24)


def test_one_rank(backend, rng):
    ids = rng.integers(0, 64, (80, 4)).astype(I32)
    table = np.full(64, -1, I32)
    table[5::4] = np.arange(15)
    got = run(backend, ids, 32, 16, expert_map=backend.put(table))
    assert_aligned(got, ids, 32, 16, expert_map=table)
    assert_aligned(run(backend, ids, 32, 16, expert_start=16), ids, 32, 16, expert_start=16)


def test_nothing_for_this_rank(backend):
    ids = np.full((9, 3), -1, I64)
    rows, expert_ids, padded = run(backend, ids, 8, 4)
    assert padded.tolist() == [0] and (expert_ids == -1).all() and (rows == 27).all()


def test_no_tokens(backend):
    rows, expert_ids, padded = run(backend, np.zeros((0, 3), I32), 8, 4)
    assert padded.tolist() == [0] and rows.size == expert_ids.size == 0


@pytest.mark.small
@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("more", [0, 13])
def test_out(backend, rng, pad, more):
    """Buffers may be longer; pad=False leaves what is behind the last block."""
    ids = rng.integers(0, 12, (21, 3)).astype(I32)
    room = capacity(63, 12, 16)
    rows = Guarded(backend, (room + more,), I32)
    blocks = Guarded(backend, (room // 16 + more,), I32)
    count = Guarded(backend, (1,), I32)
    before = backend.get(rows.tensor).copy()
    got = fusedmoe.align_block_size(
        backend.put(ids),
        16,
        12,
        pad=pad,
        out_sorted_token_ids=rows.tensor,
        out_expert_ids=blocks.tensor,
        out_num_tokens_post_padded=count.tensor,
    )
    assert got[0] is rows.tensor and got[1] is blocks.tensor and got[2] is count.tensor
    got = tuple(backend.get(t) for t in got)
    n = assert_aligned(got, ids, 16, 12)
    assert (got[0][n:] == (63 if pad else before[n:])).all()
    for buffer, name in ((rows, "rows"), (blocks, "blocks"), (count, "count")):
        buffer.check(name)


@pytest.mark.small
@pytest.mark.parametrize("num_tokens", [0, 1, 50, 3000])
def test_count_tokens_per_expert(backend, rng, num_tokens):
    ids = rng.integers(-3, 70, (num_tokens, 5)).astype(I32)
    out = Guarded(backend, (64,), I32)
    got = fusedmoe.count_tokens_per_expert(backend.put(ids), 64, out=out.tensor)
    assert got is out.tensor
    known = ids[(ids >= 0) & (ids < 64)]
    assert (backend.get(got) == np.bincount(known, minlength=64)).all()
    out.check("out")
    again = fusedmoe.count_tokens_per_expert(backend.put(ids), 64)
    assert (backend.get(again) == backend.get(got)).all()


@pytest.mark.small
@pytest.mark.parametrize(
    "wrong, name",
    [
        ({"block_size": 0}, "block_size"),
        ({"block_size": 257}, "block_size"),
        ({"num_experts": 1025}, "num_experts"),
        ({"out_sorted_token_ids": np.zeros(20, I32)}, "out_sorted_token_ids"),
        ({"out_expert_ids": np.zeros(1, I32)}, "out_expert_ids"),
        ({"out_expert_ids": np.zeros(50, I64)}, "out_expert_ids"),
        ({"out_num_tokens_post_padded": np.zeros(2, I32)}, "out_num_tokens_post_padded"),
        ({"workspace": np.zeros(64, np.uint8)}, "workspace"),
        ({"pad": 1}, "pad"),
    ],
)
def test_refuses(backend, wrong, name):
    wrong = {k: backend.put(v) if isinstance(v, np.ndarray) else v for k, v in wrong.items()}
    arguments = {"block_size": 16, "num_experts": 4, **wrong}
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        fusedmoe.align_block_size(backend.put(np.zeros((10, 4), I32)), **arguments)
