"""The door to checkpoints: what transformers itself saves, loaded back and run against the model's
own block; shares of ranks; and files with something wrong."""

import json
import warnings

import numpy as np
import pytest
from fusedmoe import fused_experts, reference
from fusedmoe.frameworks import checkpoints
from fusedmoe.frameworks.checkpoints import load_experts
from support import TorchBackend, assert_close, have, no_gpu

if not (have("torch") and have("safetensors")):
    pytest.skip("torch and safetensors are not both installed", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what other packages warn about at import
    import torch
    from safetensors.torch import save_file

HOST = TorchBackend("cpu")
TOPK = 2

# model folder -> (its class, a layer with experts, activation)
SAVED = {
    "mixtral": ("MixtralForCausalLM", 1, "silu"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", 1, "silu"),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", 0, "silu"),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", 1, "silu"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", 1, "silu"),
    "glm4_moe": ("Glm4MoeForCausalLM", 1, "silu"),
    "gpt_oss": ("GptOssForCausalLM", 1, "swiglu_oai"),
    "aria": ("AriaTextForCausalLM", 0, "silu"),
    "nemotron_h": ("NemotronHForCausalLM", 2, "relu2"),
}


@pytest.fixture(scope="module", params=SAVED)
def saved(request, tmp_path_factory):
    """(folder, layer, activation, the experts module) of a model that transformers has saved."""
    if not have("transformers"):
        pytest.skip("transformers is not installed")
    import moe_models

    name, layer, activation = SAVED[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = moe_models.make(request.param, name).bfloat16()
        folder = tmp_path_factory.mktemp(request.param)
        model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    module = next(
        module
        for name, module in model.named_modules()
        if f".layers.{layer}." in f".{name}" and name.endswith(".experts")
    )
    module.config._experts_implementation = "eager"
    return folder, layer, activation, module


def numpy(tensor):
    return HOST.get(tensor)


def tokens(weights, num_experts):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(9, weights.w13.shape[2], generator=generator).to(weights.w13.dtype)
    ids = torch.rand(9, num_experts, generator=generator).argsort(dim=1)[:, :TOPK].contiguous()
    return x, torch.rand(9, TOPK, generator=generator).to(x.dtype), ids


def run(weights, activation, x, topk_weights, ids):
    """Our output, held against the oracle on the same weights; returns (out, want, error)."""
    arguments = (x, weights.w13, weights.w2, topk_weights, ids)
    out = fused_experts(*arguments, activation=activation, **weights.options)
    options = {k: numpy(v) if torch.is_tensor(v) else v for k, v in weights.options.items()}
    want, error = reference.fused_experts_error(
        *(numpy(argument) for argument in arguments), activation=activation, **options
    )
    assert_close(numpy(out), want, error)
    return out, want, error


def test_run_against_the_block_of_the_model(saved):
    folder, layer, activation, module = saved
    weights = load_experts(folder, layer)
    x, topk_weights, ids = tokens(weights, module.num_experts)
    out, want, error = run(weights, activation, x, topk_weights, ids)
    with torch.no_grad():
        theirs = module(x, ids, topk_weights)
    # transformers rounds after every step (see test_transformers.py)
    times = 1 + 2 * (6 + TOPK) / 3
    coarser = reference.Error(error.absolute * times, error.variance * times, error.freedom)
    assert_close(numpy(out), numpy(theirs).astype(np.float64), coarser, name="transformers")


def test_every_weight_is_that_of_the_model(saved):
    folder, layer, _, module = saved
    weights = load_experts(folder, layer)
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    w13, w2 = (getattr(module, name).data for name in names)
    if module.is_transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    assert torch.equal(weights.w13, w13) and torch.equal(weights.w2, w2)
    assert weights.w13.is_contiguous() and weights.w2.is_contiguous()
    assert (weights.w13_bias is not None) == module.has_bias
    if module.has_bias:
        assert torch.equal(weights.w13_bias, module.gate_up_proj_bias.data)
        assert torch.equal(weights.w2_bias, module.down_proj_bias.data)
    assert weights.gated == module.has_gate
    assert weights.w13_order == ("gate_up" if module.is_concatenated else "interleaved")


@pytest.mark.parametrize("tp_size, ep_size", [(2, 1), (1, 4), (2, 2)])
def test_ranks_add_up(saved, tp_size, ep_size):
    """The oracles of the ranks' shares sum to the oracle of the whole; every rank is within its own
    bound; and a rank reads its share only."""
    folder, layer, activation, module = saved
    whole = load_experts(folder, layer)
    arguments = tokens(whole, module.num_experts)
    _, want, _ = run(whole, activation, *arguments)
    total = 0
    for tp_rank in range(tp_size):
        for ep_rank in range(ep_size):
            share = load_experts(
                folder,
                layer,
                tp_rank=tp_rank,
                tp_size=tp_size,
                ep_rank=ep_rank,
                ep_size=ep_size,
            )
            assert share.w13.numel() * tp_size * ep_size == whole.w13.numel()
            assert share.w2.numel() * tp_size * ep_size == whole.w2.numel()
            total = total + run(share, activation, *arguments)[1]
    np.testing.assert_allclose(total, want, rtol=1e-11, atol=1e-12)


def test_numpy(saved):
    folder, layer, _, _ = saved
    ours, theirs = load_experts(folder, layer), load_experts(folder, layer, framework="numpy")
    for name in ("w13", "w2", "w13_bias", "w2_bias"):
        tensor, array = getattr(ours, name), getattr(theirs, name)
        assert (tensor is None) == (array is None)
        assert array is None or (isinstance(array, np.ndarray) and (numpy(tensor) == array).all())


@pytest.mark.gpu
def test_on_the_gpu(checkpoint):
    if no_gpu():
        pytest.skip(no_gpu())
    weights = load_experts(checkpoint, 0, device="cuda:0")
    assert weights.w13.device == torch.device("cuda:0")
    assert torch.equal(weights.w13.cpu(), load_experts(checkpoint, 0).w13)


def names_and_tensors():
    """Experts of one layer, by the names of Qwen."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for expert in range(4):
        at = f"model.layers.0.mlp.experts.{expert}."
        for name, shape in (("gate", (6, 8)), ("up", (6, 8)), ("down", (8, 6))):
            tensors[f"{at}{name}_proj.weight"] = torch.randn(shape, generator=generator)
    tensors["model.layers.0.mlp.shared_experts.gate_proj.weight"] = torch.ones(6, 8)
    tensors["model.layers.0.mlp.gate.weight"] = torch.ones(4, 8)
    return tensors


@pytest.fixture
def checkpoint(tmp_path):
    """Two shards and an index."""
    tensors = names_and_tensors()
    shards = {}
    for i, name in enumerate(tensors):
        shards.setdefault(f"model-{i % 2}.safetensors", {})[name] = tensors[name]
    for shard, content in shards.items():
        save_file(content, tmp_path / shard)
    index = {name: shard for shard, content in shards.items() for name in content}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return tmp_path


def test_a_folder_an_index_and_a_file(checkpoint, tmp_path):
    want = load_experts(checkpoint, 0)
    assert torch.equal(load_experts(checkpoint / "model.safetensors.index.json", 0).w13, want.w13)
    save_file(names_and_tensors(), tmp_path / "all.safetensors")
    assert torch.equal(load_experts(tmp_path / "all.safetensors", 0).w13, want.w13)
    assert torch.equal(load_experts(str(tmp_path / "all.safetensors"), 0).w2, want.w2)
    (checkpoint / "model.safetensors.index.json").unlink()
    (checkpoint / "all.safetensors").unlink()
    assert torch.equal(load_experts(checkpoint, 0).w2, want.w2)


def test_dtype(checkpoint):
    weights = load_experts(checkpoint, 0, dtype="bfloat16")
    assert weights.w13.dtype == weights.w2.dtype == torch.bfloat16
    assert torch.equal(weights.w13, load_experts(checkpoint, 0).w13.bfloat16())


def test_progress(checkpoint, capsys):
    load_experts(checkpoint, 0)
    assert capsys.readouterr().err == ""  # not a terminal
    load_experts(checkpoint, 0, progress=True)
    assert "experts: 100%" in capsys.readouterr().err


def edited(**changes):
    """A single file, some of its tensors replaced; None: left out."""

    def write(tmp_path):
        tensors = names_and_tensors() | {
            f"model.layers.0.mlp.experts.{name}": tensor for name, tensor in changes.items()
        }
        path = tmp_path / "model.safetensors"
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
        return path

    return write


def missing_last(tmp_path):
    names = {f"3.{name}_proj.weight": None for name in ("gate", "up", "down")}
    (tmp_path / "config.json").write_text('{"num_experts": 4}', encoding="utf-8")
    return edited(**names)(tmp_path)


def twice(tmp_path):
    for shard in ("a.safetensors", "b.safetensors"):
        save_file(names_and_tensors(), tmp_path / shard)
    return tmp_path


def two_prefixes(tmp_path):
    tensors = names_and_tensors()
    more = {f"mtp.{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | more, tmp_path / "model.safetensors")
    return tmp_path


def no_shard(tmp_path):
    index = {name: "model-9.safetensors" for name in names_and_tensors()}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return path


def not_in_its_shard(tmp_path):
    edited(**{"1.up_proj.weight": None})(tmp_path)
    index = {name: "model.safetensors" for name in names_and_tensors()}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return path


def fused_oddly(tmp_path):
    at = "model.layers.0.mlp.experts."
    tensors = {f"{at}gate_up_proj": torch.ones(4, 10, 8), f"{at}down_proj": torch.ones(4, 8, 6)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def empty(tmp_path):
    return tmp_path


whole = edited()
fp8 = edited(
    **{f"{e}.down_proj.weight": torch.zeros(8, 6).to(torch.float8_e4m3fn) for e in range(4)}
)
# name -> (files, keyword arguments, exception, words of its text)
BAD = {
    "layer": (
        whole,
        {"layer": 7},
        ValueError,
        "layer: expected one with experts, got 7; there are some in layers 0 of",
    ),
    "missing": (
        edited(**{"2.up_proj.weight": None}),
        {},
        ValueError,
        "experts 0 to 3, missing: up of expert 2",
    ),
    "missing expert": (
        edited(**{f"1.{name}_proj.weight": None for name in ("gate", "up", "down")}),
        {},
        ValueError,
        "missing: up of expert 1, down of expert 1, gate of expert 1",
    ),
    "missing last": (missing_last, {}, ValueError, "experts 0 to 3, missing: up of expert 3"),
    "no down": (
        edited(**{f"{e}.down_proj.weight": None for e in range(4)}),
        {},
        ValueError,
        "expected a tensor for down of every expert",
    ),
    "twice": (twice, {}, ValueError, "expected once, got it in a.safetensors and in b.safetens"),
    "two names": (
        edited(**{"0.w2.weight": torch.zeros(8, 6)}),
        {},
        ValueError,
        r"expert 0: expected one down, got .*0\.down_proj\.weight and .*0\.w2\.weight",
    ),
    "two namings": (
        edited(down_proj=torch.zeros(4, 8, 6)),
        {},
        ValueError,
        r"expected experts in one naming, got .*experts\.down_proj besides",
    ),
    "two prefixes": (two_prefixes, {}, ValueError, r"prefix: expected .*model\..*, mtp\."),
    "shape": (
        edited(**{"3.gate_proj.weight": torch.zeros(6, 9)}),
        {},
        ValueError,
        r"experts\.3\.gate_proj\.weight: expected F32 \[6, 8\], got F32 \[6, 9\]",
    ),
    "dtype": (
        edited(**{"3.gate_proj.weight": torch.zeros(6, 8).half()}),
        {},
        ValueError,
        r"expected F32 \[6, 8\], got F16 \[6, 8\]",
    ),
    "fused": (fused_oddly, {}, ValueError, r"gate_up_proj: expected a shape that goes with"),
    "fp8": (
        fp8,
        {},
        NotImplementedError,
        "expected weights in bfloat16, float16 or float32, got F8_E4M3",
    ),
    "quantised": (
        edited(**{"0.up_proj.weight_scale_inv": torch.ones(1)}),
        {},
        NotImplementedError,
        r"0\.up_proj\.weight_scale_inv: .* got quantised weights",
    ),
    "no shard": (no_shard, {}, FileNotFoundError, "model-9.safetensors, which does not exist"),
    "not in its shard": (
        not_in_its_shard,
        {},
        ValueError,
        r"experts\.1\.up_proj\.weight: expected in model\.safetensors, got none there",
    ),
    "empty": (empty, {}, FileNotFoundError, "expected safetensors files, got none"),
    "no path": (lambda p: p / "x", {}, FileNotFoundError, "expected a file or a folder"),
    "tp_size": (whole, {"tp_size": 4}, ValueError, "tp_size: expected a divisor of .* 6, got 4"),
    "ep_size": (whole, {"ep_size": 3}, ValueError, "ep_size: expected a divisor of 4 experts"),
    "rank": (whole, {"ep_rank": 2, "ep_size": 2}, ValueError, "ep_rank: expected 0 .. ep_size - 1"),
    "framework": (
        whole,
        {"framework": "jax"},
        ValueError,
        "framework: expected 'torch'",
    ),
    "device": (
        whole,
        {"framework": "numpy", "device": "cuda"},
        ValueError,
        "device: expected 'cpu'",
    ),
    "dtype asked": (whole, {"dtype": "int8"}, ValueError, "dtype: expected one of bfloat16"),
    "order": (whole, {"w13_order": "x"}, ValueError, "w13_order: expected 'gate_up'"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case, tmp_path):
    files, arguments, error, words = BAD[case]
    with pytest.raises(error, match=words):
        load_experts(files(tmp_path), **{"layer": 0, **arguments})


def test_prefix(tmp_path):
    path = two_prefixes(tmp_path)
    assert torch.equal(
        load_experts(path, 0, prefix="mtp.").w2, load_experts(path, 0, prefix="model.").w2
    )


def test_without_safetensors(monkeypatch, checkpoint):
    monkeypatch.setattr(checkpoints, "installed", lambda name: (None, f"{name} is not installed"))
    assert checkpoints.status() == (None, "safetensors is not installed")
    with pytest.raises(ImportError, match="safetensors is not installed"):
        load_experts(checkpoint, 0)
