"""The plug-in that makes an unmodified SGLang use this library for bf16 and fp16 on Hopper.

SGLang calls `activate` in each of its processes (entry point group `sglang.srt.plugins`). Four
places are taken over, each with SGLang's own code behind it for every call that is declined:

    the fused-op pool       ("none", "triton"): what a Triton MoE layer of any method runs
    UnquantizedFusedMoEMethod.forward_plugin    the same at the method, SGLang's place for kernels
                                                from elsewhere
    TopK.forward_plugin     routing of a layer, where nothing is to be done to the ids afterwards
    moe_fused_gate          the routing kernel alone, for all other layers

A call is declined on shapes, dtypes and flags alone, so it is safe under CUDA graph capture, and
on every field of SGLang's that this module does not know and that is not at its default: a newer
SGLang gets its own kernels rather than wrong numbers. Under torch.compile and in batch-invariant
mode everything is declined.

FUSEDMOE_SGLANG=0 turns the plug-in off; so does leaving it out of SGLANG_PLUGINS.
"""

from __future__ import annotations

import functools
import logging
import os
from contextlib import suppress
from dataclasses import MISSING, fields

from .. import _version, ops
from ..routing import MAX_TOPK, Routing
from . import sglang as door

logger = logging.getLogger("fusedmoe")

POOL_KEY = ("none", "triton")
MAX_EXPERTS = 1024
# Fields of MoeRunnerConfig and TritonMoeQuantInfo that are honoured here, or that the Triton runner
# does not look at either. Any other has to be at its default.
CONFIG_FIELDS = frozenset(
    "num_experts num_local_experts hidden_size intermediate_size_per_partition layer_id top_k "
    "num_fused_shared_experts params_dtype routing_method_type runner_backend activation is_gated "
    "apply_router_weight_on_input inplace no_combine no_combine_keep_router_weight "
    "routed_scaling_factor gemm1_alpha gemm1_beta gemm1_clamp_limit swiglu_limit "
    "gate_up_interleaved layer use_tp_all_gather_activation".split()
)
WEIGHT_FIELDS = frozenset("w13_weight w2_weight b13 b2 fuse_swiglu_interleaved".split())

_REFUSALS = (NotImplementedError, TypeError, ValueError)  # of the library; nothing is queued then

_undo = []  # what `deactivate` calls, last first


def activate():
    """Takes the four places over and says so. A second call does nothing. Where SGLang is not as
    expected, says in one sentence what is missing and leaves it as it is."""
    if os.environ.get("FUSEDMOE_SGLANG") == "0":
        logger.warning("fusedmoe: not active in SGLang, because FUSEDMOE_SGLANG=0")
        return
    if _undo:
        return
    try:
        engine = _engine()
    except (ImportError, AttributeError, KeyError) as error:
        found, _ = door.status()
        logger.error(
            "fusedmoe: not active in SGLang %s, which is not as expected (%s: %s); tested with %s",
            found,
            type(error).__name__,
            error,
            door.TESTED,
        )
        return
    _take_pool(engine)
    _take_experts(engine)
    _take_topk(engine)
    _take_gate(engine)
    logger.warning(
        "fusedmoe %s is active in SGLang: bf16 and fp16 MoE layers and their routing run on it on "
        "Hopper GPUs, everything else on SGLang's own kernels; FUSEDMOE_SGLANG=0 turns it off",
        _version.__version__,
    )


def deactivate():
    """Gives all but the hook on moe_fused_gate back, which then declines everything."""
    while _undo:
        _undo.pop()()


