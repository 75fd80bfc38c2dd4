"""The SGLang door: signatures and plug-in against the published package, functions against the
oracle on the shapes of SGLang's own MoE tests.

The package is looked for in FUSEDMOE_SGLANG_SOURCE, a folder it is unpacked in together with the
small packages it imports, or where sglang is installed:

    pip install --no-deps --target FOLDER sglang==0.5.23 msgspec orjson psutil pyzmq pybase64 \
        requests urllib3 idna certifi charset_normalizer einops starlette anyio apache-tvm-ffi \
        prometheus-client
"""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import fusedmoe
import numpy as np
import package_checks
import pytest
from fusedmoe import reference
from fusedmoe.frameworks import sglang as door
from support import (
    BF16,
    F16,
    F32,
    TorchBackend,
    assert_choice,
    assert_close,
    have,
    make_layer,
    no_gpu,
)

pytestmark = pytest.mark.skipif(not have("torch"), reason="torch is not installed")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    """SGLang's tensors are torch's."""
    if request.param == "cuda" and no_gpu():
        pytest.skip(no_gpu())
    return TorchBackend("cpu" if request.param == "cpu" else "cuda:0")


# -------------------------------------------------------------------------------------------------
# Against the published package
# -------------------------------------------------------------------------------------------------

MOE = "sglang/srt/layers/moe/moe_runner/triton_utils"
OPS = "sglang/kernels/ops/moe"
# Ours -> file and name in the package. moe_sum_reduce itself is compiled; its twin is in Triton.
SIGNATURES = {
    "fused_experts": (f"{MOE}/fused_moe.py", "fused_experts"),
    "inplace_fused_experts": (f"{MOE}/fused_moe.py", "inplace_fused_experts"),
    "outplace_fused_experts": (f"{MOE}/fused_moe.py", "outplace_fused_experts"),
    "fused_experts_impl": (f"{MOE}/fused_moe.py", "fused_experts_impl"),
    "moe_align_block_size": (f"{MOE}/moe_align_block_size.py", "moe_align_block_size"),
    "topk_softmax": (f"{OPS}/moe_topk_softmax.py", "topk_softmax"),
    "topk_sigmoid": (f"{OPS}/moe_topk_sigmoid.py", "topk_sigmoid"),
    "moe_fused_gate": (f"{OPS}/moe_fused_gate.py", "moe_fused_gate"),
    "hash_topk": (f"{OPS}/dsv4.py", "hash_topk"),
    "moe_sum_reduce": (f"{OPS}/fused_moe_triton_kernels.py", "moe_sum_reduce_triton"),
}


def sglang_folder():
    """The folder that has sglang/ in it, or None. Nothing is imported."""
    folder = os.environ.get("FUSEDMOE_SGLANG_SOURCE")
    if folder:
        assert (Path(folder) / "sglang").is_dir(), f"FUSEDMOE_SGLANG_SOURCE={folder}: no sglang/"
        return Path(folder)
    spec = importlib.util.find_spec("sglang")
    return Path(spec.origin).parents[1] if spec and spec.origin else None


@pytest.fixture(scope="module")
def package():
    folder = sglang_folder()
    if folder is None:
        pytest.skip("sglang is not installed and FUSEDMOE_SGLANG_SOURCE is not set")
    return folder


