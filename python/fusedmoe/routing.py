"""How router logits become `topk_weights` and `topk_ids`: one description, one table of methods."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

# method -> (what it does, renormalised by default, may `renormalize` be the other value)
METHODS = {
    "softmax_topk": ("softmax over all experts, then the topk largest", False, True),
    "topk_softmax": ("the topk largest logits, then softmax over these", True, False),
}

# Methods that are named already, so that nobody builds them under another name.
PLANNED_METHODS = (
    "sigmoid_topk",
    "sigmoid_bias",
    "sigmoid_bias_grouped",
    "softmax_grouped",
    "softmax_bias",
    "sqrt_softplus_bias",
    "hash",
    "llama4",
    "sparsemixer",
)

MAX_TOPK = 32


@dataclass(frozen=True)
class Routing:
    """How `route` and `fused_moe` choose experts.

        p = softmax(router_logits[t]);  topk_ids[t] = the topk largest of p, ties to the lower id
        topk_weights[t] = routed_scaling_factor * p[topk_ids[t]] (/ their sum, renormalised)

    All arithmetic is in float32 whatever the dtype of the logits.

    Args:
        topk: experts per token, 1 to 32.
        method: "softmax_topk" or "topk_softmax" (the same, renormalised; what Mixtral, Qwen3 and
            gpt-oss call it).
        renormalize: divide the weights by their sum. None: what the method says.
        routed_scaling_factor: multiplies the weights last. Not the keyword of the same name of the
            layer, which multiplies the layer's output: give one of the two.
        ids_dtype: "int32" or "int64", of the topk_ids that `route` allocates.
        weights_dtype: "float32", of the topk_weights that `route` allocates.

    The other fields are reserved and raise NotImplementedError when given:
        correction_bias [num_experts] added to the scores for the choice only; num_groups and
        topk_groups, the choice restricted to the best groups; num_fused_shared_experts and
        shared_weight, extra slots of experts that every token visits; num_token_non_padded [1] on
        the device, rows from there on are dropped; expert_map and replica_map, logical to physical
        ids; tid2eid and token_ids, hash routing; expert_scale [num_experts]; softcap, logits =
        softcap * tanh(logits / softcap).

    Raises:
        TypeError, ValueError: a field of the wrong kind or outside its range.
        NotImplementedError: a reserved field or a method that is not built.

    Oracle: reference.route. Papers: arXiv:1701.06538 (top-k gating), arXiv:2401.04088 (top-k, then
        softmax).
    """

    topk: int
    method: str = "softmax_topk"
    renormalize: bool | None = None
    routed_scaling_factor: float = 1.0
    correction_bias: Any = None
    num_groups: int | None = None
    topk_groups: int | None = None
    num_fused_shared_experts: int = 0
    shared_weight: float | None = None
    num_token_non_padded: Any = None
    expert_map: Any = None
    replica_map: Any = None
    tid2eid: Any = None
    token_ids: Any = None
    expert_scale: Any = None
    softcap: float | None = None
    ids_dtype: str = "int32"
    weights_dtype: str = "float32"

    def __post_init__(self):
        if isinstance(self.topk, bool) or not hasattr(type(self.topk), "__index__"):
            raise TypeError(f"topk: expected an int, got {type(self.topk).__name__}")
        if not 1 <= self.topk <= MAX_TOPK:
            raise ValueError(f"topk: expected 1 to {MAX_TOPK}, got {self.topk}")
        if not isinstance(self.method, str):
            raise TypeError(f"method: expected a str, got {type(self.method).__name__}")
        if self.method in PLANNED_METHODS:
            raise NotImplementedError(
                f"method: {self.method!r} is not built yet, only {names(METHODS)}"
            )
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {names(METHODS)}, got {self.method!r}")
        _, default, free = METHODS[self.method]
        if self.renormalize is not None:
            if not isinstance(self.renormalize, bool):
                kind = type(self.renormalize).__name__
                raise TypeError(f"renormalize: expected True, False or None, got {kind}")
            if self.renormalize != default and not free:
                raise ValueError(
                    f"renormalize: expected {default} or None with method {self.method!r}, "
                    f"got {self.renormalize}"
                )
        scale = self.routed_scaling_factor
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"routed_scaling_factor: expected a float, got {type(scale).__name__}")
        if not math.isfinite(scale):
            raise ValueError(f"routed_scaling_factor: expected a finite number, got {scale}")
        if self.ids_dtype not in ("int32", "int64"):
            raise TypeError(f'ids_dtype: expected "int32" or "int64", got {self.ids_dtype!r}')
        if self.weights_dtype != "float32":
            raise NotImplementedError(
                f'weights_dtype: only "float32" is built, got {self.weights_dtype!r}'
            )
        for field in fields(self):
            if field.name in _BUILT:
                continue
            value = getattr(self, field.name)
            if value is not field.default and not (field.default == 0 and value == 0):
                raise NotImplementedError(f"{field.name}: this field of Routing is not built yet")

    @property
    def kernel_method(self) -> str:
        """The kernel's row: "softmax_topk" as it is, "topk_softmax" divided by the sum."""
        renormalize = METHODS[self.method][1] if self.renormalize is None else self.renormalize
        return "topk_softmax" if renormalize else "softmax_topk"


_BUILT = frozenset(
    ("topk", "method", "renormalize", "routed_scaling_factor", "ids_dtype", "weights_dtype")
)


def names(choices) -> str:
    """`"a", "b"`, for messages."""
    return ", ".join(f'"{name}"' for name in choices)
