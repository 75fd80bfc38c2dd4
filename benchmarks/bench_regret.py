"""Does the plan choose well? The chosen kernels beside every other choice, on this machine's GPU.

    python benchmarks/bench_regret.py                the 105 points -> results/<gpu>_regret.json
    python benchmarks/bench_regret.py --random 200   layers of random sizes, multiples of 8
                                                     -> results/<gpu>_random.json

The choices are the plans under each height of tile, with and without the kernels made for one
architecture. Their graphs take turns, so that a change of the clock meets all of them; us is the
median of a plan's turns. regret: chosen / best. model_us: fusedmoe/bench.py, model_us.
Protocol and records otherwise: fusedmoe/bench.py.
"""

import argparse
import math
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bench_layer import slug
from fusedmoe import _C, bench, ops
from fusedmoe.backend import backend
from fusedmoe.models import BF16_MODELS, DTYPES, TOKENS, Model, add_arguments, chosen_points, model

HERE = Path(__file__).resolve().parent
HEIGHTS = (0, 16, 32, 64, 96, 128, 192)  # 0: the plan's own
TURNS = 7
MOST_WEIGHTS = 150e6  # elements of one layer of random sizes


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


class Choices(bench.Layer):
    def plans(self, num_tokens):
        """{(portable, height): text}, each text once, the plan's own choice first."""
        found = {}
        for portable in (False, True):
            for height in HEIGHTS:
                _C._restrict_plans(portable, height)
                try:
                    text = bench.plan_text(self.plan(num_tokens))
                except (ValueError, NotImplementedError):
                    continue
                if text not in found.values():
                    found[portable, height] = text
        _C._restrict_plans(False, 0)
        return found

    def plan(self, num_tokens):
        dtype = DTYPES[self.dtype]
        return ops.plan(num_tokens, *self.sizes, dtype=dtype, device=self.backend.name)

    def compare(self, num_tokens, case):
        """The record of one point; RuntimeError where a result is wrong."""
        replays, plans = {}, self.plans(num_tokens)
        for choice in plans:
            _C._restrict_plans(*choice)
            calls, out, distinct = self._calls(num_tokens, "uniform")
            calls[0]()
            report, _ = self.check(num_tokens, out)
            replays[choice] = self.backend.prepare(calls)
            replays[choice](bench.WARM_REPLAYS)
        _C._restrict_plans(False, 0)
        times = {choice: [] for choice in plans}
        for _ in range(TURNS):
            for choice, replay in replays.items():
                times[choice] += replay(1)
        us = {choice: statistics.median(of) for choice, of in times.items()}
        chosen, best = next(iter(plans)), min(us, key=us.get)
        expected = bench.model_us(self.sizes, num_tokens, distinct, *bench.rates(self.backend))
        return {
            "op": "layer",
            "case": case,
            "dtype": self.dtype,
            "model": self.name,
            **self.sizes._asdict(),
            "num_tokens": num_tokens,
            "us": round(us[chosen], 2),
            "us_min": round(min(times[chosen]), 2),
            "us_max": round(max(times[chosen]), 2),
            "model_us": round(expected, 2),
            "plan": plans[chosen],
            "best_us": round(us[best], 2),
            "best_plan": plans[best],
            "regret": round(us[chosen] / us[best], 3),
            "choices": {plans[choice]: round(us[choice], 2) for choice in plans},
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, BF16_MODELS, TOKENS)
    parser.add_argument("--random", type=int, default=0, help="layers of random sizes")
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
        layers = [(None, sizes, [tokens]) for sizes, tokens in random_points(args.random)]
    else:
        models, tokens = chosen_points(args)
        layers = [(name, model(name), tokens) for name in models]
    begin, records, pool = time.perf_counter(), [], ThreadPoolExecutor(4)
    for name, sizes, tokens in layers:
        layer = Choices(gpu, name, args.dtype, max(tokens), pool=pool, sizes=sizes)
        for num_tokens in tokens:
            records.append(layer.compare(num_tokens, case))
            show(records[-1])
        bench.write_records(path, head, records)
        del layer
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
