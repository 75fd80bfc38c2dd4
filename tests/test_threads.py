"""Two threads at once, the GIL while the layer computes, threads of the pool, and fork."""

import os
import subprocess
import sys
import threading
import time

import pytest
from fusedmoe import Experts, fused_experts
from support import make_layer, no_gpu, put_layer, run_layer, same_bits


def run_python(code, **environment):
    """stdout of a fresh interpreter, which can import what this one can."""
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
    return done.stdout


def in_threads(count, work):
    """Runs work(index) in `count` threads that start together; raises what any of them raised."""
    barrier, errors = threading.Barrier(count), []

    def body(index):
        try:
            barrier.wait()
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("num_threads", [2, 5])
def test_calls_from_threads(backend, seed, num_threads):
    layers = [make_layer(seed + i, 30 + i, 64, 40, 4, 2) for i in range(num_threads)]
    want = [run_layer(backend, layer) for layer in layers]
    placed = [put_layer(backend, layer) for layer in layers]

    def work(index):
        tensors, options = placed[index]
        for _ in range(50):
            out = fused_experts(**tensors, **options)
            assert same_bits(backend.get(out), want[index])

    in_threads(num_threads, work)


@pytest.mark.parametrize("max_tokens", [None, 64])
def test_one_experts_object_in_two_threads(backend, seed, max_tokens):
    """On the CPU the scratch of max_tokens is shared by the threads of one stream: not at once."""
    layers = [make_layer(seed, 40, 64, 40, 4, 2) for _ in range(2)]
    layers[1].hidden_states[:] = make_layer(seed + 1, 40, 64, 40, 4, 2).hidden_states
    want = [run_layer(backend, layer) for layer in layers]
    placed = [put_layer(backend, layer)[0] for layer in layers]
    experts = Experts(placed[0]["w13"], placed[0]["w2"], max_tokens=max_tokens)

    def work(index):
        args = [placed[index][n] for n in ("hidden_states", "topk_weights", "topk_ids")]
        for _ in range(50):
            assert same_bits(backend.get(experts(*args)), want[index])

    in_threads(2, work)


def test_rebind_while_calling(cpu, seed):
    """A call sees the old weights or the new ones, never half of each, and never freed memory."""
    layers = [make_layer(seed, 8, 64, 40, 4, 2) for _ in range(2)]
    other = make_layer(seed + 1, 8, 64, 40, 4, 2)
    layers[1].w13, layers[1].w2 = other.w13, other.w2
    want = [run_layer(cpu, layer) for layer in layers]
    first = layers[0]
    experts = Experts(first.w13.copy(), first.w2.copy())
    stop = threading.Event()

    def work(index):
        if index == 0:
            for i in range(100):
                layer = layers[(i + 1) % 2]
                experts.rebind(layer.w13.copy(), layer.w2.copy())
            stop.set()
        else:
            while not stop.is_set():
                out = experts(first.hidden_states, first.topk_weights, first.topk_ids)
                assert any(same_bits(out, w) for w in want)

    in_threads(3, work)


def test_the_gil_is_released(cpu):
    """While one thread computes, another one counts."""
    layer = make_layer(1, 256, 1024, 512, 8, 4)
    tensors = layer.tensors()
    fused_experts(**tensors)
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    while counted[0] == 0:
        time.sleep(0)
    during = 0
    for _ in range(10):
        before = counted[0]
        fused_experts(**tensors)
        during += counted[0] - before
    done.set()
    thread.join()
    # With the GIL held the count could move only at the two ends of each call.
    assert during > 40, f"the other thread ran {during} times during ten calls"


@pytest.mark.parametrize("threads", ["1", "2", "3", "64"])
def test_number_of_threads(threads):
    """Any number of threads gives the same bits."""
    code = """
import hashlib, support
from fusedmoe import fused_experts
digest = hashlib.sha256()
for tokens in (1, 5, 80):
    layer = support.make_layer(4, tokens, 136, 72, 6, 3, routing="dropped")
    digest.update(fused_experts(**layer.tensors()).tobytes())
print(digest.hexdigest())
"""
    assert run_python(code, FUSEDMOE_NUM_THREADS=threads) == run_python(
        code, FUSEDMOE_NUM_THREADS="1"
    )


