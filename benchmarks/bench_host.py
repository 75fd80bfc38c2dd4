"""Host time of a call: what Python and the extension take before the GPU has anything to do.

    python benchmarks/bench_host.py     1 token of qwen3_30b, GPU tensors -> <gpu>_host.json

The kernel launches themselves are left out (FUSEDMOE_NO_LAUNCH=1); everything else of a call runs:
arguments, tensors, checks, plan, stage structs. Median of 15 runs of 20,000 calls (of a tenth of
them where a call takes over 10 us), under torch.no_grad().

Beside the direct calls: the same call as a node of what torch.compile makes of it, the same through
a plain torch.library.custom_op as torch's documentation has it, and inside jax.jit. The three
compiled rows include what the compiler puts around the op: guards, and its own Python.
"""

import argparse
import importlib
import os
import statistics
import sys
import time
import timeit
from pathlib import Path

os.environ["FUSEDMOE_NO_LAUNCH"] = "1"  # read once, when the extension is imported
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch is on the same GPU

import torch
from bench_layer import slug
from fusedmoe import Experts, bench, fused_experts, workspace_size
from fusedmoe.backend import backend
from fusedmoe.models import model

HERE = Path(__file__).resolve().parent
CALLS, RUNS = 20_000, 15
LONG_US = 10  # such calls: a tenth of the calls a run
WARM_UP = 1.0  # seconds of calls before the first run: a core that slept is slow for that long

TEN = (
    "hidden_states, w13, w2, topk_weights, topk_ids, w13_bias=w13_bias, w2_bias=w2_bias, "
    "shared_output=shared_output, out=out, workspace=workspace"
)
FIVE = "hidden_states, w13, w2, topk_weights, topk_ids"

# What is timed -> the statement, with the names of `tensors` and of the functions below.
STATEMENTS = {
    "fused_experts, ten tensors": f"fused_experts({TEN})",
    "fused_experts, out and workspace allocated": f"fused_experts({FIVE})",
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
    "FusedMoE module, out and workspace": (
        "module(hidden_states, topk_weights, topk_ids, out=out, workspace=workspace)"
    ),
    "torch.ops, ten tensors": f"op.out({TEN})",
    "torch.ops, out and workspace allocated": f"op.default({FIVE})",
    "torch.compile, out and workspace allocated": f"compiled({FIVE})",
    "custom_op, ten tensors": f"custom_out({TEN})",
    "custom_op, out and workspace allocated": f"custom({FIVE})",
    "custom_op in torch.compile, out and workspace allocated": f"compiled_custom({FIVE})",
    "jax.jit, out and workspace allocated": "jitted(*jax_arrays)",
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


@torch.library.custom_op("bench_host::fused_experts", mutates_args=())
def custom(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    return fused_experts(hidden_states, w13, w2, topk_weights, topk_ids)


@custom.register_fake
def _(hidden_states, w13, w2, topk_weights, topk_ids):
    return torch.empty_like(hidden_states)


@torch.library.custom_op("bench_host::fused_experts_out", mutates_args=("out", "workspace"))
def custom_out(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_bias: torch.Tensor,
    w2_bias: torch.Tensor,
    shared_output: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    fused_experts(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        shared_output=shared_output,
        out=out,
        workspace=workspace,
    )


def torch_functions(names):
    from fusedmoe.frameworks import torch as door

    door.register()
    module = door.FusedMoE(0, 1, 1)
    module.w13, module.w2 = (
        torch.nn.Parameter(names[name], requires_grad=False) for name in ("w13", "w2")
    )
    return {
        "fused_experts": fused_experts,
        "module": module,
        "op": torch.ops.fusedmoe.fused_experts,
        "compiled": torch.compile(lambda *a: fused_experts(*a), fullgraph=True),
        "custom": torch.ops.bench_host.fused_experts.default,
        "custom_out": torch.ops.bench_host.fused_experts_out.default,
        "compiled_custom": torch.compile(lambda *a: custom(*a), fullgraph=True),
    }


def jax_functions(names):
    """The same call inside jax.jit; {} and the reason where that is not to be had."""
    try:
        door = importlib.import_module("fusedmoe.frameworks.jax")
        if not hasattr(door, "fused_experts"):
            return {}, "fusedmoe.frameworks.jax has no fused_experts"
        import jax

        jax.devices("gpu")
        order = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")
        arrays = [jax.dlpack.from_dlpack(names[name]) for name in order]
        jitted = jax.jit(lambda *a: door.fused_experts(*a))
        jax.block_until_ready(jitted(*arrays))
    except Exception as error:  # a benchmark of five frameworks runs with four
        return {}, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return {"jitted": jitted, "jax_arrays": arrays}, None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3_30b")
    parser.add_argument("--only", default="", help="calls whose name contains this")
    parser.add_argument("--json", type=Path, help="record file; default by GPU")
    parser.add_argument("--commit", help="of the sources, where this copy of them has no git")
    args = parser.parse_args()

    gpu = backend("cuda")
    head = bench.header(gpu, HERE.parent, args.commit)
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"{gpu.text}; CPython {python}, torch {torch.__version__}; launches left out")
    records = []
    with torch.no_grad():
        for call, us in measure("cuda", model(args.model), only=args.only):
            framework = "jax" if call.startswith("jax") else "torch"
            records.append(
                {
                    "op": "host",
                    "call": call,
                    "framework": framework,
                    "us": round(statistics.median(us), 3),
                    "us_min": round(min(us), 3),
                    "us_max": round(max(us), 3),
                    "num_tokens": 1,
                    "python": python,
                    framework: sys.modules[framework].__version__,
                }
            )
            print(f"{records[-1]['us']:>8.3f} us  {call}", flush=True)
    path = args.json or HERE / "results" / f"{slug(head['gpu'])}_host.json"
    bench.write_records(path, head, records)
    print(f"-> {path.name}")


def measure(device, sizes, calls=CALLS, warm_up=WARM_UP, only=""):
    """(call, microseconds of each run) for all that can be had here."""
    names = tensors(device, sizes)
    names |= torch_functions(names)
    for call, statement in STATEMENTS.items():
        if only not in call:
            continue
        if call.startswith("jax"):  # the last one: its threads would run beside the others
            functions, why = jax_functions(names)
            if why:
                print(f"       -     {call}: {why}", flush=True)
                continue
            names |= functions
        timer = timeit.Timer(statement, globals=names)
        timer.timeit(1)  # compiles
        end, few = time.monotonic() + warm_up, max(calls // 100, 1)
        while time.monotonic() < end:
            us = timer.timeit(few) / few * 1e6
        count = calls if us < LONG_US else max(calls // 10, 1)
        yield call, [run / count * 1e6 for run in timer.repeat(RUNS, count)]


if __name__ == "__main__":
    sys.exit(main())
