"""The package around the functions: import, Routing, command line, generator, tables, records."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fusedmoe
import numpy as np
import pytest
from fusedmoe import Routing, bench, cli, frameworks, generate, models, reference, tuning

ROOT = Path(__file__).resolve().parent.parent


def python(code, **environment):
    """What a fresh interpreter prints; a failure shows its error."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -------------------------------------------------------------------------------------------------
# Import
# -------------------------------------------------------------------------------------------------


def test_import_loads_no_framework():
    code = "import sys, fusedmoe; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(python(code).split())
    assert "fusedmoe" in loaded
    assert not loaded & {"numpy", "ml_dtypes", "torch", "jax", "cupy", "tqdm", "dataclasses"}


def test_import_is_quick():
    code = "import time; t = time.perf_counter(); import fusedmoe; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(5)) < 0.03


def test_every_public_name_is_there():
    for name in fusedmoe.__all__:
        assert getattr(fusedmoe, name) is not None
        assert name in dir(fusedmoe)
    assert fusedmoe.__version__ == fusedmoe._C.__version__
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fusedmoe.no_such_name


def test_functions_have_their_contract_in_the_docstring():
    for name in ("fused_moe", "fused_experts", "route", "align", "gate_up", "down", "combine"):
        text = getattr(fusedmoe, name).__doc__
        assert f"Oracle: reference.{name}" in text
        assert "Args:" in text and "Returns:" in text


def test_quantize_is_reserved():
    with pytest.raises(NotImplementedError, match="quantize"):
        fusedmoe.quantize(np.zeros(1), quant="fp8_block")


# -------------------------------------------------------------------------------------------------
# Routing
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "name"),
    [
        ({"topk": 0}, ValueError, "topk"),
        ({"topk": 33}, ValueError, "topk"),
        ({"topk": True}, TypeError, "topk"),
        ({"topk": 2.0}, TypeError, "topk"),
        ({"topk": None}, TypeError, "topk"),
        ({"method": "best"}, ValueError, "method"),
        ({"method": 3}, TypeError, "method"),
        ({"renormalize": 1}, TypeError, "renormalize"),
        ({"method": "topk_softmax", "renormalize": False}, ValueError, "renormalize"),
        ({"routed_scaling_factor": float("nan")}, ValueError, "routed_scaling_factor"),
        ({"routed_scaling_factor": "2"}, TypeError, "routed_scaling_factor"),
        ({"ids_dtype": "int8"}, TypeError, "ids_dtype"),
        ({"weights_dtype": "int8"}, TypeError, "weights_dtype"),
        ({"correction_bias": np.zeros(8)}, ValueError, "correction_bias"),
        ({"method": "sigmoid_bias"}, ValueError, "correction_bias"),
        ({"num_groups": 8}, ValueError, "num_groups"),
        ({"num_fused_shared_experts": 31}, ValueError, "num_fused_shared_experts"),
        ({"softcap": -30.0}, ValueError, "softcap"),
    ],
)
def test_routing_refuses(fields, error, name):
    with pytest.raises(error, match=name):
        Routing(**{"topk": 2, **fields})


def test_routing_methods():
    assert Routing(2).knobs is None and Routing(2, method="topk_softmax").knobs is None
    assert Routing(2, renormalize=True).knobs is None
    assert Routing(2, renormalize=True).kernel_method == "topk_softmax"
    assert Routing(2, method="sigmoid", renormalize=False).knobs[0] is False
    assert Routing(np.int64(2), routed_scaling_factor=np.float32(2.5)).topk == 2


def test_routing_is_asked_for_by_type():
    with pytest.raises(TypeError, match="routing: expected a fusedmoe.Routing, got int"):
        fusedmoe.route(np.zeros((1, 4), np.float32), 2)


# -------------------------------------------------------------------------------------------------
# Framework hooks
# -------------------------------------------------------------------------------------------------


def test_allocate_beside_numpy():
    prototype = np.zeros((2, 3), np.float32)
    out, wrap = frameworks.allocate(prototype, (4, 5), "bfloat16")
    assert out.shape == (4, 5) and out.dtype.name == "bfloat16" and wrap is None
    # 16-bit integers stand for bf16: the result does too.
    out, _ = frameworks.allocate(np.zeros(3, np.uint16), (2,), "bfloat16")
    assert out.dtype == np.uint16
    out, _ = frameworks.allocate(np.zeros(3, np.uint16), (2,), "uint8")
    assert out.dtype == np.uint8


def test_allocate_beside_a_stranger():
    with pytest.raises(TypeError, match="out: expected a tensor"):
        frameworks.allocate(object(), (1,), "float32")
    assert frameworks.current_stream(object(), 0) == 0


# -------------------------------------------------------------------------------------------------
# Command line
# -------------------------------------------------------------------------------------------------


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert fusedmoe.__version__ in text and "numpy" in text and "FUSEDMOE_NUM_THREADS" in text
    assert re.search(r"^  hpc_ops +- +usable$", text, re.MULTILINE)


