"""docs/integrations.md: its code runs, as it stands there; and the README's table of doors against
the doors themselves."""

import ast
import importlib
import json
import pathlib
import re
import warnings

import pytest
from fusedmoe import frameworks
from support import have

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
SECTIONS = dict(
    section.split("\n", 1) for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
)
ROWS = json.loads((ROOT / "docs" / "compatibility.json").read_text(encoding="utf-8"))["doors"]
BLOCKS = [
    (heading, block)
    for heading, section in SECTIONS.items()
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
]


def imports(block):
    """Packages that a block imports."""
    names = []
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return sorted({name.partition(".")[0] for name in names} - {"fusedmoe"})


@pytest.mark.parametrize("heading, block", BLOCKS, ids=[heading for heading, _ in BLOCKS])
def test_code_runs(heading, block):
    for package in imports(block):
        if not have(package):
            pytest.skip(f"{package} is not installed")
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages warn about at import
        for package in imports(block):
            importlib.import_module(package)
    exec(compile(block, f"docs/integrations.md, {heading}", "exec"), names)
    assert "out" in names or "tokens" in names


def test_every_door_has_a_section_with_code_and_a_row():
    assert [row["heading"] for row in ROWS] == list(SECTIONS)
    assert {heading for heading, _ in BLOCKS} == set(SECTIONS)
    doors = [row["door"] for row in ROWS]
    assert doors == [name for name in frameworks.DOORS if name in doors]
    assert set(doors) == {name for name, *_ in frameworks.doors()}


@pytest.mark.parametrize("row", ROWS, ids=[row["door"] for row in ROWS])
def test_row(row):
    """The versions are what the door itself says it was tested with, the proof is there."""
    path = ROOT / "python" / "fusedmoe" / "frameworks" / f"{row['door']}.py"
    tested = re.search(r'^TESTED = "(.*)"$', path.read_text(encoding="utf-8"), re.MULTILINE)
    assert tested is None or tested[1] == row["tested"]
    assert row["proof"] and all((ROOT / proof).is_file() for proof in row["proof"])
