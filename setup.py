"""How the one extension, fusedmoe._C, is built. What the package is, is in pyproject.toml.

    csrc/*.c csrc/cpu/*.c csrc/cuda/*.c   -> objects                    cc
    kernels/*.cu                          -> one fatbin each            nvcc
    fatbins                               -> fatbins.c, .incbin table   cc   (see csrc/cuda/fatbins.h)
    all of them                           -> _C.abi3.so                 libc, libm, pthread, dl

Settings: FUSEDMOE_CUDA=0 (no GPU code), FUSEDMOE_NVCC, FUSEDMOE_WERROR=1, FUSEDMOE_SANITIZE=address,undefined,
FUSEDMOE_JOBS, FUSEDMOE_CACHE_DIR; CC, CFLAGS, LDFLAGS and NVCC_CCBIN as everywhere.
Development: `python setup.py build_ext --inplace`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
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

# A kernel file that needs one architecture's own instructions says so in its opening comment, for example
# `// arch: sm_90a`. All others are portable: code for sm_80 and sm_90, so that an H200 compiles nothing
# at run time, and PTX for whatever comes later.
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
    """Builds with objects.py instead of setuptools' compiler: kernels, cached objects, own warnings."""

    def build_extension(self, ext):
        try:
            self._build(self.get_ext_fullpath(ext.name))
        except (objects.CompileError, nvcc.NvccError) as error:
            raise PlatformError(str(error)) from error

    def _build(self, output):
        import numpy

        temporary = Path(self.build_temp)
        temporary.mkdir(parents=True, exist_ok=True)
        store = objects.Objects(ROOT, INCLUDE, temporary)
        compiler = c_compiler()
        sanitize = os.environ.get("FUSEDMOE_SANITIZE", "")
        checked = (f"-fsanitize={sanitize}",) if sanitize else ()

        command = [*compiler, "-c", "-std=c11", "-fPIC", "-fvisibility=hidden", "-pthread"]
        command += WARNINGS
        command += ["-Werror"] if flag_set("FUSEDMOE_WERROR") else []
        if sanitize:
            command += [
                *checked,
                "-fno-sanitize-recover=all",
                "-fno-omit-frame-pointer",
                "-O1",
                "-g",
            ]
        else:
            command += ["-O3", "-DNDEBUG"]
        command += [f"-D{name}={value}" for name, value in self._macros().items()]
        command += shlex.split(os.environ.get("CFLAGS", ""))
        command += [f"-I{folder}" for folder in INCLUDE]
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
        identity = f"{version} Python {sys.version} NumPy {numpy.__version__}"
        search = ("-isystem", python_headers(), "-isystem", numpy.get_include())

        steps = [
            objects.Step(source, ".o", tuple(command), identity, search)
            for source in c_sources(self.nvcc is not None)
        ]
        kernels = kernel_steps(self.nvcc) if self.nvcc else []
        built = store.build(kernels + steps)
        fatbins, linked = built[: len(kernels)], built[len(kernels) :]
        if self.nvcc:
            names = [Path(step.source).stem for step in kernels]
            table = temporary / "fatbins.c"
            table.write_text(fatbin_table(list(zip(names, fatbins, strict=True))))
            linked.append(str(temporary / "fatbins.o"))
            self._run([*command, os.path.abspath(table), "-o", os.path.abspath(linked[-1])])

        Path(output).parent.mkdir(parents=True, exist_ok=True)
        flags = ["-shared", "-pthread", *checked, "-Wl,--as-needed", "-Wl,-z,relro", "-Wl,-z,now"]
        flags += shlex.split(os.environ.get("LDFLAGS", ""))
        linked = [os.path.abspath(path) for path in linked]
        self._run([*compiler, *flags, *linked, "-lm", "-ldl", "-o", os.path.abspath(output)])

    def _run(self, command):
        objects.run_compiler(command, Path(command[-1]).name, ROOT)

    def _macros(self):
        """Macros of the C files. Versions come from here, so that each is written in one place."""
        if nvcc.cuda_wanted():
            self.nvcc = nvcc.require_nvcc()
            major, minor = self.nvcc.version
            print(f"fusedmoe: nvcc {major}.{minor} at {self.nvcc.path} (from {self.nvcc.found_in})")
        else:
            self.nvcc = None
            print("fusedmoe: FUSEDMOE_CUDA=0, a build for the CPU only: no GPU will be used")
        return {
            "Py_LIMITED_API": LIMITED_API,
            "MOE_VERSION": f'"{self.distribution.get_version()}"',
            "MOE_CUDA_BUILT": 1 if self.nvcc else 0,
            "MOE_CUDA_VERSION": major * 1000 + minor * 10 if self.nvcc else 0,
        }


def c_sources(cuda):
    folders = ["csrc", "csrc/cpu"] + (["csrc/cuda"] if cuda else [])
    return sorted(source for folder in folders for source in glob(f"{folder}/*.c", root_dir=ROOT))


setup(
    ext_modules=[Extension("fusedmoe._C", c_sources(cuda=True), py_limited_api=True)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
