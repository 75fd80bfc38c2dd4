"""The vLLM door: its classes against the record of vLLM's source, its sums against the oracle.

vLLM is too large to install for a test. `data/vllm_signatures.json` holds the names, arguments and
defaults that the door relies on, written from the published package by
refresh_vllm_signatures.py, and the experts run here on base classes made from that record. With
FUSEDMOE_VLLM_SOURCE, a folder with vllm/ in it, the record itself is checked, and the plug-in is
run in the real package by vllm_package.py.
"""

import abc
import ast
import enum
import importlib
import json
import logging
import os
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path

import fusedmoe
import numpy as np
import package_checks
import pytest
from fusedmoe.frameworks import vllm as door
from refresh_vllm_signatures import RECORD, record
from support import BF16, F16, F32, TorchBackend, assert_close, have, make_layer, no_gpu

pytestmark = pytest.mark.skipif(not have("torch"), reason="torch is not installed")
VLLM = json.loads(RECORD.read_text(encoding="utf-8"))
CLASSES, FUNCTIONS = VLLM["classes"], VLLM["functions"]
SOURCE = Path(door.__file__).with_name("vllm_experts.py")
TREE = ast.parse(SOURCE.read_text(encoding="utf-8"))
ACTIVATIONS = CLASSES["MoEActivation"]["values"]


# -------------------------------------------------------------------------------------------------
# The record, and the door's source against it
# -------------------------------------------------------------------------------------------------


def test_record_is_of_the_version_named():
    assert f"vllm {VLLM['version']}" == door.TESTED


@pytest.fixture(scope="module")
def package():
    folder = os.environ.get("FUSEDMOE_VLLM_SOURCE")
    if not folder:
        pytest.skip("FUSEDMOE_VLLM_SOURCE is not set")
    return Path(folder)


def test_record_is_what_the_source_says(package):
    assert record(package) == VLLM


@pytest.fixture(scope="module")
def checks(package):
    return package_checks.run("vllm_package.py", package)


@pytest.mark.parametrize("name", package_checks.names("vllm_package.py"))
def test_plug_in_in_the_real_package(checks, name):
    assert checks[name] is None, checks[name]


def own_class(name):
    (node,) = (n for n in TREE.body if isinstance(n, ast.ClassDef) and n.name == name)
    return {f.name: f for f in node.body if isinstance(f, ast.FunctionDef)}


def own_arguments(function):
    names = [arg.arg for arg in function.args.args]
    defaults = [None] * (len(names) - len(function.args.defaults))
    defaults += [ast.unparse(d) for d in function.args.defaults]
    return [[n, d] for n, d in zip(names, defaults, strict=True) if n != "self"]


BASES = ("FusedMoEExperts", "FusedMoEExpertsModular")
METHODS = sorted(own_class("FusedMoeExperts"))


@pytest.mark.parametrize("name", METHODS)
def test_method_has_the_arguments_of_vllms(name):
    mine = own_class("FusedMoeExperts")[name]
    theirs = [CLASSES[base]["methods"].get(name) for base in BASES]
    (theirs,) = [method for method in theirs if method is not None]
    assert own_arguments(mine) == theirs["arguments"]
    static = any(ast.unparse(d) == "staticmethod" for d in mine.decorator_list)
    assert static == theirs["static"] and not theirs["property"]


def test_every_abstract_method_is_defined():
    abstract = {
        name
        for base in BASES
        for name, method in CLASSES[base]["methods"].items()
        if method["abstract"]
    }
    assert abstract and abstract <= set(METHODS)


def test_method_class_overrides_what_exists():
    theirs = CLASSES["UnquantizedFusedMoEMethod"]["methods"]
    for name, function in own_class("FusedMoeMethod").items():
        assert own_arguments(function) == theirs[name]["arguments"]
    assert theirs["get_fused_moe_quant_config"]["arguments"] == [["layer", None]]
    names = [name for name, _ in CLASSES["CustomOp"]["methods"]["register_oot"]["arguments"]]
    assert names[:2] == ["cls", "_decorated_op_cls"]


def test_what_is_imported_exists():
    for node in TREE.body:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vllm."):
            continue
        for name in (alias.name for alias in node.names):
            if name in ("modular_kernel", "current_platform"):
                continue  # a module, and an object that vllm.platforms makes
            where = CLASSES.get(name) or FUNCTIONS.get(name)
            assert where and where["module"] == node.module, name


