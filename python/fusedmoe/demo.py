"""The demo: one full-size layer, from router logits and hidden states to the output.

Generates the weights, runs `fused_moe` at a few batch sizes, and prints the time, how fast the
weights went by beside what this machine's memory can do, and the error against the float64 oracle.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from . import generate, ops, reference
from .backend import backend as make_backend
from .models import model
from .routing import Routing

ROUTINGS = 8  # batches that take turns, so that small ones do not find their experts in a cache
SAMPLED_TOKENS = 4  # of a batch, held against the oracle
SECONDS = 1.0  # spent on timing one batch size


def run(name="qwen3_30b", device="auto", dtype="bfloat16", tokens=(1, 16, 256), seed=0):
    """Prints the demo; returns whether every result is within its bound of the oracle."""
    sizes = model(name)
    backend = make_backend(device)
    nbytes = sizes.num_experts * sizes.expert_elements * generate.dtype_of(dtype).itemsize
    print(
        f"{name}: hidden {sizes.hidden_size}, intermediate {sizes.intermediate_size}, "
        f"{sizes.num_experts} experts, top-{sizes.topk}, {dtype}, {nbytes / 1e9:.2f} GB of weights"
    )
    print(f"{backend.name}: {backend.text}")
    bandwidth = backend.read_bandwidth()  # before there are weights: it needs memory of its own
    with _progress(nbytes) as progress:
        host = generate.layer(sizes, dtype, seed, progress)
    weights = [backend.put(array) for array in host]
    print(f"memory: {bandwidth / 1e9:.1f} GB/s read, measured now\n")
    print("  tokens        time   weights   of memory's   error against float64, and the")
    print("                          GB/s     bandwidth   most that the dtype allows")
    verdicts = []
    for num_tokens in tokens:
        verdicts.append(_batch(backend, sizes, dtype, num_tokens, host, weights, bandwidth, seed))
    print(f"\n{'every' if all(verdicts) else 'NOT every'} result is within its bound of the oracle")
    return all(verdicts)


def _batch(backend, sizes, dtype, num_tokens, host, weights, bandwidth, seed):
    """One line of the table: time, bandwidth and error of one batch size."""
    routing = Routing(topk=sizes.topk, method="topk_softmax")
    shape = (num_tokens, sizes.hidden_size)
    x = generate.normal(shape, dtype, 1.0, (seed, num_tokens, 0))
    logits = [
        generate.normal((num_tokens, sizes.num_experts), "float32", 1.0, (seed, num_tokens, i + 1))
        for i in range(ROUTINGS)
    ]
    scratch = ops.workspace_size(
        num_tokens,
        *sizes,
        dtype=dtype,
        device=backend.name,
        routed=True,
        router_experts=sizes.num_experts,
    )
    workspace, out = backend.empty((scratch,), "uint8"), backend.empty(shape, dtype)
    hidden_states, router_logits = backend.put(x), [backend.put(array) for array in logits]

    def call(i):
        ops.fused_moe(
            hidden_states,
            *weights,
            router_logits[i],
            routing=routing,
            out=out,
            workspace=workspace,
            stream=backend.stream,
        )

    call(0)
    got = np.asarray(backend.get(out))
    chosen = np.linspace(0, num_tokens - 1, min(num_tokens, SAMPLED_TOKENS)).astype(int)
    want, error = reference.fused_moe_error(
        x, *host, logits[0], sizes.topk, method="topk_softmax", tokens=chosen
    )
    report = reference.compare(got[chosen], want, error)

    replay = backend.prepare([lambda i=i: call(i) for i in range(ROUTINGS)])
    replay(1)
    us = statistics.median(_for_a_while(replay))
    experts = [np.unique(reference.route(array, sizes.topk)[1]).size for array in logits]
    expert_bytes = sizes.expert_elements * generate.dtype_of(dtype).itemsize
    rate = statistics.mean(experts) * expert_bytes / (us * 1e-6)
    print(
        f"{num_tokens:8d}  {_time(us)}  {rate / 1e9:8.1f}  {100 * rate / bandwidth:10.0f} %   "
        f"{report.rel_rms:.2e} of {report.rel_rms_bound:.2e}  {'pass' if report.ok else 'FAIL'}"
    )
    if not report.ok:
        print(f"          {report.message}")
    return report.ok


def _for_a_while(replay):
    """Times per call from at least three replays and about SECONDS."""
    begin, times = time.perf_counter(), []
    while len(times) < 3 or (time.perf_counter() - begin < SECONDS and len(times) < 50):
        times += replay(1)
    return times


def _time(us):
    return f"{us:7.1f} us" if us < 1e4 else f"{us / 1e3:7.1f} ms"


class _progress:
    """A tqdm bar over bytes, or nothing where tqdm is not installed."""

    def __init__(self, nbytes):
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            self.bar = tqdm(
                total=nbytes, unit="B", unit_scale=True, desc="generating weights", mininterval=0.2
            )

    def __enter__(self):
        return self.bar.update if self.bar else None

    def __exit__(self, *error):
        if self.bar:
            self.bar.close()