class _Engine:
    """What is used of SGLang, found once; AttributeError or ImportError where something is gone."""

    def __init__(self):
        import torch
        from sglang.kernels.ops.moe.moe_fused_gate import moe_fused_gate  # noqa: F401
        from sglang.kernels.spec import CapabilityRequirement, KernelBackend
        from sglang.srt import batch_invariant_ops
        from sglang.srt.distributed.device_communicators import pynccl_allocator
        from sglang.srt.layers import dp_attention
        from sglang.srt.layers.moe import topk
        from sglang.srt.layers.moe.moe_runner import base, triton
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
        from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
        from sglang.srt.plugins import hook_registry
        from sglang.srt.runtime_context import get_parallel

        self.torch = torch
        self.dtypes = (torch.bfloat16, torch.float16)
        self.plugin = KernelBackend.PLUGIN
        self.hopper = CapabilityRequirement.cuda((9, 0), (9, 0))
        self.batch_invariant = batch_invariant_ops.is_batch_invariant_mode_enabled
        self.topk = topk
        self.Config, self.QuantInfo = base.MoeRunnerConfig, triton.TritonMoeQuantInfo
        self.pool = base.FusedOpPool._fused_funcs
        self.theirs = self.pool[POOL_KEY]
        self.CombineInput = StandardCombineInput
        self.Method = UnquantizedFusedMoEMethod
        self.hooks = hook_registry
        self.noop = topk.precomputed_topk_postprocess_is_noop
        self.standard = topk.build_precomputed_topk_output
        self.config_defaults = _unknown_defaults(self.Config, CONFIG_FIELDS)
        self.quant_defaults = _unknown_defaults(self.QuantInfo, WEIGHT_FIELDS)
        self.Method.get_triton_quant_info, self.topk.TopK._resolve_routing_inputs  # noqa: B018

        def output_context():  # an all-reduce may want the output in its own pool
            return pynccl_allocator.use_symmetric_memory(
                get_parallel().tp_group, disabled=not dp_attention.is_allocation_symmetric()
            )

        self.output_context = output_context


@functools.cache
def _engine():
    return _Engine()


def _unknown_defaults(kind, known):
    """(name, default) of the fields of a dataclass that are not known here."""
    unknown = [field for field in fields(kind) if field.name not in known]
    return tuple((f.name, None if f.default is MISSING else f.default) for f in unknown)


@functools.cache
def _usable(device_index):
    """Whether the library runs on this GPU, a Hopper one; loads its kernels, so that the first
    call may come under graph capture."""
    import torch

    if torch.cuda.get_device_capability(device_index)[0] != 9:
        return False
    try:
        ops.load(device_index)
    except RuntimeError as error:
        logger.error("fusedmoe: not used on GPU %d: %s", device_index, error)
        return False
    return True


def on_hopper(tensor):
    return tensor.is_cuda and _usable(tensor.device.index)


def _out_of_reach(engine):
    """What no call may be taken over in, whatever its arguments."""
    if not _undo:
        return "the plug-in is not active"
    if engine.torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if engine.batch_invariant():
        return "batch-invariant mode"
    return None


@functools.lru_cache(maxsize=256)
def _say_declined(reason):
    """Once for each reason."""
    logger.info("fusedmoe: left to SGLang's own kernels: %s", reason)


# -------------------------------------------------------------------------------------------------
# The layer
# -------------------------------------------------------------------------------------------------


def declines(dispatch_output, quant_info, config):
    """Why a call of the layer is SGLang's to compute, None where it is taken over. Looks at types,
    shapes, dtypes and flags, never at data."""
    engine = _engine()
    reason = _out_of_reach(engine)
    if reason:
        return reason
    if type(config) is not engine.Config or type(quant_info) is not engine.QuantInfo:
        return "a configuration of another kind"
    for thing, defaults in ((config, engine.config_defaults), (quant_info, engine.quant_defaults)):
        for name, default in defaults:
            value = getattr(thing, name)
            if value is not default and (default is None or value != default):
                return f"{name} is set"
    if dispatch_output.hidden_states_scale is not None:
        return "hidden_states_scale is set"
    if dispatch_output.hidden_states_pre_quant is not None:
        return "hidden_states_pre_quant is set"
    topk_output = dispatch_output.topk_output
    if not engine.topk.TopKOutputChecker.format_is_standard(topk_output):
        return "the top-k output is not in standard format"
    if config.inplace and config.no_combine:
        return "inplace and no_combine"
    try:
        _keywords(quant_info, config)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    x, w13, w2 = dispatch_output.hidden_states, quant_info.w13_weight, quant_info.w2_weight
    ids, weights = topk_output.topk_ids, topk_output.topk_weights
    if x.dtype not in engine.dtypes or w13.dtype != x.dtype or w2.dtype != x.dtype:
        return "not bf16 or fp16"
    plain = engine.torch.Tensor, engine.torch.nn.Parameter
    if any(type(t) not in plain for t in (x, w13, w2, ids, weights)):
        return "a tensor subclass"
    if x.ndim != 2 or ids.ndim != 2 or weights.shape != ids.shape:
        return "hidden_states or topk of an unexpected shape"
    if w13.ndim != 3 or not (x.is_contiguous() and w13.is_contiguous() and w2.is_contiguous()):
        return "tensors that are not contiguous"
    wide = w13.shape[1] // 2 if config.is_gated else w13.shape[1]
    if w13.shape[2] != x.shape[1] or tuple(w2.shape) != (w13.shape[0], x.shape[1], wide):
        return "weights of an unexpected shape"
    if w13.shape[0] > MAX_EXPERTS or not 1 <= ids.shape[1] <= MAX_TOPK:
        return "more experts or slots than the library takes"
    if not on_hopper(x):
        return "not on a Hopper GPU"
    return None