def parsed_signature(path, name):
    """[(argument, kind, default or None)] of a function as it is written, without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    a = function.args
    assert not (a.posonlyargs or a.vararg or a.kwarg), f"{name} has arguments of a new kind"
    defaults = [None] * (len(a.args) - len(a.defaults)) + a.defaults
    pairs = [(arg, "any", default) for arg, default in zip(a.args, defaults, strict=True)]
    pairs += [
        (arg, "keyword", default) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    return [(arg.arg, kind, default and ast.unparse(default)) for arg, kind, default in pairs]


def own_signature(function):
    kinds = {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: "any",
        inspect.Parameter.KEYWORD_ONLY: "keyword",
    }
    return [
        (p.name, kinds[p.kind], None if p.default is p.empty else repr(p.default))
        for p in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_the_one_published(package, name):
    file, published = SIGNATURES[name]
    want = [
        (argument, kind, default and default.replace('"', "'"))
        for argument, kind, default in parsed_signature(package / file, published)
    ]
    assert own_signature(getattr(door, name)) == want


def test_version_of_the_package(package):
    text = (package / "sglang" / "_version.py").read_text(encoding="utf-8")
    version = re.search(r"version = '([\d.]+)'", text).group(1)
    assert f"sglang {version}" == door.TESTED


@pytest.fixture(scope="module")
def checks(package):
    return package_checks.run("sglang_package.py", package)


@pytest.mark.parametrize("name", package_checks.names("sglang_package.py"))
def test_plug_in_in_the_real_package(checks, name):
    assert checks[name] is None, checks[name]


def test_status(monkeypatch):
    version, why = door.status()
    assert (version is None) == (why is not None)
    monkeypatch.setattr(door.metadata, "version", lambda name: "0.5.23")
    assert door.status() == ("0.5.23", None)


def test_door_and_plug_in_import_nothing_of_sglang():
    code = (
        "import sys, fusedmoe.frameworks.sglang_plugin as p\n"
        "assert 'torch' not in sys.modules and 'sglang' not in sys.modules\n"
        "p.activate(); p.deactivate()\n"
    )
    path = str(Path(fusedmoe.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": path, "FUSEDMOE_SGLANG": "0"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)


@pytest.mark.gpu
def test_plug_in_knows_a_hopper_gpu(gpu):
    from fusedmoe.frameworks import sglang_plugin

    torch = gpu.torch
    hopper = torch.cuda.get_device_capability(0)[0] == 9
    assert sglang_plugin.on_hopper(torch.empty(1, device="cuda:0")) == hopper
    assert not sglang_plugin.on_hopper(torch.empty(1))


# -------------------------------------------------------------------------------------------------
# The layer, on the grid of test/registered/moe/test_fused_moe.py and test_triton_fused_moe.py
# -------------------------------------------------------------------------------------------------

FULL = list(product((1, 33, 64, 222), (128, 1024), (128, 511, 1024), (8, 64), (2, 6), (F16, BF16)))
# On the CPU each value of each axis, and the corners that differ in kind: odd and even K.
THIN = [
    (1, 128, 128, 8, 2, F16),
    (1, 1024, 511, 8, 6, BF16),
    (33, 128, 511, 64, 6, F16),
    (33, 1024, 128, 8, 2, BF16),
    (64, 128, 1024, 8, 6, F16),
    (64, 128, 511, 8, 2, BF16),
    (222, 128, 128, 64, 6, BF16),
    (222, 128, 511, 8, 6, F16),
]


def runner_config(**fields):
    """MoeRunnerConfig's fields that fused_experts reads, at their defaults."""
    return SimpleNamespace(
        **{
            "activation": "silu",
            "is_gated": True,
            "apply_router_weight_on_input": False,
            "inplace": True,
            "no_combine": False,
            "no_combine_keep_router_weight": False,
            "routed_scaling_factor": None,
            "gemm1_alpha": None,
            "gemm1_clamp_limit": None,
            "swiglu_limit": None,
            "gate_up_interleaved": True,
            **fields,
        }
    )


def run_grid_case(backend, seed, m, n, k, e, topk, dtype):
    layer = make_layer(seed, m, k, n, e, topk, dtype)
    put = {name: backend.put(array) for name, array in layer.tensors().items()}
    x = put["hidden_states"]
    result = door.fused_experts(
        x,
        put["w13"],
        put["w2"],
        (put["topk_weights"], put["topk_ids"], None),
        runner_config(inplace=m % 2 == 0),
    )
    assert (result is x) == (m % 2 == 0)
    tokens = np.unique(np.linspace(0, m - 1, 12).astype(int))
    want, error = layer.expected(tokens)
    assert_close(backend.get(result)[tokens], want, error, seed=seed)


@pytest.mark.parametrize("m, n, k, e, topk, dtype", THIN)
def test_fused_experts_grid(seed, m, n, k, e, topk, dtype):
    run_grid_case(TorchBackend("cpu"), seed, m, n, k, e, topk, dtype)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("m, n, k, e, topk, dtype", FULL)
def test_fused_experts_full_grid(gpu, seed, m, n, k, e, topk, dtype):
    run_grid_case(gpu, seed, m, n, k, e, topk, dtype)


