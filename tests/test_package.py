"""The package as a user finds it: import, command line, files, names."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import fusedmoe
import pytest
from fusedmoe import _C, reference

PACKAGE = Path(fusedmoe.__file__).parent


def run(*args, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(
        [sys.executable, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def output(*args, **environment):
    done = run(*args, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -------------------------------------------------------------------------------------------------
# Import
# -------------------------------------------------------------------------------------------------


def test_import_brings_no_framework():
    code = """
import sys
before = set(sys.modules)
import fusedmoe
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"numpy", "ml_dtypes", "torch", "jax", "jaxlib", "cupy", "tqdm", "dataclasses"}))
print(sorted(name for name in sys.modules if name.startswith("fusedmoe")))
"""
    frameworks, ours = output("-c", code).splitlines()
    assert frameworks == "[]"
    assert "fusedmoe._C" in ours and "reference" not in ours


def test_import_takes_at_most_30_ms():
    """The best of five: what the machine does beside is not ours."""
    code = """
import time
start = time.perf_counter()
import fusedmoe
print(1e3 * (time.perf_counter() - start))
"""
    assert min(float(output("-c", code)) for _ in range(5)) <= 30


def test_import_works_where_numpy_is_hidden():
    code = """
import sys
sys.modules["numpy"] = sys.modules["ml_dtypes"] = None
import fusedmoe
print(fusedmoe.workspace_size(16, 2048, 768, 128, 8) > 0, fusedmoe.info()["version"])
try:
    fusedmoe.fused_experts([1], 2, 3, 4, 5)
except TypeError as error:
    print(error)
"""
    lines = output("-c", code).splitlines()
    assert lines[0] == f"True {fusedmoe.__version__}"
    assert lines[1].startswith("hidden_states: expected")


def test_import_needs_no_driver_and_no_gpu():
    text = output("-c", "import fusedmoe; print('fine')", CUDA_VISIBLE_DEVICES="")
    assert text == "fine\n"


def test_extension_is_one_abi3_file():
    path = Path(_C.__file__)
    assert path.name == "_C.abi3.so"
    assert len(list(path.parent.glob("_C*.so"))) == 1


def test_extension_links_libc_only():
    text = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].partition(".so")[0].rsplit("/", 1)[-1] for line in text.splitlines()}
    allowed = {"linux-vdso", "libc", "libm", "libpthread", "libdl", "ld-linux-x86-64"}
    allowed |= {"ld-linux-aarch64", "libasan", "libubsan", "libstdc++", "libgcc_s"}
    if "libasan" not in names and "libubsan" not in names:  # the sanitizers bring these two
        allowed -= {"libstdc++", "libgcc_s"}
    assert names <= allowed


def test_extension_exports_its_init_function_only():
    text = subprocess.run(
        ["nm", "-D", "--defined-only", _C.__file__], capture_output=True, text=True, check=False
    )
    if text.returncode != 0:
        pytest.skip(f"nm does not read it: {text.stderr.strip()}")
    names = {line.split()[-1] for line in text.stdout.splitlines()}
    names = {n for n in names if not n.startswith(("_init", "_fini", "__asan", "__odr_asan"))}
    assert names == {"PyInit__C"}


def test_reference_imports_nothing_of_the_package():
    tree = ast.parse((PACKAGE / "reference.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module)
    assert found == {"math", "typing", "numpy"}


def test_reference_runs_by_itself(tmp_path):
    (tmp_path / "oracle.py").write_text((PACKAGE / "reference.py").read_text())
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import numpy as np, oracle
print(oracle.route(np.zeros((1, 4)), 2)[1].tolist(), "fusedmoe" in sys.modules)
"""
    assert output("-c", code) == "[[0, 1]] False\n"


# -------------------------------------------------------------------------------------------------
# Names and texts
# -------------------------------------------------------------------------------------------------

PUBLIC = [name for name in fusedmoe.__all__ if name != "__version__"]