@pytest.mark.parametrize("threads", ["0", "-3", "many", "", "100000"])
def test_number_of_threads_that_is_none(threads):
    code = """
import support
from fusedmoe import fused_experts
layer = support.make_layer(4, 5, 64, 32, 4, 2)
support.check_layer(support.NumpyBackend(), layer)
print("fine")
"""
    assert run_python(code, FUSEDMOE_NUM_THREADS=threads) == "fine\n"


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16"])
def test_instruction_sets(isa):
    """Every level up to what this machine has; a higher one falls back to it."""
    code = """
import itertools
import numpy as np
from fusedmoe import Routing, reference, route
from support import BF16, F16, F32, NumpyBackend, check_layer, make_layer
cpu = NumpyBackend()
for dtype, shape, order in itertools.product(
    (BF16, F16, F32),
    [(1, 64, 32, 2, 2), (7, 511, 129, 3, 2), (65, 136, 200, 2, 1), (3, 5, 3, 4, 2)],
    ("gate_up", "interleaved"),
):
    check_layer(cpu, make_layer(9, *shape, dtype, w13_bias=F32, w13_order=order))
for activation in ("gelu", "gelu_tanh", "relu2", "swiglu_oai", "situ"):
    check_layer(cpu, make_layer(9, 20, 72, 40, 4, 2, F32, activation=activation))
for dtype, method, (num_experts, topk) in itertools.product(
    (BF16, F16, F32),
    ("softmax_topk", "topk_softmax"),
    [(1, 1), (8, 2), (60, 4), (128, 8), (513, 10), (1000, 24)],
):
    logits = np.random.default_rng(9).standard_normal((7, num_experts)).astype(dtype)
    weights, ids = route(logits, Routing(topk, method))
    want_weights, want_ids = reference.route(logits, topk, method=method)
    assert (ids == want_ids).all()
    # a unit for each addition of the softmax, a few for exp, as in test_route
    assert (abs(weights - want_weights) <= 2.0**-24 * (num_experts + 64) * want_weights).all()
print("fine")
"""
    assert run_python(code, FUSEDMOE_CPU_ISA=isa) == "fine\n"


FORK = """
import os, sys, support
from fusedmoe import fused_experts
layer = support.make_layer(4, 40, 64, 32, 4, 2)
want = fused_experts(**layer.tensors())
child = os.fork()
same = support.same_bits(fused_experts(**layer.tensors()), want)
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitpid(child, 0)[1] == 0
print("fine")
"""


def test_fork_after_use():
    assert run_python("import warnings; warnings.simplefilter('ignore')\n" + FORK) == "fine\n"


def test_fork_while_another_thread_computes():
    code = """
import os, threading, support, warnings
from fusedmoe import fused_experts
warnings.simplefilter("ignore")
layer = support.make_layer(4, 40, 64, 32, 4, 2)
want = fused_experts(**layer.tensors())
stop = threading.Event()
def busy():
    while not stop.is_set():
        fused_experts(**layer.tensors())
thread = threading.Thread(target=busy)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if support.same_bits(fused_experts(**layer.tensors()), want) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
print("fine")
"""
    assert run_python(code) == "fine\n"


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu() is not None, reason=str(no_gpu()))
def test_fork_after_cuda_was_used():
    """CUDA does not survive a fork: the child hears so, and its CPU backend works."""
    code = """
import os, support, warnings
from fusedmoe import fused_experts
warnings.simplefilter("ignore")
layer = support.make_layer(4, 20, 64, 32, 4, 2)
tensors, _ = support.put_layer(support.TorchBackend(), layer)
want = fused_experts(**tensors)
child = os.fork()
if child == 0:
    try:
        fused_experts(**tensors, out=tensors["hidden_states"])
    except RuntimeError as error:
        good = "fork" in str(error)
    else:
        good = False
    support.check_layer(support.NumpyBackend(), layer)
    os._exit(0 if good else 1)
assert os.waitpid(child, 0)[1] == 0
print("fine")
"""
    assert run_python(code) == "fine\n"


def test_interpreter_exit_while_a_thread_computes():
    """A daemon thread in the middle of a call does not keep the interpreter, nor crash it."""
    code = """
import threading, time, support
from fusedmoe import fused_experts
layer = support.make_layer(4, 64, 256, 128, 4, 2)
def busy():
    while True:
        fused_experts(**layer.tensors())
threading.Thread(target=busy, daemon=True).start()
time.sleep(0.2)
print("fine", flush=True)
"""
    assert run_python(code) == "fine\n"


def test_a_second_interpreter():
    """The module has no global Python state: importing it twice gives two working copies."""
    code = """
import sys, numpy as np, support
from fusedmoe import fused_experts
layer = support.make_layer(4, 5, 64, 32, 4, 2)
want = fused_experts(**layer.tensors())
for name in [n for n in sys.modules if n.startswith("fusedmoe")]:
    del sys.modules[name]
import fusedmoe
assert fusedmoe.fused_experts is not fused_experts
assert support.same_bits(fusedmoe.fused_experts(**layer.tensors()), want)
assert support.same_bits(fused_experts(**layer.tensors()), want)
print("fine")
"""
    assert run_python(code) == "fine\n"


ENVIRONMENT = """
import os, threading, time
import numpy as np
from fusedmoe import fused_experts

x, w13, w2 = (np.ones(shape, np.float32) for shape in ((1, 4), (1, 4, 4), (1, 4, 2)))
weights, ids = np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32)
out, workspace, stop = np.empty_like(x), np.empty(4096, np.uint8), threading.Event()


def call():
    while not stop.is_set():
        fused_experts(x, w13, w2, weights, ids, out=out, workspace=workspace)


threads = [threading.Thread(target=call) for _ in range(2)]
for thread in threads:
    thread.start()
end = time.monotonic() + 4
while time.monotonic() < end:
    for i in range(3000):
        os.environ[f"FUSEDMOE_TEST_{i}"] = "v" * 50
    for i in range(3000):
        del os.environ[f"FUSEDMOE_TEST_{i}"]
stop.set()
for thread in threads:
    thread.join()
"""


def test_environment_that_changes_during_calls():
    """Stages asked for their variables without the GIL, and getenv beside another thread's setenv
    read freed memory: a crash after a second or two."""
    run_python(ENVIRONMENT)
