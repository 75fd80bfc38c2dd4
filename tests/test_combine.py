"""Stage 5, combine: the sum over slots, against reference.combine."""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import reference
from support import BF16, F16, F32, Guarded, assert_close, make_ids, padded, same_bits


def case(rng, num_tokens, hidden_size, topk, dtype, routing="uniform"):
    """(rows with NaN where no slot points, row_of_slot)"""
    ids = make_ids(rng, num_tokens, topk, 8, routing)
    offsets, _, row_of_slot = reference.align(ids, 8)
    rows = np.full((num_tokens * topk, hidden_size), np.nan, np.float32)
    num_rows = int(offsets[-1])
    rows[:num_rows] = rng.standard_normal((num_rows, hidden_size), dtype=np.float32)
    return rows.astype(dtype), row_of_slot


def check(backend, seed, rows, row_of_slot, *, scale=None, shared_output=None, put=None, fill=0xFF):
    put = put or backend.put
    out = Guarded(backend, (row_of_slot.shape[0], rows.shape[1]), rows.dtype, fill)
    result = fusedmoe.combine(
        put(rows),
        backend.put(row_of_slot),
        routed_scaling_factor=scale,
        shared_output=None if shared_output is None else put(shared_output),
        out=out.tensor,
    )
    assert result is out.tensor
    got = backend.get(result)
    out.check("out")
    kwargs = {"routed_scaling_factor": scale, "shared_output": shared_output}
    want = reference.combine(rows, row_of_slot, **kwargs)
    error = reference.combine_error(rows, row_of_slot, **kwargs)
    assert_close(got, want, error, seed=seed)
    return got


@pytest.mark.small
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("num_tokens, hidden_size, topk", [(1, 1, 1), (5, 64, 2), (33, 129, 8)])
@pytest.mark.parametrize("routing", ["uniform", "dropped", "none"])
def test_matches_oracle(backend, seed, rng, dtype, num_tokens, hidden_size, topk, routing):
    if dtype not in backend.dtypes:
        pytest.skip("float32 is computed on the CPU only")
    check(backend, seed, *case(rng, num_tokens, hidden_size, topk, dtype, routing))


@pytest.mark.parametrize("topk", range(1, 33))
def test_every_topk(backend, seed, rng, topk):
    check(backend, seed, *case(rng, 11, 40, topk, BF16, "dropped"))


@pytest.mark.parametrize("scale", [None, 2.5, -0.5, 0.0, 1e-20])
@pytest.mark.parametrize("shared", [False, True])
def test_scale_and_shared_output(backend, seed, rng, scale, shared):
    rows, row_of_slot = case(rng, 13, 72, 4, BF16, "dropped")
    shared_output = rng.standard_normal((13, 72)).astype(BF16) if shared else None
    check(backend, seed, rows, row_of_slot, scale=scale, shared_output=shared_output)


def test_shared_output_survives_dropped_tokens(backend, rng):
    rows, row_of_slot = case(rng, 9, 48, 2, BF16, "none")
    shared_output = rng.standard_normal((9, 48)).astype(BF16)
    got = check(backend, 0, rows, row_of_slot, scale=3.0, shared_output=shared_output)
    assert same_bits(got, shared_output)


def test_one_slot_is_a_copy(backend, rng):
    rows, row_of_slot = case(rng, 20, 33, 1, F16)
    got = check(backend, 0, rows, row_of_slot)
    assert same_bits(got, rows[row_of_slot[:, 0]])


def test_the_sum_is_rounded_once(backend):
    """256 + 1 + 1 in bf16: rounded after each addition it stays 256, in f32 it is 258."""
    rows = np.array([[256], [1], [1]], np.float32).astype(BF16)
    out = fusedmoe.combine(backend.put(rows), backend.put(np.array([[0, 1, 2]], np.int32)))
    assert backend.get(out).astype(np.float32).tolist() == [[258]]


def test_slots_are_summed_in_order(backend):
    """1e8 + 1 - 1e8 in f32 is 0 in that order, and 1 in any order that pairs the large ones."""
    if F32 in backend.dtypes:
        rows = np.array([[1e8], [1], [-1e8]], np.float32)
        out = fusedmoe.combine(backend.put(rows), backend.put(np.array([[0, 1, 2]], np.int32)))
        assert backend.get(out).tolist() == [[0]]
    rows = np.array([[2.0**30], [1], [-(2.0**30)]], np.float32).astype(BF16)
    ids = backend.put(np.array([[0, 1, 2], [0, 2, 1], [2, 0, 1]], np.int32))
    out = fusedmoe.combine(backend.put(rows), ids)
    assert backend.get(out).astype(np.float32).tolist() == [[0], [1], [1]]


def test_strides_and_alignment(backend, seed, rng):
    rows, row_of_slot = case(rng, 14, 80, 3, BF16, "dropped")
    for pad, offset in [(8, 0), (3, 0), (0, 1), (5, 3)]:
        check(
            backend,
            seed,
            rows,
            row_of_slot,
            shared_output=rng.standard_normal((14, 80)).astype(BF16),
            put=lambda t, pad=pad, offset=offset: padded(backend, t, pad, offset=offset),
        )


def test_rows_out_of_range_are_dropped(backend, rng):
    rows = rng.standard_normal((4, 16)).astype(BF16)
    row_of_slot = np.array([[0, -1], [4, 1], [-(2**31), 2], [2**31 - 1, 3]], np.int32)
    out = fusedmoe.combine(backend.put(rows), backend.put(row_of_slot))
    assert same_bits(backend.get(out), rows)


def test_nan_stays_in_its_token(backend, seed, rng):
    rows, row_of_slot = case(rng, 6, 32, 2, BF16)
    rows[row_of_slot[2, 1], 5] = np.nan
    rows[row_of_slot[4, 0], 7] = np.inf
    check(backend, seed, rows, row_of_slot)


def test_no_tokens(backend):
    out = fusedmoe.combine(
        backend.put(np.zeros((0, 24), BF16)), backend.put(np.zeros((0, 2), np.int32))
    )
    assert backend.get(out).shape == (0, 24)
