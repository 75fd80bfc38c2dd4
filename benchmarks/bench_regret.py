"""Does the plan choose well? The chosen kernels beside every other choice, on this machine's GPU.

    python benchmarks/bench_regret.py                the 105 points -> results/<gpu>_regret.json
    python benchmarks/bench_regret.py --random 200   layers of random sizes, multiples of 8
                                                     -> results/<gpu>_random.json

A choice is the plan's own or a pair of rows of the table of variants with one height of tile. All
pairs that are not hopeless are replayed once; those near the best then take turns with the plan's
own, so that a change of the clock meets all of them: us is the median of a choice's turns. regret:
chosen / best. model_us: fusedmoe/bench.py, model_us. All layers read the same random numbers, and
every choice is held against the oracle before it is timed.
Protocol and records otherwise: fusedmoe/bench.py.
"""

import argparse
import math
import re
import statistics
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bench_layer import slug
from fusedmoe import _C, bench, generate, ops, reference
from fusedmoe.backend import backend
from fusedmoe.models import BF16_MODELS, DTYPES, TOKENS, Model, add_arguments, chosen_points, model

HERE = Path(__file__).resolve().parent
TURNS, FEW_TURNS = 7, 3  # below and from LONG_US
LONG_US = 500
NEAR = 1.12  # of the best: such choices take turns
CHECKED_TOKENS = 3  # of every choice
AHEAD = 12  # points whose oracle results are made beside the timing
MOST_WEIGHTS = 150e6  # elements of one layer of random sizes
LARGE_TILE = 96  # rows: never hopeless
OWN = (-1, -1)  # the plan's own choice
ROW = re.compile(r"moe_(gate_up|down)_(bf16|f16)_(\d+)x\d+(_any)?(?:_(\w+))?$")
# not held to: the plan takes them for other rows
OTHERS = "sm90a_decode", "sm90a_decode_bare", "sm90a_bare"


def random_points(count, seed=0):
    """(sizes, num_tokens): multiples of 8, log-uniform, as far as the weights stay small."""
    rng = np.random.default_rng(seed)

    def log_uniform(low, high):
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    while count > 0:
        hidden_size, intermediate_size = (
            8 * round(log_uniform(low, high) / 8) for low, high in ((256, 8192), (64, 4096))
        )
        num_experts = round(log_uniform(2, 512))
        topk = min(num_experts, round(log_uniform(1, 10)))
        sizes = Model(hidden_size, intermediate_size, num_experts, topk)
        if num_experts * sizes.expert_elements <= MOST_WEIGHTS:
            count -= 1
            yield sizes, round(log_uniform(1, 8192))


def rows_of(stage, dtype):
    """{height: [row of the table]} of the kernels for aligned tensors that need align."""
    found = {}
    for row, name in enumerate(_C.info()["kernels"]):
        of = ROW.match(name)
        if of and of[1] == stage and of[2] == dtype and not of[4] and of[5] not in OTHERS:
            found.setdefault(int(of[3]), []).append(row)
    return found


class Numbers:
    """Random numbers on the host and on the GPU that all layers share: the weights of two sets, and
    token rows; from their beginning, as many as a layer has."""

    def __init__(self, gpu, dtype, points, pool):
        most = [max(math.prod(shape) for shape in shapes) for shapes in zip(*points, strict=True)]
        full = DTYPES[dtype]
        jobs = [
            pool.submit(generate.normal, (size,), full, scale, (i, j))
            for i, (size, scale) in enumerate(zip(most, (1.0, 0.03, 0.05), strict=True))
            for j in range(1 if i == 0 else 2)
        ]
        x, *weights = [job.result() for job in jobs]
        self.dtype, self.x, self.w13, self.w2 = full, x, weights[:2], weights[2:]
        self.on_gpu = [[gpu.put(array) for array in arrays] for arrays in (self.w13, self.w2)]

    @staticmethod
    def shapes(sizes, num_tokens):
        hidden, inner, experts, _ = sizes
        return (num_tokens, hidden), (experts, 2 * inner, hidden), (experts, hidden, inner)


