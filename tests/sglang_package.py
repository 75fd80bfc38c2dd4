"""Checks of the SGLang plug-in against the real package, run by test_sglang.py in a process of
their own: `python sglang_package.py FOLDER`, where sglang is unpacked. Prints one JSON object,
name of a check -> None or what went wrong.

What of the package is not real, because it needs a GPU's compilers or is about models as a whole:

    triton                              a placeholder; no kernel of SGLang's runs here
    sglang, sglang.srt.configs, sglang.srt.layers.quantization
                                        the `__init__.py` alone is left out, submodules are real
    sglang.srt.configs.model_config, sglang.srt.configs.hybrid_arch
                                        placeholders

    the configuration and the process group of a server: the four fields that are read

The pool, the runner, the hook registry, the plug-in loader, the op classes and the dispatch
between their backends are SGLang's own code. There is no GPU: the tensors are on the CPU, SGLang
is told that the platform is Hopper, and the plug-in that its tensors are there.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import sys
import types
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # torch asks for triton once: before there is a placeholder
import torch._inductor.compile_fx
import torch._inductor.runtime.triton_compat  # noqa: F401
from package_checks import patched, report

HERE = Path(__file__).parent
BARE = ("sglang", "sglang.srt.configs", "sglang.srt.layers.quantization")
PLACEHOLDERS = ("sglang.srt.configs.model_config", "sglang.srt.configs.hybrid_arch")


class Placeholder(types.ModuleType):
    """A module in which every name exists: a class, or a decorator where triton has one."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        if name in ("jit", "autotune", "heuristics"):

            def value(*args, **kwargs):
                plain = len(args) == 1 and callable(args[0]) and not kwargs
                return args[0] if plain else lambda function: function

        setattr(self, name, value)
        return value


class TritonFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Placeholder(spec.name)

    def exec_module(self, module):
        pass


def prepare(folder):
    sys.path[:0] = [str(folder)]
    sys.meta_path.insert(0, TritonFinder())
    for name in BARE + PLACEHOLDERS:
        module = Placeholder(name)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = module
    from sglang.srt import runtime_context
    from sglang.srt.configs.shared_experts import SharedExpertsConfig

    runtime_context._CONTEXT._config_bags = {
        "model": types.SimpleNamespace(shared_experts=SharedExpertsConfig()),
        "exec": types.SimpleNamespace(
            moe=types.SimpleNamespace(ep_dispatch_algorithm=None),
            comm=types.SimpleNamespace(enable_symm_mem=False),
        ),
    }
    runtime_context.get_parallel().override_permanently(
        tp_group=types.SimpleNamespace(world_size=1)
    )


# -------------------------------------------------------------------------------------------------
# The plug-in, switched on over recorders in the place of SGLang's own kernels
# -------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self, name):
        self.__name__ = name
        self.calls, self.instead = [], None

    def __call__(self, *args, **kwargs):
        if self.instead is not None:
            return self.instead(*args, **kwargs)
        self.calls.append((args, kwargs))
        return self


@contextmanager
def active(hopper=True):
    """(the plug-in, what stands for SGLang's layer, what stands for its gate)."""
    from fusedmoe.frameworks import sglang_plugin as plugin
    from sglang.kernels import fused_op
    from sglang.kernels.ops.moe import moe_fused_gate as gate_module
    from sglang.kernels.spec import PlatformInfo
    from sglang.srt.layers.moe import topk
    from sglang.srt.layers.moe.moe_runner.base import FusedOpPool
    from sglang.srt.plugins.hook_registry import HookRegistry

    layer, gate = Recorder("layer"), Recorder("gate")
    pool = FusedOpPool._fused_funcs
    real = pool[plugin.POOL_KEY]
    pool[plugin.POOL_KEY] = layer
    platform = PlatformInfo("cuda", 9, 0)
    plugin._engine.cache_clear()
    HookRegistry.reset()
    with (
        patched(fused_op, _platform=lambda: platform, _platform_key=lambda: "cuda"),
        patched(topk, _is_cuda=True),
        patched(gate_module, moe_fused_gate=gate),
        patched(plugin, on_hopper=lambda tensor: hopper),
    ):
        try:
            plugin.activate()
            HookRegistry.apply_hooks()
            yield plugin, layer, gate
        finally:
            plugin.deactivate()
            pool[plugin.POOL_KEY] = real
            HookRegistry.reset()


