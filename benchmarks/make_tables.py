"""Writes the tables of README.md and docs/ from the records, between the markers that name them.

    python benchmarks/make_tables.py            rewrites them
    python benchmarks/make_tables.py --check    exit 1 where one is not what the records give

The records are those of benchmarks/results, and docs/compatibility.json for the doors; which
kernels a feature runs on is asked of the plan of the fusedmoe that is installed.

A marker is a line `<!-- table: NAME -->`; its table ends at `<!-- end of table -->`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCUMENTS = [HERE.parent / name for name in ("README.md", "docs/routing.md", "docs/design.md")]
KERNELS, TESTS = HERE.parent / "kernels", HERE.parent / "tests"
RESULTS = HERE / "results"
SHOWN_TOKENS = (1, 8, 64, 512, 4096, 16384)


def layer():
    """Latency of the layer on a Hopper GPU, as measured last, one row per model."""
    found = [load(path.name, is_uniform) for path in RESULTS.glob("h?00*_layer.json")]
    return latency(*max(found, key=lambda each: each[0]["date"], default=({}, [])))


def is_uniform(record):
    return record["case"] == "uniform" and record["dtype"] == "bf16"


def portable():
    """Latency of the portable kernels on the H200."""
    return latency(*load("h200_portable.json", lambda r: r["case"] == "portable"))


def options():
    """Latency with what the models' own layers have beside silu."""
    return latency(*load("h200_options.json", lambda r: r["case"] == "options"))


def latency(document, records):
    models = list(dict.fromkeys(record["model"] for record in records))
    us = {(record["model"], record["num_tokens"]): record["us"] for record in records}
    rows = [["µs per layer at num_tokens ="] + [str(n) for n in SHOWN_TOKENS]]
    for name in models:
        first = next(record for record in records if record["model"] == name)
        sizes = "{hidden_size}, {intermediate_size}, {num_experts}, {topk}".format(**first)
        rows.append([f"{name} ({sizes})"] + [number(us.get((name, n))) for n in SHOWN_TOKENS])
    return markdown(rows) + source(document)


def cpu():
    """The CPU backend beside torch and the machine's read bandwidth."""
    document, records = load("cpu_layer.json", lambda r: r["case"] == "cpu")
    rows = [["tokens", "ms", "weights GB/s", "of read bandwidth", "torch ms", "ratio"]]
    for r in records:
        rows.append(
            [
                str(r["num_tokens"]),
                f"{r['us'] / 1e3:.2f}",
                f"{r['gb_per_s']:.1f}",
                f"{100 * r['of_read_bandwidth']:.0f} %",
                f"{r['torch_us'] / 1e3:.2f}",
                f"{r['torch_us'] / r['us']:.2f}",
            ]
        )
    about = ""
    if records:
        last = records[-1]
        about = f"{last['model']}, {last['dtype']}; {last['cpu']}, {last['threads']} threads. "
    return markdown(rows) + source(document, about)


def host():
    """Host time per call, as measured last."""
    documents = [
        load(path.name, lambda r: r["op"] == "host") for path in RESULTS.glob("*_host.json")
    ]
    document, records = max(documents, key=lambda found: found[0]["date"], default=({}, []))
    rows = [["call", "µs"]] + [[r["call"], f"{r['us']:.2f}"] for r in records]
    about = f"CPython {records[0]['python']}, torch {records[0]['torch']}. " if records else ""
    return markdown(rows) + source(document, about)


def of_transformers():
    """How many rows of docs/transformers.md say yes."""
    text = (HERE.parent / "docs" / "transformers.md").read_text(encoding="utf-8")
    verdicts = re.findall(r"^\| .* \| (\S[^|]*) \|$", text, re.MULTILINE)[2:]  # less the head
    no = sum(verdict.startswith("no:") for verdict in verdicts)
    return f"{len(verdicts) - no} of {len(verdicts)} models"


def doors():
    """The doors to frameworks: what each offers, the versions and the tests that hold it."""
    document = json.loads((HERE.parent / "docs" / "compatibility.json").read_text(encoding="utf-8"))
    rows = [["door", "offers", "tested with", "proven by", "on a GPU"]]
    for door in document["doors"]:
        anchor = door["heading"].lower().replace(".", "").replace(" ", "-")
        proof = ", ".join(f"[{Path(test).stem}]({test})" for test in door["proof"])
        link = f"[{door['heading']}](docs/integrations.md#{anchor})"
        what = door["what"]
        if door["door"] == "transformers":
            what += f" ([{of_transformers()}](docs/transformers.md))"
        rows.append([link, what, door["tested"], proof, door["gpu"] or "-"])
    return markdown(rows, left=True)