class Choices(bench.Layer):
    """One layer on the shared numbers, at one batch size."""

    def __init__(self, gpu, name, dtype, sizes, num_tokens, numbers, pool):
        self.backend, self.name, self.sizes, self.dtype = gpu, name, sizes, dtype
        self.seed, self.pool, self.wanted, self.num_tokens = 0, pool, {}, num_tokens
        shapes = numbers.shapes(sizes, num_tokens)
        flat = numbers.x, numbers.w13[0], numbers.w2[0]
        self.x, *self.host = (
            array[: math.prod(shape)].reshape(shape)
            for array, shape in zip(flat, shapes, strict=True)
        )
        w13, w2 = numbers.on_gpu
        self.weights = [
            [t.buffer.view(s, numbers.dtype) for t, s in zip(pair, shapes[1:], strict=True)]
            for pair in zip(w13, w2, strict=True)
        ]
        self.expect(num_tokens)

    def oracle(self, num_tokens, case="uniform"):
        tokens = bench.sampled(num_tokens, CHECKED_TOKENS)
        arguments = self.x, *self.host, *self.routing(num_tokens, case, 0)
        return tokens, *reference.fused_experts_error(*arguments, tokens=tokens), None

    def plan(self, choice):
        """What the choice runs, as text."""
        _C._fix_plans(*choice)
        dtype = DTYPES[self.dtype]
        plan = ops.plan(self.num_tokens, *self.sizes, dtype=dtype, device=self.backend.name)
        return bench.plan_text(plan)

    def pairs(self):
        """Rows of gate_up with the first row of down of their height, and the other way round."""
        experts = bench.distinct_experts(self.sizes, self.num_tokens)
        rows = self.num_tokens * self.sizes.topk / experts
        up, down = (rows_of(stage, self.dtype.replace("fp", "f")) for stage in ("gate_up", "down"))
        for height in sorted(up):
            if height <= max(32, 8 * rows) and (rows <= 8 * height or height >= LARGE_TILE):
                for pair in [(row, down[height][0]) for row in up[height]] + [
                    (up[height][0], row) for row in down[height][1:]
                ]:
                    yield height, pair

    def prepare(self, choice, calls, out, wanted):
        """Its replay function; RuntimeError where its result is wrong."""
        _C._fix_plans(*choice)
        try:
            calls[0]()
            self.wanted[self.num_tokens, "uniform"] = wanted
            report, _ = self.check(self.num_tokens, out)
            return self.backend.prepare(calls), report
        finally:
            _C._fix_plans(*OWN)

    def compare(self, case):
        """The record of the point."""
        calls, out, distinct = self._calls(self.num_tokens, "uniform")
        wanted = self.wanted.pop((self.num_tokens, "uniform"))
        replays, quick, own_plan = {}, {}, self.plan(OWN)

        def add(choice):
            replays[choice], report = self.prepare(choice, calls, out, wanted)
            quick[choice] = replays[choice](2)[1]
            return report

        report = add(OWN)
        heights = {}
        for height, pair in self.pairs():
            add(pair)
            heights.setdefault(height, []).append(pair)
        for pairs in heights.values():  # the best of each stage together
            down = pairs[0][1]
            up = min((pair for pair in pairs if pair[1] == down), key=quick.get)[0]
            same_up = [pair for pair in pairs if pair[0] == pairs[0][0]]
            both = up, min(same_up, key=quick.get)[1]
            if both not in quick:
                add(both)
        plans = {choice: self.plan(choice) for choice in quick}
        _C._fix_plans(*OWN)
        near = NEAR * min(quick.values())
        times = {
            choice: [] for choice, us in quick.items()
            if choice == OWN or (us <= near and plans[choice] != own_plan)
        }  # fmt: skip
        for _ in range(TURNS if quick[OWN] < LONG_US else FEW_TURNS):
            for choice in times:
                times[choice] += replays[choice](1)
        us = {choice: statistics.median(of) for choice, of in times.items()}
        best = min(us, key=us.get)
        expected = bench.model_us(self.sizes, self.num_tokens, distinct, *bench.rates(self.backend))
        all_us = {plans[choice]: round({**quick, **us}[choice], 2) for choice in quick}
        all_us[own_plan] = round(us[OWN], 2)
        return {
            "op": "layer",
            "case": case,
            "dtype": self.dtype,
            "model": self.name,
            **self.sizes._asdict(),
            "num_tokens": self.num_tokens,
            "us": round(us[OWN], 2),
            "us_min": round(min(times[OWN]), 2),
            "us_max": round(max(times[OWN]), 2),
            "model_us": round(expected, 2),
            "plan": own_plan,
            "best_us": round(us[best], 2),
            "best_plan": plans[best],
            "regret": round(us[OWN] / us[best], 3),
            "choices": all_us,
            "rel_rms": float(f"{report.rel_rms:.3g}"),
        }