# -------------------------------------------------------------------------------------------------
# A layer
# -------------------------------------------------------------------------------------------------

T, H, I, E, K = 5, 32, 16, 8, 2  # noqa: E741


def layer_case(**config):
    """(dispatch_output, quant_info, config), all of SGLang's own types."""
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    torch.manual_seed(0)
    config = MoeRunnerConfig(**{"num_experts": E, "num_local_experts": E, "top_k": K, **config})
    rows = 2 * I if config.is_gated else I
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).to(torch.int32)
    ids[1, 0] = -1
    weights = torch.rand(T, K)
    dispatch = StandardDispatchOutput(
        hidden_states=torch.randn(T, H).bfloat16(),
        hidden_states_scale=None,
        topk_output=StandardTopKOutput(weights, ids, None),
    )
    quant_info = TritonMoeQuantInfo(
        w13_weight=torch.nn.Parameter(torch.randn(E, rows, H).bfloat16(), requires_grad=False),
        w2_weight=torch.nn.Parameter(torch.randn(E, H, I).bfloat16(), requires_grad=False),
    )
    return dispatch, quant_info, config


def as_oracle(dispatch, quant_info, **keywords):
    """Compares a function's result with the oracle's of the same call."""
    from fusedmoe import reference
    from support import BF16

    def numpy(tensor):
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(BF16).copy()
        return tensor.numpy().copy()

    x, (weights, ids, _) = dispatch.hidden_states, dispatch.topk_output
    args = [numpy(x), numpy(quant_info.w13_weight), numpy(quant_info.w2_weight)]
    args += [numpy(weights), numpy(ids)]
    for name, bias in (("w13_bias", quant_info.b13), ("w2_bias", quant_info.b2)):
        if bias is not None:
            keywords[name] = numpy(bias)
    want, error = reference.fused_experts_error(*args, **keywords)

    def check(got):
        report = reference.compare(numpy(got), want, error)
        assert report.ok, report.message

    return check


CONFIGS = {
    "inplace": ({}, {}),
    "outplace": ({"inplace": False}, {}),
    "scaled": ({"routed_scaling_factor": 2.5}, {"routed_scaling_factor": 2.5}),
    "weight on input": (
        {"apply_router_weight_on_input": True},
        {"apply_router_weight_on_input": True},
    ),
    "rows": ({"inplace": False, "no_combine": True}, {"no_combine": "unweighted"}),
    "weighted rows": (
        {"inplace": False, "no_combine": True, "no_combine_keep_router_weight": True},
        {"no_combine": "weighted"},
    ),
    "gelu": ({"activation": "gelu"}, {"activation": "gelu"}),
    "gelu_tanh": ({"activation": "gelu_tanh"}, {"activation": "gelu_tanh"}),
    "relu2": ({"activation": "relu2", "is_gated": False}, {"activation": "relu2", "gated": False}),
    "situ": (
        {"activation": "situ", "gemm1_alpha": 3.0, "gemm1_clamp_limit": 5.0},
        {"activation": "situ", "activation_alpha": 3.0, "activation_limit": 5.0},
    ),
    "gpt-oss": (
        {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0},
        {
            "activation": "swiglu_oai",
            "activation_alpha": 1.702,
            "activation_limit": 7.0,
            "w13_order": "interleaved",
        },
    ),
    "MiniMax": (
        {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "gate_up_interleaved": False},
        {"activation": "swiglu_oai", "activation_alpha": 1.702, "activation_limit": 7.0},
    ),
    "limit": ({"gemm1_clamp_limit": 1.5}, {"activation_limit": 1.5}),
    "DeepSeek-V4": ({"swiglu_limit": 10.0}, {"activation_limit": 10.0, "clamp": "before"}),
}


def check_runner_takes_every_config():
    from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    with active() as (plugin, theirs, _):
        for name, (config, keywords) in CONFIGS.items():
            dispatch, quant_info, config = layer_case(**config)
            check = as_oracle(dispatch, quant_info, **keywords)
            before = dispatch.hidden_states.clone()
            combined = MoeRunner(MoeRunnerBackend.TRITON, config).run(dispatch, quant_info)
            assert type(combined).__name__ == "StandardCombineInput", name
            out = combined.hidden_states
            check(out)
            assert (out is dispatch.hidden_states) == config.inplace, name
            assert config.inplace or torch.equal(dispatch.hidden_states, before), name
        assert not theirs.calls


