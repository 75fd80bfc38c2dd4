"""The build: which nvcc is taken, what a cached object depends on, what a failure says."""

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "build_backend" / "fusedmoe_build"

if not PACKAGE.is_dir():
    pytest.skip("the build backend is in the source tree only", allow_module_level=True)


def load(name):
    """A module of the backend, without the backend's own imports (setuptools)."""
    spec = importlib.util.spec_from_file_location(f"fusedmoe_build_{name}", PACKAGE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


nvcc = load("nvcc")
objects = load("objects")


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_nvcc(folder, release="13.0"):
    return script(folder / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {release}'")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without any nvcc."""
    for name in ("FUSEDMOE_NVCC", "FUSEDMOE_CUDA", "CUDA_HOME", "CUDA_PATH", "FUSEDMOE_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.setattr(nvcc, "_wheel_folders", lambda: [tmp_path / "wheel"])
    monkeypatch.setattr(nvcc, "USUAL", str(tmp_path / "usual" / "bin" / "nvcc"))
    return tmp_path


def test_nvcc_is_searched_in_order(machine, monkeypatch):
    assert nvcc.find_nvcc() is None
    last_to_first = [
        ("usual", {}, "the usual folder"),
        ("path", {}, "PATH"),
        ("wheel", {}, "the nvidia-cuda-nvcc wheel"),
        ("home", {"CUDA_HOME": machine / "home"}, "CUDA_HOME"),
        ("own", {"FUSEDMOE_NVCC": machine / "own" / "bin" / "nvcc"}, "FUSEDMOE_NVCC"),
    ]
    for folder, variables, found_in in last_to_first:
        path = fake_nvcc(machine / folder)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        found = nvcc.find_nvcc()
        assert (found.path, found.version, found.found_in) == (str(path), (13, 0), found_in)


def test_an_old_nvcc_is_passed_over_with_a_line(machine, monkeypatch, capfd):
    fake_nvcc(machine / "home", "12.7")
    monkeypatch.setenv("CUDA_HOME", str(machine / "home"))
    newer = fake_nvcc(machine / "usual", "12.8")
    assert nvcc.find_nvcc().path == str(newer)
    assert "is release 12.7, expected 12.8 or newer" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("release", "text"), [(None, "is not an nvcc that runs"), ("12.7", "expected 12.8 or newer")]
)
def test_an_nvcc_that_was_asked_for_is_not_replaced(machine, monkeypatch, release, text):
    fake_nvcc(machine / "usual")
    if release:
        fake_nvcc(machine / "own", release)
    monkeypatch.setenv("FUSEDMOE_NVCC", str(machine / "own" / "bin" / "nvcc"))
    with pytest.raises(nvcc.NvccError, match=f"FUSEDMOE_NVCC: .*{text}"):
        nvcc.find_nvcc()


def test_wheel_only_hides_the_systems_toolkit(machine, monkeypatch):
    fake_nvcc(machine / "usual")
    fake_nvcc(machine / "path")
    monkeypatch.setenv("CUDA_HOME", str(machine / "usual"))
    monkeypatch.setenv("FUSEDMOE_NVCC", "wheel")
    assert nvcc.find_nvcc() is None
    path = fake_nvcc(machine / "wheel")
    assert nvcc.find_nvcc().path == str(path)


def test_no_nvcc_says_what_to_do(machine):
    with pytest.raises(nvcc.NvccError, match="pip install 'nvidia-cuda-nvcc==") as error:
        nvcc.require_nvcc()
    assert "FUSEDMOE_CUDA=0" in str(error.value)


def test_the_drivers_header_is_found_by_asking_nvcc(machine):
    include = machine / "toolkit" / "include"
    dryrun = f"""echo '#$ INCLUDES="-I{include}/../include"  ' >&2"""
    found = nvcc.Nvcc(str(script(machine / "wrapper", dryrun)), (13, 0), "", "PATH")
    with pytest.raises(nvcc.NvccError, match="cuda.h: expected beside .*wrapper"):
        nvcc.include_folder(found)
    include.mkdir(parents=True)
    (include / "cuda.h").write_text("")
    assert nvcc.include_folder(found) == str(include)


def test_only_0_turns_cuda_off(machine, monkeypatch):
    assert nvcc.cuda_wanted()
    monkeypatch.setenv("FUSEDMOE_CUDA", "0")
    assert not nvcc.cuda_wanted()
    monkeypatch.setenv("FUSEDMOE_CUDA", "off")
    with pytest.raises(nvcc.NvccError, match="FUSEDMOE_CUDA: expected 0 or 1, got 'off'"):
        nvcc.cuda_wanted()


def test_the_compilers_wheels_are_asked_for_only_without_nvcc(machine, monkeypatch):
    pytest.importorskip("setuptools", reason="the backend's hooks need setuptools")
    monkeypatch.syspath_prepend(str(PACKAGE.parent))
    monkeypatch.chdir(ROOT)
    import fusedmoe_build as backend

    for name in ("find_nvcc", "cuda_wanted"):
        monkeypatch.setattr(backend, name, getattr(nvcc, name))
    assert backend._compiler_wheels() == list(nvcc.NVCC_WHEELS)
    fake_nvcc(machine / "usual")
    assert backend._compiler_wheels() == []
    monkeypatch.setenv("FUSEDMOE_NVCC", "wheel")
    monkeypatch.setenv("FUSEDMOE_CUDA", "0")
    assert backend._compiler_wheels() == []


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source that includes one header by way of another, in a tree of its own."""
    monkeypatch.setenv("FUSEDMOE_CACHE_DIR", str(tmp_path / "cache"))
    root = tmp_path / "tree"
    (root / "csrc" / "cpu").mkdir(parents=True)
    (root / "csrc" / "cpu" / "a.c").write_text('#include "near.h"\nint a = VALUE;\n')
    (root / "csrc" / "cpu" / "near.h").write_text('  # include "far.h"\n')
    (root / "csrc" / "far.h").write_text("#define VALUE 1\n")
    (root / "csrc" / "other.h").write_text("not included\n")
    return root


def copier(folder):
    """A "compiler" that copies its source and counts its runs."""
    return script(folder / "copy", f'echo run >> {folder}/runs; cp "$1" "$3"')


def step(compiler, *flags, identity="compiler 1"):
    return objects.Step("csrc/cpu/a.c", ".o", (str(compiler),), identity, search=flags)


def build(tree, *steps):
    return objects.Objects(tree, ("csrc",), tree / "build").build(list(steps))


def test_an_object_is_built_once_for_what_it_depends_on(tree, tmp_path, capfd):
    compiler = copier(tmp_path)
    (first,) = build(tree, step(compiler))
    assert Path(first).read_text() == (tree / "csrc/cpu/a.c").read_text()

    (tree / "csrc" / "other.h").write_text("changed, but not included\n")
    moved = tmp_path / "elsewhere"
    tree.rename(moved)
    os.utime(moved / "csrc" / "far.h")
    assert build(moved, step(compiler)) == [first]
    assert (tmp_path / "runs").read_text() == "run\n"
    assert "0 of 1 objects to compile" in capfd.readouterr().out

    (moved / "csrc" / "far.h").write_text("#define VALUE 2\n")
    (second,) = build(moved, step(compiler))
    (third,) = build(moved, step(compiler, identity="compiler 2"))
    assert len({first, second, third}) == 3


def test_a_failed_compile_shows_the_message_and_leaves_nothing(tree, tmp_path):
    compiler = script(tmp_path / "cc", "echo 'Python.h: No such file or directory' >&2; exit 1")
    with pytest.raises(objects.CompileError) as error:
        build(tree, step(compiler))
    assert "csrc/cpu/a.c did not compile" in str(error.value)
    assert "Python.h: No such file" in str(error.value)
    assert "apt install python3-dev" in str(error.value)
    assert list((tmp_path / "cache" / "objects").iterdir()) == []


def test_a_killed_compiler_is_told_apart(tree, tmp_path):
    compiler = script(tmp_path / "cc", "kill -9 $$")
    with pytest.raises(objects.CompileError, match="signal 9") as error:
        build(tree, step(compiler))
    assert "FUSEDMOE_JOBS=1" in str(error.value)


def test_a_missing_compiler_is_named(tree, tmp_path):
    with pytest.raises(objects.CompileError, match="cannot run .*nowhere: No such file"):
        build(tree, step(tmp_path / "nowhere"))


def test_an_unwritable_cache_moves_into_the_build_folder(tree, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEDMOE_CACHE_DIR", str(tmp_path / "file"))
    (path,) = build(tree, step(copier(tmp_path)))
    assert Path(path).parent == tree / "build" / "objects"
    assert "no cache" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("cores", "gib", "jobs"), [(2, 23, 2), (64, 8, 4), (64, 512, 64), (8, 1, 1)]
)
def test_jobs_are_capped_by_cores_and_memory(machine, monkeypatch, cores, gib, jobs):
    monkeypatch.setattr(objects, "_cores", lambda: cores)
    monkeypatch.setattr(objects, "_free_memory", lambda: gib << 30)
    assert objects.num_jobs() == jobs
    monkeypatch.setenv("FUSEDMOE_JOBS", "3")
    assert objects.num_jobs() == 3


def test_cpu_backend_compiles_where_there_is_no_x86(tmp_path):
    """simd.c named a function that only x86 had: no other machine could build."""
    compiler = shutil.which("gcc") or pytest.skip("needs gcc")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    header = tmp_path / "csrc" / "cpu" / "simd.h"
    text = header.read_text()
    assert "defined(__x86_64__)" in text
    header.write_text(text.replace("defined(__x86_64__)", "0"))
    sources = sorted(map(str, (tmp_path / "csrc" / "cpu").glob("*.c")))
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    done = subprocess.run([compiler, *flags, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
