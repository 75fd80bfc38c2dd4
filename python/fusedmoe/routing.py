"""How router logits become `topk_weights` and `topk_ids`: one description, one table of methods."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, NamedTuple

from . import _C


class Method(NamedTuple):
    """The knobs of one method, a row of kernels/route_methods.def."""

    score: str  # of a logit
    key: str  # what the choice is made by
    bias: str  # what correction_bias is added to
    groups: str  # how num_groups restricts the choice
    ids: str  # the largest keys, or ids from elsewhere
    renormalize: str  # "never", "always", or the default where it is free: "off", "on"


# The values of the knobs in the order of the enums in kernels/moe_kernels.h.
_VALUES = (
    ("softmax", "sigmoid", "sqrt_softplus", "sparsemixer", "constant"),
    ("logit", "score", "uniform", "zipf"),
    ("none", "key", "logit"),
    ("none", "max", "top2", "quota"),
    ("largest", "table", "round_robin"),
    ("never", "always", "off", "on"),
)
METHODS = {
    name: Method(*(values[i] for values, i in zip(_VALUES, row, strict=True)))
    for name, row in _C._routing_methods().items()
}
MAX_TOPK = 32
SHARED_WEIGHTS = ("sum", "gate", "sink")


@dataclass(frozen=True)
class Routing:
    """How `route` and `fused_moe` choose experts.

        x = router_logits[t];  s = score(x);  key = x or s, + correction_bias
        topk_ids[t] = the topk largest keys (of the groups kept), ties to the lower id
        topk_weights[t] = routed_scaling_factor * s[topk_ids[t]] (/ their sum, renormalised)

    All arithmetic is in float32 whatever the dtype of the logits. A row is in falling order of the
    keys. Any bit pattern in the logits gives distinct ids and finite weights: NaN comes last and
    weighs 0, and so does every expert of a softmax over NaN, +inf or only -inf.

    Args:
        topk: routed experts per token, 1 to 32.
        method: a row of the table in docs/routing.md, for instance "softmax_topk", "topk_softmax"
            (the same, renormalised; Mixtral, Qwen3, gpt-oss), "sigmoid_bias_grouped" (DeepSeek-V3).
        renormalize: divide the weights by their sum; zeros stay zero. None: what the method says.
        routed_scaling_factor: multiplies the weights last. Not the keyword of the same name of the
            layer, which multiplies the layer's output: give one of the two.
        correction_bias: [num_experts] float32, bfloat16 or float16, for the methods with "bias" in
            their name. The weights are without it, but for softmax_of_biased.
        num_groups, topk_groups: the methods with "grouped": num_groups equal runs of experts, of
            which the best topk_groups are kept. softmax_quota: topk / num_groups from each group.
        num_fused_shared_experts: slots of experts that every token visits, behind the topk routed
            ones, ids num_experts, num_experts + 1, ...
        first_shared_id: the first of these ids, where they are others: with expert_map the layout
            of expert parallelism, rank * (local + shared) + local.
        shared_weight: of these slots. "sum" or None: the sum of the routed weights over
            routed_scaling_factor, before both are applied: 1 where renormalised. A number: that
            weight. "gate": the sigmoid of a column of router_logits of its own, behind those of the
            experts. "sink" (sigmoid_bias_sink): the same, in one sum with the routed weights.
        num_zero_experts: the last of the columns stand for experts that return their input: id -1,
            with their weight.
        num_token_non_padded: [1] int32 on the device of the logits; tokens from there on have ids
            -1 and weights 0, whatever their logits.
        expert_map: [n] int32, the id that is written for an expert; -1: not here. Shared ids are
            not mapped.
        replica_map: [num_experts, replicas] int32, before expert_map: the physical ids of each
            expert, -1 behind the last one. A token takes replica token * 2654435769 mod 2^32 mod n.
        tid2eid, token_ids: "hash": ids are tid2eid[token_ids[t]], of [vocabulary, topk] and
            [num_tokens]. "forced": ids are tid2eid[t]. Ids outside the experts are dropped.
        expert_scale: [num_experts] float32, multiplies the weights after renormalisation.
        softcap: logits = softcap * tanh(logits / softcap).
        ids_dtype: "int32" or "int64", of the topk_ids that `route` allocates.
        weights_dtype: "float32", "bfloat16" or "float16", of the topk_weights that `route`
            allocates.

    Raises:
        TypeError, ValueError: a field of the wrong kind or outside its range, or that the method
            does not take. What needs the number of experts is checked by the call.

    Oracle: reference.route. Papers: arXiv:1701.06538 (top-k gating), arXiv:2401.04088 (top-k, then
        softmax), arXiv:2412.19437 (sigmoid, bias and groups).
    """

    topk: int
    method: str = "softmax_topk"
    renormalize: bool | None = None
    routed_scaling_factor: float = 1.0
    correction_bias: Any = None
    num_groups: int | None = None
    topk_groups: int | None = None
    num_fused_shared_experts: int = 0
    shared_weight: float | str | None = None
    first_shared_id: int | None = None
    num_zero_experts: int = 0
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
        _check_count("topk", self.topk, 1, MAX_TOPK)
        if not isinstance(self.method, str):
            raise TypeError(f"method: expected a str, got {type(self.method).__name__}")
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {names(METHODS)}, got {self.method!r}")
        method = METHODS[self.method]
        self._check_renormalize(method.renormalize)
        _check_number("routed_scaling_factor", self.routed_scaling_factor)
        self._check_groups(method.groups)
        self._check_shared()
        _check_count("num_zero_experts", self.num_zero_experts, 0, 1023)
        if self.softcap is not None:
            _check_number("softcap", self.softcap)
            if self.softcap <= 0:
                raise ValueError(f"softcap: expected a number above 0, got {self.softcap}")
        self._check_given("correction_bias", method.bias != "none")
        self._check_given("tid2eid", method.ids == "table")
        self._check_given("token_ids", self.method == "hash")
        if self.ids_dtype not in ("int32", "int64"):
            raise TypeError(f'ids_dtype: expected "int32" or "int64", got {self.ids_dtype!r}')
        if self.weights_dtype not in ("float32", "bfloat16", "float16"):
            raise TypeError(
                f'weights_dtype: expected "float32", "bfloat16" or "float16", '
                f"got {self.weights_dtype!r}"
            )
        object.__setattr__(self, "kernel_method", self.method)
        object.__setattr__(self, "knobs", self._knobs())

    def _check_renormalize(self, rule):
        value = self.renormalize
        if value is None:
            return
        if not isinstance(value, bool):
            raise TypeError(
                f"renormalize: expected True, False or None, got {type(value).__name__}"
            )
        if value == {"never": True, "always": False}.get(rule):
            raise ValueError(
                f"renormalize: expected {not value} or None with method {self.method!r}, "
                f"got {value}"
            )

    def _check_groups(self, rule):
        self._check_given("num_groups", rule != "none")
        self._check_given("topk_groups", rule in ("max", "top2"))
        if self.num_groups is not None:
            _check_count("num_groups", self.num_groups, 1, MAX_TOPK)
        if self.topk_groups is not None:
            _check_count("topk_groups", self.topk_groups, 1, self.num_groups)
        if rule == "quota" and self.topk % self.num_groups:
            raise ValueError(
                f"topk: expected a multiple of num_groups {self.num_groups} with method "
                f"{self.method!r}, got {self.topk}"
            )
        if self.method == "llama4" and self.topk != 1:
            raise ValueError(f"topk: expected 1 with method 'llama4', got {self.topk}")
        if self.method == "sparsemixer" and self.topk > 2:
            raise ValueError(f"topk: expected 1 or 2 with method 'sparsemixer', got {self.topk}")

    def _check_shared(self):
        count, weight = self.num_fused_shared_experts, self.shared_weight
        _check_count("num_fused_shared_experts", count, 0, MAX_TOPK - self.topk)
        if isinstance(weight, str):
            if weight not in SHARED_WEIGHTS:
                raise ValueError(
                    f"shared_weight: expected a number, None or one of {names(SHARED_WEIGHTS)}, "
                    f"got {weight!r}"
                )
        elif weight is not None:
            _check_number("shared_weight", weight)
        if self.first_shared_id is not None:
            _check_count("first_shared_id", self.first_shared_id, 0, 2**31 - 1 - MAX_TOPK)
            if not count:
                raise ValueError(
                    "first_shared_id: expected None without num_fused_shared_experts, got "
                    f"{self.first_shared_id}"
                )
        if weight is not None and not count:
            raise ValueError(
                f"shared_weight: expected None without num_fused_shared_experts, got {weight!r}"
            )
        if (weight == "sink") != (self.method == "sigmoid_bias_sink"):
            raise ValueError(
                'shared_weight: "sink" and method "sigmoid_bias_sink" come together, got '
                f"{weight!r} and {self.method!r}"
            )

    def _check_given(self, name, wanted):
        if (getattr(self, name) is not None) != wanted:
            expected, got = ("a value", "None") if wanted else ("None", "a value")
            raise ValueError(f"{name}: expected {expected} with method {self.method!r}, got {got}")

    def _knobs(self):
        """What the extension takes beside topk, method and scale, in the order of binding.h; None
        where there is nothing."""
        given = [name for name, value in _KNOB_DEFAULTS if getattr(self, name) is not value]
        if given == ["renormalize"] and self.method in ("softmax_topk", "topk_softmax"):
            # The same computation has a name, and a name is the fastest argument.
            method = "topk_softmax" if self.renormalize else "softmax_topk"
            object.__setattr__(self, "kernel_method", method)
            given = []
        if not given:
            return None
        return (
            self.renormalize,
            self.num_groups,
            self.topk_groups,
            self.num_fused_shared_experts,
            self.shared_weight,
            self.num_zero_experts,
            self.softcap,
            self.weights_dtype,
            self.first_shared_id,
            self.correction_bias,
            self.expert_scale,
            self.num_token_non_padded,
            self.expert_map,
            self.replica_map,
            self.tid2eid,
            self.token_ids,
        )

    @property
    def num_slots(self) -> int:
        """Columns of topk_weights and topk_ids: the routed experts and the shared ones."""
        return self.topk + self.num_fused_shared_experts


_KNOB_DEFAULTS = tuple(
    (field.name, field.default)
    for field in fields(Routing)
    if field.name not in ("topk", "method", "routed_scaling_factor", "ids_dtype")
)


def _check_count(name, value, low, high):
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")


def _check_number(name, value):
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def names(choices) -> str:
    """`"a", "b"`, for messages."""
    return ", ".join(f'"{name}"' for name in choices)
