"""Plots of the recorded layers -> docs/plots: latency and share of the floor against tokens.

    python benchmarks/make_plots.py                       of the record made last
    python benchmarks/make_plots.py --json RECORDS.json   of another

One figure a model, MODEL.png and MODEL-dark.png, and a page that shows them. The floor: fusedmoe/
bench.py, floor_us.
"""

import argparse
import json
from pathlib import Path

from fusedmoe import bench
from make_tables import RESULTS, is_uniform, source

PLOTS = Path(__file__).resolve().parent.parent / "docs" / "plots"

PICTURE = """
<picture>
  <source media="(prefers-color-scheme: dark)" srcset="{model}-dark.png">
  <img alt="{model}: latency against tokens" src="{model}.png">
</picture>
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, help="record file; default: the latest of a Hopper GPU"
    )
    args = parser.parse_args()
    paths = [args.json] if args.json else list(RESULTS.glob("h?00*_layer.json"))
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    document = max(documents, key=lambda each: each["date"])
    rates = bench.known_rates(document["gpu"])
    if rates is None:
        raise SystemExit(
            f"{document['gpu']}: its read and matrix rates are not in fusedmoe/bench.py"
        )
    records = [record for record in document.pop("records") if is_uniform(record)]
    PLOTS.mkdir(exist_ok=True)
    page = f"# Latency of the layer, and how near the floor it is\n{source(document)}"
    page += (
        "\nThe floor: the larger of what the memory (weights of the experts that are visited, once)"
        "\nand what the tensor cores take; nothing can be faster.\n"
    )
    for name in dict.fromkeys(record["model"] for record in records):
        own = [record for record in records if record["model"] == name]
        title = (
            "{model}, bf16: {hidden_size}, {intermediate_size}, {num_experts} experts, top-{topk}"
        )
        bench.plot(own, PLOTS / f"{name}.png", *rates, title.format(**own[0]))
        page += PICTURE.format(model=name)
    (PLOTS / "README.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