def show(record):
    sizes = "{hidden_size}/{intermediate_size}/{num_experts}/{topk}".format(**record)
    print(
        f"{record['model'] or sizes:>18} {record['num_tokens']:>6} {record['us']:>9.2f} "
        f"{record['us'] / record['model_us']:>6.2f} {record['regret']:>6.3f}  {record['plan']}"
        + ("" if record["regret"] == 1 else f"  best: {record['best_plan']}"),
        flush=True,
    )


def measure(gpu, layers, dtype, case, pool, seconds=math.inf):
    """Yields the record of each (name, sizes, num_tokens), as long as the time lasts."""
    end = time.perf_counter() + seconds
    numbers = Numbers(gpu, dtype, [Numbers.shapes(*layer[1:]) for layer in layers], pool)
    ahead, left = deque(), iter(layers)
    while time.perf_counter() < end:
        for name, *point in left:
            ahead.append(Choices(gpu, name, dtype, *point, numbers, pool))
            if len(ahead) > AHEAD:
                break
        if not ahead:
            break
        yield ahead.popleft().compare(case)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, BF16_MODELS, TOKENS)
    parser.add_argument("--random", type=int, default=0, help="layers of random sizes")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new point after these")
    parser.add_argument("--device", type=int, default=0, help="index of the GPU")
    parser.add_argument("--json", type=Path, help="record file; default by GPU")
    parser.add_argument("--commit", help="of the sources, where this copy of them has no git")
    args = parser.parse_args()

    gpu = backend("cuda", args.device)
    head = bench.header(gpu, HERE.parent, args.commit)
    case = "random" if args.random else "regret"
    path = args.json or HERE / "results" / f"{slug(head['gpu'])}_{case}.json"
    print(f"{gpu.text}, driver {head['driver']}, CUDA {head['cuda']}, commit {head['commit']}")
    if args.random:
        layers = [(None, *point) for point in random_points(args.random)]
    else:
        models, tokens = chosen_points(args)
        layers = [(name, model(name), count) for name in models for count in tokens]
    begin, records, pool = time.perf_counter(), [], ThreadPoolExecutor(8)
    for record in measure(gpu, layers, args.dtype, case, pool, args.seconds):
        records.append(record)
        show(record)
    pool.shutdown(cancel_futures=True)
    bench.write_records(path, head, records)
    regrets = [record["regret"] for record in records]
    mean = math.exp(statistics.mean(map(math.log, regrets)))
    within = 100 * sum(regret <= 1.1 for regret in regrets) / len(regrets)
    over = sum(record["us"] > 1.4 * record["model_us"] + 6 for record in records)
    print(f"\n{len(records)} points in {time.perf_counter() - begin:.0f} s -> {path.name}")
    print(
        f"regret {mean:.3f} (geometric mean), worst {max(regrets):.2f}, {within:.0f} % within 1.10"
    )
    print(f"{over} points over 1.4 model_us + 6 us")


if __name__ == "__main__":
    sys.exit(main())