def test_public_names_are_there():
    assert set(dir(fusedmoe)) >= set(fusedmoe.__all__)
    for name in fusedmoe.__all__:
        assert getattr(fusedmoe, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fusedmoe.no_such_name


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", fusedmoe.__version__)
    assert _C.__version__ == fusedmoe.__version__ == fusedmoe.info()["version"]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name):
    """What it does in a line; functions name every argument they take."""
    thing = getattr(fusedmoe, name)
    text = inspect.getdoc(thing)
    assert text and len(text.splitlines()[0]) > 20
    if not inspect.isfunction(thing) or "eserved" in text.splitlines()[0]:
        return
    referred = text + (inspect.getdoc(fusedmoe.fused_experts) if "as `fused" in text else "")
    referred += inspect.getdoc(fusedmoe.plan) if "as `plan`" in text else ""
    for parameter in inspect.signature(thing).parameters:
        assert re.search(rf"\b{parameter}\b", referred), f"{name}: {parameter} is not documented"


def test_oracles_that_docstrings_name_exist():
    for name in PUBLIC:
        text = inspect.getdoc(getattr(fusedmoe, name)) or ""
        for oracle in re.findall(r"Oracle: reference\.(\w+)", text):
            assert callable(getattr(reference, oracle))


def test_layer_keywords_are_the_same_everywhere():
    experts = list(inspect.signature(fusedmoe.fused_experts).parameters)[5:]
    moe = list(inspect.signature(fusedmoe.fused_moe).parameters)[5:]
    assert experts == moe
    own = set(inspect.signature(reference.fused_experts).parameters)
    placement = "deterministic batch_invariant out workspace stream dtype".split()
    reserved = "quant w13_scale w2_scale w13_zero_point w2_zero_point".split()
    reserved += ["hidden_states_scale", "intermediate_scale"]
    assert set(experts) - set(placement) - set(reserved) <= own


def test_stub_agrees_with_the_extension():
    """_C.pyi names what the extension has, and the parameters in their order."""
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    has = {n for n in dir(_C) if not n.startswith("__")}
    assert names == has
    layer = [f for f in tree.body if getattr(f, "name", "") == "fused_experts"][0]
    arguments = [a.arg for a in layer.args.args]
    assert arguments == list(inspect.signature(fusedmoe.fused_experts).parameters)


def test_files_that_ship():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()
    configs = PACKAGE / "configs"
    assert configs.is_dir()


# -------------------------------------------------------------------------------------------------
# Command line
# -------------------------------------------------------------------------------------------------


def cli(*args, **environment):
    return run("-m", "fusedmoe", *args, **environment)


def test_info():
    done = cli("info")
    assert done.returncode == 0, done.stderr
    assert fusedmoe.__version__ in done.stdout and "numpy" in done.stdout


def test_info_shows_environment_variables():
    assert "FUSEDMOE_NUM_THREADS" in cli("info", FUSEDMOE_NUM_THREADS="1").stdout


def test_check():
    done = cli("check", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    for dtype in ("bfloat16", "float16", "float32"):
        assert dtype in done.stdout
    assert "verdict: everything works" in done.stdout


def test_check_as_a_function():
    report = fusedmoe.check("cpu")
    assert report["ok"] and len(report["cases"]) == 3


@pytest.mark.parametrize("model", ["qwen3_30b", "dsv3_tp8"])
def test_plan(model):
    done = cli("plan", "--model", model, "--tokens", "16")
    assert done.returncode == 0, done.stderr
    assert "gate_up" in done.stdout and "down" in done.stdout


@pytest.mark.parametrize(
    "args",
    [("no-such-command",), ("plan", "--model", "gpt-1"), ("plan", "--tokens", "-1"), ()],
    ids=lambda a: "-".join(a) or "none",
)
def test_mistakes_on_the_command_line(args):
    done = cli(*args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()


def test_modules_import():
    """Every module of the package imports by itself (frameworks need their framework)."""
    for path in sorted(PACKAGE.glob("*.py")):
        if path.stem != "__main__":
            importlib.import_module(f"fusedmoe.{path.stem}".removesuffix(".__init__"))


def test_limited_api():
    """Built once for CPython 3.10 and newer: the file says so, and this Python took it."""
    assert sys.version_info >= (3, 10)
    assert sysconfig.get_config_var("Py_GIL_DISABLED") in (0, None)