def check_biases_and_interleaved_rows():
    with active() as (plugin, theirs, _):
        dispatch, quant_info, config = layer_case()
        quant_info.b13, quant_info.b2 = torch.randn(E, 2 * I), torch.randn(E, H)
        check = as_oracle(dispatch, quant_info)
        check(pool_function(plugin)(dispatch, quant_info, config).hidden_states)
        dispatch, quant_info, config = layer_case()
        quant_info.fuse_swiglu_interleaved = True
        check = as_oracle(dispatch, quant_info, w13_order="interleaved")
        check(pool_function(plugin)(dispatch, quant_info, config).hidden_states)
        assert not theirs.calls


def pool_function(plugin):
    from sglang.srt.layers.moe.moe_runner.base import FusedOpPool

    return FusedOpPool.get_fused_func(*plugin.POOL_KEY)


def check_empty_batch():
    with active() as (plugin, theirs, _):
        dispatch, quant_info, config = layer_case()
        weights, ids, _ = dispatch.topk_output
        dispatch = dispatch._replace(
            hidden_states=dispatch.hidden_states[:0],
            topk_output=dispatch.topk_output._replace(topk_weights=weights[:0], topk_ids=ids[:0]),
        )
        out = pool_function(plugin)(dispatch, quant_info, config).hidden_states
        assert out.shape == (0, H) and not theirs.calls


# What is done to a call that would be taken over, so that it is not.
def _config(**values):
    return lambda d, q, c: (d, q, dataclasses.replace(c, **values))


def _quant(**values):
    return lambda d, q, c: (d, dataclasses.replace(q, **values), c)


def _dispatch(**values):
    return lambda d, q, c: (d._replace(**values), q, c)


class Subclass(torch.Tensor):
    pass


DECLINED = {
    "use_mxfp8": _quant(use_mxfp8=True),
    "use_fp8_w8a8": _quant(use_fp8_w8a8=True),
    "use_int8_w8a8": _quant(use_int8_w8a8=True),
    "use_int8_w8a16": _quant(use_int8_w8a16=True),
    "use_int4_w4a16": _quant(use_int4_w4a16=True),
    "per_channel_quant": _quant(per_channel_quant=True),
    "w13_scale": _quant(w13_scale=torch.ones(E)),
    "w2_scale": _quant(w2_scale=torch.ones(E)),
    "w13_zp": _quant(w13_zp=torch.ones(E)),
    "w2_zp": _quant(w2_zp=torch.ones(E)),
    "a13_scale": _quant(a13_scale=torch.ones(1)),
    "a2_scale": _quant(a2_scale=torch.ones(1)),
    "block_shape": _quant(block_shape=[128, 128]),
    "scaled input": _dispatch(hidden_states_scale=torch.ones(1)),
    "input quantised before": _dispatch(hidden_states_pre_quant=(None, None)),
    "silu_mul_keep_fp32": _config(silu_mul_keep_fp32=True),
    "silu_rounded": _config(activation="silu_rounded"),
    "alpha without limit": _config(gemm1_alpha=1.702),
    "inplace and no_combine": _config(no_combine=True),
    "interleaved and gelu": lambda d, q, c: (
        d,
        dataclasses.replace(q, fuse_swiglu_interleaved=True),
        dataclasses.replace(c, activation="gelu"),
    ),
    "float32": lambda d, q, c: (
        d._replace(hidden_states=d.hidden_states.float()),
        dataclasses.replace(q, w13_weight=q.w13_weight.float(), w2_weight=q.w2_weight.float()),
        c,
    ),
    "fp8 weights": lambda d, q, c: (
        d,
        dataclasses.replace(q, w13_weight=q.w13_weight.to(torch.float8_e4m3fn)),
        c,
    ),
    "mixed dtypes": lambda d, q, c: (d, dataclasses.replace(q, w2_weight=q.w2_weight.half()), c),
    "padded weights": lambda d, q, c: (
        d,
        dataclasses.replace(q, w13_weight=torch.nn.functional.pad(q.w13_weight, (0, 128))),
        c,
    ),
    "rows of the input apart": lambda d, q, c: (
        d._replace(hidden_states=torch.randn(T, 2 * H).bfloat16()[:, :H]),
        q,
        c,
    ),
    "a tensor subclass": lambda d, q, c: (
        d._replace(hidden_states=d.hidden_states.as_subclass(Subclass)),
        q,
        c,
    ),
    "flat weights": lambda d, q, c: (
        d,
        dataclasses.replace(q, w13_weight=q.w13_weight.reshape(E, -1)),
        c,
    ),
    "transposed weights": lambda d, q, c: (
        d,
        dataclasses.replace(q, w2_weight=torch.randn(E, I, H).bfloat16().transpose(1, 2)),
        c,
    ),
    # What the library itself refuses, after all checks here.
    "a bias of another dtype": lambda d, q, c: (
        d,
        dataclasses.replace(q, b13=torch.zeros(E, 2 * I).double()),
        c,
    ),
    "ids of another dtype": lambda d, q, c: (
        d._replace(topk_output=d.topk_output._replace(topk_ids=d.topk_output.topk_ids.short())),
        q,
        c,
    ),
    "another configuration": lambda d, q, c: (d, q, types.SimpleNamespace(**vars(c))),
    "33 slots": lambda d, q, c: (
        d._replace(
            topk_output=d.topk_output._replace(
                topk_weights=torch.rand(T, 33), topk_ids=torch.zeros(T, 33, dtype=torch.int32)
            )
        ),
        q,
        c,
    ),
}


