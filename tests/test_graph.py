"""On a GPU: CUDA graphs, streams, and a GPU that is hidden."""

import ctypes
import os
import re
import subprocess
import sys

import fusedmoe
import numpy as np
import pytest
from fusedmoe import Experts, Routing, fused_experts, fused_moe, reference
from support import BF16, F16, F32, assert_close, make_layer, put_layer, same_bits

pytestmark = pytest.mark.gpu


def capture(torch, call):
    """(graph, result): warmed up on a side stream first, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.small
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 33, 700, 6000])  # the last: align in two launches
@pytest.mark.parametrize("given", [True, False], ids=["out given", "allocates"])
def test_replay_with_other_ids_and_weights(gpu, seed, dtype, num_tokens, given):
    """A captured call is replayed on other routings, tokens and weights, in the same memory."""
    torch = gpu.torch
    layers = [
        make_layer(seed + i, num_tokens, 72, 40, 6, 3, dtype, routing=routing, w13_bias=F32)
        for i, routing in enumerate(["uniform", "same", "dropped", "none", "half"])
    ]
    tensors, options = put_layer(gpu, layers[0])
    if given:
        size = fusedmoe.workspace_size(*layers[0].sizes, dtype=dtype.name)
        options["out"] = torch.empty_like(tensors["hidden_states"])
        options["workspace"] = torch.empty(size, dtype=torch.uint8, device=gpu.device)
    graph, out = capture(torch, lambda: fused_experts(**tensors, **options))
    for layer in layers[1:] + layers[:1]:
        for name, array in layer.tensors().items():
            tensors[name].copy_(gpu.put(array))
        options["w13_bias"].copy_(gpu.put(layer.options["w13_bias"]))
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        want, error = layer.expected()
        assert_close(gpu.get(out), want, error, seed=layer.seed)


def test_replay_of_a_routed_layer(gpu, seed, rng):
    torch = gpu.torch
    layer = make_layer(seed, 50, 72, 40, 12, 4)
    tensors, _ = put_layer(gpu, layer)
    args = tensors["hidden_states"], tensors["w13"], tensors["w2"]
    logits = torch.zeros(50, 12, device=gpu.device)
    routing = Routing(4, method="topk_softmax")
    graph, out = capture(torch, lambda: fused_moe(*args, logits, routing=routing))
    for _ in range(3):
        array = rng.standard_normal((50, 12)).astype(F32)
        logits.copy_(gpu.put(array))
        graph.replay()
        want, error = reference.fused_moe_error(layer.hidden_states, layer.w13, layer.w2, array, 4)
        assert_close(gpu.get(out), want, error, seed=seed)


@pytest.mark.parametrize("max_tokens", [None, 64])
def test_replay_of_experts(gpu, seed, max_tokens):
    torch = gpu.torch
    layer, other = make_layer(seed, 64, 72, 40, 6, 3), make_layer(seed + 1, 64, 72, 40, 6, 3)
    tensors, _ = put_layer(gpu, layer)
    experts = Experts(tensors["w13"], tensors["w2"], max_tokens=max_tokens)
    args = tensors["hidden_states"], tensors["topk_weights"], tensors["topk_ids"]
    graph, out = capture(torch, lambda: experts(*args))
    for name, array in other.tensors().items():
        tensors[name].copy_(gpu.put(array))
    graph.replay()
    want, error = other.expected()
    assert_close(gpu.get(out), want, error, seed=seed)


def test_many_layers_in_one_graph(gpu, seed):
    """A model captures all its layers back to back, in place."""
    torch = gpu.torch
    layers = [make_layer(seed + i, 17, 64, 40, 4, 2) for i in range(4)]
    placed = [put_layer(gpu, layer)[0] for layer in layers]
    x = gpu.put(layers[0].hidden_states)

    def call():
        for p in placed:
            args = p["w13"], p["w2"], p["topk_weights"], p["topk_ids"]
            fused_experts(x, *args, shared_output=x, out=x)
        return x

    eager = gpu.get(call())
    x.copy_(gpu.put(layers[0].hidden_states))
    graph, _ = capture(torch, call)
    x.copy_(gpu.put(layers[0].hidden_states))
    graph.replay()
    assert same_bits(gpu.get(x), eager)


def node_types(raw_graph):
    """CUgraphNodeType of every node: 0 is a kernel, 1 a copy, 2 a memset."""
    driver = ctypes.CDLL("libcuda.so.1")
    graph, count = ctypes.c_void_p(raw_graph), ctypes.c_size_t()
    assert driver.cuGraphGetNodes(graph, None, ctypes.byref(count)) == 0
    nodes = (ctypes.c_void_p * count.value)()
    assert driver.cuGraphGetNodes(graph, nodes, ctypes.byref(count)) == 0
    kind, kinds = ctypes.c_int(), []
    for node in nodes:
        assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        kinds.append(kind.value)
    return kinds


@pytest.mark.parametrize("num_tokens", [17, 3000])
def test_a_graph_has_kernels_only(gpu, seed, num_tokens):
    """No memset, no copy: a captured call is its kernels, as many as the plan says."""
    torch = gpu.torch
    layer = make_layer(seed, num_tokens, 64, 40, 4, 2)
    tensors, options = put_layer(gpu, layer)
    call = lambda: fused_experts(**tensors, **options)  # noqa: E731
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    plan = fusedmoe.plan(*layer.sizes)
    assert node_types(graph.raw_cuda_graph()) == [0] * plan["num_launches"]


@pytest.mark.parametrize("num_streams", [2, 4])
def test_streams_at_once(gpu, seed, num_streams):
    """Calls on several streams do not share anything."""
    torch = gpu.torch
    layers = [make_layer(seed + i, 200 + i, 136, 72, 8, 4) for i in range(num_streams)]
    placed = [put_layer(gpu, layer)[0] for layer in layers]
    experts = Experts(placed[0]["w13"], placed[0]["w2"], max_tokens=256)
    streams = [torch.cuda.Stream() for _ in layers]
    want = [gpu.get(fused_experts(**tensors)) for tensors in placed]
    shared = [
        gpu.get(experts(t["hidden_states"], t["topk_weights"], t["topk_ids"])) for t in placed
    ]
    torch.cuda.synchronize()
    outs = [[] for _ in layers]
    for _ in range(20):
        for stream, tensors, results in zip(streams, placed, outs, strict=True):
            with torch.cuda.stream(stream):
                a = fused_experts(**tensors)
                b = experts(tensors["hidden_states"], tensors["topk_weights"], tensors["topk_ids"])
                results.append((a, b))
    torch.cuda.synchronize()
    for results, first, second in zip(outs, want, shared, strict=True):
        for a, b in results:
            assert same_bits(gpu.get(a), first) and same_bits(gpu.get(b), second)


def test_nothing_waits_for_the_device(gpu, seed):
    """The call returns while the stream is still busy with what came before."""
    torch = gpu.torch
    layer = make_layer(seed, 40, 64, 40, 4, 2)
    tensors, options = put_layer(gpu, layer)
    fused_experts(**tensors, **options)
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    out = fused_experts(**tensors, **options)
    assert not torch.cuda.current_stream().query(), "the call waited for the device"
    want, error = layer.expected()
    assert_close(gpu.get(out), want, error, seed=seed)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # a prototype, says torch
def test_synchronising_debug_mode_of_torch_finds_nothing(gpu, seed):
    torch = gpu.torch
    layer = make_layer(seed, 40, 64, 40, 4, 2)
    tensors, options = put_layer(gpu, layer)
    try:
        torch.cuda.set_sync_debug_mode("error")
        out = fused_experts(**tensors, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want, error = layer.expected()
    assert_close(gpu.get(out), want, error, seed=seed)


# -------------------------------------------------------------------------------------------------
# In a process of its own
# -------------------------------------------------------------------------------------------------


def run_python(code, **environment):
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hidden_gpu(gpu):
    code = """
