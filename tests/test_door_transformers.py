"""The door to transformers: every MoE model class of the installed version, and what is refused."""

import copy
import pickle
import warnings
from importlib import metadata

import pytest
from fusedmoe import fused_experts
from fusedmoe.frameworks import versions
from support import have, no_gpu

if not (have("torch") and have("transformers")):
    pytest.skip("torch and transformers are not both installed", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what other packages warn about at import
    import moe_models
    import torch
    import transformers
    from fusedmoe.frameworks import transformers as door
    from transformers import AutoModelForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

DOCUMENT = moe_models.DOCUMENT.read_text(encoding="utf-8")
CURRENT = f"transformers\n{transformers.__version__}," in DOCUMENT
CASES = moe_models.cases()


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """One thread: the matrices are tiny. The warnings of model code are transformers' own."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    door.register()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder, name", CASES, ids=[name for _, name in CASES])
def test_model_class(folder, name):
    row = moe_models.examine(folder, name)
    if CURRENT:
        assert row in DOCUMENT.splitlines(), "run python tests/moe_models.py"


def test_the_table_has_a_verdict_for_every_class():
    if not CURRENT:
        pytest.skip(f"docs/transformers.md is of another version than {transformers.__version__}")
    lines = [line for line in DOCUMENT.splitlines() if line.startswith("| ")]
    verdicts = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    outside = moe_models.outside()
    assert verdicts == [name for _, name in CASES] + [row.split(" | ")[0][2:] for row in outside]
    assert set(outside) <= set(lines)


@pytest.fixture(scope="module")
def mixtral():
    return moe_models.make("mixtral", "MixtralForCausalLM")


@pytest.fixture
def layer(mixtral):
    """(experts module, its three arguments)."""
    module = moe_models.experts(mixtral)[0]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 64, generator=generator)
    ids = torch.rand(6, 8, generator=generator).argsort(dim=1)[:, :2]
    return module, x, ids, torch.rand(6, 2, generator=generator)


def test_from_pretrained(tmp_path, mixtral):
    """The way a user takes, and weights that nobody copies."""
    mixtral.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=door.NAME)
    assert model.config._experts_implementation == door.NAME
    ids = torch.arange(2, 11)[None]
    with torch.no_grad():
        before = model(ids).logits
        weight = moe_models.experts(model)[0].down_proj
        weight.mul_(2)
        after = model(ids).logits
        weight.div_(2)
        assert not torch.equal(before, after)
        assert torch.equal(before, model(ids).logits)


def test_copies_and_pickles_after_use(layer):
    module, x, ids, weights = layer
    out = door.experts_forward(module, x, ids, weights)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(door.experts_forward(other, x, ids, weights), out)
    assert set(module.state_dict()) == {"gate_up_proj", "down_proj"}


def test_experts_of_other_ranks(layer):
    """With expert parallelism ids from num_experts on belong to other ranks."""
    module, x, ids, weights = layer
    want = door.experts_forward(module, x, ids[:, :1].contiguous(), weights[:, :1].contiguous())
    ids = ids.clone()
    ids[:, 1] = module.num_experts
    assert torch.equal(door.experts_forward(module, x, ids, weights), want)


def test_a_gradient_is_refused(layer):
    module, x, ids, weights = layer
    x = x.clone().requires_grad_()
    out = door.experts_forward(module, x, ids, weights)
    with torch.no_grad():
        assert torch.equal(out, door.experts_forward(module, x, ids, weights))
    with pytest.raises(NotImplementedError, match="there is no gradient"):
        out.sum().backward()


@pytest.fixture
def gpt_oss():
    return moe_models.make("gpt_oss", "GptOssForCausalLM")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "folder, name",
    [
        ("mixtral", "MixtralForCausalLM"),
        ("gpt_oss", "GptOssForCausalLM"),
        ("muse_spark", "MuseSparkForConditionalGeneration"),
        ("nemotron_h", "NemotronHForCausalLM"),
    ],
)
def test_on_the_gpu(folder, name, dtype):
    if no_gpu():
        pytest.skip(no_gpu())
    if not (moe_models.ROOT / folder).is_dir():
        pytest.skip(f"transformers {transformers.__version__} has no {folder}")
    model = moe_models.make(folder, name)
    door.convert_experts(model)
    moe_models.check(model, dtype, "cuda")


def test_compiled():
    """Without a graph break, with the same bits; a gradient is refused there, too."""
    pytest.importorskip("fusedmoe.frameworks.torch_ops")
    model = moe_models.make("mixtral", "MixtralForCausalLM")
    door.convert_experts(model)
    model.set_experts_implementation(door.NAME)
    ids = torch.arange(2, 11)[None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids).logits)
    out = compiled(ids, use_cache=False).logits
    with pytest.raises(NotImplementedError, match="gradient"):
        out.sum().backward()


class TestTransposed:
    def test_refused(self, gpt_oss):
        model = gpt_oss
        model.set_experts_implementation(door.NAME)
        with torch.no_grad(), pytest.raises(ValueError, match=r"call .*convert_experts\(model\)"):
            model(torch.arange(2, 11)[None])

    def test_converted_once(self, gpt_oss, tmp_path):
        """Values, shapes, names and what is saved stay the same."""
        model = gpt_oss
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert door.convert_experts(model) == 4
        assert door.convert_experts(model) == 0
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert all(torch.equal(tensor, before[n]) for n, tensor in loaded.state_dict().items())
        model.set_experts_implementation(door.NAME)
        with torch.no_grad():
            assert torch.isfinite(model(torch.arange(2, 11)[None]).logits).all()


def test_a_model_without_the_interface():
    with pytest.raises(ValueError, match="experts interface, got none in Linear"):
        door.convert_experts(torch.nn.Linear(2, 2))


class TestGates:
    def gate(self, module, function):
        other = copy.deepcopy(module)
        other._apply_gate = function
        return other

    def test_unknown(self, layer):
        module = self.gate(layer[0], lambda gate_up: gate_up.chunk(2, dim=-1)[0].sin())
        with pytest.raises(NotImplementedError, match="expected a gate that is one of silu"):
            door.experts_options(module)

    def test_nearly_known(self, layer):
        """A factor of 1.001, or a limit that the module does not name, is another gate."""
        act = torch.nn.functional.silu
        for function in (
            lambda g: 1.001 * act(g.chunk(2, -1)[0]) * g.chunk(2, -1)[1],
            lambda g: act(g.chunk(2, -1)[0].clamp(max=9.0)) * g.chunk(2, -1)[1].clamp(-9.0, 9.0),
        ):
            with pytest.raises(NotImplementedError):
                door.experts_options(self.gate(layer[0], function))

    @pytest.mark.parametrize("clamp", ["before", "after"])
    def test_limit(self, layer, clamp):
        act = torch.nn.functional.silu

        def function(gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            gate = act(gate.clamp(max=3.0)) if clamp == "before" else act(gate).clamp(max=3.0)
            return gate * up.clamp(-3.0, 3.0)

        module = self.gate(layer[0], function)
        module.limit = 3.0
        options = door.experts_options(module)
        assert options["activation_limit"] == 3.0 and options["clamp"] == clamp

    def test_up_first(self, layer):
        act = torch.nn.functional.gelu
        module = self.gate(layer[0], lambda g: g.chunk(2, -1)[0] * act(g.chunk(2, -1)[1]))
        options = door.experts_options(module)
        assert (options["activation"], options["w13_order"]) == ("gelu", "up_gate")


# What is wrong -> the arguments of fused_experts that it changes.
BAD = {
    "hidden_states of another dtype": lambda a: a | {"x": a["x"].double()},
    "hidden_states of another width": lambda a: a | {"x": a["x"][:, :48]},
    "hidden_states with three dimensions": lambda a: a | {"x": a["x"][None]},
    "hidden_states with strided rows": lambda a: a | {"x": a["x"].T.contiguous().T},
    "ids as float": lambda a: a | {"ids": a["ids"].float()},
    "ids of another length": lambda a: a | {"ids": a["ids"][:3]},
    "ids with one dimension": lambda a: a | {"ids": a["ids"][:, 0]},
    "weights as double": lambda a: a | {"weights": a["weights"].double()},
    "weights of another topk": lambda a: a | {"weights": a["weights"][:, :1]},
    "w13 of another dtype": lambda a: a | {"w13": a["w13"].bfloat16()},
    "w13 of another width": lambda a: a | {"w13": a["w13"][:, :, :32]},
    "w2 with fewer experts": lambda a: a | {"w2": a["w2"][:4]},
    "w2 of another size": lambda a: a | {"w2": a["w2"][:, :, :16]},
    "w2 on no device": lambda a: a | {"w2": a["w2"].to("meta")},
}


@pytest.mark.parametrize("case", BAD)
def test_the_same_error_as_the_direct_call(layer, case):
    module, x, ids, weights = layer
    module = copy.deepcopy(module)
    good = {"x": x, "ids": ids, "weights": weights}
    good |= {"w13": module.gate_up_proj.data, "w2": module.down_proj.data}
    bad = BAD[case](good)
    module.gate_up_proj = torch.nn.Parameter(bad["w13"], requires_grad=False)
    module.down_proj = torch.nn.Parameter(bad["w2"], requires_grad=False)
    w13, w2 = module.gate_up_proj, module.down_proj
    with pytest.raises((TypeError, ValueError)) as direct:
        fused_experts(bad["x"], w13, w2, bad["weights"], bad["ids"])
    with pytest.raises((TypeError, ValueError)) as through:
        door.experts_forward(module, bad["x"], bad["ids"], bad["weights"])
    assert (through.type, str(through.value)) == (direct.type, str(direct.value))


class TestRegister:
    def test_status(self):
        assert door.status() == (transformers.__version__, None)
        assert ALL_EXPERTS_FUNCTIONS[door.NAME] is door.experts_forward

    @pytest.mark.parametrize(
        "found, words",
        [
            ({}, "transformers is not installed"),
            ({"transformers": "4.57.1", "torch": "2.13.0"}, "5.10 or newer is needed"),
            ({"transformers": "5.23.0"}, "torch is not installed"),
        ],
    )
    def test_one_sentence(self, monkeypatch, found, words):
        def version(name):
            if name not in found:
                raise metadata.PackageNotFoundError
            return found[name]

        monkeypatch.setattr(versions.metadata, "version", version)
        with pytest.raises(ImportError, match=f"^fusedmoe for transformers: {words}$"):
            door.register()

    def test_an_interface_that_has_moved(self, monkeypatch):
        monkeypatch.delattr("transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS")
        with pytest.raises(ImportError, match=f"tested with {door.TESTED}"):
            door.register()
