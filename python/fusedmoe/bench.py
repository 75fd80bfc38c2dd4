"""The benchmark harness: one protocol, one record format; scripts in benchmarks/ are thin on it.

Protocol, for a layer `(hidden_states, topk_weights, topk_ids) -> out` on a GPU:
    - Random normal activations and weights; uniform random distinct topk_ids (int32), float32
      topk_weights.
    - The result of the first call is held against the float64 oracle before anything is timed.
    - Two weight sets (two layers) take turns; 16 calls with 16 routings (4 from 4096 tokens)
      stand back to back in one CUDA graph; a replay is timed by events, divided by the calls.
    - us: median of 5 replays after 2. From 4096 tokens the chip is power-limited, so there us is
      taken after 0.7 s of idle, and us_hot (of uniform routing) after 2.5 s of the same load.
On a CPU there is one weight set, larger than any cache, and the routings take turns.

Records: `{"gpu", "driver", "cuda", "commit", "date", "command", "chip_stream_us", "records"}`. A
run that measures some of the points replaces these and keeps the rest.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np

from . import _C, generate, ops, reference
from ._version import __version__
from .backend import backend as make_backend
from .backend import cpu_model
from .models import DTYPES, TOKENS, chosen_points, model

LARGE = 4096  # tokens from which the chip is power-limited
CHECKED_TOKENS = 8  # of one call, held against the oracle
WARM_REPLAYS, REPLAYS = 2, 5
IDLE_SECONDS, HOT_SECONDS = 0.7, 2.5


# -------------------------------------------------------------------------------------------------
# One layer, measured
# -------------------------------------------------------------------------------------------------


class Layer:
    """The weights of one model on one backend, made once for all its points.

    sizes: of a layer that is not in the table of models; `name` is then None.
    pool: an executor that makes weights and oracle results beside the timing, or None: in turn. A
    GPU's events do not notice what the host does meanwhile; a CPU's clock would.
    """

    def __init__(self, backend, name, dtype, max_tokens, seed=0, pool=None, sizes=None):
        self.backend, self.name, self.sizes, self.dtype = backend, name, sizes or model(name), dtype
        self.seed, self.pool = seed, pool
        full = DTYPES[dtype]
        seeds = [(seed, 0), (seed, 1)] if backend.name == "cuda" else [(seed, 0)]
        sets = (pool.map if pool else map)(lambda own: generate.layer(self.sizes, full, own), seeds)
        self.weights = []
        for host in sets:
            self.host = self.host if self.weights else host  # of the first set, for the oracle
            self.weights.append([backend.put(array) for array in host])
        shape = (max_tokens, self.sizes.hidden_size)
        self.x = generate.normal(shape, full, 1.0, (seed, 2))
        self.wanted, self.biases = {}, None

    def expect(self, num_tokens, case="uniform"):
        """Starts on the oracle's result for the first call of a point, where there is a pool."""
        if self.pool:
            self.wanted[num_tokens, case] = self.pool.submit(self.oracle, num_tokens, case)

    def oracle(self, num_tokens, case="uniform"):
        """(tokens, want, error, RMS error of unfused kernels) of the first call of a point."""
        tokens = sampled(num_tokens)
        arguments = self.x[:num_tokens], *self.host, *self.routing(num_tokens, case, 0)
        options = self.options(case, lambda array: array)
        want, error = reference.fused_experts_error(
            *arguments, tokens=tokens, deterministic=case != FAST, **options
        )
        unfused_rms = None if options else reference.unfused_rms(*arguments, tokens=tokens)
        return tokens, want, error, unfused_rms

    def options(self, case, put):
        """What the calls of a case have beside plain gated silu; put: what makes tensors."""
        if case != OPTIONS:
            return {}
        if "gptoss" not in self.name:
            return {"activation": "gelu_tanh"}
        if self.biases is None:
            hidden_size, intermediate_size, num_experts, _ = self.sizes
            self.biases = [
                generate.normal((num_experts, size), DTYPES[self.dtype], 0.5, (self.seed, 3, size))
                for size in (2 * intermediate_size, hidden_size)
            ]
        names = ("w13_bias", "w2_bias")
        biases = {name: put(array) for name, array in zip(names, self.biases, strict=True)}
        return {
            "activation": "swiglu_oai",
            "activation_alpha": 1.702,
            "activation_limit": 7.0,
            "w13_order": "interleaved",
            **biases,
        }

    def routing(self, num_tokens, case, i):
        """(topk_weights, topk_ids) of call i of a point."""
        return routing(num_tokens, self.sizes, (self.seed, num_tokens, i), case)

    def measure(self, num_tokens, case="uniform"):
        """The record of one point. RuntimeError where the result is not within its bound."""
        backend, dtype = self.backend, DTYPES[self.dtype]
        calls, out, distinct = self._calls(num_tokens, case)
        calls[0]()
        report, unfused_rms = self.check(num_tokens, out, case)
        replay = backend.prepare(calls)
        if num_tokens >= LARGE and backend.name == "cuda":
            time.sleep(IDLE_SECONDS)
        times = replay(WARM_REPLAYS + REPLAYS)[WARM_REPLAYS:]
        record = {
            "op": "layer",
            "case": case,
            "dtype": self.dtype,
            "model": self.name,
            **self.sizes._asdict(),
            "num_tokens": num_tokens,
            "us": round(statistics.median(times), 2),
            "us_min": round(min(times), 2),
            "us_max": round(max(times), 2),
        }
        if num_tokens >= LARGE and backend.name == "cuda" and case not in SKEWED:
            end = time.perf_counter() + HOT_SECONDS
            while time.perf_counter() < end:
                replay(max(1, int(1e5 / (times[0] * len(calls)))))
            record["us_hot"] = round(statistics.median(replay(REPLAYS)), 2)
        plan = ops.plan(
            num_tokens, *self.sizes, dtype=dtype, device=backend.name, deterministic=case != FAST
        )
        if case in SKEWED:
            itemsize = generate.dtype_of(dtype).itemsize
            predicted = model_us(self.sizes, num_tokens, distinct, *rates(backend), itemsize)
            record.update(distinct=distinct, predicted_us=round(predicted, 2))
        text = plan_text(plan)
        if case == OPTIONS:  # the rows that a plain layer, which ops.plan speaks of, has others for
            text = re.sub("_(plain|high|wide)", "_swap", text.replace("_bare", ""))
        record["rel_rms"] = float(f"{report.rel_rms:.3g}")
        if unfused_rms is not None:
            record["unfused_rms"] = float(f"{unfused_rms:.3g}")
        return {**record, "plan": text, "launches": plan["num_launches"]}

    def _calls(self, num_tokens, case):
        """(calls with routings of their own, the weight sets in turn, all into one output; that
        output; how many experts a call visits on average)."""
        backend, dtype = self.backend, DTYPES[self.dtype]
        x = self.x[:num_tokens]
        hidden_states, out = backend.put(x), backend.empty(x.shape, dtype)
        scratch = ops.workspace_size(num_tokens, *self.sizes, dtype=dtype, device=backend.name)
        workspace = backend.empty((scratch,), "uint8")
        options = self.options(case, backend.put)
        routings = [
            self.routing(num_tokens, case, i) for i in range(4 if num_tokens >= LARGE else 16)
        ]

        def call(weights, topk_weights, topk_ids):
            ops.fused_experts(
                hidden_states,
                *weights,
                topk_weights,
                topk_ids,
                out=out,
                workspace=workspace,
                stream=backend.stream,
                deterministic=case != FAST,
                **options,
            )

        calls = []
        for i, pair in enumerate(routings):
            weights = self.weights[i % len(self.weights)]
            tensors = [backend.put(array) for array in pair]
            calls.append(lambda weights=weights, tensors=tensors: call(weights, *tensors))
        distinct = statistics.mean(len(np.unique(ids)) for _, ids in routings)
        return calls, out, distinct

    def check(self, num_tokens, out, case="uniform"):
        """Holds the `out` of the first call against the oracle; RuntimeError if it is wrong.
        Returns the report and the RMS error that unfused kernels would have."""
        future = self.wanted.pop((num_tokens, case), None)
        tokens, want, error, unfused_rms = (
            future.result() if future else self.oracle(num_tokens, case)
        )
        got = np.concatenate([np.asarray(self.backend.rows(out, t, t + 1)) for t in tokens])
        report = reference.compare(got, want, error)
        if not report.ok:
            point = f"{self.name} {self.dtype} {num_tokens} tokens"
            raise RuntimeError(f"{point}: wrong result, not timed: {report.message}")
        return report, unfused_rms