def check_declined_calls_reach_sglang_untouched():
    from sglang.srt.layers.moe.topk import PackedTopKOutput

    def packed(d, q, c):
        ids = d.topk_output.topk_ids
        return d._replace(topk_output=PackedTopKOutput(ids, None)), q, c

    with active() as (plugin, theirs, _):
        for name, change in {**DECLINED, "packed ids": packed}.items():
            args = change(*layer_case())
            before = args[0].hidden_states.clone()
            result = pool_function(plugin)(*args)
            assert result is theirs and len(theirs.calls) == 1, f"{name} was taken over"
            got, kwargs = theirs.calls.pop()
            assert all(a is b for a, b in zip(got, args, strict=True)) and not kwargs, name
            assert torch.equal(args[0].hidden_states, before), name


def check_declines_off_hopper_under_compile_and_batch_invariant():
    with active(hopper=False) as (plugin, theirs, _):
        assert plugin.declines(*layer_case()) == "not on a Hopper GPU"
    with active() as (plugin, theirs, _):
        assert plugin.declines(*layer_case()) is None
        with patched(torch.compiler, is_compiling=lambda: True):
            assert "compile" in plugin.declines(*layer_case())
        with patched(plugin._engine(), batch_invariant=lambda: True):
            assert "batch-invariant" in plugin.declines(*layer_case())
    assert plugin.declines(*layer_case()) == "the plug-in is not active"


def check_a_field_of_a_newer_sglang():
    """A newer release adds a field: at its default the call is taken, else it is declined."""
    with active() as (plugin, theirs, _):
        engine = plugin._engine()
        dispatch, quant_info, config = layer_case()
        newer = dataclasses.make_dataclass(
            "MoeRunnerConfig", [("round_twice", bool, False)], bases=(engine.Config,)
        )
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        with patched(
            engine,
            Config=newer,
            config_defaults=plugin._unknown_defaults(newer, plugin.CONFIG_FIELDS),
        ):
            assert plugin.declines(dispatch, quant_info, newer(**values)) is None
            reason = plugin.declines(dispatch, quant_info, newer(**values, round_twice=True))
            assert reason == "round_twice is set"


# -------------------------------------------------------------------------------------------------
# The op classes
# -------------------------------------------------------------------------------------------------


def method_case():
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    dispatch, quant_info, config = layer_case()
    method, layer = UnquantizedFusedMoEMethod(), torch.nn.Module()
    layer.moe_runner_config = config
    method.create_weights(layer, E, H, I, torch.bfloat16, with_bias=True)
    layer.w13_weight.data.copy_(quant_info.w13_weight)
    layer.w2_weight.data.copy_(quant_info.w2_weight)
    quant_info.b13 = torch.randn(E, 2 * I)
    quant_info.b2 = torch.randn(E, H)
    layer.w13_weight_bias.data.copy_(quant_info.b13)
    layer.w2_weight_bias.data.copy_(quant_info.b2)
    method.create_moe_runner(layer, config)
    return method, layer, dispatch, quant_info


