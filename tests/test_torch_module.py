"""frameworks.torch.FusedMoE: the layer as a torch.nn.Module."""

import copy
import io
import pickle

import pytest
from fusedmoe import Routing, fused_experts, fused_moe, route
from fusedmoe.frameworks.torch import TESTED, status
from support import BF16, F32, TorchBackend, assert_close, make_layer, put_layer
from test_memory import assert_flat

torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)

from fusedmoe.frameworks.torch import FusedMoE  # noqa: E402

SIZES = 4, 48, 32  # num_experts, hidden_size, intermediate_size
BIASED = dict(topk=2, method="sigmoid_bias_grouped", num_groups=2, topk_groups=1)


def biased():
    return Routing(**BIASED, correction_bias=torch.tensor([3.0, 1, 0, -1]))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.getfixturevalue("gpu") if request.param == "cuda" else TorchBackend("cpu")


@pytest.fixture
def inputs(rng):
    """hidden_states and router_logits."""
    return tuple(torch.from_numpy(rng.standard_normal((9, n)).astype(F32)) for n in (48, 4))


def same(a, b, inputs):
    return torch.equal(a(*inputs), b(*inputs))


def test_status():
    version, why = status()
    assert torch.__version__.startswith(version) and why is None
    assert TESTED.startswith("torch ")


@pytest.mark.parametrize("routed", [True, False])
def test_against_the_oracle(device, seed, routed):
    layer = make_layer(seed, 9, 48, 32, 4, 2, w13_bias=BF16, w2_bias=BF16, shared_output=True)
    tensors, options = put_layer(device, layer)
    module = FusedMoE(*SIZES, 2, bias=True, dtype=torch.bfloat16, device=device.device)
    module.load_state_dict(
        {
            **{name: tensors[name] for name in ("w13", "w2")},
            **{name: options[name] for name in ("w13_bias", "w2_bias")},
        }
    )
    x, shared = tensors["hidden_states"], options["shared_output"]
    out = torch.full_like(x, torch.nan)
    if routed:
        logits = torch.randn(9, 4, device=x.device, generator=torch.Generator(x.device))
        got = module(x, logits, shared_output=shared, out=out)
        assert torch.equal(
            got,
            fused_moe(x, tensors["w13"], tensors["w2"], logits, routing=Routing(2), **options),
        )
    else:
        weights, ids = tensors["topk_weights"], tensors["topk_ids"]
        got = module(x, weights, ids, shared_output=shared, out=out)
        want, error = layer.expected()
        assert_close(device.get(got), want, error, seed=seed)
        again = module(x, topk_weights=weights, topk_ids=ids, shared_output=shared)
        assert torch.equal(again, got)
    assert got is out and not got.requires_grad


