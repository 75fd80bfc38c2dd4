"""Routing on the CPU, beside torch -> results/cpu_routing.json.

    python benchmarks/bench_cpu_routing.py    softmax_topk and topk_softmax at six batch sizes

torch runs `torch.topk(torch.softmax(x, -1), k)`, and divides by the sum where the weights are
renormalised. Both read the same float32 logits with the same number of threads and take turns: a
pause, in which the other's threads go to sleep, calls that wake the own ones, then calls that are
timed, one after the other. The figures are medians over turns of a call from Python. Ids are held
against torch's before anything is timed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from fusedmoe import _C, Routing, bench, ops
from fusedmoe.backend import backend, cpu_model

HERE = Path(__file__).resolve().parent
TOKENS = (1, 8, 64, 256, 1024, 4096)
SHAPES = ((128, 8), (256, 8), (512, 10))  # num_experts, topk
SECONDS = 0.8  # of both together, for one point
PAUSE = 0.02  # as in bench_cpu.py
WAKE, TIMED = 0.01, 0.005  # seconds of calls in a turn


def theirs(x, topk, renormalize):
    weights, ids = torch.topk(torch.softmax(x, -1), topk)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids


def calls(side, seconds):
    """Microseconds of a call, of as many as fill `seconds`."""
    count, begin, now = 0, time.perf_counter(), 0.0
    while now < seconds:
        side()
        count += 1
        now = time.perf_counter() - begin
    return now * 1e6 / count


def measure(method, num_experts, topk, num_tokens, threads):
    rng = np.random.default_rng((num_experts, num_tokens))
    x = torch.from_numpy(rng.standard_normal((num_tokens, num_experts), dtype=np.float32))
    routing, renormalize = Routing(topk, method), method == "topk_softmax"
    outs = torch.empty((num_tokens, topk)), torch.empty((num_tokens, topk), dtype=torch.int32)

    def ours():
        ops.route(x, routing, out_weights=outs[0], out_ids=outs[1])

    ours()
    weights, ids = theirs(x, topk, renormalize)
    if not (torch.equal(outs[1].long(), ids) and torch.allclose(outs[0], weights, rtol=1e-5)):
        raise RuntimeError(f"{method} {num_experts}/{topk}, {num_tokens} tokens: torch differs")

    sides = {ours: [], lambda: theirs(x, topk, renormalize): []}
    begin = time.perf_counter()
    while time.perf_counter() - begin < SECONDS or len(sides[ours]) < 5:
        for side, taken in sides.items():
            time.sleep(PAUSE)
            calls(side, WAKE)
            taken.append(calls(side, TIMED))
    us, torch_us = (statistics.median(taken) for taken in sides.values())
    return {
        "op": "route",
        "case": "cpu",
        "method": method,
        "logits_dtype": "float32",
        "num_experts": num_experts,
        "topk": topk,
        "num_groups": None,
        "topk_groups": None,
        "num_tokens": num_tokens,
        "us": round(us, 2),
        "us_min": round(min(sides[ours]), 2),
        "us_max": round(max(sides[ours]), 2),
        "torch_us": round(torch_us, 2),
        "threads": threads,
        "cpu": cpu_model(),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "cpu_routing.json")
    parser.add_argument("--commit", help="of the sources, where this copy of them has no git")
    args = parser.parse_args()

    cpu = backend("cpu")
    threads = _C.info()["cpu"]["threads"]
    torch.set_num_threads(threads)
    print(f"{cpu.text}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    records = []
    for method in ("softmax_topk", "topk_softmax"):
        for num_experts, topk in SHAPES:
            print(f"\n{method} {num_experts}/{topk}\n  tokens         us    torch us   ratio")
            for num_tokens in TOKENS:
                with torch.inference_mode():
                    r = measure(method, num_experts, topk, num_tokens, threads)
                records.append(r)
                print(
                    f"{num_tokens:>8} {r['us']:>10.1f} {r['torch_us']:>11.1f} "
                    f"{r['torch_us'] / r['us']:>7.2f}",
                    flush=True,
                )
    bench.write_records(args.json, bench.header(cpu, HERE.parent, args.commit), records)
    print(f"-> {args.json.name}")


if __name__ == "__main__":
    sys.exit(main())
