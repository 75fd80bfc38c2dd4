"""torch.ops.fusedmoe: the ops themselves, torch.compile, torch.export, CUDA graphs."""

import gc
import inspect
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from fusedmoe import Experts, Routing, align, fused_experts, fused_moe, ops, reference, route
from support import BF16, F16, F32, TorchBackend, assert_close, make_layer, put_layer, same_bits
from test_memory import assert_flat

torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
# What torch itself says while a compiler is imported and used is not ours to fix.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch"),
]

import fusedmoe.frameworks.torch as door  # noqa: E402

door.register()
door.register()  # does nothing


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """torch on the CPU, and on a GPU where there is one."""
    return request.getfixturevalue("gpu") if request.param == "cuda" else TorchBackend("cpu")


@pytest.fixture
def host():
    return TorchBackend("cpu")


@pytest.fixture
def layer(seed):
    return make_layer(seed, 9, 48, 32, 4, 2, w13_bias=F32, w2_bias=BF16, shared_output=True)


@pytest.fixture
def logits(rng):
    return torch.from_numpy(rng.standard_normal((9, 4)).astype(F32))


def compiled(function, backend="eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


# -------------------------------------------------------------------------------------------------
# The ops
# -------------------------------------------------------------------------------------------------


def names_of(op):
    return [argument.name for argument in op._schema.arguments]


def test_options_by_position_are_refused(layer):
    """Though the extension takes them so."""
    with pytest.raises(TypeError, match="takes 5 positional arguments but 6 were given"):
        fused_experts(*layer.tensors().values(), None)
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        align(layer.topk_ids, 4, None)


@pytest.mark.parametrize("name", ["fused_experts", "align"])
def test_arguments_are_those_of_the_function(name):
    """A keyword that the function gets has to go into the schema, at its place."""
    function = list(inspect.signature(getattr(ops, name)).parameters)
    written = {"out", "workspace", "out_expert_offsets", "out_sorted_token_ids", "out_row_of_slot"}
    packet = getattr(torch.ops.fusedmoe, name)
    assert names_of(packet.default) == [n for n in function if n not in written | {"stream"}]
    assert sorted(names_of(packet.out)) == sorted(n for n in function if n != "stream")


def test_arguments_of_a_routed_layer_are_those_of_the_functions():
    layer = list(inspect.signature(ops.fused_experts).parameters)[5:]
    router = names_of(torch.ops.fusedmoe.route.default)[1:-1]
    got = names_of(torch.ops.fusedmoe.fused_moe.default)[4:]
    names = {
        "routed_scaling_factor": "routing_scaling_factor",
        "expert_map": "routing_expert_map",
    }
    want = [names.get(n, n) for n in router] + layer
    assert got == [n for n in want if n not in ("out", "workspace", "stream")]
    fields = {*Routing.__dataclass_fields__}
    assert {*router} - {"shared_weight_from"} == fields - {"ids_dtype"}


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("no_combine", [None, "weighted"])
def test_layer(device, seed, dtype, no_combine):
    layer = make_layer(seed, 9, 48, 32, 4, 2, dtype, w13_bias=F32, w2_bias=dtype)
    tensors, options = put_layer(device, layer)
    options["no_combine"] = no_combine
    want = fused_experts(**tensors, **{**options, "no_combine": no_combine or False})
    op = torch.ops.fusedmoe.fused_experts
    assert torch.equal(op(**tensors, **options), want)
    out = torch.full_like(want, torch.nan)
    assert op(**tensors, **options, out=out) is None
    assert torch.equal(out, want)
    workspace = torch.full((1 << 20,), 255, dtype=torch.uint8, device=out.device)
    out.fill_(torch.nan)
    op.out(**tensors, **options, out=out, workspace=workspace)
    assert torch.equal(out, want)


def test_layer_of_integers_that_hold_bfloat16(host, layer):
    tensors, options = put_layer(host, layer)
    want = fused_experts(**tensors, **options).view(torch.int16)
    for name in ("hidden_states", "w13", "w2"):
        tensors[name] = tensors[name].view(torch.int16)
    got = torch.ops.fusedmoe.fused_experts(**tensors, **options, dtype="bfloat16")
    assert torch.equal(got, want)


ROUTINGS = {
    "topk": dict(topk=2),
    "renormalised": dict(topk=2, renormalize=True, routed_scaling_factor=2.5),
    "groups": dict(topk=1, method="sigmoid_grouped", num_groups=2, topk_groups=1),
    "shared": dict(topk=2, num_fused_shared_experts=1, shared_weight=0.25),
    "shared sum": dict(topk=2, num_fused_shared_experts=1, shared_weight="sum"),
    "bias": dict(topk=2, method="sigmoid_bias", correction_bias=torch.tensor([0.0, 3, -3, 1])),
    "map": dict(topk=2, expert_map=torch.tensor([3, 2, 1, 0], dtype=torch.int32), softcap=2.0),
    "dtypes": dict(topk=2, ids_dtype="int64", weights_dtype="bfloat16"),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_router(logits, name):
    fields = ROUTINGS[name]
    want = route(logits, **fields)
    op_fields = dict(fields)
    if isinstance(fields.get("shared_weight"), str):
        op_fields["shared_weight_from"] = op_fields.pop("shared_weight")
    got = torch.ops.fusedmoe.route(logits, **op_fields)
    ids_dtype = op_fields.pop("ids_dtype", "int32")
    out_weights, out_ids = torch.empty_like(want[0]), torch.empty_like(want[1])
    torch.ops.fusedmoe.route(logits, **op_fields, out_weights=out_weights, out_ids=out_ids)
    for weights, ids in (got, (out_weights, out_ids)):
        assert ids.dtype == getattr(torch, ids_dtype)
        assert torch.equal(weights, want[0]) and torch.equal(ids, want[1])


@pytest.mark.parametrize("name", ["groups", "shared sum", "dtypes"])
def test_compiled_router(logits, name):
    fields = ROUTINGS[name]
    routing = Routing(**fields)
    want = route(logits, routing)
    for function in (lambda x: route(x, routing), lambda x: route(x, **fields)):
        weights, ids = compiled(function)(logits)
        assert torch.equal(weights, want[0]) and torch.equal(ids, want[1])


def test_align(device, layer):
    ids = device.put(layer.topk_ids)
    want = align(ids, 4)
    outs = [torch.empty_like(tensor) for tensor in want]
    names = "out_expert_offsets", "out_sorted_token_ids", "out_row_of_slot"
    torch.ops.fusedmoe.align(ids, 4, **dict(zip(names, outs, strict=True)))
    for got in (torch.ops.fusedmoe.align(ids, 4), outs, compiled(lambda x: align(x, 4))(ids)):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def opcheck_cases(device, layer):
    tensors, options = put_layer(device, layer)
    x = tensors["hidden_states"]
    logits = torch.zeros(9, 4, device=x.device)
    out, workspace = torch.empty_like(x), torch.zeros(1 << 18, dtype=torch.uint8, device=x.device)
    new = lambda *shape: torch.zeros(shape, dtype=torch.int32, device=x.device)  # noqa: E731
    ops = torch.ops.fusedmoe
    five, moe = tuple(tensors.values()), (x, tensors["w13"], tensors["w2"], logits, 2)
    bias = dict(method="sigmoid_bias", correction_bias=torch.ones(4, device=x.device))
    return {
        "fused_experts": (ops.fused_experts.default, five, options),
        "fused_experts rows": (ops.fused_experts.default, five, {"no_combine": "unweighted"}),
        "fused_experts.out": (ops.fused_experts.out, five, {**options, "out": out}),
        "fused_experts.out workspace": (
            ops.fused_experts.out,
            five,
            {"out": out, "workspace": workspace},
        ),
        "fused_moe": (ops.fused_moe.default, moe, options),
        "fused_moe bias": (ops.fused_moe.default, moe, bias),
        "fused_moe.out": (ops.fused_moe.out, moe, {**options, "out": out}),
        "route": (ops.route.default, (logits, 2), {"ids_dtype": "int64"}),
        "route shared": (
            ops.route.default,
            (logits, 2),
            {"num_fused_shared_experts": 1, "weights_dtype": "bfloat16"},
        ),
        "route.out": (
            ops.route.out,
            (logits, 2),
            {"out_weights": logits[:, :2].contiguous(), "out_ids": new(9, 2)},
        ),
        "align": (ops.align.default, (tensors["topk_ids"], 4), {}),
        "align.out": (
            ops.align.out,
            (tensors["topk_ids"], 4),
            {
                "out_expert_offsets": new(5),
                "out_sorted_token_ids": new(18),
                "out_row_of_slot": new(9, 2),
            },
        ),
    }


@pytest.mark.parametrize("name", opcheck_cases(TorchBackend("cpu"), make_layer(0, 9, 48, 32, 4, 2)))
def test_opcheck(device, layer, name):
    """Schema, fake results, autograd registration, and tracing with dynamic shapes, by torch."""
    op, arguments, keywords = opcheck_cases(device, layer)[name]
    results = torch.library.opcheck(op, arguments, keywords)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_shapes_of_fake_results(host, seed, num_tokens):
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = make_layer(seed, num_tokens, 48, 32, 4, 2)
    tensors, _ = put_layer(host, layer)
    for no_combine in (None, "weighted"):
        want = torch.ops.fusedmoe.fused_experts(**tensors, no_combine=no_combine)
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
            got = torch.ops.fusedmoe.fused_experts(**fake, no_combine=no_combine)
        assert got.shape == want.shape and got.dtype == want.dtype
        assert got.stride() == want.stride()
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert torch.ops.fusedmoe.fused_experts(**meta).shape == (num_tokens, 48)


# -------------------------------------------------------------------------------------------------
# Gradients: there are none, and who asks for one is told
# -------------------------------------------------------------------------------------------------

NO_GRADIENT = "expected a call under torch.no_grad.*got a backward pass"


@pytest.mark.parametrize("how", ["op", "compiled"])
@pytest.mark.parametrize("name", ["hidden_states", "w2"])
def test_backward_raises(host, layer, how, name):
    tensors, options = put_layer(host, layer)
    tensors[name] = torch.nn.Parameter(tensors[name])
    function = torch.ops.fusedmoe.fused_experts if how == "op" else compiled(fused_experts)
    if how == "compiled":
        function = compiled(lambda **kw: fused_experts(**kw), backend="aot_eager")
    out = function(**tensors, **options)
    assert out.requires_grad
    assert torch.equal(out.detach(), fused_experts(**tensors, **options))
    with pytest.raises(NotImplementedError, match=f"fused_experts: {NO_GRADIENT}"):
        out.float().sum().backward()


def test_backward_of_a_router_raises(logits):
    logits.requires_grad_()
    for weights, ids in (
        torch.ops.fusedmoe.route(logits, 2),
        compiled(lambda x: route(x, topk=2), backend="aot_eager")(logits),
    ):
        assert weights.requires_grad and not ids.requires_grad
        with pytest.raises(NotImplementedError, match=f"route: {NO_GRADIENT}"):
            weights.sum().backward()


def test_no_gradient_where_none_is_asked_for(host, layer):
    tensors, options = put_layer(host, layer)
    tensors["w13"] = torch.nn.Parameter(tensors["w13"])
    want = fused_experts(**tensors, **options)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = torch.ops.fusedmoe.fused_experts(**tensors, **options)
            assert not out.requires_grad and torch.equal(out, want)


def test_out_with_a_tensor_that_requires_a_gradient(host, layer):
    """As torch's own functions with out=; under no_grad it is fine."""
    tensors, options = put_layer(host, layer)
    tensors["w2"] = torch.nn.Parameter(tensors["w2"])
    out = torch.full((9, 48), torch.nan, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="fused_experts: expected .* out=.*got w2"):
        torch.ops.fusedmoe.fused_experts(**tensors, **options, out=out)
    assert out.isnan().all()
    with torch.no_grad():
        torch.ops.fusedmoe.fused_experts(**tensors, **options, out=out)
        assert torch.equal(out, fused_experts(**tensors, **options))


# -------------------------------------------------------------------------------------------------
# torch.compile
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_call(device, layer, backend):
    """The plain function, in one graph, between operations of torch."""
    tensors, options = put_layer(device, layer)

    def function(x, *rest):
        return fused_experts(x * 1, *rest, **options) + 1

    want = function(*tensors.values())
    assert torch.equal(compiled(function, backend)(*tensors.values()), want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("given", ["out", "workspace", "out and workspace", "in place"])
def test_compiled_call_with_out(device, layer, backend, given):
    tensors, options = put_layer(device, layer)
    want = fused_experts(**tensors, **options)
    x = tensors.pop("hidden_states")
    out = torch.full_like(x, torch.nan) if "out" in given else None
    out = x if given == "in place" else out
    workspace = torch.full((1 << 20,), 255, dtype=torch.uint8, device=x.device)
    workspace = workspace if "workspace" in given else None

    def function(x, out, workspace):
        return fused_experts(x, **tensors, **options, out=out, workspace=workspace)

    result = compiled(function, backend)(x, out, workspace)
    assert torch.equal(result, want)
    if out is not None:
        assert torch.equal(out, want) and result.data_ptr() == out.data_ptr()


def test_compiled_graph_holds_one_op(host, layer):
    """No graph break, nothing beside the op: arguments are not copied or converted."""
    tensors, options = put_layer(host, layer)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return graph.forward

    compiled(lambda *a: fused_experts(*a, **options), backend)(*tensors.values())
    (graph,) = graphs
    calls = [node.target for node in graph.nodes if node.op.startswith("call")]
    assert calls == [torch.ops.fusedmoe.fused_experts.default]


def test_compiled_once_for_all_numbers_of_tokens(host, seed):
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    call = compiled(lambda *a: fused_experts(*a), backend, dynamic=True)
    for num_tokens in (9, 3, 200, 17):
        layer = make_layer(seed, num_tokens, 48, 32, 4, 2)
        tensors, _ = put_layer(host, layer)
        assert torch.equal(call(*tensors.values()), fused_experts(**tensors))
    assert count == 1


@pytest.mark.parametrize("where, name", [("outside", "bias"), ("inside", "topk")])
def test_compiled_routed_layer(device, layer, logits, where, name):
    fields = {
        k: v.to(device.device) if isinstance(v, torch.Tensor) else v
        for k, v in ROUTINGS[name].items()
    }
    tensors, options = put_layer(device, layer)
    x, w13, w2 = tensors["hidden_states"], tensors["w13"], tensors["w2"]
    routing = Routing(**fields)
    if where == "outside":
        function = lambda x, y: fused_moe(x, w13, w2, y, routing=routing, **options)  # noqa: E731
    else:
        function = lambda x, y: fused_moe(  # noqa: E731
            x, w13, w2, y, routing=Routing(**fields), **options
        )
    logits = logits.to(device.device)
    got = compiled(function, "aot_eager")(x, logits)
    assert torch.equal(got, function(x, logits))


@pytest.mark.slow
def test_compiled_by_inductor(host, layer, monkeypatch):
    """Also where it chooses layouts: the input of the layer is a transposed sum."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    tensors, options = put_layer(host, layer)
    x = tensors.pop("hidden_states").T.contiguous()

    def function(x):
        y = (x + 1).T.contiguous()
        out = torch.empty_like(y)
        fused_experts(y, **tensors, **options, out=out)
        return fused_experts(out, **tensors, **options)

    assert torch.equal(compiled(function, "inductor")(x), function(x))


def test_a_call_with_a_stream_breaks_the_graph(host, layer):
    """A handle is no value of a graph: the call is made, but not compiled."""
    tensors, options = put_layer(host, layer)
    function = lambda *a: fused_experts(*a, **options, stream=0)  # noqa: E731
    got = torch.compile(function, backend="eager")(*tensors.values())
    assert torch.equal(got, fused_experts(**tensors, **options))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Observed exception"):
        compiled(function)(*tensors.values())
    with pytest.raises(NotImplementedError, match="stream: expected None in code that torch"):
        door_ops().fused_experts(*tensors.values(), *[None] * 25, 0, None)


def door_ops():
    from fusedmoe.frameworks import torch_ops

    return torch_ops


def test_experts_break_the_graph(host, layer):
    tensors, _ = put_layer(host, layer)
    experts = Experts(tensors["w13"], tensors["w2"])
    arguments = tensors["hidden_states"], tensors["topk_weights"], tensors["topk_ids"]
    got = torch.compile(lambda *a: experts(*a) * 1, backend="eager")(*arguments)
    assert torch.equal(got, experts(*arguments))


def test_arrays_of_others_while_torch_traces(layer, rng, monkeypatch):
    """That torch is tracing is said for all threads; one with NumPy arrays is not meant."""
    logits = rng.standard_normal((9, 4)).astype(F32)
    x, w13, w2 = layer.hidden_states, layer.w13, layer.w2
    calls = [
        lambda: fused_experts(**layer.tensors(), **layer.options),
        lambda: fused_moe(x, w13, w2, logits, routing=Routing(2)),
        lambda: route(logits, topk=2)[0],
        lambda: align(layer.topk_ids, 4)[2],
    ]
    want = [call() for call in calls]
    monkeypatch.setattr(ops, "_is_traced", lambda: True)
    got = [call() for call in calls]
    assert all(type(a) is np.ndarray and same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_torch_is_not_loaded_for_others():
    """A call without torch imports neither it nor its door."""
    code = """
import sys, numpy as np
from fusedmoe import align, fused_experts, route
ids = np.zeros((3, 2), np.int32)
align(ids, 4)
route(np.zeros((3, 4), np.float32), topk=2)
x, w = np.zeros((3, 8), np.float32), np.zeros((4, 8, 4), np.float32)
fused_experts(x, np.zeros((4, 8, 8), np.float32), w, np.zeros((3, 2), np.float32), ids)
assert not [name for name in sys.modules if "torch" in name]
from fusedmoe.frameworks import torch as door
sys.modules["torch"] = None  # as where it is not installed
try:
    door.register()
except ImportError as error:
    assert str(error).startswith("torch.ops.fusedmoe: expected torch 2.11 to "), error
else:
    raise AssertionError("no error")
"""
    path = [*sys.path, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------
# torch.export
# -------------------------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    def __init__(self, tensors, options):
        super().__init__()
        for name in ("w13", "w2"):
            self.register_buffer(name, tensors[name])
        self.options = options

    def forward(self, x, logits):
        weights, ids = route(logits, topk=2)
        y = fused_experts(x, self.w13, self.w2, weights, ids, **self.options)
        return fused_moe(y, self.w13, self.w2, logits, routing=Routing(2))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of torch's own archive
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_number_of_tokens(host, seed, rng, strict):
    layer = make_layer(seed, 9, 48, 32, 4, 2, w13_bias=F32)
    tensors, options = put_layer(host, layer)
    model = Layers(tensors, options)
    tokens = torch.export.Dim("num_tokens", min=1, max=4096)
    logits = host.put(rng.standard_normal((9, 4)).astype(F32))
    program = torch.export.export(
        model,
        (tensors["hidden_states"], logits),
        dynamic_shapes=({0: tokens}, {0: tokens}),
        strict=strict,
    )
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    for num_tokens in (1, 9, 300):
        other = make_layer(seed, num_tokens, 48, 32, 4, 2)
        x = host.put(other.hidden_states)
        logits = host.put(rng.standard_normal((num_tokens, 4)).astype(F32))
        assert torch.equal(loaded(x, logits), model(x, logits))
    calls = [str(node.target) for node in program.graph.nodes if "fusedmoe" in str(node.target)]
    assert calls == [f"fusedmoe.{name}.default" for name in ("route", "fused_experts", "fused_moe")]


# -------------------------------------------------------------------------------------------------
# Bad input: the exception and the words of the direct call
# -------------------------------------------------------------------------------------------------

BAD = {
    "dtype of the ids": {"topk_ids": lambda t: t.float()},
    "dtype of the weights": {"topk_weights": lambda t: t.double()},
    "dtypes that differ": {"w13": lambda t: t.half()},
    "hidden_states of one dimension": {"hidden_states": lambda t: t[0]},
    "hidden_states of three dimensions": {"hidden_states": lambda t: t[None]},
    "ids of one dimension": {"topk_ids": lambda t: t[0]},
    "topk that differs": {"topk_weights": lambda t: t[:, :1]},
    "tokens that differ": {"topk_ids": lambda t: t[:-1]},
    "hidden_size that differs": {"w13": lambda t: t[..., :-1]},
    "experts that differ": {"w2": lambda t: t[:-1]},
    "columns": {"hidden_states": lambda t: t.T.contiguous().T},
    "bias": {"w13_bias": lambda t: t[:, :-1]},
    "shared_output": {"shared_output": lambda t: t[:, :-1]},
    "sparse": {"w2": lambda t: t.to_sparse()},
    "meta": {"w2": lambda t: t.to("meta")},
    "activation": {"activation": "relu"},
    "clamp": {"clamp": "never"},
    "order": {"w13_order": "down"},
    "rows of another kind": {"no_combine": "sum"},
    "scale": {"routed_scaling_factor": float("nan")},
    "limit": {"activation_limit": -1.0},
    "first expert": {"expert_start": -1},
    "reserved": {"quant": "fp8_block"},
    "mode": {"batch_invariant": True},
    "integers": {"dtype": "int8"},
}


def failure(call):
    with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError)) as caught:
        call()
    return caught.type, str(caught.value)


COMPILED = "dtype of the ids", "topk that differs", "columns", "meta", "order", "reserved"


@pytest.mark.parametrize(
    "how, name",
    [(how, name) for how in ("op", "op.out") for name in BAD] + [("compiled", n) for n in COMPILED],
)
def test_bad_input(host, layer, how, name):
    tensors, options = put_layer(host, layer)
    arguments = {**tensors, **options}
    for key, change in BAD[name].items():
        arguments[key] = change(arguments[key]) if callable(change) else change
    direct = failure(lambda: fused_experts(**arguments))
    assert direct[0] in (TypeError, ValueError, NotImplementedError)
    out = torch.full((9, 48), 7, dtype=torch.bfloat16)
    if how == "op":
        got = failure(lambda: torch.ops.fusedmoe.fused_experts(**arguments))
    elif how == "op.out":
        got = failure(lambda: torch.ops.fusedmoe.fused_experts(**arguments, out=out))
    else:
        got = failure(lambda: compiled(lambda **kw: fused_experts(**kw))(**arguments))
    assert got == direct
    assert (out == 7).all()


@pytest.mark.parametrize(
    "fields",
    [
        dict(topk=99),
        dict(topk=2, method="best"),
        dict(topk=2, routed_scaling_factor=float("inf")),
        dict(topk=2, method="sigmoid_bias"),
        dict(topk=2, num_groups=2),
        dict(topk=2, shared_weight=0.5),
        dict(topk=2, num_fused_shared_experts=31),
        dict(topk=2, softcap=-1.0),
        dict(topk=2, weights_dtype="int8"),
        dict(topk=2, ids_dtype="int16"),
        dict(topk=3, method="sparsemixer"),
        dict(topk=5),
        dict(topk=2, expert_scale=torch.ones(3)),
    ],
    ids=str,
)
def test_bad_routing(logits, fields):
    want = failure(lambda: route(logits, **fields))
    assert failure(lambda: torch.ops.fusedmoe.route(logits, **fields)) == want


@pytest.mark.gpu
def test_tensors_on_two_devices(gpu, host, layer):
    tensors, options = put_layer(gpu, layer)
    tensors["topk_ids"] = host.put(layer.topk_ids)
    want = failure(lambda: fused_experts(**tensors, **options))
    assert failure(lambda: torch.ops.fusedmoe.fused_experts(**tensors, **options)) == want


# -------------------------------------------------------------------------------------------------
# Memory
# -------------------------------------------------------------------------------------------------


def test_memory_is_flat(host, seed):
    layer = make_layer(seed, 2, 16, 8, 2, 2, w13_bias=BF16, shared_output=True)
    tensors, options = put_layer(host, layer)
    out, op = torch.empty(2, 16, dtype=torch.bfloat16), torch.ops.fusedmoe.fused_experts
    logits = torch.zeros(2, 2)

    def call():
        op.default(**tensors, **options)
        op.out(**tensors, **options, out=out)
        torch.ops.fusedmoe.route.default(logits, 2)

    assert_flat(call, [*tensors.values(), *options.values(), out])


def test_memory_is_flat_compiled(host, seed):
    layer = make_layer(seed, 2, 16, 8, 2, 2)
    tensors, options = put_layer(host, layer)
    call = compiled(lambda *a: fused_experts(*a))
    assert_flat(lambda: call(*tensors.values()), [*tensors.values()], 2000)


# -------------------------------------------------------------------------------------------------
# On a GPU
# -------------------------------------------------------------------------------------------------


def other_layers(seed, num_tokens, **options):
    return [
        make_layer(seed + i, num_tokens, 72, 40, 6, 3, routing=routing, **options)
        for i, routing in enumerate(["uniform", "same", "dropped", "none", "half"])
    ]


def overwrite(device, tensors, layer):
    for name, array in layer.tensors().items():
        tensors[name].copy_(device.put(array))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # advice about the GPU
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_reduce_overhead(gpu, seed, num_tokens):
    """Inductor with CUDA graphs: replays see other routings, tokens and weights."""
    layers = other_layers(seed, num_tokens)
    tensors, _ = put_layer(gpu, layers[0])

    def function(x, *rest):
        return fused_experts(x * 1, *rest) + 0

    call = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for layer in layers * 2:
            overwrite(gpu, tensors, layer)
            torch.compiler.cudagraph_mark_step_begin()
            got = call(*tensors.values()).clone()
            want, error = layer.expected()
            assert_close(gpu.get(got), want, error, seed=layer.seed)


@pytest.mark.gpu
@pytest.mark.small
@pytest.mark.parametrize("given", ["nothing", "out", "compiled"])
def test_replay_with_other_routings(gpu, seed, given):
    layers = other_layers(seed, 33)
    tensors, _ = put_layer(gpu, layers[0])
    op = torch.ops.fusedmoe.fused_experts
    out = torch.empty_like(tensors["hidden_states"])

    def call():
        if given == "out":
            op.out(**tensors, out=out)
            return out
        if given == "compiled":
            return function(*tensors.values())
        return op.default(**tensors)

    function = compiled(lambda *a: fused_experts(*a))
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for layer in layers[1:] + layers[:1]:
        overwrite(gpu, tensors, layer)
        result.fill_(torch.nan)
        graph.replay()
        want, error = layer.expected()
        assert_close(gpu.get(result), want, error, seed=layer.seed)


@pytest.mark.gpu
def test_replay_of_a_routed_layer(gpu, seed, rng):
    layer = make_layer(seed, 50, 72, 40, 12, 4)
    tensors, _ = put_layer(gpu, layer)
    logits = torch.zeros(50, 12, device=gpu.device)
    arguments = tensors["hidden_states"], tensors["w13"], tensors["w2"], logits, 4, "topk_softmax"
    op = torch.ops.fusedmoe.fused_moe.default
    op(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = op(*arguments)
    for _ in range(3):
        array = rng.standard_normal((50, 12)).astype(F32)
        logits.copy_(gpu.put(array))
        graph.replay()
        want, error = reference.fused_moe_error(layer.hidden_states, layer.w13, layer.w2, array, 4)
        assert_close(gpu.get(result), want, error, seed=seed)


@pytest.mark.gpu
def test_current_stream(gpu, layer):
    tensors, options = put_layer(gpu, layer)
    want, error = layer.expected()
    stream, x = torch.cuda.Stream(), tensors.pop("hidden_states")
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        out = torch.ops.fusedmoe.fused_experts(late, **tensors, **options)
        assert not stream.query()
    stream.synchronize()
    assert_close(gpu.get(out), want, error)


@pytest.mark.gpu
def test_gpu_memory_is_flat(gpu, seed):
    layer = make_layer(seed, 2, 16, 8, 2, 2)
    tensors, _ = put_layer(gpu, layer)
    op = torch.ops.fusedmoe.fused_experts.default
    call = compiled(lambda *a: fused_experts(*a))

    def both():
        op(*tensors.values())
        call(*tensors.values())

    for _ in range(100):
        both()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    assert_flat(both, [*tensors.values()], 5000)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