def sampled(num_tokens, count=CHECKED_TOKENS):
    """Tokens to check: the first, the last, and some between."""
    return np.unique(np.linspace(0, num_tokens - 1, min(num_tokens, count)).astype(int))


SKEWED = ("zipf1", "same_experts")
FAST = "fast"
OPTIONS = "options"  # as models have it: activations of their own, biases


def routing(num_tokens, sizes, seed, case="uniform"):
    """Random distinct (topk_weights, topk_ids): float32 and int32 [num_tokens, topk].

    case  "zipf1": expert i is drawn with weight 1 / (i + 1), experts in random order;
          "same_experts": all tokens go to the same topk; any other: uniform
    """
    random = np.random.default_rng(seed)
    num_experts, topk = sizes.num_experts, sizes.topk
    if case == "same_experts":
        ids = np.tile(random.permutation(num_experts)[:topk].astype(np.int32), (num_tokens, 1))
    elif case == "zipf1":
        # Gumbel's trick: the topk largest of log p + noise are a draw without replacement.
        keys = random.gumbel(size=(num_tokens, num_experts)) - np.log1p(np.arange(num_experts))
        ranks = np.argpartition(-keys, topk - 1, axis=1)[:, :topk]
        ids = random.permutation(num_experts).astype(np.int32)[ranks]
    else:
        # Floyd's sampling, all tokens at once: every set of topk experts is equally likely.
        ids = np.full((num_tokens, topk), -1, np.int32)
        for slot, last in enumerate(range(num_experts - topk, num_experts)):
            drawn = random.integers(0, last + 1, num_tokens, dtype=np.int32)
            taken = (ids[:, :slot] == drawn[:, None]).any(axis=1)
            ids[:, slot] = np.where(taken, last, drawn)
        random.permuted(ids, axis=1, out=ids)
    weights = random.random((num_tokens, topk), np.float32) + np.float32(0.1)
    return weights / weights.sum(axis=1, keepdims=True), ids


