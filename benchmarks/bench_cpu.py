"""The layer on the CPU, beside torch's CPU path of it and what this machine reads from memory.

    python benchmarks/bench_cpu.py    12 batch sizes of qwen3_30b, bf16 -> results/cpu_layer.json

torch runs the layer as transformers does: a loop over the experts with bf16 matrix products. Both
work on the same weights with the same number of threads and take turns; the figures are medians.
gb_per_s counts the weights of the experts that the batch visits, once each. The read bandwidth is
measured with all threads before each of the windows that a point is made of; of_read_bandwidth is
the median of the windows' shares.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fusedmoe import _C, bench, ops
from fusedmoe.backend import backend, cpu_model
from fusedmoe.models import DTYPES, TOKENS, add_arguments, chosen_points

HERE = Path(__file__).resolve().parent
ROUTINGS = 8
SECONDS = 2.0  # of both together, for one point
WINDOWS = 5  # each with a read bandwidth of its own
ROUNDS = 2  # of a window, at least
# Threads of either side spin for a while after their work, OpenMP's for 300,000 `pause`: 6 ms on
# AMD, 14 ms on Intel. This keeps them out of the other's time.
PAUSE = 0.02


def torch_layer(hidden_states, w13, w2, topk_weights, topk_ids):
    """The layer as transformers runs it on a CPU."""
    out = torch.zeros_like(hidden_states)
    mask = F.one_hot(topk_ids, w13.shape[0]).permute(2, 1, 0)
    for expert in mask.sum((1, 2)).nonzero().flatten().tolist():
        slot, token = torch.where(mask[expert])
        gate, up = F.linear(hidden_states[token], w13[expert]).chunk(2, dim=-1)
        row = F.linear(F.silu(gate) * up, w2[expert]) * topk_weights[token, slot, None]
        out.index_add_(0, token, row.to(out.dtype))
    return out


class Point:
    """One batch size: inputs of ROUTINGS batches, for both sides."""

    def __init__(self, layer, num_tokens):
        self.layer, self.num_tokens = layer, num_tokens
        self.x = layer.x[:num_tokens]
        self.out = np.empty_like(self.x)
        nbytes = ops.workspace_size(
            num_tokens, *layer.sizes, dtype=DTYPES[layer.dtype], device="cpu"
        )
        self.workspace = np.empty(nbytes, np.uint8)
        self.pairs = [
            bench.routing(num_tokens, layer.sizes, (0, num_tokens, i)) for i in range(ROUTINGS)
        ]
        self.torch_x = as_torch(self.x)
        self.torch_pairs = [
            (torch.from_numpy(weights).to(self.torch_x.dtype), torch.from_numpy(ids).long())
            for weights, ids in self.pairs
        ]

    def ours(self, i):
        pair = self.pairs[i % ROUTINGS]
        weights = self.layer.weights[0]
        ops.fused_experts(self.x, *weights, *pair, out=self.out, workspace=self.workspace)

    def theirs(self, i):
        return torch_layer(self.torch_x, *self.layer.torch_weights, *self.torch_pairs[i % ROUTINGS])

    def weight_bytes(self):
        """Bytes of the experts that a batch visits, mean over the batches."""
        experts = statistics.mean(np.unique(ids).size for _, ids in self.pairs)
        return experts * self.layer.sizes.expert_elements * self.x.itemsize


def measure(layer, num_tokens, threads):
    point = Point(layer, num_tokens)
    point.ours(0)
    report, _ = layer.check(num_tokens, point.out)
    difference = rel_rms(as_torch(point.out), point.theirs(0))
    if not difference < 0.05:
        raise RuntimeError(f"{num_tokens} tokens: torch differs by {difference:.3f}")

    # A shared machine's memory is now slow, now fast: a share of it holds within one window only.
    times, shares, read_rates = {point.ours: [], point.theirs: []}, [], []
    i = 0
    for _ in range(WINDOWS):
        read_rates.append(layer.backend.read_bandwidth())
        first, begin = len(times[point.ours]), time.perf_counter()
        while len(times[point.ours]) < first + ROUNDS or (
            len(times[point.ours]) < first + 40 and time.perf_counter() - begin < SECONDS / WINDOWS
        ):
            for side, taken in times.items():
                time.sleep(PAUSE)
                start = time.perf_counter()
                side(i)
                taken.append((time.perf_counter() - start) * 1e6)
            i += 1
        rate = point.weight_bytes() / statistics.median(times[point.ours][first:]) * 1e6
        shares.append(rate / read_rates[-1])
    ours, theirs = (sorted(taken) for taken in times.values())
    us = statistics.median(ours)
    rate = point.weight_bytes() / us / 1e3
    return {
        "op": "layer",
        "case": "cpu",
        "dtype": layer.dtype,
        "model": layer.name,
        **layer.sizes._asdict(),
        "num_tokens": num_tokens,
        "us": round(us, 1),
        "us_min": round(ours[0], 1),
        "us_max": round(ours[-1], 1),
        "read_gb_per_s": round(statistics.median(read_rates) / 1e9, 2),
        "gb_per_s": round(rate, 2),
        "of_read_bandwidth": round(statistics.median(shares), 3),
        "torch_us": round(statistics.median(theirs), 1),
        "rel_rms": float(f"{report.rel_rms:.3g}"),
        "threads": threads,
        "cpu": cpu_model(),
    }


def as_torch(array):
    """The tensor in the memory of a NumPy array; NumPy's bfloat16 means nothing to torch."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def rel_rms(got, want):
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, ("qwen3_30b",), [n for n in TOKENS if n <= 2048])
    parser.add_argument("--json", type=Path, default=HERE / "results" / "cpu_layer.json")
    parser.add_argument("--commit", help="of the sources, where this copy of them has no git")
    args = parser.parse_args()

    models, tokens = chosen_points(args)
    cpu = backend("cpu")
    threads = _C.info()["cpu"]["threads"]
    torch.set_num_threads(threads)
    head = bench.header(cpu, HERE.parent, args.commit)
    print(f"{cpu.text}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in models:
        layer = bench.Layer(cpu, name, args.dtype, max(tokens))
        layer.torch_weights = [as_torch(array) for array in layer.host]
        records = []
        print(f"\n{name} {args.dtype}")
        print("  tokens         us       GB/s  of read    torch us   ratio    rel_rms")
        with torch.inference_mode():
            for num_tokens in tokens:
                r = measure(layer, num_tokens, threads)
                records.append(r)
                print(
                    f"{num_tokens:>8} {r['us']:>10.0f} {r['gb_per_s']:>10.1f} "
                    f"{100 * r['of_read_bandwidth']:>7.0f}% {r['torch_us']:>11.0f} "
                    f"{r['torch_us'] / r['us']:>7.2f} {r['rel_rms']:>10.2e}",
                    flush=True,
                )
        bench.write_records(args.json, head, records)
    print(f"-> {args.json.name}")


if __name__ == "__main__":
    sys.exit(main())
