"""Host time of a call: what Python and the extension take before the GPU has anything to do.

    python benchmarks/bench_host.py     1 token of qwen3_30b, torch GPU tensors -> <gpu>_host.json

The kernel launches themselves are left out (FUSEDMOE_NO_LAUNCH=1); everything else of a call runs:
arguments, tensors, checks, plan, stage structs. Median of 9 runs of 20,000 calls.
"""

import argparse
import os
import statistics
import sys
import timeit
from pathlib import Path

os.environ["FUSEDMOE_NO_LAUNCH"] = "1"  # read once, when the extension is imported

import torch
from bench_layer import slug
from fusedmoe import Experts, bench, fused_experts, workspace_size
from fusedmoe.backend import backend
from fusedmoe.models import model

HERE = Path(__file__).resolve().parent
CALLS, RUNS = 20_000, 9

# What is timed -> the statement, with the names of `tensors`.
STATEMENTS = {
    "fused_experts, ten tensors": (
        "fused_experts(hidden_states, w13, w2, topk_weights, topk_ids, w13_bias=w13_bias, "
        "w2_bias=w2_bias, shared_output=shared_output, out=out, workspace=workspace)"
    ),
    "fused_experts, out and workspace allocated": (
        "fused_experts(hidden_states, w13, w2, topk_weights, topk_ids)"
    ),
    "Experts.run": "experts.run(hidden_states, topk_weights, topk_ids, out, workspace)",
    "Experts.__call__": (
        "experts(hidden_states, topk_weights, topk_ids, out=out, workspace=workspace)"
    ),
    "Experts.__call__, out and workspace allocated": (
        "experts(hidden_states, topk_weights, topk_ids)"
    ),
    "Experts.__call__, max_tokens, out allocated": (
        "experts_scratch(hidden_states, topk_weights, topk_ids)"
    ),
}


def tensors(device, sizes, dtype=torch.bfloat16):
    """Arguments of one token; contents do not matter, nothing reads them."""
    h, i, e, k = sizes
    names = {
        "hidden_states": torch.zeros(1, h, dtype=dtype, device=device),
        "w13": torch.zeros(e, 2 * i, h, dtype=dtype, device=device),
        "w2": torch.zeros(e, h, i, dtype=dtype, device=device),
        "topk_weights": torch.ones(1, k, device=device),
        "topk_ids": torch.arange(k, dtype=torch.int32, device=device).reshape(1, k),
        "w13_bias": torch.zeros(e, 2 * i, dtype=dtype, device=device),
        "w2_bias": torch.zeros(e, h, dtype=dtype, device=device),
        "shared_output": torch.zeros(1, h, dtype=dtype, device=device),
        "out": torch.empty(1, h, dtype=dtype, device=device),
    }
    nbytes = workspace_size(1, *sizes, device=device)
    names["workspace"] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    names["experts"] = Experts(names["w13"], names["w2"])
    names["experts_scratch"] = Experts(names["w13"], names["w2"], max_tokens=1)
    return names


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3_30b")
    parser.add_argument("--json", type=Path, help="record file; default by GPU")
    parser.add_argument("--commit", help="of the sources, where this copy of them has no git")
    args = parser.parse_args()

    gpu = backend("cuda")
    head = bench.header(gpu, HERE.parent, args.commit)
    names = {"fused_experts": fused_experts, **tensors("cuda", model(args.model))}
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"{gpu.text}; CPython {python}, torch {torch.__version__}; launches left out")
    records = []
    for call, statement in STATEMENTS.items():
        timer = timeit.Timer(statement, globals=names)
        timer.timeit(CALLS // 10)
        us = [run / CALLS * 1e6 for run in timer.repeat(RUNS, CALLS)]
        records.append(
            {
                "op": "host",
                "call": call,
                "framework": "torch",
                "us": round(statistics.median(us), 3),
                "us_min": round(min(us), 3),
                "us_max": round(max(us), 3),
                "num_tokens": 1,
                "python": python,
                "torch": torch.__version__,
            }
        )
        print(f"{records[-1]['us']:>8.3f} us  {call}", flush=True)
    path = args.json or HERE / "results" / f"{slug(head['gpu'])}_host.json"
    bench.write_records(path, head, records)
    print(f"-> {path.name}")


if __name__ == "__main__":
    sys.exit(main())
