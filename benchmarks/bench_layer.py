"""The whole layer after routing on this machine's GPU: 7 bf16 models x 15 batch sizes.

    python benchmarks/bench_layer.py                    all points -> results/<gpu>_layer.json
    python benchmarks/bench_layer.py --case portable    the kernels that need no Hopper GPU
                                                        -> results/<gpu>_portable.json
    python benchmarks/bench_layer.py --case skew        Zipf-1.0 routing, and all tokens to the same
                                                        experts -> results/<gpu>_skew.json
    python benchmarks/bench_layer.py --case fast        deterministic=False, from 1024 tokens
                                                        -> results/<gpu>_fast.json
    python benchmarks/bench_layer.py --case options     gptoss as gpt-oss has it: biases and
                                                        swiglu_oai; the others with gelu_tanh
                                                        -> results/<gpu>_options.json
    python benchmarks/bench_layer.py --quick            one model, four batch sizes

Protocol and records: fusedmoe/bench.py. `--chip-stream-us` puts into the file what this very chip
takes to stream the weights of qwen3_30b at 64 tokens, which tells a slow chip from a slow kernel.
"""

import argparse
import re
import sys
import time
from pathlib import Path

from fusedmoe import bench
from fusedmoe.backend import backend
from fusedmoe.models import BF16_MODELS, TOKENS, add_arguments, chosen_points

HERE = Path(__file__).resolve().parent
# --case -> (file, cases of fusedmoe/bench.py)
CASES = {
    "uniform": ("layer", ("uniform",)),
    "portable": ("portable", ("portable",)),
    "skew": ("skew", bench.SKEWED),
    "fast": ("fast", (bench.FAST,)),
    "options": ("options", (bench.OPTIONS,)),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, BF16_MODELS, TOKENS)
    parser.add_argument("--case", default="uniform", choices=CASES)
    parser.add_argument("--device", type=int, default=0, help="index of the GPU")
    parser.add_argument("--json", type=Path, help="record file; default by GPU and case")
    parser.add_argument("--chip-stream-us", type=float)
    parser.add_argument("--commit", help="of the sources, where this copy of them has no git")
    args = parser.parse_args()

    gpu = backend("cuda", args.device)
    models, tokens = chosen_points(args)
    if args.case == bench.FAST:  # below, it changes nothing
        tokens = [n for n in tokens if n >= 1024]
    head = bench.header(gpu, HERE.parent, args.commit, args.chip_stream_us)
    name, cases = CASES[args.case]
    path = args.json or HERE / "results" / f"{slug(head['gpu'])}_{name}.json"
    print(f"{gpu.text}, driver {head['driver']}, CUDA {head['cuda']}, commit {head['commit']}")
    begin = time.perf_counter()

    def save(records):
        bench.write_records(path, head, records)

    bench.run(gpu, models, tokens, args.dtype, cases, save)
    count = len(models) * len(tokens) * len(cases)
    print(f"\n{count} points in {time.perf_counter() - begin:.0f} s -> {path.name}")


def slug(gpu):
    """ "NVIDIA H200" -> "h200"."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    return "_".join(word for word in words if word not in ("nvidia", "geforce", "tesla"))


if __name__ == "__main__":
    sys.exit(main())
