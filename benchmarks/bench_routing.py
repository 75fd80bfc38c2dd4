"""Routing and alignment on this machine's GPU -> results/<gpu>_routing.json.

    python benchmarks/bench_routing.py             the points below, then every method at 3 sizes
    python benchmarks/bench_routing.py --op align  one op: route, align, route_align

A point is 40 calls back to back in one CUDA graph, on tensors that stay where the gate's product
would have left them, in L2; us is the median of 7 replays, divided by 40. Ids, weights and rows of
the call are held against the oracle before anything is timed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from bench_layer import slug
from fusedmoe import Routing, bench, ops, reference
from fusedmoe.backend import backend
from fusedmoe.generate import dtype_of
from fusedmoe.routing import METHODS

HERE = Path(__file__).resolve().parent
CALLS = 40
TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
METHOD_TOKENS = (1, 256, 16384)  # of every method in docs/routing.md

# method, dtype of the logits, num_experts, topk, and what else the method takes
ROUTES = (
    ("sigmoid_bias_grouped", "float32", 256, 8, {"num_groups": 8, "topk_groups": 4}),
    ("sigmoid_bias", "float32", 384, 8, {}),
    ("topk_softmax", "bfloat16", 128, 8, {}),
    ("topk_softmax", "bfloat16", 256, 8, {}),
    ("topk_softmax", "bfloat16", 512, 10, {}),
    ("sigmoid_bias", "bfloat16", 896, 16, {}),
)
ALIGNS = ((128, 8), (256, 8), (512, 10))
ROUTE_ALIGNS = (ROUTES[0], ROUTES[2])
# What the model families of the table use; the rest as 256 experts, topk 8, float32.
SHAPES = {
    "softmax_topk": ("bfloat16", 64, 8, {}),
    "topk_softmax": ("bfloat16", 128, 8, {}),
    "topk_sigmoid": ("bfloat16", 128, 8, {}),
    "sigmoid": ("bfloat16", 128, 8, {}),
    "llama4": ("bfloat16", 128, 1, {}),
    "softmax_grouped": ("float32", 160, 6, {"num_groups": 8, "topk_groups": 3}),
    "softmax_bias": ("float32", 64, 6, {}),
    "sqrt_softplus": ("float32", 256, 6, {}),
    "sqrt_softplus_bias": ("float32", 256, 6, {}),
    "hash": ("float32", 256, 6, {}),
    "sigmoid_bias_sink": (
        "float32",
        256,
        6,
        {"num_fused_shared_experts": 2, "shared_weight": "sink"},
    ),
}
GROUPS = {"num_groups": 8, "topk_groups": 4}
CORRECT_ONLY = ("sparsemixer", "softmax_quota", *(m for m in METHODS if m.startswith("simulated")))
CHECKED_TOKENS = 64


class Point:
    """One op on one shape: tensors, the call, its check."""

    def __init__(self, device, op, num_tokens, method, logits_dtype, num_experts, topk, fields):
        self.device, self.op, self.num_tokens = device, op, num_tokens
        self.method, self.logits_dtype = method, logits_dtype
        self.num_experts, self.topk, self.fields = num_experts, topk, dict(fields)
        self.random = np.random.default_rng((num_tokens, num_experts, topk))
        scratch = ops.workspace_size(num_tokens, 8, 8, num_experts, topk, device="cuda")
        self.workspace = device.empty((scratch,), "uint8")
        if op != "align":
            self._make_logits()
        slots = num_tokens * topk
        self.ids = device.empty((num_tokens, self._num_slots()), "int32")
        if op == "align":
            sizes = bench.model("qwen3_30b")._replace(num_experts=num_experts, topk=topk)
            self.host_ids = bench.routing(num_tokens, sizes, (num_tokens, num_experts))[1]
            self.ids = device.put(self.host_ids)
        self.aligned = (
            device.empty((num_experts + 1,), "int32"),
            device.empty((slots,), "int32"),
            device.empty((num_tokens, topk), "int32"),
        )

    def _num_slots(self):
        return self.topk + self.fields.get("num_fused_shared_experts", 0)

    def _make_logits(self):
        row, random, device = METHODS[self.method], self.random, self.device
        columns = self.num_experts
        columns += self.fields.get("num_fused_shared_experts", 0)
        shape = (self.num_tokens, columns)
        self.logits = random.standard_normal(shape, np.float32).astype(dtype_of(self.logits_dtype))
        if row.bias != "none":
            bias = random.uniform(-0.2, 0.2, self.num_experts).astype(np.float32)
            self.fields["correction_bias"] = bias
        if row.ids == "table":
            rows = self.num_tokens if self.method == "forced" else 1000
            table = np.argsort(random.random((rows, self.num_experts)), axis=1)
            self.fields["tid2eid"] = table[:, : self.topk].astype(np.int32)
        if self.method == "hash":
            self.fields["token_ids"] = random.integers(0, 1000, self.num_tokens).astype(np.int32)
        on_device = {
            name: device.put(value) if isinstance(value, np.ndarray) else value
            for name, value in self.fields.items()
        }
        self.routing = Routing(self.topk, method=self.method, **on_device)
        self.device_logits = device.put(self.logits)
        self.weights = device.empty((self.num_tokens, self._num_slots()), "float32")

    def call(self):
        offsets, rows, row_of_slot = self.aligned
        outs = {"stream": self.device.stream}
        if self.op != "align":
            outs.update(out_weights=self.weights, out_ids=self.ids)
        if self.op != "route":
            outs.update(
                out_expert_offsets=offsets,
                out_sorted_token_ids=rows,
                out_row_of_slot=row_of_slot,
                workspace=self.workspace,
            )
        if self.op == "route":
            ops.route(self.device_logits, self.routing, **outs)
        elif self.op == "align":
            ops.align(self.ids, self.num_experts, **outs)
        else:
            ops.route_align(self.device_logits, self.routing, **outs)

    def measure(self):
        """The record; RuntimeError where the result is wrong."""
        self.call()
        if self.op != "align":
            self._check_route()
        if self.op != "route":
            self._check_align()
        times = self.device.prepare([self.call] * CALLS)(9)[2:]
        return {
            "op": self.op,
            "case": "uniform",
            "method": self.method,
            "logits_dtype": self.logits_dtype,
            "num_experts": self.num_experts,
            "topk": self.topk,
            "num_groups": self.fields.get("num_groups"),
            "topk_groups": self.fields.get("topk_groups"),
            "num_tokens": self.num_tokens,
            "us": round(statistics.median(times), 2),
            "us_min": round(min(times), 2),
            "us_max": round(max(times), 2),
        }

    def _fail(self, what):
        raise RuntimeError(
            f"{self.op} {self.method} {self.num_experts}/{self.topk}, {self.num_tokens} tokens: "
            f"wrong {what}, not timed"
        )

    def _check_route(self):
        """Every slot holds the largest key left, to 8 units of its rounding; weights to 1e-5."""
        ids, weights = self.device.get(self.ids), self.device.get(self.weights)
        tokens = bench.sampled(self.num_tokens, CHECKED_TOKENS)
        fields, topk = dict(self.fields), self.topk
        for name in ("token_ids", "tid2eid") if self.method == "hash" else ():
            fields[name] = fields[name][tokens] if name == "token_ids" else fields[name]
        if self.method == "forced":
            fields["tid2eid"] = fields["tid2eid"][tokens]
        logits, got = self.logits[tokens], ids[tokens]
        if METHODS[self.method].ids == "largest":
            x = logits[:, : self.num_experts]
            x, score = reference.route_scores(x, self.method, fields.get("correction_bias"))
            key = reference.route_keys(x, score, self.method, fields.get("correction_bias"))
            want = reference.route_choice(
                key, x.shape, topk, self.method, fields.get("num_groups"), fields.get("topk_groups")
            )
            off = np.take_along_axis(key, got[:, :topk].astype(np.int64), 1)
            off = np.abs(off - np.take_along_axis(key, want, 1))
            if not (off <= 2.0**-21 * np.abs(key).max(axis=1, keepdims=True)).all():
                self._fail("ids")
            fields["topk_ids"] = got[:, :topk].astype(np.int64)
        fields["num_shared"] = fields.pop("num_fused_shared_experts", 0)
        want, want_ids = reference.route(logits, topk, method=self.method, **fields)
        if not (got == want_ids).all():
            self._fail("ids")
        if not np.allclose(weights[tokens], want, rtol=1e-5, atol=1e-30):
            self._fail("weights")

    def _check_align(self):
        ids = self.device.get(self.ids)
        want = reference.align(ids, self.num_experts)
        got = [self.device.get(tensor) for tensor in self.aligned]
        if not all(
            (g[: w.size] if g.ndim == 1 else g).tolist() == w.tolist()
            for g, w in zip(got, want, strict=True)
        ):
            self._fail("rows")


def points(wanted):
    """(op, num_tokens, method, dtype, num_experts, topk, fields) of all points."""
    if wanted in (None, "route"):
        yield from (("route", n, *route) for route in ROUTES for n in TOKENS)
    if wanted in (None, "align"):
        yield from (("align", n, None, None, *align, {}) for align in ALIGNS for n in TOKENS)
    if wanted in (None, "route_align"):
        yield from (("route_align", n, *route) for route in ROUTE_ALIGNS for n in TOKENS)
    if wanted in (None, "methods"):
        done = {route[:4] for route in ROUTES}
        for method, row in METHODS.items():
            groups = {name: GROUPS[name] for name in GROUPS if row.groups in ("max", "top2")}
            shape = SHAPES.get(method, ("float32", 256, 8, groups))
            if method not in CORRECT_ONLY and (method, *shape[:3]) not in done:
                yield from (("route", n, method, *shape) for n in METHOD_TOKENS)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=("route", "align", "route_align", "methods"))
    parser.add_argument("--device", type=int, default=0, help="index of the GPU")
    parser.add_argument("--json", type=Path, help="record file; default by GPU")
    parser.add_argument("--commit", help="of the sources, where this copy of them has no git")
    args = parser.parse_args()

    gpu = backend("cuda", args.device)
    head = bench.header(gpu, HERE.parent, args.commit)
    path = args.json or HERE / "results" / f"{slug(head['gpu'])}_routing.json"
    print(f"{gpu.text}, driver {head['driver']}, CUDA {head['cuda']}, commit {head['commit']}")
    begin, records, line = time.perf_counter(), [], None
    for op, num_tokens, *shape in points(args.op):
        record = Point(gpu, op, num_tokens, *shape).measure()
        records.append(record)
        name = f"{op} {shape[0] or ''} {shape[2]}/{shape[3]} {shape[1] or ''}"
        if name != line:
            line = name
            print(f"\n{name:<50}", end="")
        print(f"{num_tokens:>7}:{record['us']:>7.2f}", end="", flush=True)
    bench.write_records(path, head, records)
    print(f"\n\n{len(records)} points in {time.perf_counter() - begin:.0f} s -> {path.name}")


if __name__ == "__main__":
    sys.exit(main())
