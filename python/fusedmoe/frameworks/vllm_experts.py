"""Experts for vLLM's modular kernels, over `fusedmoe.fused_experts`. Imports vLLM: only `vllm.py`
imports this."""

from __future__ import annotations

import functools

import torch
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation_supported,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.moe_output import route_major_moe_output
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.platforms import current_platform

from .. import ops
from ..routing import MAX_TOPK
from .vllm import activation_keywords, logger

MAX_EXPERTS = 1024
ALIGNMENT = 256  # bytes, of the library's workspace


class FusedMoeExperts(mk.FusedMoEExpertsModular):
    """bf16 and fp16 experts, from the dispatched tokens to their weighted sum.

    Tokens come in standard format ([M, K], not batched by expert), ids are local, or global where
    an expert_map is given. Weights stay as vLLM loaded them: what is rewritten in place is seen by
    the next call. All scratch memory is vLLM's workspace; nothing else is allocated but by
    apply_router_weight_on_input and a post_gemm2_hook.
    """

    def __init__(self, moe_config, quant_config, max_num_tokens=None, num_dispatchers=None):
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        self.keywords = keywords_of(moe_config.activation, self.activation_config)

    @staticmethod
    def is_supported_config(cls, moe_config, weight_key, activation_key, activation_format):
        supported, reason = mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        if not supported:
            return supported, reason
        if moe_config.in_dtype not in (torch.bfloat16, torch.float16):
            return False, f"kernel does not support {moe_config.in_dtype}"
        if moe_config.num_local_experts > MAX_EXPERTS:
            return False, f"kernel takes at most {MAX_EXPERTS} experts"
        if moe_config.experts_per_token > MAX_TOPK:
            return False, f"kernel takes at most {MAX_TOPK} experts a token"
        return True, None

    @staticmethod
    def activation_format():
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device():
        return current_platform.is_cuda() and _usable()

    @staticmethod
    def _supports_no_act_and_mul():
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key, activation_key):
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation):
        return apply_moe_activation_supported(activation)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config):
        return not (
            moe_parallel_config.use_fi_nvl_two_sided_kernels
            or moe_parallel_config.use_fi_nvl_one_sided_kernels
        )

    def finalize_weight_and_reduce_impl(self):
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M,
        N,
        K,
        topk,
        global_num_experts,
        local_num_experts,
        expert_tokens_meta,
        activation,
    ):
        """(workspace13, workspace2, output). workspace2 is the library's workspace; workspace13,
        which vLLM may lay over the output, is not used. M may be 0 when vLLM profiles."""
        needed = ALIGNMENT + ops.workspace_size(
            max(M, 1),
            K,
            self.adjust_N_for_activation(N, activation),
            local_num_experts,
            topk,
            dtype=str(self.moe_config.in_dtype).removeprefix("torch."),
            device="cpu" if current_platform.is_cpu() else "cuda",
            gated=activation.is_gated,
            no_combine=self.post_gemm2_hook is not None and "unweighted",
        )
        row = -(-needed // (2 * max(M, 1)))
        return (0,), (max(M, 1), row), (M, K)

    def apply(
        self,
        output,
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        global_num_experts,
        expert_map,
        a1q_scale,
        a2_scale,
        workspace13,
        workspace2,
        expert_tokens_meta,
        apply_router_weight_on_input,
    ):
        """output = the weighted sum over slots, every row written.

        Args:
            output: [M, K], written. hidden_states: [M, K] bfloat16 or float16.
            w1, w2: [E, N, K] and [E, K, N / 2 (N where not gated)], dtype of hidden_states.
            topk_weights, topk_ids: [M, topk]; ids are global where expert_map is given.
            activation: the layer's.
            global_num_experts: not looked at: the length of expert_map, or E.
            expert_map: [global_num_experts] int32, -1: not here. None: ids are local.
            a1q_scale, a2_scale: None.
            workspace13: not used. workspace2: scratch, content arbitrary.
            expert_tokens_meta: not looked at.
            apply_router_weight_on_input: the weights are in hidden_states already.

        Raises as `fusedmoe.fused_experts`. Oracle: reference.fused_experts.
        """
        keywords = self.keywords
        if activation is not self.moe_config.activation:
            keywords = keywords_of(activation, self.activation_config)
        hooked = self._uses_post_gemm2_hook(hidden_states.shape[0])
        if hooked and apply_router_weight_on_input:
            raise NotImplementedError(
                "apply_router_weight_on_input: expected False with a post_gemm2_hook, got True"
            )
        weights = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
        result = ops.fused_experts(
            hidden_states,
            w1,
            w2,
            weights,
            topk_ids,
            hidden_states_scale=a1q_scale,
            intermediate_scale=a2_scale,
            w13_bias=self.w1_bias,
            w2_bias=self.w2_bias,
            no_combine="unweighted" if hooked else False,
            expert_map=expert_map,
            out=None if hooked else output,
            workspace=_bytes(workspace2),
            **keywords,
        )
        if hooked:
            rows = route_major_moe_output(result, topk_weights, topk_ids, expert_map)
            self._run_post_gemm2_hook(rows, output)


def keywords_of(activation, config):
    """As `activation_keywords`, of vLLM's own types."""
    return activation_keywords(
        activation.value,
        config.clamp_limit,
        config.alpha,
        config.beta,
        config.activation_situ_beta,
        config.activation_situ_linear_beta,
    )


def _bytes(workspace):
    """A tensor's memory as bytes, from its first aligned address on."""
    flat = workspace.view(-1).view(torch.uint8)
    return flat[-flat.data_ptr() % ALIGNMENT :]


@functools.cache
def _usable():
    """Whether the library runs on this process's GPU, a Hopper one; loads its kernels, so that the
    first call may come under graph capture."""
    if not current_platform.is_device_capability_family(90):
        return False
    try:
        ops.load(torch.cuda.current_device())
    except RuntimeError as error:
        logger.error("fusedmoe: not used: %s", error)
        return False
    return True


class FusedMoeMethod(UnquantizedFusedMoEMethod):
    """vLLM's unquantised method; where it would run the Triton experts, it runs `FusedMoeExperts`
    if these take the layer."""

    def __init__(self, moe):
        super().__init__(moe)
        self.theirs = self.experts_cls
        # An explicit moe_backend="triton" is a wish for Triton; LoRA changes the Triton experts.
        if self.theirs is TritonExperts and moe.moe_backend == "auto" and not moe.is_lora_enabled:
            supported, reason = FusedMoeExperts.is_supported_config(
                FusedMoeExperts, moe, None, None, mk.FusedMoEActivationFormat.Standard
            )
            if supported:
                self.experts_cls = FusedMoeExperts
            else:
                logger.info("fusedmoe: a MoE layer runs on vLLM's own kernels: %s", reason)

    def _init_moe_kernel(self, layer):
        # The activation's numbers may be the layer's and are known only now.
        config = ApplyMoEActivationConfig.from_configs(
            self.moe, self.get_fused_moe_quant_config(layer)
        )
        if self.experts_cls is FusedMoeExperts:
            try:
                keywords_of(self.moe.activation, config)
            except NotImplementedError as error:
                self.experts_cls = self.theirs
                logger.info("fusedmoe: a MoE layer runs on vLLM's own kernels: %s", error)
        super()._init_moe_kernel(layer)


def take_over():
    """AttributeError where vLLM lacks something that is used only later."""
    MoEActivation.SILU.is_gated, ops.workspace_size  # noqa: B018
    FusedMoeExperts._uses_post_gemm2_hook, FusedMoeExperts._run_post_gemm2_hook  # noqa: B018
    missing = FusedMoeExperts.__abstractmethods__
    if missing:
        raise AttributeError(f"FusedMoEExpertsModular asks for {', '.join(sorted(missing))}")
    name = UnquantizedFusedMoEMethod.name
    UnquantizedFusedMoEMethod.register_oot(FusedMoeMethod)
    FusedMoeMethod.name = name  # by which vLLM's configuration turns the op on and off
