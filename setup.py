"""How the one extension, fusedmoe._C, is built. What the package is, is in pyproject.toml.

    csrc/*.c csrc/cpu/*.c csrc/cuda/*.c   -> objects                    cc
    kernels/*.cu                          -> one fatbin each            nvcc
    fatbins                               -> fatbins.c, .incbin table   cc, csrc/cuda/fatbins.h
    all of them                           -> _C.abi3.so                 cc; libc, libm, pthread, dl

Settings: FUSEDMOE_CUDA=0 (no GPU code), FUSEDMOE_NVCC (a path, or "wheel"), FUSEDMOE_WERROR=1,
FUSEDMOE_SANITIZE=address,undefined, FUSEDMOE_JOBS, FUSEDMOE_CACHE_DIR; CC, CFLAGS, LDFLAGS and
NVCC_CCBIN as everywhere. Development: `python setup.py build_ext --inplace`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

from fusedmoe_build import nvcc, objects  # noqa: E402  (found only through the line above)

LIMITED_API = "0x030A0000"  # Python 3.10; bdist_wheel's tag below says the same
INCLUDE = ("csrc", "kernels")

# A kernel file that needs one architecture's own instructions says so in its opening comment:
# `// arch: sm_90a`. All others are portable: code for sm_80 and sm_90, so that an H200 compiles
# nothing at run time, and PTX for whatever comes later.
ARCH_MARK = re.compile(r"\barch:\s*sm_(\d+a?)\b")
ARCH_MARK_LINES = 30
PORTABLE = (
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90,code=sm_90",
)

WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Wconversion")


def flag_set(name):
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise PlatformError(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1"


def c_compiler():
    """The C compiler's command: $CC, else the first of gcc, cc and clang."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for name in [chosen[0]] if chosen else ["gcc", "cc", "clang"]:
        if shutil.which(name):
            return chosen or [name]
    raise PlatformError(
        "no C compiler found (looked for $CC, gcc, cc, clang). Debian, Ubuntu: apt install gcc g++"
    )


def python_headers():
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").exists():
        raise PlatformError(
            f"Python.h: expected in {folder}, got nothing. Install this Python's headers "
            "(Debian, Ubuntu: apt install python3-dev)"
        )
    return folder


def sanitizers():
    value = os.environ.get("FUSEDMOE_SANITIZE", "")
    return [f"-fsanitize={value}"] if value else []


def c_flags(macros):
    flags = ["-c", "-std=c11", "-fPIC", "-fvisibility=hidden", "-pthread", *WARNINGS]
    if flag_set("FUSEDMOE_WERROR"):
        flags += ["-Werror"]
    if sanitizers():
        flags += [
            *sanitizers(),
            "-fno-sanitize-recover=all",
            "-fno-omit-frame-pointer",
            "-O1",
            "-g",
        ]
    else:
        # Nobody reads the flags of floating-point exceptions. Values stay as they are; loops that
        # choose between two of them become vectors.
        flags += ["-O3", "-fno-trapping-math", "-DNDEBUG"]
    flags += [f"-D{name}={value}" for name, value in macros.items()]
    flags += shlex.split(os.environ.get("CFLAGS", ""))
    return flags + [f"-I{folder}" for folder in INCLUDE]


def link_flags():
    flags = ["-shared", "-pthread", *sanitizers(), "-Wl,--as-needed", "-Wl,-z,relro", "-Wl,-z,now"]
    return flags + shlex.split(os.environ.get("LDFLAGS", ""))


def c_sources(*folders):
    return sorted(source for folder in folders for source in glob(f"{folder}/*.c", root_dir=ROOT))


def c_steps(command, cuda):
    """cuda: the nvcc whose cuda.h csrc/cuda sees; None for a build without GPU code."""
    try:
        import numpy  # here: only a build needs it, an sdist does not
    except ImportError:
        numpy = None
    if numpy is None or int(numpy.__version__.split(".")[0]) < 2:
        raise PlatformError(
            "the headers of NumPy 2 or newer are needed to build (they serve NumPy 1 at run time "
            "too): pip install 'numpy>=2'"
        )
    compiler = subprocess.run([*c_compiler(), "--version"], capture_output=True, text=True).stdout
    identity = f"{compiler} Python {sys.version} NumPy {numpy.__version__}"
    search = ("-isystem", python_headers(), "-isystem", numpy.get_include())
    steps = [
        objects.Step(source, ".o", tuple(command), identity, search)
        for source in c_sources("csrc", "csrc/cpu")
    ]
    if cuda:
        search = ("-isystem", nvcc.include_folder(cuda))
        steps += [
            objects.Step(source, ".o", tuple(command), f"{compiler} {cuda.text}", search)
            for source in c_sources("csrc/cuda")
        ]
    return steps