def test_doors_of_packages_that_are_broken_or_missing(monkeypatch):
    def broken():
        raise OSError("two\nlines")

    monkeypatch.setattr("fusedmoe.frameworks.hpc_ops.status", broken)
    monkeypatch.setattr("fusedmoe.frameworks.checkpoints.status", lambda: (None, "not there"))
    rows = {name: rest for name, *rest in frameworks.doors()}
    assert rows["hpc_ops"] == [None, False, "OSError: two lines"]
    assert rows["checkpoints"] == [None, False, "not there"]
    assert rows["numpy"][1] and list(rows) == [n for n in frameworks.DOORS if n in rows]


def test_check_on_the_cpu(capsys):
    assert cli.main(["check", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.count("ok   cpu") == 3 and "verdict: everything works" in text


@pytest.mark.gpu
def test_check_on_a_gpu(gpu):
    result = fusedmoe.check("cuda")
    assert result["ok"], result["text"]


def test_check_reports_a_failure(monkeypatch):
    def broken(*args, **keywords):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(fusedmoe.ops, "fused_moe", broken)
    result = fusedmoe.check("cpu")
    assert not result["ok"]
    assert "FAIL cpu bfloat16: RuntimeError: two lines" in result["text"]


def test_plan(capsys):
    assert cli.main(["plan", "--model", "qwen3_30b", "--tokens", "16"]) == 0
    assert "gate_up" in capsys.readouterr().out
    assert cli.main(["plan", "--tokens", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_chunks"] == 1


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["tune"], "tune: not built yet"),
        (["plan", "--model", "gpt5"], "model: expected one of qwen3_30b"),
        (["plan", "--tokens", "-1"], "num_tokens"),
        (["demo", "--model", "gpt5"], "model: expected one of"),
        # went unseen until after the weights, or gave "every result is within its bound" of none
        (["demo", "--tokens", ","], "tokens: expected numbers of at least 1"),
        (["demo", "--tokens", "1,-1"], "tokens: expected numbers of at least 1"),
        (["bench", "--tokens", "0"], "tokens: expected numbers of at least 1"),
        (["bench", "--tokens", "x"], "tokens: expected numbers of at least 1"),
    ],
)
def test_wrong_commands(capsys, argv, text):
    assert cli.main(argv) == 2
    assert text in capsys.readouterr().err


@pytest.mark.slow
def test_demo_and_bench(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("fusedmoe.demo.SECONDS", 0.05)
    model = "mixtral_tp8"  # the smallest
    assert cli.main(["demo", "--model", model, "--device", "cpu", "--tokens", "1,3"]) == 0
    assert capsys.readouterr().out.count("pass") == 2
    path = tmp_path / "out.json"
    argv = ["bench", "--model", model, "--device", "cpu", "--tokens", "1", "--json", str(path)]
    assert cli.main(argv) == 0
    (record,) = json.loads(path.read_text())["records"]
    assert record["model"] == model and record["us"] > 0 and record["rel_rms"] < 0.01


# -------------------------------------------------------------------------------------------------
# Generator
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_generated_numbers_are_normal(dtype):
    x = generate.normal((3, 100_001), dtype, 2.0, 7)
    assert x.dtype == generate.dtype_of(dtype)
    y = x.astype(np.float64) / 2
    assert abs(y.mean()) < 0.01 and abs(y.std() - 1) < 0.01
    assert abs((y**4).mean() - 3) < 0.1  # a normal distribution's
    assert np.array_equal(generate.normal((3, 100_001), dtype, 2.0, 7), x)
    assert not np.array_equal(generate.normal((3, 100_001), dtype, 2.0, 8), x)
    assert len(np.unique(x[:, :1000].view(f"u{x.itemsize}"))) > 500


def test_generator_reports_every_byte():
    seen = []
    generate.normal((generate._CHUNK + 3,), "bfloat16", 1.0, 0, seen.append)
    assert sum(seen) == 2 * (generate._CHUNK + 3)


def test_random_routings_are_distinct_and_uniform():
    sizes = models.Model(8, 8, 12, 5)
    weights, ids = bench.routing(20_000, sizes, 1)
    assert weights.dtype == np.float32 and ids.dtype == np.int32
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    for slot in range(5):  # each slot by itself is uniform too
        counts = np.bincount(ids[:, slot], minlength=12)
        assert abs(counts - 20_000 / 12).max() < 6 * (20_000 / 12) ** 0.5
    weights, ids = bench.routing(3, models.Model(8, 8, 4, 4), 1)
    assert (np.sort(ids, axis=1) == np.arange(4)).all()


# -------------------------------------------------------------------------------------------------
# Records and tables
# -------------------------------------------------------------------------------------------------


def record(model, num_tokens, us):
    return {"op": "layer", "case": "uniform", "dtype": "bf16", "model": model} | {
        "num_tokens": num_tokens,
        "us": us,
    }


def test_records_are_replaced_point_by_point(tmp_path):
    path = tmp_path / "gpu_layer.json"
    head = {"gpu": "G", "driver": "1", "cuda": "13.0", "commit": "aaa", "date": "2026-01-01"}
    head |= {"command": "python x.py", "chip_stream_us": 263.0, "records": []}
    bench.write_records(path, head, [record("m", 1, 5.0), record("m", 16, 50.0)])
    later = head | {"commit": "bbb", "date": "2026-01-02", "chip_stream_us": None}
    bench.write_records(path, later, [record("m", 2, 9.0), record("m", 1, 4.0)])
    document = json.loads(path.read_text())
    assert document["commit"] == "bbb" and document["chip_stream_us"] == 263.0
    found = [(r["num_tokens"], r["us"], r["commit"]) for r in document["records"]]
    assert found == [(1, 4.0, "bbb"), (2, 9.0, "bbb"), (16, 50.0, "aaa")]


def test_recorded_commands_hold_no_path_of_this_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/b/benchmarks/bench_cpu.py", "--json", "/c/d.json", "-x"])
    assert bench.command_line() == "python benchmarks/bench_cpu.py --json d.json -x"
    monkeypatch.setattr(sys, "argv", ["/a/fusedmoe/__main__.py", "bench"])
    assert bench.command_line() == "python -m fusedmoe bench"


def test_floor():
    sizes = models.model("qwen3_30b")
    # One token: 8 experts of 9.4 MB each at 4.65 TB/s. Many: 771 TFLOP/s.
    assert bench.floor_us(sizes, 1, 4.65e6, 771e6) == pytest.approx(16.24, rel=0.01)
    flops = 2 * 16384 * 8 * 3 * 2048 * 768
    assert bench.floor_us(sizes, 16384, 4.65e6, 771e6) == pytest.approx(flops / 771e6)


def test_committed_records_are_sound():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        document = json.loads(path.read_text())
        assert not re.search(r"(^|[\s=\"'])/", document["command"]), path.name
        assert {"gpu", "driver", "cuda", "commit", "date", "command"} <= set(document)
        keys = [bench._key(entry) for entry in document["records"]]
        assert len(set(keys)) == len(keys), path.name
        assert all(entry["us"] > 0 for entry in document["records"])


TABLE = {
    "gpu": "NVIDIA H200",
    "dtype": "bf16",
    "command": "x",
    "date": "2026-01-01",
    "commit": "aaa",
    "rows": [
        {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "topk": 2}
        | {"num_tokens": [1, 8], "gate_up": "a", "down": "b"}
    ],
}


def test_tuned_tables(tmp_path):
    assert isinstance(tuning.tables(), dict)  # what is shipped reads without complaint
    path = tmp_path / "t.json"
    path.write_text(json.dumps(TABLE))
    table = tuning.tables(tmp_path)["t.json"]
    assert tuning.find(table, 64, 32, 8, 2, 8)["gate_up"] == "a"
    assert tuning.find(table, 64, 32, 8, 2, 9) is None
    assert tuning.find(table, 64, 32, 8, 4, 1) is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gpu": None}, "gpu: expected str, got NoneType"),
        ({"rows": {}}, "rows: expected list, got dict"),
        ({"rows": [TABLE["rows"][0] | {"topk": "2"}]}, r"rows\[0\]: topk: expected int"),
        ({"rows": [TABLE["rows"][0] | {"num_tokens": [8, 1]}]}, r"rows\[0\]: num_tokens"),
        ({"rows": TABLE["rows"] * 2}, r"rows\[1\]: num_tokens: .* overlaps"),
    ],
)
def test_wrong_tuned_tables(tmp_path, change, text):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(TABLE | change))
    with pytest.raises(ValueError, match=f"t.json: {text}"):
        tuning.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="t.json: expected JSON"):
        tuning.read(path)


# -------------------------------------------------------------------------------------------------
# README and usage page
# -------------------------------------------------------------------------------------------------


def test_readme_tables_come_from_the_records():
    script = ROOT / "benchmarks" / "make_tables.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_routing_method_has_a_whole_row_in_the_docs():
    text = (ROOT / "docs" / "routing.md").read_text(encoding="utf-8")
    table = text.split("<!-- table: routing_methods -->")[1].split("<!-- end of table -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"`{name}`" for name in reference.METHODS]
    assert all(len(row) == 13 and all(cell.strip() for cell in row) for row in rows)
    assert "not measured" not in table


def test_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["out"].shape == (16, 2048) and names["out"].dtype.name == "bfloat16"


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_usage_code_runs(framework):
    pytest.importorskip(framework)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "usage.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        if f"import {framework}" in block or names:
            if framework == "jax" or "import jax" not in block:
                exec(block, names)
    assert tuple(names["out"].shape)[0] == 16


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "usage.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


def test_a_plot_that_cannot_be_written_is_refused_before_the_measurement(capsys):
    """It once failed after the measurement."""
    with pytest.raises(SystemExit):
        cli.main(["bench", "--plot", "layer.txt"])
    assert "--plot" in capsys.readouterr().err
