"""Tuned tables: rows that override the plan's own choice, each only inside the range it states.

A table is one JSON file in `configs`, for one GPU and one weight format:

    {"gpu": "NVIDIA H200", "dtype": "bf16", "command": "...", "date": "...", "commit": "...",
     "rows": [{"hidden_size": 2048, "intermediate_size": 768, "num_experts": 128, "topk": 8,
               "num_tokens": [1, 8], "gate_up": "variant name", "down": "variant name"}]}

`num_tokens` is a closed range; two rows of the same sizes do not overlap. Nothing is taken from the
nearest row outside of a range. The set is empty at present, and the plan reads no table yet.
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "configs"

_HEADER = {"gpu": str, "dtype": str, "command": str, "date": str, "commit": str, "rows": list}
_SIZES = ("hidden_size", "intermediate_size", "num_experts", "topk")
_CHOICES = ("gate_up", "down")


def tables(folder=FOLDER):
    """{file name: table} of all tables, each checked. ValueError names the file and the field."""
    return {path.name: read(path) for path in sorted(Path(folder).glob("*.json"))}


def read(path):
    """One table, checked."""
    path = Path(path)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: expected JSON, got {error}") from None
    _check_fields(path.name, table, _HEADER)
    ranges = {}
    for number, row in enumerate(table["rows"]):
        where = f"{path.name}: rows[{number}]"
        _check_fields(where, row, dict.fromkeys(_SIZES, int) | dict.fromkeys(_CHOICES, str))
        first, last = _range(where, row.get("num_tokens"))
        others = ranges.setdefault(tuple(row[name] for name in _SIZES), [])
        for low, high in others:
            if first <= high and low <= last:
                raise ValueError(
                    f"{where}: num_tokens: expected a range of its own, got "
                    f"[{first}, {last}], which overlaps [{low}, {high}]"
                )
        others.append((first, last))
    return table


def find(table, hidden_size, intermediate_size, num_experts, topk, num_tokens):
    """The row of a checked table for these sizes, None where no range holds num_tokens."""
    sizes = (hidden_size, intermediate_size, num_experts, topk)
    for row in table["rows"]:
        first, last = row["num_tokens"]
        if tuple(row[name] for name in _SIZES) == sizes and first <= num_tokens <= last:
            return row
    return None


def _check_fields(where, value, kinds):
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
    for name, kind in kinds.items():
        if not isinstance(value.get(name), kind):
            got = type(value[name]).__name__ if name in value else "nothing"
            raise ValueError(f"{where}: {name}: expected {kind.__name__}, got {got}")


def _range(where, value):
    ints = isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
    if not ints or not 0 <= value[0] <= value[1]:
        raise ValueError(f"{where}: num_tokens: expected [first, last], got {value!r}")
    return value
