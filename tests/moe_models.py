"""Every MoE model class of the installed transformers, tiny, with random weights, and whether
`experts_implementation="fusedmoe"` computes it. `python tests/moe_models.py` writes the table of
docs/transformers.md; tests/test_door_transformers.py holds each row against it."""

import copy
import dataclasses
import importlib
import inspect
import pathlib
import re
import warnings

from fusedmoe.frameworks import transformers as door

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what other packages warn about at import
    import torch
    import transformers

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "transformers.md"
ROOT = pathlib.Path(transformers.__file__).parent / "models"

# Sizes by the names that configs have for them; a config's own value where there is none.
SIZES = {
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 64,
    "hidden_dim": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "depth": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "global_head_dim": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 128,
    "sliding_window": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 95,
    "image_size": 32,
    "patch_size": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
}

_HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
# name of a config class -> what it needs besides.
MORE = {
    "BailingHybridConfig": {**_HYBRID, **_SPARSE, "short_conv_kernel_size": 4},
    "BeamConfig": _SPARSE,
    "DeepseekOcr2TextConfig": {**_SPARSE, "head_dim": None},
    "Dots1Config": {"n_shared_experts": 1},
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [32, 48],
        "rope_parameters": {**_ROPE, "mrope_section": [2, 2, 4]},
    },
    "FlintConfig": {"mlp_only_layers": [0]},
    "Gemma4TextConfig": {"enable_moe_block": True, "hidden_size_per_layer_input": 0},
    "Glm4vMoeTextConfig": {
        "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    },
    "Glm5NextTextConfig": {
        **_SPARSE,
        "layer_types": ["linear_attention", "indexed_attention"],
        "qk_rope_head_dim": 0,
        "head_dim": 0,
    },
    "GraniteMoeHybridConfig": _HYBRID,
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearConfig": {**_HYBRID, **_SPARSE},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "MiMoV2FlashConfig": {"layer_types": ["full_attention", "full_attention"]},
    "MistralLarge4Config": {"vision_config": _PIXTRAL},
    "MuseSparkAudioConfig": {
        "num_hidden_layers": 4,
        "hidden_sizes": (16, 16, 32, 32),
        "out_hidden_size": 64,
    },
    "MuseSparkTextConfig": {"moe_hidden_size": 32},
    "NemotronHConfig": {"layers_block_type": ["mamba", "attention", "moe"], "n_groups": 2},
    "Qwen3_5MoeTextConfig": _HYBRID,
    "Qwen3NextConfig": _HYBRID,
    "Qwen3OmniMoeAudioEncoderConfig": {
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "d_model": 64,
        "downsample_hidden_size": 16,
    },
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 90},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 32},
    "Qwen4ExpTextConfig": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16,
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def folders():
    """The folders of models whose experts go through the interface."""
    found = []
    for path in sorted(ROOT.glob("*/modeling_*.py")):
        if "@use_experts_implementation" in path.read_text(encoding="utf-8"):
            found.append(path.parent.name)
    return found


def tiny_config(config_class, folder):
    fields = {field.name for field in dataclasses.fields(config_class)}
    fields |= set(inspect.signature(config_class).parameters)
    values = {name: value for name, value in SIZES.items() if name in fields}
    aliases = config_class.attribute_map
    values = {k: v for k, v in values.items() if k not in aliases or aliases[k] not in values}
    for name, sub in config_class.sub_configs.items():
        if name in fields and inspect.isclass(sub) and dataclasses.is_dataclass(sub):
            if sub is not transformers.PreTrainedConfig:
                values[name] = tiny_config(sub, folder)
    values.update(MORE.get(config_class.__name__, {}))
    return config_class(**values)


# Where the class to try is not the first ...ForCausalLM or else ...ForConditionalGeneration; those
# without a head are run to their last hidden state and generate nothing.
CLASSES = {
    "diffusion_gemma": ["DiffusionGemmaEncoderTextModel"],
    "openai_privacy_filter": ["OpenAIPrivacyFilterForTokenClassification"],
    "qwen3_omni_moe": ["Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeTalkerModel"],
}


def cases():
    """(folder, class name) of every model to try."""
    found = []
    for folder in folders():
        source = (ROOT / folder / f"modeling_{folder}.py").read_text(encoding="utf-8")
        names = re.findall(r"^class (\w+For(?:CausalLM|ConditionalGeneration))\(", source, re.M)
        names.sort(key=lambda name: not name.endswith("ForCausalLM"))
        found += [(folder, name) for name in CLASSES.get(folder, names[:1])]
    return found