@pytest.mark.small
@pytest.mark.parametrize(
    "arguments, options",
    [
        ({"activation": "gelu"}, {"activation": "gelu"}),
        ({"activation": "gelu_tanh"}, {"activation": "gelu_tanh"}),
        ({"activation": "situ"}, {"activation": "situ"}),
        ({"activation": "relu2", "is_gated": False}, {"activation": "relu2", "gated": False}),
        (
            {"is_gated": False, "gemm1_alpha": 1.0, "gemm1_limit": 1.0, "swiglu_limit": 1.0},
            {"gated": False},
        ),
        (
            {"gemm1_alpha": 1.702, "gemm1_limit": 7.0},
            {
                "activation": "swiglu_oai",
                "activation_alpha": 1.702,
                "activation_limit": 7.0,
                "w13_order": "interleaved",
            },
        ),
        (
            {"gemm1_alpha": 1.5, "gemm1_limit": 2.0, "gate_up_interleaved": False},
            {"activation": "swiglu_oai", "activation_alpha": 1.5, "activation_limit": 2.0},
        ),
        ({"gemm1_limit": 0.5, "swiglu_limit": 9.0}, {"activation_limit": 0.5}),
        ({"swiglu_limit": 0.5}, {"activation_limit": 0.5, "clamp": "before"}),
        ({"fuse_swiglu_interleaved": True}, {"w13_order": "interleaved"}),
        ({"apply_router_weight_on_input": True}, {"apply_router_weight_on_input": True}),
        ({"routed_scaling_factor": 2.5}, {"routed_scaling_factor": 2.5}),
        ({"no_combine": True}, {"no_combine": "unweighted"}),
        (
            {"no_combine": True, "no_combine_keep_router_weight": True},
            {"no_combine": "weighted"},
        ),
        ({"defer_sum": True, "routed_scaling_factor": 2.5}, {"no_combine": "weighted"}),
        ({"filter_expert": False}, {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_every_modifier(backend, seed, arguments, options):
    gated = options.get("gated", True)
    layer = make_layer(seed, routing="dropped", w13_bias=F32, w2_bias=F32, gated=gated)
    layer = layer.with_options(**options)
    put = {name: backend.put(array) for name, array in layer.tensors().items()}
    biases = [backend.put(layer.options[name]) for name in ("w13_bias", "w2_bias")]
    got = door.fused_experts_impl(*put.values(), *biases, **arguments)
    want, error = layer.expected()
    assert_close(backend.get(got), want, error, seed=seed)


def test_in_and_out_of_place_are_the_same_bits(backend, seed):
    layer = make_layer(seed)
    put = {name: backend.put(array) for name, array in layer.tensors().items()}
    x = put["hidden_states"]
    out = door.outplace_fused_experts(*put.values())
    assert (backend.get(x) == layer.tensors()["hidden_states"]).all()
    assert door.inplace_fused_experts(*put.values()) is None
    assert (backend.get(x) == backend.get(out)).all()


# -------------------------------------------------------------------------------------------------
# Routing
# -------------------------------------------------------------------------------------------------


def assert_routed(backend, got, logits, topk, **oracle):
    want_weights, want_ids = reference.route(np.asarray(logits), topk, **oracle)
    weights, ids = (backend.get(tensor) for tensor in got)
    assert weights.dtype == np.float32 and ids.dtype == np.int32
    near = np.flatnonzero((ids != want_ids).any(axis=-1))
    if len(near):  # a million random keys: some are the same to the rounding of float32
        assert len(near) < 2 + len(ids) / 1000
        method = oracle["method"]
        assert_choice(logits[near], logits.shape[1], topk, method, oracle, ids[near])
        chosen = dict(oracle, topk_ids=ids[:, :topk])
        want_weights, want_ids = reference.route(np.asarray(logits), topk, **chosen)
        np.testing.assert_array_equal(ids, want_ids)
    # float32 sums over at most E terms, exp to a few units.
    bound = 2.0**-24 * (logits.shape[1] + 64)
    np.testing.assert_allclose(weights, want_weights, rtol=bound, atol=2.0**-126)


def empty_topk(backend, num_tokens, topk):
    weights = backend.put(np.full((num_tokens, topk), np.nan, np.float32))
    return weights, backend.put(np.full((num_tokens, topk), -7, np.int32))


@pytest.mark.parametrize("num_tokens", [1, 16, 300])
@pytest.mark.parametrize("num_experts, topk", [(4, 1), (8, 2), (64, 4), (60, 4), (256, 2)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_topk_softmax(backend, rng, num_tokens, num_experts, topk, dtype):
    logits = rng.standard_normal((num_tokens, num_experts)).astype(dtype)
    for renormalize in (False, True):
        out = empty_topk(backend, num_tokens, topk)
        assert door.topk_softmax(*out, backend.put(logits), renormalize) is None
        assert_routed(backend, out, logits, topk, method="softmax_topk", renormalize=renormalize)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 16, 128, 512, 1024, 2048])
@pytest.mark.parametrize("num_experts", [4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_topk_softmax_full_grid(gpu, rng, num_tokens, num_experts, topk):
    test_topk_softmax(gpu, rng, num_tokens, num_experts, topk, F32)


def test_topk_softmax_bias_and_softcap(backend, rng):
    logits, bias = rng.standard_normal((9, 32)).astype(F32), rng.standard_normal(32).astype(F32)
    out = empty_topk(backend, 9, 4)
    door.topk_softmax(*out, backend.put(logits), True, 2.0, backend.put(bias))
    oracle = dict(method="softmax_of_biased", renormalize=True, softcap=2.0, correction_bias=bias)
    assert_routed(backend, out, logits, 4, **oracle)


REFUSED = (False, 2.5, 1)  # a scale and shared slots, not renormalised
SIGMOID = [case for case in product((False, True), (1.0, 2.5), (0, 1)) if case != REFUSED]


@pytest.mark.parametrize("biased", [False, True])
def test_topk_sigmoid_refuses_a_scale_with_shared_slots(backend, rng, biased):
    renormalize, scale, shared = REFUSED
    logits = rng.standard_normal((17, 64)).astype(F32)
    bias = backend.put((rng.standard_normal(64) / 8).astype(F32)) if biased else None
    out = empty_topk(backend, 17, 4 + shared)
    with pytest.raises(NotImplementedError, match="routed_scaling_factor"):
        door.topk_sigmoid(*out, backend.put(logits), renormalize, bias, scale, shared)
    assert (backend.get(out[1]) == -7).all()


@pytest.mark.parametrize("renormalize, scale, shared", SIGMOID)
@pytest.mark.parametrize("biased", [False, True])
def test_topk_sigmoid(backend, rng, renormalize, scale, shared, biased):
    logits = rng.standard_normal((17, 64)).astype(F32)
    bias = (rng.standard_normal(64) / 8).astype(F32) if biased else None
    out = empty_topk(backend, 17, 4 + shared)
    args = (*out, backend.put(logits), renormalize, None if bias is None else backend.put(bias))
    door.topk_sigmoid(*args, scale, shared)
    oracle = {"correction_bias": bias} if biased else {}
    assert_routed(
        backend,
        out,
        logits,
        4,
        method="sigmoid_bias" if biased else "sigmoid",
        renormalize=renormalize,
        scale=scale if renormalize else 1.0,
        num_shared=shared,
        shared_weight="sum" if shared else None,
        **oracle,
    )


@pytest.mark.parametrize("num_tokens", [1, 7, 64])
@pytest.mark.parametrize(
    "num_experts, groups, topk_groups, topk", [(128, 4, 2, 4), (256, 8, 4, 8), (512, 16, 8, 16)]
)
@pytest.mark.parametrize("shared, applied", list(product((0, 1, 2), (False, True))))
def test_moe_fused_gate_grid(
    backend, rng, num_tokens, num_experts, groups, topk_groups, topk, shared, applied
):
    scores = rng.standard_normal((num_tokens, num_experts)).astype(F32)
    bias = rng.random(num_experts).astype(F32)
    got = door.moe_fused_gate(
        backend.put(scores),
        backend.put(bias),
        topk + shared,
        num_fused_shared_experts=shared,
        routed_scaling_factor=2.5,
        apply_routed_scaling_factor_on_output=applied,
        num_expert_group=groups,
        topk_group=topk_groups,
    )
    assert_routed(
        backend,
        got,
        scores,
        topk,
        method="sigmoid_bias_grouped",
        correction_bias=bias,
        num_groups=groups,
        topk_groups=topk_groups,
        num_shared=shared,
        shared_weight=(1.0 if applied else 0.4) if shared else None,
        scale=2.5 if applied else 1.0,
    )


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [*range(2, 10), 16, 256, 1024, 8192, 65536])
@pytest.mark.parametrize(
    "num_experts, groups, topk_groups, topk", [(128, 4, 2, 4), (256, 8, 4, 8), (512, 16, 8, 16)]
)
def test_moe_fused_gate_full_grid(gpu, rng, num_tokens, num_experts, groups, topk_groups, topk):
    for shared, applied in product((0, 1, 2), (False, True)):
        test_moe_fused_gate_grid(
            gpu, rng, num_tokens, num_experts, groups, topk_groups, topk, shared, applied
        )


@pytest.mark.parametrize(
    "scoring, method", [("sigmoid", "sigmoid_bias"), ("sqrtsoftplus", "sqrt_softplus_bias")]
)
def test_moe_fused_gate_padding(backend, rng, scoring, method):
    """Rows past the device scalar get -1 and 0, whatever their logits are."""
    scores, bias = rng.standard_normal((9, 64)).astype(F32), rng.random(64).astype(F32)
    scores[6:] = np.nan
    count = backend.put(np.array(6, np.int32)).reshape(())
    got = door.moe_fused_gate(
        backend.put(scores), backend.put(bias), 6, scoring, num_token_non_padded=count
    )
    oracle = dict(method=method, correction_bias=bias, num_token_non_padded=6)
    assert_routed(backend, got, scores, 6, **oracle)


@pytest.mark.parametrize("biased", [False, True])
def test_moe_fused_gate_softmax(backend, rng, biased):
    scores, bias = rng.standard_normal((9, 64)).astype(BF16), rng.random(64).astype(F32)
    got = door.moe_fused_gate(
        backend.put(scores),
        backend.put(bias) if biased else None,
        6,
        "softmax",
        renormalize=False,
        moe_softcapping=3.0,
    )
    oracle = dict(method="softmax_of_biased", correction_bias=bias) if biased else {}
    oracle = oracle or dict(method="softmax_topk")
    assert_routed(backend, got, scores, 6, **oracle, renormalize=False, softcap=3.0)


@pytest.mark.parametrize("shared", [0, 1])
def test_hash_topk(backend, rng, shared):
    logits = rng.standard_normal((11, 64)).astype(F32)
    table = np.stack([rng.permutation(64)[:6] for _ in range(50)]).astype(np.int32)
    tokens = rng.integers(0, 50, 11).astype(np.int64)
    got = door.hash_topk(backend.put(logits), backend.put(tokens), backend.put(table), shared, 2.5)
    assert_routed(
        backend,
        got,
        logits,
        6,
        method="hash",
        tid2eid=table,
        token_ids=tokens,
        num_shared=shared,
        shared_weight=0.4 if shared else None,
    )


# -------------------------------------------------------------------------------------------------
# Align and combine
# -------------------------------------------------------------------------------------------------


def assert_aligned(backend, got, ids, block_size, num_experts, first):
    """Blocks of one expert each, in the order of experts from `first` on; each slot once."""
    token_ids, expert_ids, count = (backend.get(tensor) for tensor in got)
    count, slots = int(count[0]), ids.reshape(-1)
    assert count % block_size == 0
    expected = []
    for expert in range(first, num_experts):
        mine = np.flatnonzero(slots == expert)
        padding = -len(mine) % block_size
        expected += [*mine, *[slots.size] * padding]
        blocks = expert_ids[(len(expected) - len(mine) - padding) // block_size :]
        assert (blocks[: (len(mine) + padding) // block_size] == expert).all()
    np.testing.assert_array_equal(token_ids[:count], expected)
    assert (token_ids[count:] == slots.size).all()
    assert (expert_ids[count // block_size :] == -1).all()


@pytest.mark.parametrize("num_tokens", [1, 4, 64, 1024])
@pytest.mark.parametrize("topk, num_experts", [(1, 8), (8, 256), (32, 64)])
@pytest.mark.parametrize("block_size", [32, 128, 256])
def test_moe_align_block_size(backend, rng, num_tokens, topk, num_experts, block_size):
    ids = rng.integers(-1, num_experts, (num_tokens, topk)).astype(np.int32)
    put = backend.put(ids)
    got = door.moe_align_block_size(put, block_size, num_experts)
    assert_aligned(backend, got, ids, block_size, num_experts, -1)
    got = door.moe_align_block_size(put, block_size, num_experts, True)
    assert_aligned(backend, got, ids, block_size, num_experts, 0)
    got = door.moe_align_block_size(
        put, block_size, num_experts, return_inactive_prefix_count=True, pad_expert_ids=True
    )
    assert_aligned(backend, got, ids, block_size, num_experts, -1)
    assert backend.get(got[2])[1] == -(-(ids == -1).sum() // block_size)
    assert (backend.get(put) == ids).all()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [2**i for i in range(13)])
@pytest.mark.parametrize("topk", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
def test_moe_align_block_size_full_grid(gpu, rng, num_tokens, topk, block_size):
    test_moe_align_block_size(gpu, rng, num_tokens, topk, 256, block_size)


def test_moe_align_block_size_as_documented(backend):
    """The example of SGLang's docstring, whose ids are 1 to 4."""
    ids = backend.put(np.array([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], np.int32))
    token_ids, expert_ids, count = door.moe_align_block_size(ids, 4, 5)
    want = [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert backend.get(token_ids)[:16].tolist() == want
    assert backend.get(expert_ids)[:4].tolist() == [1, 2, 3, 4]
    assert backend.get(count).tolist() == [16]


@pytest.mark.parametrize("shape", [(1, 1, 64), (33, 8, 511), (222, 9, 128), (0, 4, 64)])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_moe_sum_reduce(backend, seed, rng, shape, dtype):
    rows = rng.standard_normal(shape).astype(dtype)
    num_tokens, topk, hidden_size = shape
    out = backend.put(np.full((num_tokens, hidden_size), np.nan, dtype))
    assert door.moe_sum_reduce(backend.put(rows), out, 2.5) is None
    flat = rows.reshape(-1, hidden_size)
    places = np.arange(num_tokens * topk).reshape(num_tokens, topk)
    want = reference.combine(flat, places, routed_scaling_factor=2.5)
    error = reference.combine_error(flat, places, routed_scaling_factor=2.5, dtype=dtype)
    assert_close(backend.get(out), want, error, seed=seed)


# -------------------------------------------------------------------------------------------------
# Wrong input: what the direct call says
# -------------------------------------------------------------------------------------------------


def change(name, value):
    return lambda put: put.update({name: value(put[name])})


WRONG = {
    "hidden_states is float64": change("hidden_states", lambda t: t.double()),
    "hidden_states has three dimensions": change("hidden_states", lambda t: t[None]),
    "w13 is of another dtype": change("w13", lambda t: t.half()),
    "w13 has too few columns": change("w13", lambda t: t[:, :, :-1]),
    "w13 has an odd number of rows": change("w13", lambda t: t[:, :-1]),
    "w2 has too many experts": change("w2", lambda t: t.repeat(2, 1, 1)),
    "w2 is transposed": change("w2", lambda t: t.transpose(1, 2)),
    "topk_weights are int32": change("topk_weights", lambda t: t.int()),
    "topk_weights are too few": change("topk_weights", lambda t: t[:, :-1]),
    "topk_ids are float32": change("topk_ids", lambda t: t.float()),
    "topk_ids are too few": change("topk_ids", lambda t: t[:-1]),
    "topk_ids are a list": change("topk_ids", lambda t: t.tolist()),
    "w2 is None": change("w2", lambda t: None),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_told_as_by_the_direct_call(backend, name):
    put = {n: backend.put(array) for n, array in make_layer(3).tensors().items()}
    before = backend.get(put["hidden_states"])
    WRONG[name](put)
    with pytest.raises((TypeError, ValueError)) as direct:
        fusedmoe.fused_experts(**put)
    with pytest.raises(direct.type, match=f"^{re.escape(str(direct.value))}$"):
        door.outplace_fused_experts(*put.values())
    topk_output = put["topk_weights"], put["topk_ids"], None
    with pytest.raises(direct.type, match=f"^{re.escape(str(direct.value))}$"):
        door.fused_experts(
            put["hidden_states"], put["w13"], put["w2"], topk_output, runner_config(inplace=False)
        )
    if "hidden_states" not in name:
        assert (backend.get(put["hidden_states"]) == before).all()


@pytest.mark.parametrize(
    "arguments, keywords",
    [
        ({"activation": "swish"}, {"activation": "swish"}),
        (
            {"activation": "gelu", "gemm1_alpha": 1.0},
            {"activation": "gelu", "activation_alpha": 1.0},
        ),
        ({"gemm1_limit": -1.0}, {"activation_limit": -1.0}),
        ({"routed_scaling_factor": "2"}, {"routed_scaling_factor": "2"}),
        ({"routed_scaling_factor": float("inf")}, {"routed_scaling_factor": float("inf")}),
        ({"use_fp8_w8a8": True, "block_shape": [128, 128]}, {"quant": "fp8_block"}),
        ({"use_fp8_w8a8": True}, {"quant": "fp8_tensor"}),
        ({"use_int8_w8a8": True}, {"quant": "int8"}),
        ({"use_int4_w4a16": True}, {"quant": "int4_g128"}),
        ({"w1_scale": np.ones(4, F32)}, {"w13_scale": np.ones(4, F32)}),
        ({"a1_q": np.ones(4, F32)}, {"hidden_states_scale": np.ones(4, F32)}),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_keyword_is_told_as_by_the_direct_call(backend, arguments, keywords):
    put = [backend.put(array) for array in make_layer(3).tensors().values()]
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as direct:
        fusedmoe.fused_experts(*put, **keywords)
    with pytest.raises(direct.type, match=f"^{re.escape(str(direct.value))}$"):
        door.fused_experts_impl(*put, **arguments)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"inplace": True, "no_combine": True}, ValueError, "no_combine"),
        ({"inplace": True, "defer_sum": True}, ValueError, "defer_sum"),
        ({"gemm1_alpha": 1.702}, ValueError, "gemm1_limit: expected a number with gemm1_alpha"),
        ({"activation": "silu_rounded"}, NotImplementedError, "silu_rounded"),
        (
            {"fuse_swiglu_interleaved": True, "swiglu_limit": 10.0},
            ValueError,
            "fuse_swiglu_interleaved",
        ),
    ],
)
def test_wrong_together(arguments, error, text):
    backend = TorchBackend("cpu")
    layer = make_layer(3)
    put = [backend.put(array) for array in layer.tensors().values()]
    with pytest.raises(error, match=text):
        door.fused_experts_impl(*put, **arguments)
    assert (backend.get(put[0]) == layer.tensors()["hidden_states"]).all()


def test_wrong_routing():
    backend = TorchBackend("cpu")
    scores, bias = backend.put(np.zeros((3, 8), F32)), backend.put(np.zeros(8, F32))
    weights, ids = empty_topk(backend, 3, 2)
    for call, error, text in (
        (lambda: door.topk_softmax(weights, ids, scores.double()), TypeError, "router_logits"),
        (lambda: door.topk_softmax(weights[:2], ids, scores), ValueError, "out_weights"),
        (lambda: door.topk_softmax(weights, ids.float(), scores), TypeError, "out_ids"),
        (lambda: door.topk_sigmoid(weights, ids, scores[0]), ValueError, "router_logits"),
        (lambda: door.moe_fused_gate(scores, bias[:7], 2), ValueError, "correction_bias"),
        (lambda: door.moe_fused_gate(scores, bias, 9), ValueError, "topk"),
        (lambda: door.moe_fused_gate(scores, bias, 0), ValueError, "topk"),
        (lambda: door.moe_fused_gate(scores, bias, 2, "tanh"), ValueError, "scoring_func"),
        (lambda: door.moe_fused_gate(scores, None, 2), ValueError, "correction_bias"),
        (
            lambda: door.moe_fused_gate(scores, bias, 2, "softmax", num_expert_group=2),
            NotImplementedError,
            "num_expert_group",
        ),
        (
            lambda: door.moe_fused_gate(scores, bias, 2, packed_out=ids),
            NotImplementedError,
            "packed_out",
        ),
        (lambda: door.hash_topk(scores, ids[:, 0], ids, scoring_func="x"), ValueError, "scoring"),
        (lambda: door.hash_topk(scores, ids[:, 0], ids.float()), TypeError, "tid2eid"),
        (lambda: door.moe_align_block_size(ids, 0, 4), ValueError, "block_size"),
        (lambda: door.moe_align_block_size(ids, 4, 5000), ValueError, "num_experts"),
        (
            lambda: door.moe_align_block_size(ids, 4, 4, True, return_inactive_prefix_count=True),
            ValueError,
            "return_inactive_prefix_count",
        ),
        (lambda: door.moe_sum_reduce(scores, scores, 1.0), ValueError, "input"),
        (lambda: door.moe_sum_reduce(scores[None], scores, 1.0), ValueError, "out"),
    ):
        with pytest.raises(error, match=text):
            call()
    assert (backend.get(ids) == -7).all() and np.isnan(backend.get(weights)).all()