def check_unquantised_method_runs_the_plug_in():
    from sglang.kernels import fused_op

    with active() as (plugin, theirs, _):
        method, layer, dispatch, quant_info = method_case()
        check = as_oracle(dispatch, quant_info)
        fused_op.clear_fused_op_trace()
        fused_op.enable_fused_op_trace()
        combined = method.apply(layer, dispatch)
        fused_op.disable_fused_op_trace()
        (record,) = fused_op.get_fused_op_trace()
        assert record.backend == "plugin", record
        check(combined.hidden_states)
        # Weights that are rewritten in place are seen.
        layer.w2_weight.data.zero_()
        layer.w2_weight_bias.data.zero_()
        assert not method.apply(layer, method_case()[2]).hidden_states.any()
        assert not theirs.calls


def check_unquantised_method_declines_to_forward_cuda():
    with active() as (plugin, theirs, _):
        method, layer, dispatch, _ = method_case()
        dispatch = dispatch._replace(hidden_states_pre_quant=(None, None))
        assert method.apply(layer, dispatch) is theirs
        (args, _) = theirs.calls.pop()
        assert args[0] is dispatch and args[2] is method.runner.config
        method.runner.fused_func = None  # an all-to-all backend: not this layer's place
        seen = Recorder("forward_cuda")
        with patched(type(method), forward_cuda=seen):
            assert method.apply(layer, method_case()[2]) is seen


def check_capabilities_of_other_ops_stay():
    from sglang.kernels.fused_op import BaseFusedOp

    with active() as (plugin, _, _):
        engine = plugin._engine()
        assert engine.plugin not in BaseFusedOp.capabilities
        assert engine.plugin in engine.Method.capabilities
        assert engine.plugin in engine.topk.TopK.capabilities
    assert engine.plugin not in engine.Method.capabilities
    assert "forward_plugin" not in engine.Method.__dict__


TOPKS = {
    "softmax": {"renormalize": False},
    "softmax, renormalised": {"renormalize": True},
    "softmax, scaled": {
        "renormalize": True,
        "routed_scaling_factor": 2.5,
        "apply_routed_scaling_factor_on_output": True,
    },
    "sigmoid": {"scoring_func": "sigmoid", "correction_bias": True},
    "sqrtsoftplus": {"scoring_func": "sqrtsoftplus", "correction_bias": True},
    "grouped": {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2},
    "DeepSeek-V3": {
        "use_grouped_topk": True,
        "num_expert_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "correction_bias": True,
        "routed_scaling_factor": 2.5,
        "apply_routed_scaling_factor_on_output": True,
    },
}


def make_topk(correction_bias=None, **fields):
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    bias = torch.randn(32) / 8 if correction_bias else None
    topk = TopK(4, layer_id=0, correction_bias=bias, **fields)
    topk.bind_runner_backend(MoeRunnerBackend.TRITON)
    return topk


def check_topk_gives_what_select_experts_gives():
    """Against SGLang's own torch code, run on the same logits."""
    with active() as (plugin, _, gate):
        for name, fields in TOPKS.items():
            torch.manual_seed(1)
            topk, x, logits = make_topk(**fields), torch.randn(17, H), torch.randn(17, 32)
            assert topk(x[:0], logits[:0]).topk_ids.shape == (0, 4), name
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with patched(torch, compile=lambda *a, **k: a[0]):
                    want = select_in_torch(topk, x, logits)
            got = topk(x, logits)
            assert type(got).__name__ == "StandardTopKOutput", name
            assert got.topk_weights.dtype == torch.float32 and got.topk_ids.dtype == torch.int32
            for ours, theirs in zip(by_id(*got[:2]), by_id(*want[:2]), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=2e-6, err_msg=name)
        assert not gate.calls