import fusedmoe, support
try:
    fusedmoe.load(0)
except RuntimeError as error:
    print(error)
assert fusedmoe.info()["devices"] == []
support.check_layer(support.NumpyBackend(), support.make_layer(1, 5, 32, 16, 4, 2))
"""
    text = run_python(code, CUDA_VISIBLE_DEVICES="")
    assert re.search(r"(?i)gpu|cuda", text), text


@pytest.mark.parametrize("variable", ["FUSEDMOE_SYNC", "CUDA_LAUNCH_BLOCKING"])
def test_modes(gpu, variable):
    """Synchronising after each kernel: the same layer."""
    code = """
import support
gpu = support.TorchBackend()
for tokens in (1, 40, 300):
    support.check_layer(gpu, support.make_layer(1, tokens, 72, 40, 4, 2))
print("fine")
"""
    assert run_python(code, **{variable: "1"}) == "fine\n"


def test_kernels_compiled_from_ptx_by_the_driver(gpu):
    """What a GPU newer than all machine code in the fatbins runs. Without torch, whose kernels have
    no PTX: memory and copies through fusedmoe's helpers."""
    code = """
import numpy as np, support
from fusedmoe import fused_experts
from fusedmoe.backend import backend
gpu = backend("cuda", 0)
for dtype in (support.BF16, support.F16):
    for tokens, hidden in (1, 72), (40, 72), (300, 72), (1100, 511):
        layer = support.make_layer(1, tokens, hidden, 40, 4, 2, dtype)
        tensors = {name: gpu.put(array) for name, array in layer.tensors().items()}
        out = gpu.put(np.full((tokens, hidden), np.nan, np.float32).astype(dtype))
        fused_experts(**tensors, out=out, workspace=gpu.put(np.full(1 << 24, 0xFF, np.uint8)))
        want, error = layer.expected()
        support.assert_close(np.asarray(gpu.get(out)), want, error)
print("fine")
"""
    assert run_python(code, CUDA_FORCE_PTX_JIT="1") == "fine\n"


def test_load_and_info(gpu):
    fusedmoe.load(0)
    devices = fusedmoe.info()["devices"]
    assert devices and devices[0]["name"] == gpu.torch.cuda.get_device_name(0)
    with pytest.raises((RuntimeError, ValueError), match="device"):
        fusedmoe.load(len(devices) + 7)


def test_device_out_of_memory_is_a_memory_error(gpu):
    """The framework's allocator fails: its own error comes through, out is untouched."""
    torch = gpu.torch
    layer = make_layer(1, 4, 64, 40, 4, 2)
    tensors, _ = put_layer(gpu, layer)
    free, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1024 / total)
    try:
        out = torch.cuda.OutOfMemoryError
        with pytest.raises((MemoryError, RuntimeError, out)):
            many = 200_000
            x = tensors["hidden_states"][:1].expand(many, 64)
            ids = tensors["topk_ids"][:1].expand(many, 2)
            weights = tensors["topk_weights"][:1].expand(many, 2)
            fused_experts(x, tensors["w13"], tensors["w2"], weights, ids)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    want, error = layer.expected()
    assert_close(gpu.get(fused_experts(**tensors)), want, error)


def test_numpy_arrays_still_run_on_the_cpu(gpu):
    layer = make_layer(1, 4, 64, 40, 4, 2)
    want, error = layer.expected()
    assert_close(np.asarray(fused_experts(**layer.tensors())), want, error)