def _keywords(quant_info, config):
    return door.activation_keywords(
        config.activation,
        config.is_gated,
        config.gemm1_alpha,
        config.gemm1_clamp_limit,
        config.swiglu_limit,
        config.gate_up_interleaved,
        quant_info.fuse_swiglu_interleaved,
    )


def run(dispatch_output, quant_info, config):
    """The layer, for a call that `declines` has nothing against."""
    engine = _engine()
    x, topk_output = dispatch_output.hidden_states, dispatch_output.topk_output
    no_combine, out = False, None
    if config.no_combine:
        no_combine = "weighted" if config.no_combine_keep_router_weight else "unweighted"
    elif config.inplace:
        out = x
    else:
        with engine.output_context():
            out = engine.torch.empty_like(x)
    out = ops.fused_experts(
        x,
        quant_info.w13_weight,
        quant_info.w2_weight,
        topk_output.topk_weights,
        topk_output.topk_ids,
        w13_bias=quant_info.b13,
        w2_bias=quant_info.b2,
        apply_router_weight_on_input=config.apply_router_weight_on_input,
        routed_scaling_factor=config.routed_scaling_factor,
        no_combine=no_combine,
        out=out,
        **_keywords(quant_info, config),
    )
    return engine.CombineInput(hidden_states=out)


def _run_or_theirs(engine, *call):
    """`run`; what it refuses after all, it has refused before anything was written."""
    try:
        return run(*call)
    except _REFUSALS as error:
        _say_declined(str(error))
        return engine.theirs(*call)


def _take_pool(engine):
    theirs = engine.theirs

    @functools.wraps(theirs)
    def fused_experts_none_to_fusedmoe(dispatch_output, quant_info, runner_config):
        if engine.torch.compiler.is_compiling():  # before all else, which is not to be traced
            return theirs(dispatch_output, quant_info, runner_config)
        reason = declines(dispatch_output, quant_info, runner_config)
        if reason is None:
            return _run_or_theirs(engine, dispatch_output, quant_info, runner_config)
        _say_declined(reason)
        return theirs(dispatch_output, quant_info, runner_config)

    engine.pool[POOL_KEY] = fused_experts_none_to_fusedmoe
    _undo.append(lambda: engine.pool.update({POOL_KEY: theirs}))


def _take_experts(engine):
    def forward_plugin(self, layer, dispatch_output):
        if engine.torch.compiler.is_compiling():
            return self.forward_cuda(layer, dispatch_output)
        runner = self.runner
        here = (
            self._aiter_runner is None
            and runner is not None
            and runner.runner_backend.is_triton()
            and runner.fused_func is not None  # no all-to-all, no LoRA, not turned off
            and not runner.lora_enabled
        )
        if here:
            quant_info = self.get_triton_quant_info(layer)
            if declines(dispatch_output, quant_info, runner.config) is None:
                return _run_or_theirs(engine, dispatch_output, quant_info, runner.config)
        return self.forward_cuda(layer, dispatch_output)  # declined again, and said, by the pool's

    _take_op(engine, engine.Method, forward_plugin)


def _take_op(engine, kind, forward_plugin):
    """Makes `forward_plugin` what a class of SGLang's ops runs on Hopper GPUs. It falls back to
    `forward_cuda` by itself; with SGLang's per-call choice of backends (`backend_eligible`) there
    would be more for torch.compile to trace."""
    # A mapping of this class's own: the one it inherits is shared by all ops.
    capabilities = {**kind.capabilities, engine.plugin: frozenset({engine.hopper})}
    for name, value in (("capabilities", capabilities), ("forward_plugin", forward_plugin)):
        _undo.append(functools.partial(_restore, kind, name, kind.__dict__.get(name)))
        setattr(kind, name, value)


def _restore(kind, name, value):
    if value is None:
        delattr(kind, name)
    else:
        setattr(kind, name, value)