# -------------------------------------------------------------------------------------------------
# What the hardware allows
# -------------------------------------------------------------------------------------------------


def distinct_experts(sizes, num_tokens):
    """Experts that at least one of num_tokens uniform random tokens visits, on average."""
    return sizes.num_experts * (1 - (1 - sizes.topk / sizes.num_experts) ** num_tokens)


def floor_us(sizes, num_tokens, bytes_per_us, flops_per_us, itemsize=2, distinct=None):
    """The larger of the least bytes / read rate (each distinct expert's weights once, input and
    output, the intermediate written and read) and FLOPs / matrix rate."""
    elements = (distinct or distinct_experts(sizes, num_tokens)) * sizes.expert_elements
    elements += 2 * num_tokens * (sizes.hidden_size + sizes.topk * sizes.intermediate_size)
    flops = 2 * num_tokens * sizes.topk * sizes.expert_elements
    return max(elements * itemsize / bytes_per_us, flops / flops_per_us)


def model_us(sizes, num_tokens, distinct, bytes_per_us, flops_per_us, itemsize=2):
    """What a very good layer takes: weights that stream at 97 % of the read rate in two launches
    while they are what takes time, else gate_up, down and combine one after the other at 87 % of
    the matrix rate.

    distinct  experts that the batch visits. Constants of an H200; of another GPU the memory's are
              scaled by its read rate.
    """
    hidden, slots = sizes.hidden_size, num_tokens * sizes.topk
    rate = bytes_per_us / _RATES["NVIDIA H200"][0]
    weights = distinct * sizes.expert_elements * itemsize
    compute = 2 * slots * sizes.expert_elements / flops_per_us
    if num_tokens <= 512 and weights / (4.5e6 * rate) > compute:
        stream = weights / (4.55e6 * rate) + 3.0 - 1.5 * math.exp(-weights / 60e6)
        return 1.03 * stream + (1.5 if num_tokens <= 16 else 2.5) + 0.1 * compute
    out, tokens = slots * hidden * itemsize, num_tokens * hidden * itemsize
    spills = out > 40e6  # the L2
    read, written, gathered = 4.5e6 * rate, 3.6e6 * rate if spills else 8e6, 4.3e6 * rate
    gate_up = sorted(((weights * 2 / 3 + tokens) / read, compute * 2 / 3 / 0.87))
    down = sorted((weights / 3 / read, compute / 3 / 0.87, out / written))
    combine = (out * (1 if spills else 0.4) + tokens) / gathered
    return gate_up[1] + gate_up[0] / 4 + down[2] + down[1] / 4 + combine + 4


