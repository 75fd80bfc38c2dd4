"""Which nvcc compiles the kernels."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

OLDEST = (12, 8)
USUAL = "/usr/local/cuda/bin/nvcc"

# One line of versions: nvcc looks for its companions (cicc, crt/, nv/target) in its own folder.
NVCC_WHEELS = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
)


class Nvcc(NamedTuple):
    path: str
    version: tuple[int, int]
    text: str  # all of `nvcc --version`: part of every kernel's cache key
    found_in: str


class NvccError(Exception):
    """No usable nvcc. The text says what to do."""


def cuda_wanted():
    """FUSEDMOE_CUDA=0 asks for a build without GPU code. Nothing else leads there."""
    value = os.environ.get("FUSEDMOE_CUDA", "1")
    if value not in ("0", "1"):
        raise NvccError(f"FUSEDMOE_CUDA: expected 0 or 1, got {value!r}")
    return value == "1"


def _wheel_folders():
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        yield from sorted(Path(root).glob("cu[0-9]*"), reverse=True)
        yield Path(root, "cuda_nvcc")


def _candidates():
    """(where, path) of every place an nvcc may be, best first."""
    chosen = os.environ.get("FUSEDMOE_NVCC", "")
    if chosen and chosen != "wheel":
        yield "FUSEDMOE_NVCC", chosen
        return  # a compiler that was asked for is the one to use, or the one to complain about
    system = chosen != "wheel"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if system and os.environ.get(name):
            yield name, os.path.join(os.environ[name], "bin", "nvcc")
    for folder in _wheel_folders():
        yield "the nvidia-cuda-nvcc wheel", str(folder / "bin" / "nvcc")
    if system:
        yield "PATH", shutil.which("nvcc") or ""
        yield "the usual folder", USUAL


def _version(path):
    """((major, minor), text), or None where path is no nvcc that runs."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    return ((int(found[1]), int(found[2])), answer.stdout.strip()) if found else None


def find_nvcc():
    """The nvcc to use, or None.

    Looks in $FUSEDMOE_NVCC, $CUDA_HOME, $CUDA_PATH, the nvidia-cuda-nvcc wheel, PATH and
    /usr/local/cuda, and takes the first that is new enough. FUSEDMOE_NVCC=wheel looks at the wheel
    only. Raises NvccError where FUSEDMOE_NVCC names something that cannot be used.
    """
    asked_for = os.environ.get("FUSEDMOE_NVCC", "") not in ("", "wheel")
    for where, path in _candidates():
        seen = _version(path) if path else None
        if seen is None:
            problem = "is not an nvcc that runs"
        elif seen[0] < OLDEST:
            problem = (
                f"is release {seen[0][0]}.{seen[0][1]}, expected {OLDEST[0]}.{OLDEST[1]} or newer"
            )
        else:
            return Nvcc(path, *seen, where)
        if asked_for:
            raise NvccError(f"FUSEDMOE_NVCC: {path} {problem}")
        if seen:
            print(f"fusedmoe: passing over {path} (from {where}): it {problem}", flush=True)
    return None


def require_nvcc():
    nvcc = find_nvcc()
    if nvcc is None:
        raise NvccError(
            f"no nvcc {OLDEST[0]}.{OLDEST[1]} or newer found to build the GPU kernels "
            "(looked in $FUSEDMOE_NVCC, $CUDA_HOME, $CUDA_PATH, the nvidia-cuda-nvcc wheel, PATH, "
            "/usr/local/cuda). One of these helps:\n"
            f"  pip install {' '.join(repr(wheel) for wheel in NVCC_WHEELS)}\n"
            "  FUSEDMOE_NVCC=/path/to/nvcc    a toolkit that is somewhere else\n"
            "  FUSEDMOE_CUDA=0                a build without GPU code\n"
            "(`pip install .` with build isolation fetches the compiler's wheels by itself.)"
        )
    return nvcc


def include_folder(nvcc):
    """The folder of this nvcc's cuda.h, asked of nvcc itself.

    A toolkit, a wheel and a wrapper script in PATH each have it elsewhere."""
    answer = subprocess.run(
        [nvcc.path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    found = re.search(r'^#\$ INCLUDES="-I([^"]+)"', answer.stderr, re.MULTILINE)
    if found is None or not Path(found[1], "cuda.h").is_file():
        where = found[1] if found else "its folders"
        raise NvccError(
            f"cuda.h: expected beside {nvcc.path}, got {where} without it "
            "(the nvidia-cuda-runtime wheel has it)"
        )
    return os.path.normpath(found[1])
