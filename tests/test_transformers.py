"""The MoE blocks of transformers, an outside reference: the oracle against them in float64, and our
layer against them on the same tensors, in float32 and bfloat16.

Real classes and real config structure, random weights. The sizes are the models' own, but for the
number of experts and, where a single expert is large, the share of one of eight GPUs.
"""

import copy
import functools
import warnings

import fusedmoe
import numpy as np
import pytest
from fusedmoe import Routing, fused_experts, fused_moe, reference
from support import TorchBackend, assert_close, have, no_gpu

if not (have("torch") and have("transformers")):
    pytest.skip("torch and transformers are not both installed", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what other packages warn about at import
    import torch
    from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
    from transformers.activations import ACT2FN
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

NUM_TOKENS = 11
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HOST = TorchBackend("cpu")


def qwen3():
    """Qwen3-30B-A3B with 12 of its 128 experts."""
    return Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=12,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )


def mixtral():
    """Mixtral-8x7B with 4 of its 8 experts, one GPU's share of eight."""
    return MixtralConfig(
        hidden_size=4096, intermediate_size=1792, num_local_experts=4, num_experts_per_tok=2
    )


def gpt_oss():
    """gpt-oss with 6 of its 32 experts, one GPU's share of four."""
    return GptOssConfig(
        hidden_size=2880, intermediate_size=720, num_local_experts=6, num_experts_per_tok=4
    )


def deepseek_v3():
    """DeepSeek-V3 with 8 of its 256 experts, one GPU's share of eight."""
    return DeepseekV3Config(
        hidden_size=7168,
        moe_intermediate_size=256,
        n_routed_experts=8,
        num_local_experts=8,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )


MODELS = {
    "qwen3": (qwen3, Qwen3MoeSparseMoeBlock),
    "mixtral": (mixtral, MixtralSparseMoeBlock),
    "gpt_oss": (gpt_oss, GptOssMLP),
    "deepseek_v3": (deepseek_v3, DeepseekV3MoE),
}