def select_in_torch(topk, x, logits):
    """(weights, ids) of SGLang's reference functions for the same configuration."""
    from sglang.srt.layers.moe import topk as module

    config = topk.topk_config
    common = dict(gating_output=logits, topk=config.top_k, renormalize=config.renormalize)
    scale = dict(
        routed_scaling_factor=config.routed_scaling_factor,
        apply_routed_scaling_factor_on_output=config.apply_routed_scaling_factor_on_output,
    )
    if not config.use_grouped_topk:
        weights, ids = module.fused_topk_native(
            hidden_states=x,
            correction_bias=config.correction_bias,
            scoring_func=config.scoring_func,
            **common,
        )
        return weights * (scale["routed_scaling_factor"] or 1.0), ids
    groups = dict(num_expert_group=config.num_expert_group, topk_group=config.topk_group)
    if config.correction_bias is None:
        function = getattr(module.grouped_topk_gpu, "__wrapped__", module.grouped_topk_gpu)
        return function(x, **common, **groups, **scale)
    function = module.biased_grouped_topk_impl
    function = getattr(function, "__wrapped__", function)
    return function(x, correction_bias=config.correction_bias, **common, **groups, **scale)


def by_id(weights, ids):
    order = ids.long().argsort(dim=-1)
    return ids.long().gather(1, order).numpy(), weights.float().gather(1, order).numpy()


def check_topk_declines():
    """Anything that select_experts would work on afterwards is left to SGLang."""
    from sglang.srt.layers.moe.topk import TopKOutputFormat

    seen = Recorder("forward_cuda")
    with active() as (plugin, _, _), patched(plugin._engine().topk.TopK, forward_cuda=seen):
        x, logits = torch.randn(3, H), torch.randn(3, 32)

        def takes(topk, **kwargs):
            if topk(x, logits, **kwargs) is not seen:
                return True
            args, got = seen.calls.pop()
            assert args == (x, logits) and got == kwargs
            return False

        assert takes(make_topk())
        assert not takes(make_topk(), num_token_non_padded=torch.tensor(2, dtype=torch.int32))
        assert not takes(make_topk(), dynamic_expert_bias=torch.zeros(3, 32))
        assert not takes(make_topk(), router_logits_partials=torch.zeros(3, 32))
        assert not takes(make_topk(custom_routing_function=lambda **_: None))
        assert not takes(make_topk(scoring_func="sqrtsoftplus", sqrtsoftplus_log1p=True))
        assert not takes(make_topk(scoring_func="sigmoid"))  # without a bias
        assert not takes(make_topk(correction_bias=True))  # softmax with one
        assert not takes(make_topk(output_format=TopKOutputFormat.BYPASSED))
        waterfill = make_topk()
        waterfill.enable_waterfill = True
        assert not takes(waterfill)
        shared = make_topk()
        shared.topk_config.shared_experts = types.SimpleNamespace(num_shared_topk_slots=1)
        assert not takes(shared)
        other = make_topk()
        other.topk_config.runner_backend = types.SimpleNamespace(is_triton=lambda: False)
        assert not takes(other)


def check_torch_compile_traces_past_it():
    """In one graph, whatever the plug-in put in the way: SGLang compiles its models whole."""
    from sglang.kernels.ops.moe import moe_fused_gate as module

    method, layer, dispatch, quant_info = method_case()
    x, twice = dispatch.hidden_states, dispatch.hidden_states * 2
    with active() as (plugin, theirs, gate):
        topk, logits = make_topk(), torch.randn(T, 32)
        function, config = pool_function(plugin), method.runner.config
        topk(x, logits), method.apply(layer, dispatch)  # dispatch is settled before tracing
        x.copy_(twice / 2)
        theirs.instead = lambda d, q, c: d.hidden_states * 2
        gate.instead = lambda scores, bias, topk: scores.softmax(-1)
        with (
            patched(type(topk), forward_cuda=lambda self, h, logits, **_: logits.softmax(-1)),
            patched(type(method), forward_cuda=lambda self, l, d: d.hidden_states * 2),  # noqa: E741
        ):
            for call, want in (
                (lambda: topk(x, logits), logits.softmax(-1)),
                (lambda: method.apply(layer, dispatch), twice),
                (lambda: function(dispatch, quant_info, config), twice),
                (lambda: module.moe_fused_gate(logits, None, 4), logits.softmax(-1)),
            ):
                assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(), want)