@pytest.mark.parametrize(
    "options",
    [
        dict(activation="swiglu_oai", activation_alpha=1.5, activation_limit=5.0),
        dict(activation="relu2", gated=False),
        dict(w13_order="interleaved", apply_router_weight_on_input=True),
        dict(w13_order="up_gate", activation_limit=2.0, clamp="before"),
        dict(routed_scaling_factor=2.5),
        dict(expert_start=1),
        dict(expert_map=torch.tensor([3, -1, 0, 1, 2], dtype=torch.int32)),
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_reach_the_call(inputs, options):
    module = FusedMoE(*SIZES, **options)
    x, logits = inputs
    weights, ids = route(logits, topk=2)
    want = fused_experts(x, module.w13, module.w2, weights, ids, **options)
    assert torch.equal(module(x, weights, ids), want)


def test_parameters():
    module = FusedMoE(*SIZES, 2, bias=True, dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "w13": (4, 64, 48),
        "w2": (4, 48, 32),
        "w13_bias": (4, 64),
        "w2_bias": (4, 48),
    }
    assert list(module.state_dict()) == list(shapes)
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in module.parameters())
    assert all(p.abs().max() <= 48**-0.5 or "w2" in n for n, p in module.named_parameters())
    assert FusedMoE(*SIZES, gated=False).w13.shape == (4, 32, 48)
    text = repr(FusedMoE(*SIZES, routing=biased()))
    assert "4, 48, 32, topk=2, method='sigmoid_bias_grouped'" in text and "tensor" not in text


def test_state_dict(inputs):
    module, other = (FusedMoE(*SIZES, routing=biased()) for _ in range(2))
    other.correction_bias.zero_()
    assert list(module.state_dict()) == ["w13", "w2", "correction_bias"]
    assert not same(module, other, inputs)
    other.load_state_dict(module.state_dict())
    assert same(module, other, inputs)
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    third = FusedMoE(*SIZES, routing=biased())
    third.load_state_dict(torch.load(saved, weights_only=True))
    assert same(module, third, inputs)


def test_maps_are_not_in_the_state_dict():
    expert_map = torch.tensor([1, 0, 3, 2], dtype=torch.int32)
    routing = Routing(2, expert_map=expert_map)
    module = FusedMoE(*SIZES, routing=routing, expert_map=expert_map.flip(0))
    assert list(module.state_dict()) == ["w13", "w2"]
    assert {name for name, _ in module.named_buffers()} == {"routing_expert_map", "expert_map"}
    assert module.to("meta").routing.expert_map.is_meta


@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_meta_construction(inputs, how):
    source = FusedMoE(*SIZES, routing=biased(), bias=True)
    module = FusedMoE(*SIZES, routing=biased(), bias=True, device="meta")
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    if how == "to_empty":
        module.to_empty(device="cpu")
    module.load_state_dict(source.state_dict(), assign=how == "assign")
    assert same(source, module, inputs)
    assert module.routing.correction_bias is module.correction_bias
    with torch.device("meta"):
        assert FusedMoE(*SIZES, 2).w13.is_meta


def test_to_dtype(inputs):
    module = FusedMoE(*SIZES, routing=biased()).to(torch.bfloat16)
    x, logits = inputs[0].bfloat16(), inputs[1]
    assert module.w13.dtype == module.routing.correction_bias.dtype == torch.bfloat16
    want = fused_moe(x, module.w13, module.w2, logits, routing=module.routing)
    assert torch.equal(module(x, logits), want)


@pytest.mark.gpu
def test_to_device(gpu, seed):
    layer = make_layer(seed, 9, 48, 32, 4, 2)
    module = FusedMoE(*SIZES, routing=biased(), dtype=torch.bfloat16).to(gpu.device)
    x, logits = gpu.put(layer.hidden_states), torch.zeros(9, 4, device=gpu.device)
    assert module.routing.correction_bias.device == x.device
    want = fused_moe(x, module.w13, module.w2, logits, routing=module.routing)
    assert torch.equal(module(x, logits), want)
    back = module.cpu()
    assert not back.routing.correction_bias.is_cuda and back(x.cpu(), logits.cpu()).is_cpu


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_their_own(inputs, how):
    module = FusedMoE(*SIZES, routing=biased(), bias=True)
    module(*inputs)
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        saved = io.BytesIO()
        torch.save(module, saved)
        saved.seek(0)
        other = torch.load(saved, weights_only=False)
    assert same(module, other, inputs)
    assert other.routing.correction_bias is other.correction_bias
    assert other.routing.correction_bias is not module.correction_bias
    before = module(*inputs)
    other.w2.zero_()
    other.correction_bias.copy_(other.correction_bias.flip(0))
    assert torch.equal(module(*inputs), before) and not same(module, other, inputs)


def test_weights_are_never_kept(inputs):
    """In place, through .data, and exchanged: the next call sees it."""
    module = FusedMoE(*SIZES, routing=biased())
    other = FusedMoE(*SIZES, routing=Routing(**BIASED, correction_bias=-biased().correction_bias))
    module.w13.copy_(other.w13)
    module.w2.data = other.w2.data
    module.correction_bias = other.correction_bias
    assert same(module, other, inputs)
    module.w13 = torch.nn.Parameter(torch.zeros_like(other.w13), requires_grad=False)
    assert not module(*inputs).any()


def test_compiled(inputs):
    torch._dynamo.reset()
    module = FusedMoE(*SIZES, routing=biased(), bias=True)
    call = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(call(*inputs), module(*inputs))
    module.correction_bias = -module.correction_bias
    module.w2.mul_(2)
    assert torch.equal(call(*inputs), module(*inputs))


def test_exported(inputs):
    module = FusedMoE(*SIZES, routing=biased())
    tokens = torch.export.Dim.DYNAMIC
    program = torch.export.export(module, inputs, dynamic_shapes=({0: tokens}, {0: tokens}))
    few = tuple(tensor[:3] for tensor in inputs)
    assert torch.equal(program.module()(*few), module(*few))
    assert set(program.state_dict) == set(module.state_dict())


@pytest.mark.parametrize("which", ["hidden_states", "router_logits", "w13"])
def test_backward_raises(inputs, which):
    module = FusedMoE(*SIZES, 2)
    x, logits = (tensor.clone() for tensor in inputs)
    want = module(x, logits)
    {"hidden_states": x, "router_logits": logits, "w13": module.w13}[which].requires_grad_()
    out = module(x, logits)
    assert out.requires_grad and torch.equal(out, want)
    with pytest.raises(NotImplementedError, match="fused_moe: expected a call under torch.no_grad"):
        out.sum().backward()
    with torch.no_grad():
        assert not module(x, logits).requires_grad


def failure(call):
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
        call()
    return caught.type, str(caught.value)


BAD = {
    "hidden_size": lambda x, logits, m: (x[:, 1:], logits),
    "dtype": lambda x, logits, m: (x.bfloat16(), logits),
    "double": lambda x, logits, m: (x.double(), logits),
    "dimensions": lambda x, logits, m: (x[None], logits),
    "columns": lambda x, logits, m: (x.T.contiguous().T, logits),
    "text": lambda x, logits, m: ("hidden", logits),
    "experts": lambda x, logits, m: (x, logits[:, :3]),
    "tokens": lambda x, logits, m: (x, logits[:3]),
    "logits dtype": lambda x, logits, m: (x, logits.long()),
    "meta": lambda x, logits, m: (x, logits.to("meta")),
    "numpy bool": lambda x, logits, m: (x, (logits > 0).numpy()),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(inputs, name):
    module = FusedMoE(*SIZES, 2)
    x, logits = BAD[name](*inputs, module)
    direct = failure(lambda: fused_moe(x, module.w13, module.w2, logits, routing=Routing(2)))
    assert failure(lambda: module(x, logits)) == direct


def test_wrong_construction_and_calls(inputs):
    x, logits = inputs
    for error, match, make in (
        (ValueError, "topk: expected None", lambda: FusedMoE(*SIZES, 2, routing=Routing(2))),
        (TypeError, "routing: expected a fusedmoe.Routing", lambda: FusedMoE(*SIZES, routing=2)),
        (ValueError, "topk: expected 1 to 32, got 0", lambda: FusedMoE(*SIZES, 0)),
        (TypeError, "router_logits: expected a tensor", lambda: FusedMoE(*SIZES, 2)(x)),
        (
            TypeError,
            "router_logits: expected a tensor",
            lambda: FusedMoE(*SIZES, 2)(x, topk_weights=logits),
        ),
        (ValueError, "topk_ids: expected a tensor", lambda: FusedMoE(*SIZES)(x, logits)),
    ):
        with pytest.raises(error, match=match):
            make()


def test_memory_is_flat(seed):
    module = FusedMoE(2, 16, 8, 2, routing=None)
    x, logits = torch.zeros(2, 16), torch.zeros(2, 2)
    assert_flat(lambda: module(x, logits), [x, logits, *module.parameters()], 2000)


@pytest.mark.gpu
def test_cuda_graph_with_other_routings(gpu, seed):
    layers = [make_layer(seed + i, 33, 72, 40, 6, 3) for i in range(3)]
    tensors, _ = put_layer(gpu, layers[0])
    module = FusedMoE(6, 72, 40, dtype=torch.bfloat16, device=gpu.device)
    arguments = [tensors[name] for name in ("hidden_states", "topk_weights", "topk_ids")]
    module(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(*arguments)
    for layer in layers:
        for name, array in layer.tensors().items():
            tensors[name].copy_(gpu.put(array))
        module.load_state_dict({"w13": tensors["w13"], "w2": tensors["w2"]})
        graph.replay()
        want, error = layer.expected()
        assert_close(gpu.get(out), want, error, seed=seed)
