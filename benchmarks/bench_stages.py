"""The stages of the layer, each alone, on this machine's GPU: where the time goes.

    python benchmarks/bench_stages.py                   7 bf16 models -> results/<gpu>_stages.json
    python benchmarks/bench_stages.py --quick           one model, few batch sizes

Protocol: that of fusedmoe/bench.py, with the calls of one stage in the graph. gate_up and down
alone make the list of tiles first, which align does in the layer; that launch is left in.
tb_per_s counts every byte once: the weights of the distinct experts, rows read and rows written.
"""

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from bench_layer import slug
from fusedmoe import bench, ops
from fusedmoe.backend import backend
from fusedmoe.models import BF16_MODELS, DTYPES, add_arguments, chosen_points

HERE = Path(__file__).resolve().parent
TOKENS = (1024, 2048, 4096, 8192, 16384)
STAGES = ("align", "gate_up", "down", "combine")


class Stages(bench.Layer):
    """The layer's weights and oracle, and the calls of one stage at a time."""

    def calls(self, num_tokens):
        """{stage: calls}, routings and weight sets in turn, and the output of the last stage."""
        gpu, dtype, sizes = self.backend, DTYPES[self.dtype], self.sizes
        slots, stream = num_tokens * sizes.topk, {"stream": gpu.stream}
        x = gpu.put(self.x[:num_tokens])
        intermediate = gpu.empty((slots, sizes.intermediate_size), dtype)
        rows = gpu.empty((slots, sizes.hidden_size), dtype)
        out = gpu.empty((num_tokens, sizes.hidden_size), dtype)
        workspace = gpu.empty((1 << 24,), "uint8")
        calls = {stage: [] for stage in STAGES}
        for i in range(4):
            pair = bench.routing(num_tokens, sizes, (self.seed, num_tokens, i))
            weights, ids = [gpu.put(array) for array in pair]
            offsets = gpu.empty((sizes.num_experts + 1,), "int32")
            sorted_ids = gpu.empty((slots,), "int32")
            row_of_slot = gpu.empty((num_tokens, sizes.topk), "int32")
            w13, w2 = self.weights[i % len(self.weights)]
            groups, scratch = (offsets, sorted_ids), {"workspace": workspace, **stream}
            outs = {
                "out_expert_offsets": offsets,
                "out_sorted_token_ids": sorted_ids,
                "out_row_of_slot": row_of_slot,
            }
            align = partial(ops.align, ids, sizes.num_experts, **outs, **scratch)
            gate_up = partial(ops.gate_up, x, w13, *groups, sizes.topk, out=intermediate, **scratch)
            down = partial(ops.down, intermediate, w2, *groups, sizes.topk, out=rows, **scratch)
            combine = partial(ops.combine, rows, row_of_slot, out=out, **stream)
            down.keywords["topk_weights"] = weights
            for stage, call in zip(STAGES, (align, gate_up, down, combine), strict=True):
                calls[stage].append(call)
        return calls, out

    def work(self, stage, num_tokens):
        """(bytes, FLOPs) of one call of a stage."""
        sizes, slots = self.sizes, num_tokens * self.sizes.topk
        hidden, inner = sizes.hidden_size, sizes.intermediate_size
        experts = bench.distinct_experts(sizes, num_tokens)
        if stage == "align":
            return 12 * slots, 0
        if stage == "combine":
            return 2 * (slots + num_tokens) * hidden, 0
        width = 2 * inner if stage == "gate_up" else inner
        flops = 2 * slots * width * hidden
        read = num_tokens * hidden + slots * inner if stage == "gate_up" else slots * inner
        written = 0 if stage == "gate_up" else slots * hidden
        return 2 * (experts * width * hidden + read + written), flops

    def measure_stages(self, num_tokens):
        """The records of one point, one for each stage; RuntimeError where the result is wrong."""
        calls, out = self.calls(num_tokens)
        for i in range(3, -1, -1):  # the first routing last: its result is checked
            for stage in STAGES:
                calls[stage][i]()
        report, _ = self.check(num_tokens, out)
        plan = ops.plan(num_tokens, *self.sizes, dtype=DTYPES[self.dtype], device="cuda")
        records = []
        for stage in STAGES:
            replay = self.backend.prepare(calls[stage])
            if num_tokens >= bench.LARGE:
                time.sleep(bench.IDLE_SECONDS)
            times = replay(bench.WARM_REPLAYS + bench.REPLAYS)[bench.WARM_REPLAYS :]
            us = statistics.median(times)
            nbytes, flops = self.work(stage, num_tokens)
            records.append(
                {
                    "op": stage,
                    "case": "uniform",
                    "dtype": self.dtype,
                    "model": self.name,
                    **self.sizes._asdict(),
                    "num_tokens": num_tokens,
                    "us": round(us, 2),
                    "us_min": round(min(times), 2),
                    "us_max": round(max(times), 2),
                    "tb_per_s": round(nbytes / us / 1e6, 3),
                    "tflop_per_s": round(flops / us / 1e6, 1),
                    "rel_rms": float(f"{report.rel_rms:.3g}"),
                    "plan": plan[stage]["name"] if stage in plan else stage,
                }
            )
        return records


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, BF16_MODELS, TOKENS)
    parser.add_argument("--device", type=int, default=0, help="index of the GPU")
    parser.add_argument("--json", type=Path, help="record file; default by GPU")
    parser.add_argument("--commit", help="of the sources, where this copy of them has no git")
    args = parser.parse_args()

    gpu = backend("cuda", args.device)
    models, tokens = chosen_points(args)
    head = bench.header(gpu, HERE.parent, args.commit)
    path = args.json or HERE / "results" / f"{slug(head['gpu'])}_stages.json"
    print(f"{gpu.text}, driver {head['driver']}, CUDA {head['cuda']}, commit {head['commit']}")
    pool = ThreadPoolExecutor(4)
    for name in models:
        layer = Stages(gpu, name, args.dtype, max(tokens), pool=pool)
        print(f"\n{name} {args.dtype}\n{'tokens':>8}", end="")
        print("".join(f"{stage:>10}{'TB/s':>7}{'TFLOP/s':>9}" for stage in STAGES), flush=True)
        records = []
        for num_tokens in tokens:
            layer.expect(num_tokens)
        for num_tokens in tokens:
            point = layer.measure_stages(num_tokens)
            records += point
            print(f"{num_tokens:>8}", end="")
            cells = ((r["us"], r["tb_per_s"], r["tflop_per_s"]) for r in point)
            print("".join(f"{a:>10.1f}{b:>7.2f}{c:>9.1f}" for a, b, c in cells), flush=True)
        bench.write_records(path, head, records)
        del layer


if __name__ == "__main__":
    sys.exit(main())