def check_gate_is_hooked():
    from fusedmoe import reference
    from sglang.kernels.ops.moe import moe_fused_gate as module

    with active() as (plugin, _, gate):
        torch.manual_seed(2)
        scores, bias = torch.randn(9, 64), torch.randn(64) / 8
        got = module.moe_fused_gate(
            scores, bias, 5, num_fused_shared_experts=1, routed_scaling_factor=2.5
        )
        want = reference.route(
            scores.numpy(),
            4,
            method="sigmoid_bias",
            correction_bias=bias.numpy(),
            num_shared=1,
            shared_weight=1 / 2.5,
        )
        np.testing.assert_allclose(got[0].numpy(), want[0], rtol=2e-6)
        np.testing.assert_array_equal(got[1].numpy(), want[1])
        assert not gate.calls
        packed = torch.empty(9, 4, dtype=torch.int32)
        for args, kwargs in (
            ((scores, bias, 4), {"packed_out": packed}),
            ((scores, bias, 4), {"renormalize_epsilon": 1e-20}),
            ((scores, bias, 4), {"scoring_func": "sqrtsoftplus", "sqrtsoftplus_log1p": True}),
            ((scores, bias, 4, "softmax"), {"num_expert_group": 4, "topk_group": 2}),
            ((scores, bias, 40), {}),
            ((scores, torch.randn(63), 4), {}),
        ):
            assert module.moe_fused_gate(*args, **kwargs) is gate, kwargs
            assert gate.calls.pop()[1] == kwargs


# -------------------------------------------------------------------------------------------------
# Coming and going
# -------------------------------------------------------------------------------------------------


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))


@contextmanager
def heard():
    handler, log = Heard(), logging.getLogger("fusedmoe")
    log.addHandler(handler)
    try:
        yield handler.lines
    finally:
        log.removeHandler(handler)


def check_it_says_that_it_is_active_and_takes_over_once():
    from fusedmoe.frameworks import sglang_plugin

    with heard() as lines, active() as (plugin, theirs, _):
        assert [level for level, _ in lines] == ["WARNING"] and "is active in SGLang" in lines[0][1]
        function = pool_function(plugin)
        plugin.activate()
        assert pool_function(plugin) is function and len(lines) == 1
    assert sglang_plugin._undo == []


def check_the_loader_of_sglang_runs_it():
    """SGLang's own load_plugins, with the entry point of pyproject.toml."""
    import sglang.srt.plugins as plugins
    from fusedmoe.frameworks import sglang_plugin

    target = entry_points_of_pyproject("sglang.srt.plugins")["fusedmoe"]
    point = importlib.metadata.EntryPoint("fusedmoe", target, plugins.GENERAL_PLUGINS_GROUP)
    with (
        heard() as lines,
        patched(plugins, entry_points=lambda group: [point] if "plugins" in group else []),
        patched(plugins, _plugins_loaded=False),
    ):
        try:
            plugins.load_plugins()
            assert "is active" in lines[0][1]
            assert sglang_plugin._undo
        finally:
            sglang_plugin.deactivate()
            plugins.HookRegistry.reset()


def entry_points_of_pyproject(group):
    import tomllib

    text = (HERE.parent / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["entry-points"][group]


def check_it_can_be_turned_off():
    import os

    from fusedmoe.frameworks import sglang_plugin

    os.environ["FUSEDMOE_SGLANG"] = "0"
    try:
        with heard() as lines, active() as (plugin, theirs, _):
            assert pool_function(plugin) is theirs and sglang_plugin._undo == []
        assert "FUSEDMOE_SGLANG=0" in lines[0][1]
    finally:
        del os.environ["FUSEDMOE_SGLANG"]


def check_a_missing_part_is_one_sentence():
    from fusedmoe.frameworks import sglang_plugin as plugin
    from sglang.srt.layers.moe import topk

    build = topk.build_precomputed_topk_output
    del topk.build_precomputed_topk_output
    plugin._engine.cache_clear()
    try:
        with heard() as lines:
            plugin.activate()
        ((level, text),) = lines
        assert level == "ERROR" and "build_precomputed_topk_output" in text and "0.5.23" in text
        assert plugin._undo == []
    finally:
        topk.build_precomputed_topk_output = build
        plugin._engine.cache_clear()


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
    logging.getLogger("fusedmoe").setLevel(logging.INFO)
    report(globals())
