"""Nothing leaks: memory, blocks and reference counts after many calls, good and bad."""

import ctypes
import gc
import os
import sys

import fusedmoe
import numpy as np
import pytest
from fusedmoe import Experts, Routing, fused_experts, fused_moe
from producers import OldProducer, Producer
from support import BF16, ERRORS, Guarded, make_layer

CALLS = 10_000


class Mallinfo(ctypes.Structure):
    """struct mallinfo2 of glibc, bytes."""

    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


def malloc_bytes():
    """What malloc has handed out and not got back, in all of the process; 0 where it cannot say."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # glibc before 2.33, musl
        return 0
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def resident_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_flat(call, objects, calls=CALLS):
    """References to `objects`, Python's blocks and malloc's bytes do not grow over `calls` calls.

    Growth is counted from a warmed-up state, because caches fill once; an object, or 16 bytes, lost
    in one call of twenty is noticed."""
    for _ in range(200):
        call()
    gc.collect()
    counts = [sys.getrefcount(x) for x in objects]
    blocks, bytes_, memory = sys.getallocatedblocks(), malloc_bytes(), resident_bytes()
    for _ in range(calls):
        call()
    gc.collect()
    after = [sys.getrefcount(x) for x in objects]
    for x, now, before in zip(objects, after, counts, strict=True):
        # a small int is everybody's: its count moves by itself, but not with the calls
        flat = abs(now - before) < calls // 20 if type(x) is int else now == before
        assert flat, (x, now, before)
    grown = sys.getallocatedblocks() - blocks
    assert grown < calls // 20, f"{grown} blocks more after {calls} calls"
    grown = malloc_bytes() - bytes_
    assert grown < max(calls // 20 * 16, 4096), f"{grown} bytes of malloc more after {calls} calls"
    grown = resident_bytes() - memory  # what neither of the two counts, such as mapped memory
    assert grown < 2 << 20, f"{grown} resident bytes more after {calls} calls"


@pytest.fixture
def layer():
    return make_layer(3, 2, 16, 8, 2, 2, w13_bias=BF16, w2_bias=BF16, shared_output=True)


def arguments(layer):
    return {**layer.tensors(), **layer.options}


def test_calls_that_succeed(layer):
    kwargs = arguments(layer)
    out = np.empty((2, 16), BF16)
    objects = [*kwargs.values(), out]
    assert_flat(lambda: fused_experts(**kwargs, out=out), objects)


def test_calls_that_allocate(layer):
    kwargs = arguments(layer)
    assert_flat(lambda: fused_experts(**kwargs), list(kwargs.values()))


def failing(kwargs, wrong):
    def call():
        try:
            fused_experts(**{**kwargs, **wrong})
        except ERRORS:
            return
        raise AssertionError("this call should fail")

    return call


WRONG = {
    "dtype of the last tensor": {"topk_ids": np.zeros((2, 2), np.float32)},
    "shape of out": {"out": np.zeros((2, 17), BF16)},
    "read-only out": {"out": np.broadcast_to(np.zeros(16, BF16), (2, 16))},
    "activation": {"activation": "relu"},
    "kind": {"w2": "text"},
    "reserved": {"quant": "fp8_block"},
    "workspace": {"workspace": np.zeros(256, np.uint8)},
    "unknown keyword": {"no_such_argument": 1},
    "big number": {"routed_scaling_factor": 10**400},
    "stream": {"stream": object()},
}


@pytest.mark.parametrize("name", WRONG)
def test_calls_that_fail(layer, name):
    kwargs = arguments(layer)
    objects = [*kwargs.values(), *WRONG[name].values()]
    assert_flat(failing(kwargs, WRONG[name]), objects, CALLS // len(WRONG))


def test_many_calls_that_fail(layer):
    """10,000 of them, each wrong in another way than the one before."""
    kwargs = arguments(layer)
    calls = [failing(kwargs, wrong) for wrong in WRONG.values()]
    turn = iter(range(10**9))
    objects = list(kwargs.values())
    assert_flat(lambda: calls[next(turn) % len(calls)](), objects)


@pytest.mark.parametrize("cls", [Producer, OldProducer])
def test_producers_that_succeed_and_fail(layer, cls):
    x, w13 = cls(layer.hidden_states), cls(layer.w13)
    kwargs = {**arguments(layer), "hidden_states": x, "w13": w13}
    out, workspace = np.empty((2, 16), BF16), np.empty(1 << 14, np.uint8)

    def call():
        fused_experts(**kwargs, out=out, workspace=workspace)
        failing(kwargs, {"topk_ids": np.zeros((2, 2), np.float32)})()

    assert_flat(call, [x, w13], 5000)
    x.check_released()
    w13.check_released()


def test_experts_objects(layer):
    kwargs = {k: v for k, v in arguments(layer).items() if "bias" in k}
    args = layer.hidden_states, layer.topk_weights, layer.topk_ids

    def call():
        experts = Experts(layer.w13, layer.w2, **kwargs, max_tokens=4)
        experts(*args)
        experts.rebind(layer.w13, layer.w2, **kwargs)
        experts.run(*args)
        try:
            experts.rebind(layer.w13, layer.w13)
        except ValueError:
            pass
        try:
            Experts(layer.w13, layer.w13)
        except ValueError:
            pass

    assert_flat(call, [layer.w13, layer.w2, *args, *kwargs.values()], 2000)


def test_experts_in_a_cycle(layer):
    """The object takes part in garbage collection: a tensor that refers back to it is freed."""

    class Weights(np.ndarray):
        pass

    freed = []

    class Sentinel:
        def __del__(self):
            freed.append(1)

    w13 = layer.w13.view(Weights)
    w13.sentinel = Sentinel()
    w13.owner = Experts(w13, layer.w2)
    del w13
    gc.collect()
    assert freed == [1]


def test_stages(layer):
    logits = np.zeros((2, 2), np.float32)
    x, w13, w2 = layer.hidden_states, layer.w13, layer.w2

    def call():
        weights, ids = fusedmoe.route(logits, Routing(2))
        offsets, sorted_token_ids, row_of_slot = fusedmoe.align(ids, 2)
        intermediate = fusedmoe.gate_up(x, w13, offsets, sorted_token_ids, 2)
        rows = fusedmoe.down(intermediate, w2, offsets, sorted_token_ids, 2, topk_weights=weights)
        fusedmoe.combine(rows, row_of_slot)
        fused_moe(x, w13, w2, logits, routing=Routing(2))

    assert_flat(call, [logits, x, w13, w2], 2000)


def test_plans_of_many_sizes(layer):
    """The plan cache is bounded: 10,000 different problems leave memory flat."""
    x = np.zeros((64, 16), BF16)
    weights, ids = np.zeros((64, 2), np.float32), np.zeros((64, 2), np.int32)
    turn = iter(range(10**9))

    def call():
        n = next(turn)
        t = n % 64
        fused_experts(x[:t], layer.w13, layer.w2, weights[:t], ids[:t])
        fusedmoe.plan(n, 64 + n % 7, 32, 8, 2)

    assert_flat(call, [x, weights, ids])


def test_info_and_plan():
    """The extension's own info: the Python around it asks importlib.metadata, which has caches."""
    assert_flat(lambda: (fusedmoe._C.info(), fusedmoe.plan(8, 64, 64, 4, 2)), [])


