"""Writes the tables of README.md from the records, between the markers that name them.

    python benchmarks/make_tables.py            rewrites README.md
    python benchmarks/make_tables.py --check    exit 1 where README.md is not what the records give

The records are those of benchmarks/results, and docs/compatibility.json for the doors.

A marker is a line `<!-- table: NAME -->`; its table ends at `<!-- end of table -->`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
SHOWN_TOKENS = (1, 8, 64, 512, 4096, 16384)


def portable():
    """Latency of the portable kernels on the H200, one row per model."""
    document, records = load("h200_portable.json", lambda r: r["case"] == "portable")
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


TABLES = {"portable": portable, "cpu": cpu, "host": host, "doors": doors}


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
            raise SystemExit(f"README.md: table: expected one of {', '.join(TABLES)}, got {name}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}<!-- end of table -->"

    pattern = r"<!-- table: (\w+) -->\n.*?<!-- end of table -->"
    return re.sub(pattern, table, text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = rewrite(old)
    if args.check:
        if new != old:
            print("README.md is not what the records give: run python benchmarks/make_tables.py")
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