# What a layer is asked for -> what changes its plan; qwen3_30b otherwise.
FEATURES = {
    "silu, gated": {},
    "the other activations, biases, `apply_router_weight_on_input`, `routed_scaling_factor`, "
    "`shared_output`, `expert_map`, `expert_start`, ids of -1, padded strides, any `w13_order`": {},
    "`gated=False`": {"gated": False},
    "`no_combine`": {"no_combine": "weighted"},
    "float16": {"dtype": "float16"},
    "rows that are not 16-byte aligned (odd sizes, addresses, strides)": {"vector_bytes": 2},
    "`fused_moe`: the same after routing": {"routed": True},
    "a GPU that is not Hopper": None,
}
FAMILIES = {
    "_decode": "decode",
    "_swap": "middle",
    "_plain": "middle",
    "_high": "middle",
    "_wide": "middle",
    "_sm90a": "prefill",
    "_bare": "prefill",
    "_joined": "prefill",
    "_any": "portable, any",
}


def plan_features():
    """Which kernels a feature runs on, from the plan."""
    import fusedmoe

    tokens = (1, 16, 64, 512, 4096)
    rows = [["at num_tokens =", *map(str, tokens)]]
    for feature, changes in FEATURES.items():
        cells = ["portable"] * len(tokens)
        if changes is not None:
            plans = [
                fusedmoe.plan(n, 2048, 768, 128, 8, num_sms=132, device="cuda", **changes)
                for n in tokens
            ]
            cells = [" + ".join(dict.fromkeys(map(family, stages(plan)))) for plan in plans]
        rows.append([feature, *cells])
    return markdown(rows, left=True)


def stages(plan):
    return [plan[stage]["name"] for stage in ("gate_up", "down")]


def family(name):
    return next((text for end, text in FAMILIES.items() if name.endswith(end)), "portable")


# Methods of docs/routing.md: who uses them, and what else is worth knowing.
ROUTING_MODELS = {
    "softmax_topk": "OLMoE, Jamba, Qwen1.5-MoE; with `softcap` Grok",
    "topk_softmax": "Mixtral, Qwen3-MoE, Qwen3-Next, gpt-oss, Granite, DBRX; with `expert_scale` "
    "Gemma 4",
    "sigmoid": "LFM2 without bias",
    "topk_sigmoid": "the same where sigmoid saturates at 1: orders on",
    "llama4": "Llama 4: topk 1, with `apply_router_weight_on_input`",
    "sigmoid_bias": "Kimi K2, MiniMax-M2, GLM-4.5, Step 3, Nemotron 3, dots1",
    "sigmoid_grouped": "DeepSeek-V3 without its bias",
    "sigmoid_bias_grouped": "DeepSeek-V3, R1, V3.2, Ling",
    "sigmoid_bias_sink": 'Inkling: shared experts in the sum (`shared_weight="sink"`)',
    "softmax_grouped": "DeepSeek-V2",
    "softmax_bias_grouped": "DeepSeek-V2 with a bias",
    "sqrt_softplus": "DeepSeek-V4 without its bias",
    "sqrt_softplus_bias": "DeepSeek-V4",
    "hash": "DeepSeek-V4, its first layers: `tid2eid`, `token_ids`",
    "softmax_bias": "ERNIE 4.5 (renormalised), LongCat (`num_zero_experts`): weights without the "
    "bias",
    "softmax_of_biased": "weights are softmax(x + bias)",
    "softmax_biased_choice": "chosen by x + bias, weights softmax(x)",
    "softmax_quota": "Intern-S1-Pro: topk / num_groups of each group",
    "sparsemixer": "Phi-3.5-MoE: topk 1 or 2, jitter 0.01",
    "forced": "replay: `tid2eid` is [num_tokens, topk]",
    "simulated_uniform": "benchmarks; ids are a hash of (token, expert)",
    "simulated_round_robin": "benchmarks",
    "simulated_zipf": "benchmarks; the first choice is expert e with probability ~ 1 / (e + 1)",
}
CORRECT_ONLY = ("sparsemixer", "softmax_quota", "simulated_")
ROUTING_TOKENS = (1, 256, 16384)