# GPU -> (bytes per us that a kernel reads, FLOPs per us of large bf16 matrix products), measured.
_RATES = {
    "NVIDIA H200": (4.65e6, 771e6),
    "NVIDIA H100 80GB HBM3": (3.1e6, 771e6),
}


def known_rates(gpu):
    """(bytes per us, FLOPs per us) of a GPU by its name, None where it was not measured."""
    return _RATES.get(gpu)


def rates(backend):
    """(bytes per us, FLOPs per us) that floor_us divides by. Of a GPU not in the table and of
    a CPU the read rate is measured now, and the floor is that of the memory alone."""
    if backend.name == "cuda":
        known = known_rates(_C.info()["devices"][backend.index]["name"])
        if known is not None:
            return known
    return backend.read_bandwidth() * 1e-6, float("inf")


def plan_text(plan):
    """What runs: the variant of each GEMM stage."""
    names = [plan[stage]["name"].removeprefix("moe_") for stage in ("gate_up", "down")]
    parts = list(dict.fromkeys(names))
    if plan["num_chunks"] > 1:
        parts.append(f"{plan['num_chunks']} chunks")
    return ", ".join(parts)


# -------------------------------------------------------------------------------------------------
# Records
# -------------------------------------------------------------------------------------------------

_KEYS = (
    ("op", "case", "dtype", "model", "hidden_size", "intermediate_size", "num_tokens")
    + ("method", "logits_dtype", "num_experts", "topk", "num_groups", "topk_groups")
    + ("call", "framework")
)


def write_records(path, header, records):
    """Writes `records` into `path`: those of the same point are replaced, the rest is kept."""
    path = Path(path)
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    # Records carry their own commit and date, so those of other runs stay true under a new header.
    stamp = {name: header[name] for name in ("commit", "date")}
    merged = {_key(record): record for record in old.get("records", [])}
    merged.update({_key(record): {**record, **stamp} for record in records})
    known = {name: value for name, value in header.items() if value is not None}
    document = {**{name: None for name in header}, **old, **known}
    del document["records"]
    order = sorted(merged.values(), key=_order)
    lines = ",\n".join(json.dumps(record) for record in order)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(document)[:-1]
    part = path.with_suffix(".part")
    part.write_text(f'{head}, "records": [\n{lines}\n]}}\n', encoding="utf-8")
    part.replace(path)


def _key(record):
    return tuple(record.get(name) for name in _KEYS)


def _order(record):
    return tuple((str(type(value)), value) for value in _key(record) if value is not None)


def header(backend, root=None, commit=None, chip_stream_us=None):
    """The head of a record file. `root`: the source tree whose commit is named."""
    gpu = driver = cuda = ""
    if backend.name == "cuda":
        facts = _C.info()
        gpu = facts["devices"][backend.index]["name"]
        driver, cuda = driver_version(), _dotted(facts["cuda_version"])
    return {
        "gpu": gpu,
        "driver": driver,
        "cuda": cuda,
        "commit": commit or source_commit(root),
        "date": datetime.now().isoformat(timespec="seconds"),
        "command": command_line(),
        "chip_stream_us": chip_stream_us,
        "records": [],
    }


def driver_version():
    """The GPU driver's version, "" where it cannot be told."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            text = subprocess.run(query, capture_output=True, text=True).stdout
        except OSError:
            return ""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else ""


def _dotted(version):
    """13000 -> "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def source_commit(root):
    """The short commit of the tree at `root`, "+" after it where sources differ; else the
    version."""
    if root is None:
        return __version__
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        sources = ["csrc", "kernels", "python"]
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *sources]).returncode
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return head + ("+" if changed else "")


