"""Routing of published models: from_hf_config against the routers of transformers, and the table of
names against itself."""

import importlib
import inspect
import re
import warnings

import fusedmoe
import numpy as np
import pytest
from fusedmoe import Routing, from_hf_config, routing_config
from fusedmoe.presets import FAMILIES, PRESETS
from fusedmoe.routing import METHODS
from support import have


@pytest.mark.parametrize("model", list(PRESETS))
def test_preset(model):
    fields = routing_config(model)
    bias = np.zeros(PRESETS[model].num_experts, np.float32)
    more = {"correction_bias": bias} if METHODS[fields["method"]].bias != "none" else {}
    logits = np.random.default_rng(1).standard_normal((3, len(bias))).astype(np.float32)
    weights, ids = fusedmoe.route(logits, Routing(**fields, **more))
    assert ids.shape == (3, fields["topk"]) and PRESETS[model].source
    if METHODS[fields["method"]].renormalize in ("always", "on"):
        scale = fields.get("routed_scaling_factor", 1.0)
        assert np.allclose(weights.sum(axis=1), scale, rtol=1e-5)


def test_unknown():
    with pytest.raises(ValueError, match="model: .*DeepSeek-V3.*got 'x'"):
        routing_config("x")
    with pytest.raises(ValueError, match="config: .*mixtral.*got None"):
        from_hf_config(object())


if have("torch") and have("transformers"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages warn about at import
        import torch
        import transformers  # noqa: F401

# Small sizes by the names that configs have for them; the model's own where there is none.
SIZES = {
    "hidden_size": 64,
    "num_experts": 32,
    "num_local_experts": 32,
    "n_routed_experts": 32,
    "moe_num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_topk": 4,
    "top_k_experts": 4,
    "moe_k": 4,
    "vocab_size": 64,
    "zero_expert_num": 8,
}
VARIANTS = {
    "deepseek_v2": [
        {"topk_method": "greedy"},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ],
    "deepseek_v3": [{"n_group": 4, "topk_group": 2}, {"n_group": 1, "topk_group": 1}],
    "glm4_moe": [{"norm_topk_prob": False}, {"n_group": 8, "topk_group": 3}],
    "lfm2_moe": [{"use_expert_bias": True}, {"use_expert_bias": False}],
    "llama4_text": [{"num_experts_per_tok": 1}],
    "phimoe": [{"num_experts_per_tok": 2}],
    "qwen3_moe": [{"norm_topk_prob": True}, {"norm_topk_prob": False}],
}
CASES = [(kind, v) for kind in FAMILIES for v in VARIANTS.get(kind, [{}])]


def make_router(kind, variant):
    """(config, router) of a model type, small; random weights."""
    folder = kind.removesuffix("_text")
    try:
        configs = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
        models = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ImportError:
        pytest.skip(f"this transformers has no {kind}")
    config_class = next(
        c
        for c in vars(configs).values()
        if inspect.isclass(c) and getattr(c, "model_type", None) == kind
    )
    known = set(dir(config_class())) | set(inspect.signature(config_class).parameters)
    fields = {**SIZES, **variant}
    aliases = getattr(config_class, "attribute_map", {})
    fields = {k: v for k, v in fields.items() if k in known and (k in variant or k not in aliases)}
    config = config_class(**fields)
    pattern = re.compile(r"class (\w+(?:Router|MoEV1Gate))\(")
    names = [n for n in pattern.findall(inspect.getsource(models)) if "Hash" not in n]
    router_class = getattr(models, names[0])
    more = {"layer_idx": 0} if "layer_idx" in inspect.signature(router_class).parameters else {}
    torch.manual_seed(3)
    router = router_class(config, **more).eval()
    for tensor in [*router.parameters(), *router.buffers()]:
        tensor.data = torch.randn(tensor.shape) * 0.3
    return config, router


@pytest.mark.skipif(
    not (have("torch") and have("transformers")), reason="torch and transformers are not installed"
)
@pytest.mark.parametrize("kind, variant", CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_from_hf_config_is_the_router_of_transformers(kind, variant):
    """The same experts, as a set, with the same weights."""
    config, router = make_router(kind, variant)
    fields = from_hf_config(config)
    method = METHODS[fields["method"]]
    x = torch.randn(40, router_inputs(router, config))
    call = {}
    bias = getattr(router, "e_score_correction_bias", None)
    if hasattr(router, "moe_statics"):
        bias = router.moe_statics.e_score_correction_bias.reshape(-1)
    for name in ("e_score_correction_bias", "expert_bias"):
        if name in inspect.signature(router.forward).parameters and method.bias != "none":
            bias = call[name] = torch.randn(32) * 0.3
    with torch.no_grad():
        got = router(x, **call)
    if kind == "llama4_text":  # weights scattered over all experts
        scores, logits = got
        weights, ids = scores.topk(1, dim=-1)
    else:
        logits, weights, ids = got
    if kind == "gemma4_text":
        logits = logits.log()  # it returns probabilities
        fields["expert_scale"] = router.per_expert_scale.detach()
    if method.bias != "none":
        fields["correction_bias"] = bias.detach().float().clone()
    zero = fields.pop("num_zero_experts", 0)
    ours, our_ids = fusedmoe.route(logits.detach(), Routing(**fields, ids_dtype="int64"))
    order, our_order = ids.argsort(dim=1), our_ids.argsort(dim=1)
    assert torch.equal(our_ids.gather(1, our_order), ids.gather(1, order))
    torch.testing.assert_close(
        ours.gather(1, our_order), weights.gather(1, order).float(), rtol=2e-5, atol=1e-6
    )
    if zero:
        known, marked = fusedmoe.route(
            logits.detach(), Routing(**fields, num_zero_experts=zero, ids_dtype="int64")
        )
        assert torch.equal(known, ours)
        assert torch.equal(marked, torch.where(our_ids < logits.shape[1] - zero, our_ids, -1))


def router_inputs(router, config):
    return getattr(router, "hidden_dim", None) or config.hidden_size