@pytest.mark.parametrize(
    "variables, kind",
    [
        (("moe_config", "moe"), "FusedMoEConfig"),
        (("moe_parallel_config",), "FusedMoEParallelConfig"),
        (("config",), "ApplyMoEActivationConfig"),
    ],
)
def test_fields_that_are_read_exist(variables, kind):
    known = {*CLASSES[kind]["fields"], *CLASSES[kind]["methods"]}
    read = {
        node.attr
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in variables
    }
    assert read and read <= known, read - known


def test_every_activation_of_the_triton_experts():
    """Each one vLLM's Triton experts take is taken, with its own numbers where it needs some."""
    numbers = {"swigluoai_uninterleave": (7.0, 1.702, 1.0), "situ": (None, 1.0, 0.0, 2.0)}
    for member in VLLM["activations"]:
        value = ACTIVATIONS[member]
        keywords = door.activation_keywords(value, *numbers.get(value, ()))
        assert keywords.get("gated", True) == (not value.endswith("_no_mul"))
    for value in ({*ACTIVATIONS.values()} - {ACTIVATIONS[m] for m in VLLM["activations"]}) - {
        "relu2_no_mul"
    }:
        with pytest.raises(NotImplementedError, match=value):
            door.activation_keywords(value)
    for numbers in ((7.0, 1.702, 0.5), (None, 1.702, 1.0)):
        with pytest.raises(NotImplementedError, match="alpha 1.702"):
            door.activation_keywords("swigluoai_uninterleave", *numbers)
    with pytest.raises(NotImplementedError, match="situ_beta None"):
        door.activation_keywords("situ")


# -------------------------------------------------------------------------------------------------
# The experts, on base classes made from the record
# -------------------------------------------------------------------------------------------------


def stand_in():
    """Modules with the names that vllm_experts imports. The base classes have the recorded
    methods, abstract where vLLM's are; what they do is what vLLM's do, as far as it is needed."""
    import torch

    def method(name, spec):
        def call(self, *args, **kwargs):
            raise NotImplementedError(name)

        call.__isabstractmethod__ = spec["abstract"]
        return staticmethod(call) if spec["static"] else call

    def base(name, bases=(), **own):
        specs = CLASSES[name]["methods"]
        made = {n: method(n, s) for n, s in specs.items() if not s["property"] and n != "__init__"}
        return type(name, bases, {**made, **own})

    activation = enum.Enum(
        "MoEActivation",
        ACTIVATIONS,
        type=type("Gated", (), {"is_gated": property(lambda s: not s.value.endswith("_no_mul"))}),
    )
    config_fields = CLASSES["ApplyMoEActivationConfig"]["fields"]
    Config = type("ApplyMoEActivationConfig", (types.SimpleNamespace,), {})
    Config.from_configs = classmethod(
        lambda cls, moe, quant: cls(
            **{**dict.fromkeys(config_fields), "alpha": 1.0, "beta": 0.0, **quant.activation}
        )
    )

    def init(self, moe_config, quant_config, max_num_tokens=None, num_dispatchers=None):
        self.moe_config, self.quant_config = moe_config, quant_config
        self.activation_config = Config.from_configs(moe_config, quant_config)
        self.w1_bias, self.w2_bias = quant_config.w1_bias, quant_config.w2_bias

    def supported(cls, moe_config, weight_key, activation_key, activation_format):
        for said in (
            cls._supports_current_device(),
            moe_config.is_act_and_mul or cls._supports_no_act_and_mul(),
            cls._supports_activation(moe_config.activation),
            cls._supports_quant_scheme(weight_key, activation_key),
            cls._supports_parallel_config(moe_config.moe_parallel_config),
            activation_format == cls.activation_format(),
        ):
            if not said:
                return False, "kernel does not support it"
        return True, None

    Experts = base(
        "FusedMoEExperts",
        (abc.ABC,),
        __init__=init,
        post_gemm2_hook=None,
        is_supported_config=staticmethod(supported),
        _uses_post_gemm2_hook=lambda self, n: self.post_gemm2_hook is not None and n > 0,
        _run_post_gemm2_hook=lambda self, rows, out: self.post_gemm2_hook(rows, out),
    )
    Modular = base(
        "FusedMoEExpertsModular",
        (Experts,),
        adjust_N_for_activation=staticmethod(lambda N, a: N if not a.is_gated else N // 2),
    )
    Format = enum.Enum("FusedMoEActivationFormat", {"Standard": 1, "BatchedExperts": 2})
    Triton = type("TritonExperts", (), {})

    class Method:
        name = "unquantized_fused_moe"
        registered = []

        def __init__(self, moe):
            self.moe, self.experts_cls = moe, moe.selected

        @classmethod
        def register_oot(cls, op_cls):
            if cls.registered:
                raise AssertionError("Duplicate op name")
            op_cls.name = cls.__name__
            cls.registered.append(op_cls)

        def get_fused_moe_quant_config(self, layer):
            return layer

        def _init_moe_kernel(self, layer):
            self.kernel = self.experts_cls

    def route_major(routes, topk_weights, topk_ids, expert_map):
        return routes, topk_weights, topk_ids, expert_map

    platform = types.SimpleNamespace(
        is_cuda=lambda: True,
        is_cpu=lambda: not torch.cuda.is_available(),
        is_device_capability_family=lambda family: family == 90,
    )
    moe = "vllm.model_executor.layers.fused_moe"
    triton_takes = {getattr(activation, name) for name in VLLM["activations"]}
    modules = {
        f"{moe}.modular_kernel": {
            "FusedMoEExperts": Experts,
            "FusedMoEExpertsModular": Modular,
            "FusedMoEActivationFormat": Format,
        },
        f"{moe}.activation": {
            "ApplyMoEActivationConfig": Config,
            "MoEActivation": activation,
            "apply_moe_activation_supported": lambda a: a in triton_takes,
        },
        f"{moe}.experts.triton_moe": {"TritonExperts": Triton},
        f"{moe}.moe_output": {"route_major_moe_output": route_major},
        f"{moe}.topk_weight_and_reduce": {
            "TopKWeightAndReduceNoOP": type("TopKWeightAndReduceNoOP", (), {})
        },
        f"{moe}.unquantized_fused_moe_method": {"UnquantizedFusedMoEMethod": Method},
        "vllm.platforms": {"current_platform": platform},
    }
    made = {}
    for name, content in modules.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            made.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        vars(made[name]).update(content)
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        module.__path__ = []
        if parent:
            setattr(made[parent], child, module)
    return made


@pytest.fixture
def experts(monkeypatch):
    """The module vllm_experts, imported on the stand-in."""
    name = "fusedmoe.frameworks.vllm_experts"
    for module, value in stand_in().items():
        monkeypatch.setitem(sys.modules, module, value)
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "_usable", lambda: True)
    door._register.cache_clear()
    yield module
    door._register.cache_clear()
    sys.modules.pop(name, None)
    del fusedmoe.frameworks.vllm_experts


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    """vLLM's tensors are torch's."""
    if request.param == "cuda" and no_gpu():
        pytest.skip(no_gpu())
    return TorchBackend("cpu" if request.param == "cpu" else "cuda:0")