# -------------------------------------------------------------------------------------------------
# Routing
# -------------------------------------------------------------------------------------------------


def routing_of(config):
    """The `Routing` of a TopKConfig without shared slots, None where there is none. It gives the
    ids and weights that SGLang's select_experts gives before it works on them."""
    backend = config.runner_backend
    if backend is not None and not backend.is_triton():
        return None  # some of them route in their own way
    if config.custom_routing_function or config.sqrtsoftplus_log1p or config.fused_gate_packed_ids:
        return None
    bias, score, groups = config.correction_bias, config.scoring_func, None
    if bias is not None and bias.ndim != 1:
        return None
    if config.use_grouped_topk:
        groups = config.num_expert_group
        if bias is not None:  # sigmoid, whatever scoring_func says
            method = "sigmoid_bias_grouped" if groups > 1 else "sigmoid_bias"
        else:
            method = {"softmax": "softmax_grouped", "sigmoid": "sigmoid_grouped"}.get(score)
        groups = groups if bias is None or groups > 1 else None
    elif score == "softmax":
        method = "softmax_topk" if bias is None else None
    else:
        methods = {"sigmoid": "sigmoid_bias", "sqrtsoftplus": "sqrt_softplus_bias"}
        method = None if bias is None else methods.get(score)
    if method is None or not 1 <= config.top_k <= MAX_TOPK:
        return None
    scale = 1.0
    if config.apply_routed_scaling_factor_on_output and config.routed_scaling_factor is not None:
        scale = float(config.routed_scaling_factor)
    return Routing(
        topk=config.top_k,
        method=method,
        renormalize=bool(config.renormalize),
        routed_scaling_factor=scale,
        correction_bias=bias,
        num_groups=groups,
        topk_groups=None if groups is None else config.topk_group,
    )


def _take_topk(engine):
    module, plain = engine.topk, (engine.torch.Tensor, engine.torch.nn.Parameter)

    def takes(
        self,
        router_logits,
        num_token_non_padded=None,
        expert_location_dispatch_info=None,
        dynamic_expert_bias=None,
        router_logits_partials=None,
    ):
        config = self.topk_config
        return (
            not _out_of_reach(engine)
            and config.output_format == module.TopKOutputFormat.STANDARD
            and not self.enable_waterfill
            and not module._SGLANG_EXPERIMENTAL_LORA_OPTI
            and dynamic_expert_bias is None
            and router_logits_partials is None
            and type(router_logits) in plain
            and router_logits.ndim == 2
            and router_logits.shape[1] <= MAX_EXPERTS
            and on_hopper(router_logits)
            and engine.noop(
                config,
                *self._resolve_routing_inputs(num_token_non_padded, expert_location_dispatch_info),
            )
            and routing_of(config) is not None
        )

    def forward_plugin(self, hidden_states, router_logits, **rest):
        if engine.torch.compiler.is_compiling() or not takes(self, router_logits, **rest):
            return self.forward_cuda(hidden_states, router_logits, **rest)
        try:
            with engine.output_context():
                weights, ids = ops.route(router_logits, routing_of(self.topk_config))
        except _REFUSALS as error:
            _say_declined(str(error))
            return self.forward_cuda(hidden_states, router_logits, **rest)
        return engine.standard(weights, ids, self.topk_config, self.layer_id)

    _take_op(engine, module.TopK, forward_plugin)


def _take_gate(engine):
    plain = (engine.torch.Tensor, engine.torch.nn.Parameter)

    def gate(original, scores, bias, *args, **kwargs):
        if engine.torch.compiler.is_compiling():
            return original(scores, bias, *args, **kwargs)
        takes = (
            not _out_of_reach(engine)
            and type(scores) in plain
            and (bias is None or type(bias) in plain)
            and scores.ndim == 2
            and scores.shape[1] <= MAX_EXPERTS
            and scores.stride(1) == 1
            and on_hopper(scores)
        )
        if takes:
            with suppress(*_REFUSALS):
                return door.moe_fused_gate(scores, bias, *args, **kwargs)
        return original(scores, bias, *args, **kwargs)

    # SGLang applies its hooks when all plug-ins have run.
    engine.hooks.HookRegistry.register(
        "sglang.kernels.ops.moe.moe_fused_gate.moe_fused_gate",
        gate,
        engine.hooks.HookType.AROUND,
    )