def command_line():
    """The command that runs, with no path of this machine in it."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        first = ["python", "-m", "fusedmoe"]
    elif program.suffix == ".py":
        first = ["python", f"{program.resolve().parent.name}/{program.name}"]
    else:
        first = [program.name]
    rest = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(first + rest)


# -------------------------------------------------------------------------------------------------
# Many points
# -------------------------------------------------------------------------------------------------


def run(backend, models, tokens, dtype="bf16", cases=("uniform",), save=None):
    """Measures models x cases x tokens and prints a line for each; returns the records.

    cases: "portable": only kernels that need no architecture of their own (the plan chooses among
    these from now on); "fast": with deterministic=False; others: routings (see `routing`).
    save: None, or a function that takes the records of one model when it is done.
    """
    _C._restrict_plans("portable" in cases, 0)
    read_rate, flops_rate = rates(backend)
    pool = ThreadPoolExecutor(4) if backend.name == "cuda" else None
    itemsize = generate.dtype_of(DTYPES[dtype]).itemsize
    all_records = []
    for name in models:
        begin = time.perf_counter()
        layer = Layer(backend, name, dtype, max(tokens), pool=pool)
        print(f"\n{name} {dtype}, made in {time.perf_counter() - begin:.1f} s", flush=True)
        print(f"{'tokens':>8} {'us':>10} {'spread':>7} {'hot':>10} {'weights GB/s':>13} ", end="")
        print(f"{'TFLOP/s':>8} {'of floor':>9} {'rel_rms':>9}  plan", flush=True)
        records = []
        points = [(num_tokens, case) for case in cases for num_tokens in tokens]
        for point in points:
            layer.expect(*point)
        for point in points:
            record = layer.measure(*point)
            records.append(record)
            print_record(record, layer.sizes, read_rate, flops_rate, itemsize)
        if save is not None:
            save(records)
        all_records += records
        del layer
    return all_records


def print_record(record, sizes, read_rate, flops_rate, itemsize):
    us, num_tokens = record["us"], record["num_tokens"]
    experts = record.get("distinct") or distinct_experts(sizes, num_tokens)
    nbytes = experts * sizes.expert_elements * itemsize
    flops = 2 * num_tokens * sizes.topk * sizes.expert_elements
    floor = floor_us(sizes, num_tokens, read_rate, flops_rate, itemsize, experts)
    spread = (record["us_max"] - record["us_min"]) / us
    print(
        f"{num_tokens:>8} {us:>10.2f} {100 * spread:>6.1f}% {record.get('us_hot', ''):>10} "
        f"{nbytes / us / 1e3:>13.0f} {flops / us / 1e6:>8.1f} {100 * floor / us:>8.0f}% "
        f"{record['rel_rms']:>9.2e}  {record['plan']}",
        flush=True,
    )


def plot(records, path, read_rate, flops_rate, title):
    """Latency and share of the floor against tokens: `path` (PNG) and, beside it, `-dark`."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'fusedmoe[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = Path(path)
    by_model = {}
    for record in records:
        by_model.setdefault(record["model"], []).append(record)
    for style, name in (
        ("default", path),
        ("dark_background", path.with_stem(path.stem + "-dark")),
    ):
        with plt.style.context(style):
            figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
            for label, points in by_model.items():
                tokens = [point["num_tokens"] for point in points]
                us = [point["us"] for point in points]
                floors = [
                    floor_us(model(label), n, read_rate, flops_rate, _itemsize(points[0]))
                    for n in tokens
                ]
                left.plot(tokens, us, marker="o", markersize=3, label=label)
                share = [100 * floor / each for floor, each in zip(floors, us, strict=True)]
                right.plot(tokens, share, marker="o", markersize=3, label=label)
            left.set(yscale="log", xlabel="tokens", ylabel="µs per layer")
            right.set(ylim=(0, 105), xlabel="tokens", ylabel="% of the floor")
            ticks = sorted({point["num_tokens"] for point in records})
            for axes in (left, right):
                axes.set_xscale("log", base=2)
                axes.set_xticks(ticks, [str(n) for n in ticks], rotation=60, fontsize=7)
                axes.grid(alpha=0.25)
            left.legend(fontsize=8)
            figure.suptitle(title)
            figure.savefig(name, dpi=150)
            plt.close(figure)
        print(f"wrote {name}")


def _itemsize(record):
    return generate.dtype_of(DTYPES[record["dtype"]]).itemsize


def main(args):
    """`python -m fusedmoe bench`."""
    backend = make_backend(args.device)
    models, tokens = chosen_points(args)
    if backend.name == "cpu" and args.tokens == ",".join(map(str, TOKENS)):
        tokens = [n for n in tokens if n <= 1024]
    print(f"{backend.name}: {backend.text}")
    records = run(backend, models, tokens, args.dtype)
    if args.json:
        write_records(args.json, {**header(backend), "cpu": cpu_model()}, records)
        print(f"wrote {args.json}")
    if args.plot:
        plot(records, args.plot, *rates(backend), backend.text)
    return 0
