"""hpc-ops: its bf16 layer by its own argument list, for code that was written for it.

    from fusedmoe.frameworks.hpc_ops import fuse_moe_bf16

The package itself is not needed.
"""

from __future__ import annotations

from ..ops import fused_experts

TESTED = "hpc-ops pull request 41 (July 2026)"


def status():
    """(version found or None, why it is not usable or None): nothing is needed."""
    return None, None


def fuse_moe_bf16(
    x,
    gate_up_weight,
    down_weight,
    topk_ids,
    topk_scale,
    rank_ep,
    num_expert_total,
    shared_output=None,
    output=None,
):
    """The experts of one rank, of num_expert_total in all.

        output[t] = sum over s of topk_scale[t, s] * expert(topk_ids[t, s], x[t]) + shared_output[t]

    over the slots whose expert this rank holds. Rank r holds the experts r*E .. (r + 1)*E - 1.

    Args:
        x: [T, H] bfloat16; whatever else `fused_experts` takes is taken, too. Not written.
        gate_up_weight: [E, 2*I, H] dtype of x, gate rows, then up rows.
        down_weight: [E, H, I] dtype of x.
        topk_ids: [T, k] int32 or int64, ids of all num_expert_total experts.
        topk_scale: [T, k] float32, the weights.
        rank_ep: this rank, from 0.
        num_expert_total: experts of all ranks together.
        shared_output: [T, H] dtype of x, added; under expert parallelism on one rank only. None:
            nothing.
        output: [T, H] dtype of x, written. None: allocated by the framework of x.

    Returns:
        output.

    Raises:
        TypeError: rank_ep or num_expert_total is no int. ValueError: this rank's experts are not
            among num_expert_total. Else as `fused_experts`, whose names the texts have: x is
            hidden_states, gate_up_weight w13, down_weight w2, topk_scale topk_weights.

    Oracle: reference.fused_experts with expert_start.
    """
    for name, value in (("rank_ep", rank_ep), ("num_expert_total", num_expert_total)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    shape = getattr(gate_up_weight, "shape", None)
    start = None
    if shape is not None and len(shape) == 3:  # else refused below, in the words of every call
        start = rank_ep * shape[0]
        if rank_ep < 0 or start + shape[0] > num_expert_total:
            raise ValueError(
                f"rank_ep: expected experts of 0 .. {num_expert_total - 1}, "
                f"got {start} .. {start + shape[0] - 1} on rank {rank_ep}"
            )
    return fused_experts(
        x,
        gate_up_weight,
        down_weight,
        topk_scale,
        topk_ids,
        expert_start=start,
        shared_output=shared_output,
        out=output,
    )