def kernel_architectures(source):
    head = (ROOT / source).read_text(encoding="utf-8").splitlines()[:ARCH_MARK_LINES]
    mark = ARCH_MARK.search("\n".join(head))
    return (f"-gencode=arch=compute_{mark[1]},code=sm_{mark[1]}",) if mark else PORTABLE


def kernel_steps(compiler):
    flags = ["-std=c++17", "-O3", "-lineinfo", "--fatbin", "--compress-mode=size", "-Ikernels"]
    if flag_set("FUSEDMOE_WERROR"):
        flags += ["-Xptxas", "-warn-spills", "-Werror", "all-warnings"]
    return [
        objects.Step(
            source,
            ".fatbin",
            (compiler.path, *flags, *kernel_architectures(source)),
            compiler.text,
        )
        for source in sorted(glob("kernels/*.cu", root_dir=ROOT))
    ]


def fatbin_table(fatbins):
    """C source that holds the fatbins and the table of csrc/cuda/fatbins.h."""
    lines = ['#include "cuda/fatbins.h"', ""]
    for name, path in fatbins:
        lines += [
            '__asm__(".section .rodata.moe_fatbins, \\"a\\"\\n"',
            '        ".balign 64\\n"',
            f'        ".globl moe_fatbin_{name}, moe_fatbin_{name}_end\\n"',
            f'        ".hidden moe_fatbin_{name}, moe_fatbin_{name}_end\\n"',
            f'        "moe_fatbin_{name}:\\n"',
            f'        ".incbin \\"{path}\\"\\n"',
            f'        "moe_fatbin_{name}_end:\\n"',
            '        ".byte 0\\n"',
            '        ".previous\\n");',
            f"extern const unsigned char moe_fatbin_{name}[], moe_fatbin_{name}_end[];",
            "",
        ]
    lines += ["const moe_fatbin moe_fatbins[] = {"]
    lines += [f'    {{"{name}", moe_fatbin_{name}, moe_fatbin_{name}_end}},' for name, _ in fatbins]
    lines += ["    {0, 0, 0},", "};", f"const int moe_num_fatbins = {len(fatbins)};", ""]
    return "\n".join(lines)


class BuildExtension(build_ext):
    """Builds with objects.py instead of setuptools' compiler: kernels, a cache, own warnings."""

    def build_extension(self, ext):
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (objects.CompileError, nvcc.NvccError) as error:
            raise PlatformError(str(error)) from error

    def _build(self, output):
        temporary = Path(self.build_temp).resolve()
        temporary.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        store = objects.Objects(ROOT, INCLUDE, temporary)

        if nvcc.cuda_wanted():
            cuda = nvcc.require_nvcc()
            major, minor = cuda.version
            print(f"fusedmoe: nvcc {major}.{minor} at {cuda.path} (from {cuda.found_in})")
        else:
            cuda = None
            print("fusedmoe: FUSEDMOE_CUDA=0, a build for the CPU only: it will use no GPU")

        compiler = c_compiler()
        macros = {
            "Py_LIMITED_API": LIMITED_API,
            "MOE_VERSION": f'"{self.distribution.get_version()}"',
            "MOE_CUDA_BUILT": 1 if cuda else 0,
            "MOE_CUDA_VERSION": major * 1000 + minor * 10 if cuda else 0,
        }
        command = [*compiler, *c_flags(macros)]
        kernels = kernel_steps(cuda) if cuda else []
        built = store.build(kernels + c_steps(command, cuda))
        fatbins, linked = built[: len(kernels)], built[len(kernels) :]

        # A folder of its own: two builds may run in one tree.
        with tempfile.TemporaryDirectory(dir=temporary) as folder:
            if cuda:
                names = [Path(step.source).stem for step in kernels]
                table = Path(folder, "fatbins.c")
                table.write_text(fatbin_table(list(zip(names, fatbins, strict=True))))
                linked.append(f"{folder}/fatbins.o")
                objects.run_compiler([*command, str(table), "-o", linked[-1]], table.name, ROOT)
            library = Path(folder, output.name)
            objects.run_compiler(
                [*compiler, *link_flags(), *linked, "-lm", "-ldl", "-o", str(library)],
                output.name,
                ROOT,
            )
            os.replace(library, output)


extension = Extension(
    "fusedmoe._C", c_sources("csrc", "csrc/cpu", "csrc/cuda"), py_limited_api=True
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
