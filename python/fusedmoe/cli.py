"""`python -m fusedmoe` and `fusedmoe`: info, check, demo, plan, bench, tune."""

from __future__ import annotations

import argparse
import os
import sys


def main(argv=None):
    """Runs one command; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, MemoryError) as error:
        print(f"fusedmoe: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser():
    from .models import BF16_MODELS, MODELS, TOKENS, add_arguments

    names = ", ".join(MODELS)
    parser = argparse.ArgumentParser(prog="fusedmoe", description="The Mixture-of-Experts layer.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("info", help="versions, devices, frameworks, environment")
    command.set_defaults(run=_info)

    command = commands.add_parser("check", help="does it work here? Paste the answer in a report")
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    command.set_defaults(run=_check)

    command = commands.add_parser("demo", help="one full-size layer: time, bandwidth, error")
    command.add_argument("--model", default="qwen3_30b", help=names)
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    command.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of all"
    )
    command.add_argument("--tokens", default="1,16,256", help="batch sizes, comma-separated")
    command.set_defaults(run=_demo)

    command = commands.add_parser("plan", help="what a call of some size does; needs no GPU")
    command.add_argument("--model", default="qwen3_30b", help=names)
    command.add_argument("--tokens", type=int, default=16)
    command.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    command.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    command.add_argument("--num-sms", type=int, default=0, help="of another GPU than the one here")
    command.add_argument(
        "--json", action="store_true", help="the whole plan, to be read by programs"
    )
    command.set_defaults(run=_plan)

    command = commands.add_parser("bench", help="time a layer, after checking its result")
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add_arguments(command, BF16_MODELS[:1], TOKENS)
    command.add_argument("--json", metavar="FILE", help="merge the records into FILE")
    command.add_argument(
        "--plot", metavar="FILE.png", type=_png, help="draw, light and dark (matplotlib)"
    )
    command.set_defaults(run=_bench)

    command = commands.add_parser("tune", help="not built yet")
    command.set_defaults(run=_tune)
    return parser


def _png(name):
    """What --plot can write, known before the measurement and not after it."""
    from importlib.util import find_spec

    if not name.endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, got {name!r}")
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("matplotlib is not installed: pip install matplotlib")
    return name


def _info(args):
    from .diagnostics import print_info

    print_info()
    return 0


def _check(args):
    from .diagnostics import check

    result = check(args.device)
    print(result["text"])
    return 0 if result["ok"] else 1


def _demo(args):
    from .demo import run
    from .models import batch_sizes

    return 0 if run(args.model, args.device, args.dtype, batch_sizes(args.tokens)) else 1


def _plan(args):
    from . import ops
    from .models import model

    sizes = model(args.model)
    options = {"dtype": args.dtype, "device": args.device, "num_sms": args.num_sms}
    plan = ops.plan(args.tokens, *sizes, **options)
    if args.json:
        import json

        print(json.dumps(plan, indent=2))
    else:
        print(f"{args.model}, {args.tokens} tokens, {args.dtype}, {args.device}")
        _print_tree(plan)
    return 0


def _bench(args):
    from .bench import main as bench

    return bench(args)


def _tune(args):
    raise NotImplementedError("tune: not built yet; the plan's cost model decides everywhere")


def _print_tree(tree, indent=""):
    """Nested dicts: leaves first, one `name value` a line, then the parts."""
    for name, value in tree.items():
        if not isinstance(value, dict):
            print(f"{indent}{name:<24} {_number(value)}")
    for name, value in tree.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print_tree(value, indent + "  ")


def _number(value):
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value
