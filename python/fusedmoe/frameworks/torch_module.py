"""FusedMoE: the layer as a torch.nn.Module."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from .. import _C
from ..routing import Routing
from . import torch_ops

# Tensors of a Routing that belong to a checkpoint. The others say where experts are, or what one
# call is about.
_PERSISTENT = ("correction_bias", "expert_scale", "tid2eid")


class FusedMoE(torch.nn.Module):
    """Routing and the layer, with the experts' weights as Parameters.

        out = module(hidden_states, router_logits)
        out = module(hidden_states, topk_weights, topk_ids)

    The router's own GEMM is not part of it.

    Args:
        num_experts, hidden_size, intermediate_size: E, held here, H and I.
        topk: routed experts per token, short for routing=Routing(topk).
        routing: a `Routing`; its tensors become buffers named as its fields (expert_map:
            routing_expert_map), of which correction_bias, expert_scale and tid2eid are in the
            state_dict. Neither topk nor routing: only the second form of the call.
        bias: whether there are w13_bias and w2_bias.
        activation, activation_alpha, activation_limit, clamp, gated, w13_order,
            apply_router_weight_on_input, routed_scaling_factor, expert_start: as `fused_experts`.
        expert_map: as `fused_experts`; a buffer that is not in the state_dict.
        dtype, device: of the Parameters. On "meta" nothing is allocated until `to_empty` or
            `load_state_dict(..., assign=True)`.

    Parameters, which do not require a gradient:
        w13 [E, 2*I, H] (not gated: [E, I, H]), w2 [E, H, I], w13_bias [E, 2*I], w2_bias [E, H] or
        None. Each call takes them as they are then: rewrite or exchange them at any time.

    Where a gradient is asked for, the forward runs and the backward raises NotImplementedError.

    Oracle: reference.fused_moe, reference.fused_experts.
    """

    def __init__(
        self,
        num_experts,
        hidden_size,
        intermediate_size,
        topk=None,
        *,
        routing=None,
        bias=False,
        activation="silu",
        activation_alpha=None,
        activation_limit=None,
        clamp="after",
        gated=True,
        w13_order="gate_up",
        apply_router_weight_on_input=False,
        routed_scaling_factor=None,
        expert_map=None,
        expert_start=None,
        dtype=None,
        device=None,
    ):
        super().__init__()
        if topk is not None and routing is not None:
            raise ValueError(f"topk: expected None where routing is given, got {topk!r}")
        if topk is not None:
            routing = Routing(topk)
        elif routing is not None and not isinstance(routing, Routing):
            raise TypeError(f"routing: expected a fusedmoe.Routing, got {type(routing).__name__}")
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.expert_start = expert_start
        self._semantics = (  # in the order of the extension
            activation,
            activation_alpha,
            activation_limit,
            clamp,
            gated,
            w13_order,
            apply_router_weight_on_input,
            routed_scaling_factor,
        )
        self._routing = routing
        self._routing_buffers = {}  # field -> name of the buffer
        for field in fields(Routing) if routing is not None else ():
            tensor = getattr(routing, field.name)
            if isinstance(tensor, torch.Tensor):
                name = "routing_expert_map" if field.name == "expert_map" else field.name
                self._routing_buffers[field.name] = name
                self.register_buffer(name, tensor.to(device=device), field.name in _PERSISTENT)
        self.register_buffer("expert_map", expert_map, persistent=False)

        rows = intermediate_size * (2 if gated else 1)
        shapes = {"w13": (rows, hidden_size), "w2": (hidden_size, intermediate_size)}
        if bias:
            shapes.update(w13_bias=(rows,), w2_bias=(hidden_size,))
        for name in ("w13", "w2", "w13_bias", "w2_bias"):
            parameter = None
            if name in shapes:
                data = torch.empty(num_experts, *shapes[name], dtype=dtype, device=device)
                parameter = torch.nn.Parameter(data, requires_grad=False)
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self):
        """Uniform in +-1/sqrt(fan_in), as torch.nn.Linear."""
        fan_in = {"w13": self.hidden_size, "w2": self.intermediate_size}
        for name, parameter in self.named_parameters():
            bound = fan_in[name.removesuffix("_bias")] ** -0.5
            with torch.no_grad():
                parameter.uniform_(-bound, bound)

    @property
    def routing(self):
        """The `Routing` with the buffers as they are now, or None."""
        routing, buffers = self._routing, self._routing_buffers
        if not buffers:
            return routing
        now = {field: getattr(self, name) for field, name in buffers.items()}
        if any(tensor is not getattr(routing, field) for field, tensor in now.items()):
            self._routing = routing = replace(routing, **now)
        return routing

    def forward(
        self,
        hidden_states,
        router_logits=None,
        topk_ids=None,
        *,
        topk_weights=None,
        shared_output=None,
        out=None,
        workspace=None,
    ):
        """out [num_tokens, hidden_size].

        Args:
            hidden_states, shared_output, out, workspace: as `fused_experts`.
            router_logits: as `fused_moe`; where topk_ids is given, topk_weights as `fused_experts`.
            topk_ids, topk_weights: as `fused_experts`.
        """
        scores = router_logits if topk_weights is None else topk_weights
        if (router_logits is None) == (topk_weights is None) or (
            topk_ids is None and topk_weights is not None
        ):
            raise TypeError(
                "router_logits: expected a tensor, or else topk_weights and topk_ids, got a mixture"
            )
        parameters = self._parameters  # self.w13 takes 20 times as long
        w13, w13_bias = parameters["w13"], parameters["w13_bias"]
        w2, w2_bias = parameters["w2"], parameters["w2_bias"]
        binding = _C
        if torch.compiler.is_compiling() or (
            torch.is_grad_enabled()
            and torch_ops.any_requires_grad(
                hidden_states, scores, shared_output, out, w13, w2, w13_bias, w2_bias
            )
        ):
            binding = torch_ops
        options = (
            *(None,) * 7,  # of quantised weights
            w13_bias,
            w2_bias,
            *self._semantics,
            shared_output,
            False,  # no_combine
            self._buffers["expert_map"],
            self.expert_start,
            True,  # deterministic
            False,  # batch_invariant
            out,
            workspace,
            None,  # stream: torch's current one
            None,  # dtype
        )
        if topk_ids is not None:
            return binding.fused_experts(hidden_states, w13, w2, scores, topk_ids, *options)
        routing = self.routing
        if routing is None:
            raise ValueError(
                "topk_ids: expected a tensor, because the module has neither topk nor routing, "
                "got None"
            )
        return binding.fused_moe(
            hidden_states,
            w13,
            w2,
            scores,
            routing.topk,
            routing.kernel_method,
            routing.routed_scaling_factor,
            routing.knobs,
            *options,
        )

    def extra_repr(self):
        sizes = f"{self.num_experts}, {self.hidden_size}, {self.intermediate_size}"
        router = (
            f", {field.name}={value!r}"
            for field in (() if self._routing is None else fields(Routing))
            if field.name not in self._routing_buffers
            and (value := getattr(self._routing, field.name)) is not field.default
        )
        bias = "" if self.w13_bias is None else ", bias=True"
        return f"{sizes}{''.join(router)}{bias}, activation={self._semantics[0]!r}"