class Block:
    """A block with random weights, its routing of random tokens, and our arguments for the same."""

    def __init__(self, name, dtype):
        make_config, cls = MODELS[name]
        config = make_config()
        config._experts_implementation = "eager"
        generator = torch.Generator().manual_seed(20)
        self.name, self.dtype = name, dtype
        with torch.no_grad():
            block = cls(config).eval()
            for parameter in block.parameters():
                # Column-major weights (gpt-oss) have their fan-in next to last.
                transposed = name == "gpt_oss" and parameter.dim() == 3
                fan_in = parameter.shape[-2 if transposed else -1]
                scale = 0.3 if "bias" in name or parameter.dim() == 1 else fan_in**-0.5
                parameter.normal_(0, scale, generator=generator)
            self.block = block.to(DTYPES[dtype])
            self.x = torch.randn(NUM_TOKENS, config.hidden_size, generator=generator)
            self.x = self.x.to(DTYPES[dtype])
            self.router = getattr(self.block, "router", None) or self.block.gate
            self.logits, self.topk_weights, self.topk_ids = self.router(self.x)
        self.experts = self.block.experts
        self.topk = self.topk_ids.shape[1]

    def weights(self):
        """(w13, w2, keyword arguments) of this layer, as the package takes them."""
        e = self.experts
        if self.name != "gpt_oss":
            return e.gate_up_proj.detach(), e.down_proj.detach(), {}
        return (
            e.gate_up_proj.detach().transpose(1, 2).contiguous(),
            e.down_proj.detach().transpose(1, 2).contiguous(),
            {
                "w13_bias": e.gate_up_proj_bias.detach(),
                "w2_bias": e.down_proj_bias.detach(),
                "activation": "swiglu_oai",
                "w13_order": "interleaved",
            },
        )

    def run_experts(self, experts, x, weights):
        with torch.no_grad():
            return experts(x, self.topk_ids, weights)

    @functools.cached_property
    def plain(self):
        """(want, Error) of the oracle on the same numbers."""
        return self.expected()

    def expected(self, **more):
        """The same with a shared output, or weights that are not exact."""
        w13, w2, options = self.weights()
        options = {k: numpy(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return reference.fused_experts_error(
            numpy(self.x),
            numpy(w13),
            numpy(w2),
            numpy(self.topk_weights),
            numpy(self.topk_ids),
            **options,
            **more,
        )


def numpy(tensor):
    return HOST.get(tensor)


@pytest.fixture(scope="module", params=[(m, d) for m in MODELS for d in DTYPES], ids="-".join)
def block(request):
    return Block(*request.param)


def only(models, dtypes=tuple(DTYPES)):
    """Parametrises a test over some of the blocks."""
    params = [(m, d) for m in models for d in dtypes]
    return pytest.mark.parametrize("block", params, indirect=True, ids="-".join)


def coarser(error, times):
    """Error of a computation that rounds `times` as often as ours."""
    return reference.Error(error.absolute * times, error.variance * times, error.freedom)


def roundings(topk):
    """How much more often transformers rounds: gate, up, activation, product, down, weight and each
    partial sum, where the oracle's bound has three roundings. Twice, because a rounded gate passes
    the activation's slope, which can be steeper than the activation itself."""
    return 2 * (6 + topk) / 3


def test_the_oracle_is_the_block_in_float64(block):
    """No rounding on either side: the formulas are the same to 12 digits."""
    exact = copy.deepcopy(block.experts).double()
    want = block.run_experts(exact, block.x.double(), block.topk_weights.double()).numpy()
    got, _ = block.plain
    assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()


def test_the_block_itself_is_near_the_oracle(block):
    got = block.run_experts(block.experts, block.x, block.topk_weights)
    want, error = block.plain
    assert_close(numpy(got), want, coarser(error, roundings(block.topk)), name="transformers")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_layer(block, device):
    """On the very same tensors: within our bound of the oracle, and near the block."""
    if device == "cuda" and no_gpu():
        pytest.skip(no_gpu())
    if device == "cuda" and block.dtype == "float32":
        pytest.skip("float32 is computed on the CPU only")
    w13, w2, options = block.weights()
    tensors = [block.x, w13, w2, block.topk_weights, block.topk_ids]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    got = fused_experts(*(t.detach().to(device) for t in tensors), **options).cpu()
    want, error = block.plain
    assert_close(numpy(got), want, error, name="fused_experts")
    theirs = numpy(block.run_experts(block.experts, block.x, block.topk_weights))
    both = coarser(error, 1 + roundings(block.topk))
    assert_close(numpy(got), theirs.astype(np.float64), both, name="against transformers")


@only(["qwen3", "mixtral", "deepseek_v3"])
def test_parameters_as_they_are(block):
    """The module's own Parameters, no detach. (Those of gpt-oss are column-major.)"""
    e = block.experts
    out = fused_experts(block.x, e.gate_up_proj, e.down_proj, block.topk_weights, block.topk_ids)
    want, error = block.plain
    assert_close(numpy(out), want, error)


@only(["qwen3", "mixtral", "gpt_oss"], ["float32"])
def test_whole_block(block):
    """fused_moe from the block's own router logits; in float32, where no two of them are equal."""
    w13, w2, options = block.weights()
    routing = Routing(block.topk, method="topk_softmax", ids_dtype="int64")
    weights, ids = fusedmoe.route(block.logits, routing)
    order = block.topk_ids.argsort(dim=1)
    ours = ids.argsort(dim=1)
    assert torch.equal(ids.gather(1, ours), block.topk_ids.gather(1, order))
    theirs = block.topk_weights.gather(1, order)
    torch.testing.assert_close(weights.gather(1, ours), theirs, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        whole = block.block(block.x[None])
    whole = (whole[0] if isinstance(whole, tuple) else whole)[0]
    got = fused_moe(block.x, w13, w2, block.logits, routing=routing, **options)
    _, error = block.expected(weights_relative=1e-5)
    both = coarser(error, 1 + roundings(block.topk))
    assert_close(numpy(got), numpy(whole).astype(np.float64), both)


@only(["deepseek_v3"])
def test_block_with_its_shared_expert(block):
    """The whole block, its shared expert as shared_output and the factor 2.5 as ours to apply."""
    w13, w2, _ = block.weights()
    with torch.no_grad():
        shared = block.block.shared_experts(block.x)
        whole = block.block(block.x[None])[0]
    factor = block.router.routed_scaling_factor
    assert factor == 2.5
    got = fused_experts(
        block.x,
        w13,
        w2,
        block.topk_weights / factor,
        block.topk_ids,
        routed_scaling_factor=factor,
        shared_output=shared,
    )
    # The weights were divided and multiplied again: two roundings in float32.
    want, error = block.expected(shared_output=numpy(shared), weights_relative=2.0**-22)
    assert_close(numpy(got), want, error)
    both = coarser(error, 1 + roundings(block.topk))
    assert_close(numpy(got), numpy(whole).astype(np.float64), both)


ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu2": "relu2",
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    g = torch.linspace(-40, 40, 2001, dtype=torch.float64)
    want = ACT2FN[ACTIVATIONS[name]](g).numpy()
    np.testing.assert_allclose(
        reference.activate(g.numpy(), activation=name), want, rtol=1e-13, atol=1e-15
    )