def moe_config(experts, activation="silu", **fields):
    import torch

    return types.SimpleNamespace(
        **{
            "in_dtype": torch.bfloat16,
            "activation": experts.MoEActivation(activation),
            "is_act_and_mul": not activation.endswith("_no_mul"),
            "num_local_experts": 4,
            "experts_per_token": 2,
            "moe_parallel_config": types.SimpleNamespace(
                use_fi_nvl_two_sided_kernels=False, use_fi_nvl_one_sided_kernels=False
            ),
            "moe_backend": "auto",
            "is_lora_enabled": False,
            "selected": experts.TritonExperts,
            **fields,
        }
    )


def quant_config(w1_bias=None, w2_bias=None, **activation):
    return types.SimpleNamespace(w1_bias=w1_bias, w2_bias=w2_bias, activation=activation)


def run_experts(experts, backend, layer, activation="silu", on_input=False, **numbers):
    """`apply` as vLLM's modular kernel calls it: output and workspaces are given, and poisoned."""
    import torch

    put = {name: backend.put(array) for name, array in layer.tensors().items()}
    options = {n: layer.options.get(n) for n in ("w13_bias", "w2_bias", "expert_map")}
    options = {n: None if v is None else backend.put(v) for n, v in options.items()}
    x, w13 = put["hidden_states"], put["w13"]
    config = moe_config(experts, activation, in_dtype=x.dtype)
    kernel = experts.FusedMoeExperts(
        config, quant_config(options["w13_bias"], options["w2_bias"], **numbers)
    )
    (E, N, K), topk = w13.shape, put["topk_ids"].shape[1]
    shapes = kernel.workspace_shapes(
        x.shape[0],
        N,
        K,
        topk,
        E,
        E,
        None,
        config.activation,
    )
    workspace13, workspace2, output = (
        torch.full(shape, float("nan"), dtype=x.dtype, device=x.device) for shape in shapes
    )
    result = kernel.apply(
        output=output,
        hidden_states=x,
        w1=w13,
        w2=put["w2"],
        topk_weights=put["topk_weights"],
        topk_ids=put["topk_ids"],
        activation=config.activation,
        global_num_experts=E,
        expert_map=options["expert_map"],
        a1q_scale=None,
        a2_scale=None,
        workspace13=workspace13,
        workspace2=workspace2,
        expert_tokens_meta=None,
        apply_router_weight_on_input=on_input,
    )
    assert result is None
    return backend.get(output)