def make(folder, name):
    """The model, in float32, with random weights of the size of their fan-in: as transformers
    initialises them, experts would be lost beside the residual stream."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    model_class = getattr(module, name)
    generator = torch.Generator().manual_seed(20)
    torch.manual_seed(20)
    model = model_class(tiny_config(model_class.config_class, folder)).eval()
    transposed = {id(p) for e in experts(model) if e.is_transposed for p in e.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter.shape[-2 if id(parameter) in transposed else -1]
                parameter.normal_(0, fan_in**-0.5, generator=generator)
    return model


def experts(model):
    return [module for module in model.modules() if hasattr(module, "is_transposed")]


class Tape:
    """Routing of a first run for all later runs of the same model: rounding can turn a choice of
    experts that is nearly a tie, and what follows would say nothing about the experts."""

    def __init__(self):
        self.calls, self.position = [], None

    def hook(self, module, args):
        hidden_states, ids, weights = args
        if self.position is None:
            self.calls.append((ids, weights))
        else:
            ids, weights = self.calls[self.position]
            self.position += 1
        return hidden_states, ids, weights.to(args[2].dtype)


def cast(model, dtype):
    """A copy in that dtype, but for what the model itself keeps in float32."""
    model = copy.deepcopy(model).to(dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(f".{kept}." in f".{name}." for kept in model._keep_in_fp32_modules_strict or ()):
            tensor.data = tensor.data.float()
    return model


def run(model, inputs, tape, implementation="eager"):
    """Logits, or the last hidden state, as float64."""
    model.set_experts_implementation(implementation)
    tape.position = 0 if tape.calls else None
    hooks = [module.register_forward_pre_hook(tape.hook) for module in experts(model)]
    device, dtype = model.device, model.dtype
    inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    try:
        with torch.no_grad():
            out = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return getattr(out, "logits", out[0]).double()


def rms(tensor):
    return tensor.square().mean().sqrt().item()


def nothing(module, hidden_states, top_k_index, top_k_weights):
    return torch.zeros_like(hidden_states)


def check(model, dtype, device="cpu"):
    """Our logits are as near to the model in float64 as eager's are: its rounding, in every layer
    and not only in the experts, is the unit, and we round the experts less often."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    generator = torch.Generator().manual_seed(3)
    inputs = {"input_ids": torch.randint(2, 90, (2, 11), generator=generator)}
    if type(model).__name__ == "Qwen3OmniMoeTalkerModel":  # codes and text, added up by its caller
        inputs = {"inputs_embeds": torch.randn(2, 11, 64, generator=generator)}
    model = cast(model, dtype).to(device)
    tape = Tape()
    eager = run(model, inputs, tape)
    ours = run(model, inputs, tape, door.NAME)
    exact = run(cast(model, torch.float64), inputs, tape)
    assert torch.isfinite(exact).all() and torch.isfinite(ours).all()
    unit = rms(eager - exact)
    assert unit > 0
    assert rms(ours - exact) <= 2 * unit, f"{rms(ours - exact):.3g}, eager {unit:.3g}"
    if dtype == torch.float32:  # and the experts matter
        ALL_EXPERTS_FUNCTIONS.register("nothing", nothing)
        assert rms(run(model, inputs, tape, "nothing") - exact) > 1000 * unit


def check_generation(model):
    """32 tokens, greedy: the same ones, with nothing replayed."""
    ids = torch.randint(2, 90, (2, 5), generator=torch.Generator().manual_seed(4))
    settings = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    tokens = []
    for implementation in ("eager", door.NAME):
        model.set_experts_implementation(implementation)
        tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings))
    assert tokens[0].shape == (2, 37) and torch.equal(*tokens)


def examine(folder, name):
    """The row of the table for a model that works; raises where it does not."""
    model = make(folder, name)
    modules = experts(model)
    converted = door.convert_experts(model)
    for dtype in (torch.float32, torch.bfloat16):
        check(model, dtype)
    generates = name.endswith(("ForCausalLM", "ForConditionalGeneration"))
    if generates:
        check_generation(model)
    first = modules[0]
    options = door.experts_options(first)
    notes = [options["activation"]]
    for key, word in (("activation_alpha", "alpha"), ("activation_limit", "limit")):
        if options[key] is not None:
            notes.append(f"{word} {options[key]:g}")
    notes += [options["w13_order"]] if options["w13_order"] != "gate_up" else []
    notes += ["not gated"] if not options["gated"] else []
    notes += ["biases"] if first.has_bias else []
    notes += ["norm after down"] if getattr(first, "has_post_expert_norm", False) else []
    proof = "logits, 32 tokens" if generates else "logits"
    verdict = "after `convert_experts`" if converted else "works"
    return row(name, type(first).__name__, ", ".join(notes), proof, verdict)


def row(*cells):
    return f"| {' | '.join(cells)} |"


def outside():
    """Rows of models that have experts of their own kind."""
    rows = []
    pattern = re.compile(r"^class (\w*(?:Experts|CDMoE|MoE|SparseMLP))\(nn\.Module", re.MULTILINE)
    for path in sorted(ROOT.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        names = pattern.findall(source)
        if names and "@use_experts_implementation" not in source:
            reason = "no: its experts do not go through the experts interface"
            rows.append(row(path.parent.name, ", ".join(names), "", "", reason))
    return rows


HEAD = f"""# Model classes of transformers

`fusedmoe.frameworks.transformers.register()` makes `experts_implementation="fusedmoe"` known to
transformers. This table is written by `python tests/moe_models.py` with transformers
{transformers.__version__}, and `tests/test_door_transformers.py` checks every row of it: the class,
tiny and with random weights, on the CPU. In float32 and bfloat16 its logits are at most twice as
far from the same model in float64 as those of transformers' own eager experts; in float32 it
generates the same 32 tokens, greedily. Other classes of the same model (for images, for
classification) share its experts.

"after `convert_experts`": the weights are stored as [E, H, 2I].
`fusedmoe.frameworks.transformers.convert_experts(model)`, called once after loading, turns them in
memory; shapes, names and values stay. Without it the first call raises and says so.

"no": transformers takes the name and runs its own experts; `convert_experts(model)` raises.

"""
TABLE = row("class", "experts", "gate", "compared", "verdict") + "\n" + row(*["---"] * 5)


def write(rows):
    DOCUMENT.write_text(HEAD + "\n".join([TABLE, *rows, *outside()]) + "\n", encoding="utf-8")


def main():
    transformers.logging.set_verbosity_error()
    door.register()
    torch.set_num_threads(1)
    rows = []
    for folder, name in cases():
        try:
            rows.append(examine(folder, name))
        except Exception as error:
            text = " ".join(str(error).split())
            rows.append(row(name, "", "", "", f"no: {type(error).__name__}: {text}"))
        print(rows[-1], flush=True)
    write(rows)


if __name__ == "__main__":
    main()
