"""Chunks: a small workspace cuts the tokens of a layer into passes.

FUSEDMOE_WORKSPACE_LIMIT is read once, at import, so the layers run in a process of their own: this
file as a script, which the test starts.
"""

import os
import subprocess
import sys

import fusedmoe
import numpy as np
import pytest
from fusedmoe import Experts, Routing, fused_experts, fused_moe, reference
from support import (
    BF16,
    F32,
    NumpyBackend,
    TorchBackend,
    assert_close,
    check_layer,
    make_layer,
    put_layer,
    same_bits,
    workspace_bytes,
)

LIMIT = 60_000  # bytes; a token of the layers below needs about 800

OPTIONS = {
    "plain": {},
    "no_combine": {"no_combine": "weighted"},
    "shared_output": {"shared_output": True, "routed_scaling_factor": 0.5},
    "on_input": {"apply_router_weight_on_input": True, "w13_bias": F32},
    "dropped": {"routing": "dropped", "ids_dtype": np.int64},
    "expert_map": {"expert_map": [1, -1, 0, 3, 2], "num_ids": 5},
}


def case(name, num_tokens=300):
    return make_layer(7, num_tokens, 64, 48, 4, 2, **OPTIONS[name])


def run_case(backend, name):
    layer = case(name)
    plan = fusedmoe.plan(
        *layer.sizes, device=backend.name, no_combine=layer.options.get("no_combine", False)
    )
    assert plan["num_chunks"] > 2 and plan["chunk_tokens"] * plan["num_chunks"] >= 300
    assert workspace_bytes(backend, layer) <= LIMIT < 300 * 800
    got = check_layer(backend, layer)
    # In place: no chunk may read what an earlier one has written.
    if not layer.options.get("no_combine"):
        tensors, options = put_layer(backend, layer)
        x = tensors["hidden_states"]
        fused_experts(**tensors, **options, out=x)
        assert same_bits(backend.get(x), got)


def run_routed(backend):
    layer = case("plain")
    logits = np.random.default_rng(3).standard_normal((300, 4)).astype(BF16)
    tensors, _ = put_layer(backend, layer)
    args = tensors["hidden_states"], tensors["w13"], tensors["w2"], backend.put(logits)
    got = backend.get(fused_moe(*args, routing=Routing(2, method="topk_softmax")))
    want, error = reference.fused_moe_error(layer.hidden_states, layer.w13, layer.w2, logits, 2)
    assert_close(got, want, error)


def run_experts(backend):
    layer = case("plain")
    tensors, _ = put_layer(backend, layer)
    experts = Experts(tensors["w13"], tensors["w2"], max_tokens=300)
    args = tensors["hidden_states"], tensors["topk_weights"], tensors["topk_ids"]
    want, error = layer.expected()
    assert_close(backend.get(experts(*args)), want, error)


def main(backend, name):
    backend = NumpyBackend() if backend == "cpu" else TorchBackend()
    special = {"fused_moe": run_routed, "Experts": run_experts}
    if name in special:
        special[name](backend)
    else:
        run_case(backend, name)


def run_limited(limit, *args):
    here = os.path.dirname(__file__)
    environment = {**os.environ, "FUSEDMOE_WORKSPACE_LIMIT": str(limit)}
    environment["PYTHONPATH"] = os.pathsep.join([here, *sys.path])
    run = [sys.executable, *args]
    return subprocess.run(run, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", [*OPTIONS, "fused_moe", "Experts"])
def test_chunks(backend, name):
    done = run_limited(LIMIT, __file__, backend.name, name)
    assert done.returncode == 0, done.stderr


def test_too_small_for_one_token():
    code = """
import numpy as np, fusedmoe
x = np.ones((2, 64), np.float32)
w13, w2 = np.ones((2, 128, 64), np.float32), np.ones((2, 64, 64), np.float32)
try:
    fusedmoe.fused_experts(x, w13, w2, np.ones((2, 1), np.float32), np.zeros((2, 1), np.int32))
except ValueError as error:
    print(error)
"""
    done = run_limited(300, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "workspace_limit" in done.stdout and "300" in done.stdout


@pytest.mark.parametrize("limit", ["", "many", "-5", "1e9"])
def test_a_limit_that_is_no_number(limit):
    """A bad value is heard of, or the default is used: never an unlimited workspace."""
    code = "import fusedmoe; print(fusedmoe.workspace_size(131072, 7168, 2048, 256, 8))"
    done = run_limited(limit, "-c", code)
    if done.returncode == 0:
        assert int(done.stdout) <= 3 << 29
    else:
        assert "FUSEDMOE_WORKSPACE_LIMIT" in done.stderr


if __name__ == "__main__":
    main(*sys.argv[1:])