def test_torch_calls(layer):
    pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
    from support import TorchBackend

    host = TorchBackend("cpu")
    kwargs = {k: host.put(v) for k, v in arguments(layer).items()}
    assert_flat(lambda: fused_experts(**kwargs), list(kwargs.values()))
    assert_flat(failing(kwargs, {"activation": "relu"}), list(kwargs.values()))


@pytest.mark.gpu
def test_gpu_memory(gpu, layer):
    """What is free is the device's: other processes may take some of it, but not each time."""
    torch = gpu.torch
    kwargs = {k: gpu.put(v) for k, v in arguments(layer).items()}
    bad = failing(kwargs, {"activation": "relu"})

    def call():
        fused_experts(**kwargs)
        bad()

    for _ in range(100):
        call()
    gc.collect()  # tensors of earlier tests that only a cycle holds
    changes = []
    for _ in range(8):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
        assert_flat(call, list(kwargs.values()))
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before[0]
        changes.append(torch.cuda.mem_get_info()[0] - before[1])
    assert 0 in changes


def test_guard_zones_notice_a_write(cpu):
    """The tests' own net: one byte before or after is noticed."""
    for at in (-1, 0):
        guarded = Guarded(cpu, (4, 3), BF16)
        begin = guarded.begin if at == -1 else guarded.begin + guarded.nbytes + 1
        guarded.storage[begin - 1] ^= 1
        with pytest.raises(AssertionError, match="written"):
            guarded.check("out")