CASES = {
    "silu": ({}, {}),
    "silu with a clamp": ({"clamp_limit": 0.5}, {"activation_limit": 0.5, "clamp": "before"}),
    "gelu": ({}, {"activation": "gelu"}),
    "gelu_tanh": ({}, {"activation": "gelu_tanh"}),
    "situ": (
        {"activation_situ_beta": 3.0, "activation_situ_linear_beta": 2.0},
        {"activation": "situ", "activation_alpha": 3.0, "activation_limit": 2.0},
    ),
    "swigluoai": (
        {"clamp_limit": 3.0},
        {
            "activation": "swiglu_oai",
            "activation_alpha": 1.702,
            "activation_limit": 7.0,
            "w13_order": "interleaved",
        },
    ),
    "swigluoai_uninterleave": (
        {"clamp_limit": 2.0, "alpha": 1.5, "beta": 1.0},
        {"activation": "swiglu_oai", "activation_alpha": 1.5, "activation_limit": 2.0},
    ),
    "swiglustep": ({}, {"activation_limit": 7.0, "clamp": "after"}),
    "silu_no_mul": ({}, {"gated": False}),
    "gelu_no_mul": ({}, {"activation": "gelu", "gated": False}),
    "gelu_tanh_no_mul": ({}, {"activation": "gelu_tanh", "gated": False}),
    "relu2_no_mul": ({}, {"activation": "relu2", "gated": False}),
}


@pytest.mark.small
@pytest.mark.parametrize("name", CASES)
def test_activation(experts, backend, seed, name):
    numbers, options = CASES[name]
    gated = options.get("gated", True)
    layer = make_layer(seed, w13_bias=F32, w2_bias=F32, gated=gated).with_options(**options)
    got = run_experts(experts, backend, layer, name.partition(" ")[0], **numbers)
    want, error = layer.expected()
    assert_close(got, want, error, seed=seed)


# Rows of test_moe.py::test_fused_moe of vLLM that a CPU does in a moment; N is per half.
@pytest.mark.parametrize("m, n, k", [(1, 128, 128), (1, 256, 128), (33, 256, 128), (40, 64, 511)])
@pytest.mark.parametrize("num_experts, topk", [(8, 2), (16, 6)])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_grid(experts, backend, seed, m, n, k, num_experts, topk, dtype):
    layer = make_layer(seed, m, k, n, num_experts, topk, dtype)
    want, error = layer.expected()
    assert_close(run_experts(experts, backend, layer), want, error, seed=seed)


