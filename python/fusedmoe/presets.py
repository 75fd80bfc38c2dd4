"""The routing of published models: by name, and from a transformers config.

Both give keyword arguments of `Routing`, without tensors: a method with a bias still needs
`correction_bias`, hash routing its table, Gemma 4 its expert_scale.

    fields = routing_config("deepseek-ai/DeepSeek-V3")
    routing = Routing(**fields, correction_bias=gate.e_score_correction_bias)
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """How one `model_type` of transformers routes. Values are the names of config attributes, the
    first that is there counts; a value that is no str is the value itself."""

    method: str
    topk: tuple = ("num_experts_per_tok",)
    renormalize: str | bool | None = None  # None: what the method says
    scale: str | None = None
    grouped: str | None = None  # the method where there is more than one group
    zero_experts: str | None = None


_SOFTMAX = Family("softmax_topk", renormalize="norm_topk_prob")
_TOPK_SOFTMAX = Family("topk_softmax")
_NOAUX_TC = Family(
    "sigmoid_bias",
    renormalize="norm_topk_prob",
    scale="routed_scaling_factor",
    grouped="sigmoid_bias_grouped",
)
# model_type of a config, or of its text_config -> Family. Source of every row: the router class of
# that name in transformers 5, against which tests/test_presets.py holds it.
FAMILIES = {
    "deepseek_v2": Family(
        "softmax_topk", renormalize=False, scale="routed_scaling_factor", grouped="softmax_grouped"
    ),
    "deepseek_v3": _NOAUX_TC,
    "deepseek_v32": _NOAUX_TC,
    "deepseek_v4": Family("sqrt_softplus_bias", scale="routed_scaling_factor"),
    "dots1": _NOAUX_TC,
    "ernie4_5_moe": Family("softmax_bias", topk=("num_experts_per_tok", "moe_k"), renormalize=True),
    "exaone_moe": _NOAUX_TC,
    "flex_olmo": _SOFTMAX,
    "gemma4_text": _TOPK_SOFTMAX._replace(topk=("top_k_experts",)),
    "glm4_moe": _NOAUX_TC,
    "glm4_moe_lite": _NOAUX_TC,
    "glm_moe_dsa": _NOAUX_TC,
    "gpt_oss": _TOPK_SOFTMAX,
    "granitemoe": _TOPK_SOFTMAX,
    "granitemoehybrid": _TOPK_SOFTMAX,
    "granitemoeshared": _TOPK_SOFTMAX,
    "hunyuan_v1_moe": _TOPK_SOFTMAX._replace(topk=("moe_topk", "num_experts_per_tok")),
    "hy_v3": Family("sigmoid_bias", scale="router_scaling_factor"),
    "jamba": Family("softmax_topk"),
    "lfm2_moe": Family("sigmoid_bias", renormalize="norm_topk_prob", scale="routed_scaling_factor"),
    "llama4_text": Family("llama4"),
    "longcat_flash": Family(
        "softmax_bias",
        topk=("moe_topk", "num_experts_per_tok"),
        scale="routed_scaling_factor",
        zero_experts="zero_expert_num",
    ),
    "mimo_v2_flash": _NOAUX_TC,
    "minimax": _TOPK_SOFTMAX,
    "minimax_m2": Family("sigmoid_bias"),
    "mixtral": _TOPK_SOFTMAX,
    "nemotron_h": _NOAUX_TC,
    "olmoe": _SOFTMAX,
    "phimoe": Family("sparsemixer"),
    "qwen2_moe": _SOFTMAX,
    "qwen3_5_moe_text": _TOPK_SOFTMAX,
    "qwen3_moe": _SOFTMAX,
    "qwen3_next": _SOFTMAX,
    "solar_open": _NOAUX_TC,
}


class Preset(NamedTuple):
    """The routing of one published model."""

    num_experts: int
    fields: dict
    source: str


def _noaux(topk, scale, groups=None):
    fields = {"topk": topk, "method": "sigmoid_bias", "routed_scaling_factor": scale}
    if groups:
        fields.update(method="sigmoid_bias_grouped", num_groups=groups[0], topk_groups=groups[1])
    return fields


_CONFIG = "config.json of the model"
PRESETS = {
    "deepseek-ai/DeepSeek-V3": Preset(256, _noaux(8, 2.5, (8, 4)), "arXiv:2412.19437, " + _CONFIG),
    "deepseek-ai/DeepSeek-R1": Preset(256, _noaux(8, 2.5, (8, 4)), "as DeepSeek-V3"),
    "deepseek-ai/DeepSeek-V3.2": Preset(256, _noaux(8, 2.5, (8, 4)), "as DeepSeek-V3"),
    "deepseek-ai/DeepSeek-V4-Flash": Preset(
        256,
        {"topk": 6, "method": "sqrt_softplus_bias", "routed_scaling_factor": 1.5},
        _CONFIG + "; its first layers: method hash",
    ),
    "moonshotai/Kimi-K2-Instruct": Preset(384, _noaux(8, 2.827), _CONFIG),
    "inclusionAI/Ling-1T": Preset(256, _noaux(8, 2.5, (8, 4)), _CONFIG),
    "MiniMaxAI/MiniMax-M2": Preset(256, _noaux(8, 1.0), _CONFIG),
    "mistralai/Mixtral-8x7B-v0.1": Preset(
        8, {"topk": 2, "method": "topk_softmax"}, "arXiv:2401.04088"
    ),
    "Qwen/Qwen3-30B-A3B": Preset(128, {"topk": 8, "method": "topk_softmax"}, _CONFIG),
    "Qwen/Qwen3-235B-A22B": Preset(128, {"topk": 8, "method": "topk_softmax"}, _CONFIG),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": Preset(
        512, {"topk": 10, "method": "topk_softmax"}, _CONFIG
    ),
    "openai/gpt-oss-20b": Preset(32, {"topk": 4, "method": "topk_softmax"}, _CONFIG),
    "openai/gpt-oss-120b": Preset(128, {"topk": 4, "method": "topk_softmax"}, _CONFIG),
    "allenai/OLMoE-1B-7B-0924": Preset(64, {"topk": 8, "method": "softmax_topk"}, _CONFIG),
    "meta-llama/Llama-4-Scout-17B-16E": Preset(16, {"topk": 1, "method": "llama4"}, _CONFIG),
    "meta-llama/Llama-4-Maverick-17B-128E": Preset(128, {"topk": 1, "method": "llama4"}, _CONFIG),
    "microsoft/Phi-3.5-MoE-instruct": Preset(16, {"topk": 2, "method": "sparsemixer"}, _CONFIG),
}


def routing_config(model: str) -> dict:
    """The fields of `Routing` of a published model, without tensors.

    Args:
        model: a name of the table PRESETS, for instance "deepseek-ai/DeepSeek-V3".

    Raises:
        ValueError: there is no such row.
    """
    if model not in PRESETS:
        raise ValueError(f"model: expected one of {', '.join(PRESETS)}, got {model!r}")
    return dict(PRESETS[model].fields)


def from_hf_config(config) -> dict:
    """The fields of `Routing` from a transformers config, without tensors.

    Args:
        config: a config of transformers, of a model type in FAMILIES; of a model with vision or
            audio, its text_config is read.

    Returns:
        A dict: topk, method and what else is not at its default.

    Raises:
        ValueError: no such model type, or an attribute that is not there.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES and getattr(config, "text_config", None) is not None:
        config = config.text_config
        kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(f"config: expected a model_type of {', '.join(FAMILIES)}, got {kind!r}")
    family = FAMILIES[kind]
    fields = {"topk": _first(config, family.topk), "method": family.method}
    groups = getattr(config, "n_group", None) or 1
    if kind == "deepseek_v2" and config.topk_method == "greedy":
        groups = 1
    if family.grouped and groups > 1:
        fields.update(
            method=family.grouped, num_groups=groups, topk_groups=_first(config, ("topk_group",))
        )
    if kind == "lfm2_moe" and not config.use_expert_bias:
        fields["method"] = "sigmoid"
    if isinstance(family.renormalize, str):
        fields["renormalize"] = bool(_first(config, (family.renormalize,)))
    elif family.renormalize is not None:
        fields["renormalize"] = family.renormalize
    if family.scale:
        fields["routed_scaling_factor"] = float(_first(config, (family.scale,)) or 1.0)
    if family.zero_experts and getattr(config, family.zero_experts, None):
        fields["num_zero_experts"] = getattr(config, family.zero_experts)
    return fields


def _first(config, names):
    for name in names:
        if getattr(config, name, None) is not None:
            value = getattr(config, name)
            return value[0] if isinstance(value, (list, tuple)) else value
    raise ValueError(f"config: expected an attribute {' or '.join(names)}, got none")
