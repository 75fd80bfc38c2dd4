"""Experts: the layer with its weights pinned and checked once, the fast way to call it.

    experts = Experts(w13, w2, activation="silu", max_tokens=None)
    out = experts(hidden_states, topk_weights, topk_ids,
                  out=None, workspace=None, shared_output=None, stream=None)
    out = experts.run(hidden_states, topk_weights, topk_ids, out, workspace, shared_output, stream)
    experts.rebind(w13, w2, w13_bias=None, w2_bias=None)

The type is written in C (csrc/experts.c). It holds owning views of the weights: no repacked copy
is made, and weights that are rewritten in place are seen by the next call. `.run` takes positional
arguments only and is the fastest; trailing ones may be left out. `.rebind` exchanges the weights
for others of the same shapes, dtype and device; strides are free.

Construction takes every keyword of `fused_experts` that describes weights or semantics, that is
all but hidden_states_scale, shared_output, out, workspace and stream. `max_tokens=n` makes the
object keep one scratch buffer per stream, allocated by the framework of hidden_states at the first
call, for calls of up to n tokens; without it each call that gives no workspace allocates one.

Attributes (read-only): num_experts, hidden_size, intermediate_size, dtype, device.
Numerics, errors and arguments are those of `fused_experts`. Oracle: reference.fused_experts.
"""

from ._C import Experts

__all__ = ["Experts"]