@pytest.mark.parametrize("ep_size", [2, 4])
def test_expert_map(experts, backend, seed, rng, ep_size):
    """Global ids, of which a rank holds a quarter; slots of others add nothing."""
    expert_map = np.full(16, -1, np.int32)
    mine = rng.permutation(16)[: 16 // ep_size]
    expert_map[mine] = np.arange(len(mine))
    layer = make_layer(seed, 33, num_experts=len(mine), topk=6, expert_map=expert_map, num_ids=16)
    want, error = layer.expected()
    assert_close(run_experts(experts, backend, layer), want, error, seed=seed)


def test_router_weight_on_input(experts, backend, seed):
    """vLLM multiplies the input itself; the experts must not weigh again."""
    layer = make_layer(seed, topk=1)
    got = run_experts(experts, backend, layer, on_input=True)
    layer.topk_weights[:] = 1
    want, error = layer.expected()
    assert_close(got, want, error, seed=seed)


def test_post_gemm2_hook(experts, backend, seed):
    layer = make_layer(seed)
    seen = []

    def hook(unfinalized, output):
        rows, weights, _, _ = unfinalized
        seen.append(rows)
        output.copy_((rows.float() * weights[..., None]).sum(1))

    experts.FusedMoeExperts.post_gemm2_hook = staticmethod(hook)
    got = run_experts(experts, backend, layer)
    (rows,) = seen
    want, error = layer.with_options(no_combine="unweighted").expected()
    assert_close(backend.get(rows), want, error, seed=seed)
    assert np.isfinite(got.astype(F32)).all()
    with pytest.raises(NotImplementedError, match="post_gemm2_hook"):
        run_experts(experts, backend, layer, on_input=True)


def test_workspace_grows_with_tokens_and_fits(experts):
    kernel = experts.FusedMoeExperts(moe_config(experts), quant_config())
    silu, sizes = experts.MoEActivation.SILU, []
    for m in (0, 1, 7, 64, 65, 1000):
        unused, workspace, output = kernel.workspace_shapes(m, 96, 64, 2, 4, 4, None, silu)
        assert unused == (0,) and output == (m, 64)
        sizes.append(workspace[0] * workspace[1] * 2)
        device = "cpu" if experts.current_platform.is_cpu() else "cuda"
        needed = fusedmoe.workspace_size(max(m, 1), 64, 48, 4, 2, device=device)
        assert needed + 256 <= sizes[-1] <= needed + 256 + 2 * max(m, 1)
    assert sizes == sorted(sizes)


# -------------------------------------------------------------------------------------------------
# What is taken over
# -------------------------------------------------------------------------------------------------


def test_supported_configurations(experts):
    import torch

    def supported(**fields):
        standard = experts.mk.FusedMoEActivationFormat.Standard
        keys = fields.pop("weight_key", None), fields.pop("activation_key", None)
        form = fields.pop("form", standard)
        config = moe_config(experts, **fields)
        kind = experts.FusedMoeExperts
        return kind.is_supported_config(kind, config, *keys, form)[0]

    assert supported() and supported(in_dtype=torch.float16, activation="relu2_no_mul") == (
        "RELU2_NO_MUL" in VLLM["activations"]
    )
    assert not supported(in_dtype=torch.float32)
    assert not supported(num_local_experts=1025)
    assert not supported(experts_per_token=33)
    assert not supported(activation="relu2")
    assert not supported(weight_key="fp8")
    assert not supported(activation_key="fp8")
    assert not supported(form=experts.mk.FusedMoEActivationFormat.BatchedExperts)
    parallel = types.SimpleNamespace(
        use_fi_nvl_two_sided_kernels=True, use_fi_nvl_one_sided_kernels=False
    )
    assert not supported(moe_parallel_config=parallel)


def test_method_takes_only_what_triton_would_run(experts):
    method = experts.FusedMoeMethod
    assert method(moe_config(experts)).experts_cls is experts.FusedMoeExperts
    for fields in (
        {"moe_backend": "triton"},
        {"is_lora_enabled": True},
        {"num_local_experts": 5000},
    ):
        assert method(moe_config(experts, **fields)).experts_cls is experts.TritonExperts, fields
    assert method(moe_config(experts, selected=object)).experts_cls is object


def test_method_declines_an_activation_it_hears_of_late(experts):
    """The layer's own numbers are known when its kernel is made."""
    method = experts.FusedMoeMethod(moe_config(experts, "swigluoai_uninterleave"))
    method._init_moe_kernel(quant_config(clamp_limit=7.0, alpha=1.702, beta=1.0))
    assert method.kernel is experts.FusedMoeExperts
    method._init_moe_kernel(quant_config(clamp_limit=7.0, alpha=1.702, beta=0.5))
    assert method.kernel is experts.TritonExperts


def test_register_says_so_and_does_it_once(experts, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, "fusedmoe"):
        door.register()
        door.register()
    method = experts.UnquantizedFusedMoEMethod
    assert method.registered == [experts.FusedMoeMethod]
    assert experts.FusedMoeMethod.name == "unquantized_fused_moe"
    (line,) = caplog.records
    assert line.levelname == "WARNING" and "is active in vLLM" in line.getMessage()


def test_register_can_be_turned_off(experts, caplog, monkeypatch):
    monkeypatch.setenv("FUSEDMOE_VLLM", "0")
    door.register()
    assert experts.UnquantizedFusedMoEMethod.registered == []
    assert "FUSEDMOE_VLLM=0" in caplog.text


@pytest.mark.parametrize("what", ["a new abstract method", "a missing name", "another plug-in"])
def test_a_vllm_that_is_not_as_expected_is_one_sentence(experts, caplog, what):
    if what == "a new abstract method":
        experts.FusedMoeExperts.__abstractmethods__ = frozenset({"quantize_weights"})
    elif what == "a missing name":
        del experts.mk.FusedMoEExperts._run_post_gemm2_hook
    else:
        experts.UnquantizedFusedMoEMethod.registered.append(None)
    door.register()
    (line,) = caplog.records
    assert line.levelname == "ERROR" and "not active in vLLM" in line.getMessage()
    assert "tested with vllm" in line.getMessage() and "\n" not in line.getMessage()


def test_without_vllm(caplog, monkeypatch):
    if have("vllm"):
        pytest.skip("vllm is installed")
    door._register.cache_clear()
    assert door.status() == (None, "vllm is not installed")
    door.register()
    assert "No module named 'vllm'" in caplog.text


def test_entry_point_is_register():
    text = (RECORD.parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition('[project.entry-points."vllm.general_plugins"]')[2]
    target = re.match(r'\s*fusedmoe = "([\w.:]+)"', section).group(1)
    assert pkgutil.resolve_name(target) is door.register


def test_door_imports_no_framework():
    code = "import sys, fusedmoe.frameworks.vllm; assert not {'torch', 'vllm'} & set(sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(fusedmoe.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)


# -------------------------------------------------------------------------------------------------
# Wrong input: what the direct call says
# -------------------------------------------------------------------------------------------------

WRONG = {
    "hidden_states is float64": ("hidden_states", lambda t: t.double()),
    "hidden_states has three dimensions": ("hidden_states", lambda t: t[None]),
    "w13 is of another dtype": ("w13", lambda t: t.half()),
    "w13 has too few columns": ("w13", lambda t: t[:, :, :-1]),
    "w13 has an odd number of rows": ("w13", lambda t: t[:, :-1]),
    "w2 has too many experts": ("w2", lambda t: t.repeat(2, 1, 1)),
    "w2 is transposed": ("w2", lambda t: t.transpose(1, 2)),
    "topk_weights are int32": ("topk_weights", lambda t: t.int()),
    "topk_weights are too few": ("topk_weights", lambda t: t[:, :-1]),
    "topk_ids are float32": ("topk_ids", lambda t: t.float()),
    "topk_ids are too few": ("topk_ids", lambda t: t[:-1]),
    "out is of another dtype": ("out", lambda t: t.float()),
    "out is too narrow": ("out", lambda t: t[:, :-1]),
    "workspace is too small": ("workspace", lambda t: t[:1]),
    "expert_map is float32": ("expert_map", lambda t: t.float()),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_told_as_by_the_direct_call(experts, backend, name):
    import torch

    put = {n: backend.put(array) for n, array in make_layer(3).tensors().items()}
    x = put["hidden_states"]
    kernel = experts.FusedMoeExperts(moe_config(experts), quant_config())
    silu = experts.MoEActivation.SILU
    _, scratch, _ = kernel.workspace_shapes(*x.shape[:1], 96, 64, 2, 4, 4, None, silu)
    put["out"] = torch.full_like(x, 7)
    put["workspace"] = torch.empty(scratch, dtype=x.dtype, device=x.device)
    put["expert_map"] = torch.arange(4, dtype=torch.int32, device=x.device)
    argument, wrong = WRONG[name]
    put[argument] = wrong(put[argument])
    direct = {**put, "workspace": experts._bytes(put["workspace"])}
    with pytest.raises((TypeError, ValueError)) as told:
        fusedmoe.fused_experts(**direct)
    with pytest.raises(told.type, match=f"^{re.escape(str(told.value))}$"):
        kernel.apply(
            put["out"], put["hidden_states"], put["w13"], put["w2"], put["topk_weights"],
            put["topk_ids"], silu, 4, put["expert_map"], None, None, None, put["workspace"], None,
            False,
        )  # fmt: skip
    if argument != "out":
        assert (backend.get(put["out"]) == 7).all()


def test_quantised_input_is_refused_as_by_the_direct_call(experts, backend):
    put = [backend.put(array) for array in make_layer(3).tensors().values()]
    scale = backend.put(np.ones(4, F32))
    with pytest.raises(NotImplementedError) as told:
        fusedmoe.fused_experts(*put, hidden_states_scale=scale)
    kernel = experts.FusedMoeExperts(moe_config(experts), quant_config())
    x, silu = put[0], experts.MoEActivation.SILU
    _, scratch, _ = kernel.workspace_shapes(x.shape[0], 96, 64, 2, 4, 4, None, silu)
    workspace = x.new_empty(scratch)
    with pytest.raises(NotImplementedError, match=f"^{re.escape(str(told.value))}$"):
        kernel.apply(x.clone(), *put, silu, 4, None, scale, None, None, workspace, None, False)