def routing_methods():
    """Every method: its knobs from route_methods.def, its test, and what it takes."""
    rule = r"^MOE_ROUTE_METHOD\((\w+), *(\w+), *(\w+), *(\w+), *(\w+), *(\w+), *(\w+)\)"
    text = (KERNELS / "route_methods.def").read_text(encoding="utf-8")
    methods = re.findall(rule, text, re.MULTILINE)
    for name in ("h200_routing.json", "h100_routing.json"):
        document, records = load(name, lambda r: r["op"] == "route")
        if records:
            break
    head = ["method", "models", "score", "key", "bias", "groups", "ids", "renormalize", "test"]
    rows = [head + ["of"] + [f"µs at {n:,}" for n in ROUTING_TOKENS]]
    for method, *knobs in methods:
        knobs = [knob.lower() for knob in knobs]
        mine = [r for r in records if r["method"] == method and r["num_tokens"] == 16384]
        shape = min(mine, key=lambda r: r["num_experts"], default=None)
        if method.startswith(CORRECT_ONLY):
            speed = ["all", *["correct only"] * len(ROUTING_TOKENS)]
        elif shape is None:
            speed = ["all", *["not measured"] * len(ROUTING_TOKENS)]
        else:
            same = ("num_experts", "topk", "logits_dtype")
            us = {
                r["num_tokens"]: r["us"]
                for r in records
                if r["method"] == method and all(r[key] == shape[key] for key in same)
            }
            speed = ["{num_experts}/{topk} {logits_dtype}".format(**shape)]
            speed += [f"{us[n]:.2f}" if n in us else "not measured" for n in ROUTING_TOKENS]
        rows.append([f"`{method}`", ROUTING_MODELS[method], *knobs, routing_test(method), *speed])
    return markdown(rows) + source(document)


def routing_test(method):
    """A test whose parameters are all methods names none; the random ones have their own."""
    where = "test_routing_methods.py"
    name = "test_simulated" if method.startswith("simulated") else "test_method"
    if f"def {name}(" not in (TESTS / where).read_text(encoding="utf-8"):
        raise SystemExit(f"{where}: expected {name}, which the table of methods names")
    return f"`{name}`"


TABLES = {
    "layer": layer,
    "plan_features": plan_features,
    "options": options,
    "portable": portable,
    "cpu": cpu,
    "host": host,
    "doors": doors,
    "routing_methods": routing_methods,
}


def load(name, wanted):
    """(the file without its records, the wanted records); empty where there is no such file."""
    path = RESULTS / name
    if not path.exists():
        return {}, []
    document = json.loads(path.read_text(encoding="utf-8"))
    records = [record for record in document.pop("records") if wanted(record)]
    return document, records


def markdown(rows, left=False):
    if len(rows) == 1:
        return "Not measured yet.\n"
    head = "| " + " | ".join(rows[0]) + " |"
    rule = "| --- |" + (" --- |" if left else " ---: |") * (len(rows[0]) - 1)
    return "\n".join([head, rule] + ["| " + " | ".join(row) + " |" for row in rows[1:]]) + "\n"


def source(document, about=""):
    """The line under a table: machine, commit and command."""
    if not document:
        return ""
    gpu = document.get("gpu")
    if gpu:
        about += f"{gpu}, driver {document['driver']}, CUDA {document['cuda']}. "
    day = document["date"].partition("T")[0]
    return f"\n{about}Commit {document['commit']}, {day}: `{document['command']}`\n"


def number(us):
    if us is None:
        return "-"
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def rewrite(text):
    def table(found):
        name = found[1]
        if name not in TABLES:
            raise SystemExit(f"table: expected one of {', '.join(TABLES)}, got {name}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}<!-- end of table -->"

    pattern = r"<!-- table: (\w+) -->\n.*?<!-- end of table -->"
    return re.sub(pattern, table, text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = 0
    for path in DOCUMENTS:
        old = path.read_text(encoding="utf-8")
        new = rewrite(old)
        stale += new != old
        if args.check and new != old:
            print(f"{path.name} is not what the records give: run python benchmarks/make_tables.py")
        elif not args.check:
            path.write_text(new, encoding="utf-8")
    return int(args.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
