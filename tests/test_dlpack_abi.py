"""csrc/dlpack.h and the ctypes structs of the tests against upstream's dlpack.h, if installed."""

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import producers
import pytest
from support import have

OURS = Path(__file__).parent.parent / "csrc" / "dlpack.h"

# struct -> fields; a field that upstream names otherwise is (ours, upstream)
STRUCTS = {
    "DLDevice": ["device_type", "device_id"],
    "DLDataType": ["code", "bits", "lanes"],
    "DLTensor": ["data", "device", "ndim", "dtype", "shape", "strides", "byte_offset"],
    "DLManagedTensor": ["dl_tensor", "manager_ctx", "deleter"],
    "DLPackVersion": ["major", "minor"],
    "DLManagedTensorVersioned": ["version", "manager_ctx", "deleter", "flags", "dl_tensor"],
}
EXCHANGE = {
    "DLPackExchangeAPIHeader": ["version", "prev_api"],
    "DLPackExchangeAPI": [
        "header",
        "managed_tensor_allocator",
        "managed_tensor_from_py_object_no_sync",
        "managed_tensor_to_py_object_no_sync",
        "dltensor_from_py_object_no_sync",
        "current_work_stream",
    ],
}
CONSTANTS = [
    "kDLCPU",
    "kDLCUDA",
    "kDLCUDAHost",
    "kDLCUDAManaged",
    "kDLInt",
    "kDLUInt",
    "kDLFloat",
    "kDLBfloat",
    "kDLComplex",
    "kDLBool",
]


def upstream_headers():
    """(name, path) of each dlpack.h that an installed package brings."""
    site = Path(sysconfig.get_paths()["purelib"])
    found = []
    for package, inside in [
        ("torch", "include/ATen/dlpack.h"),
        ("tvm_ffi", "include/dlpack/dlpack.h"),
        ("jaxlib", "include/dlpack/dlpack.h"),
        ("cupy", "_core/include/cupy/_dlpack/dlpack.h"),
        ("cupy", "_core/include/cupy/dlpack/dlpack.h"),
    ]:
        path = site / package / inside
        if have(package) and path.is_file():
            found.append((package, path))
    return found


def compile_and_run(folder, header, names, constants):
    """{name: number} as the C compiler sees `header`."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    lines = [
        "#include <stdio.h>",
        "#include <stddef.h>",
        f'#include "{header}"',
        "int main(void) {",
    ]
    for struct, fields in names.items():
        lines.append(f'printf("{struct} %zu\\n", sizeof({struct}));')
        for field in fields:
            lines.append(f'printf("{struct}.{field} %zu\\n", offsetof({struct}, {field}));')
    lines += [f'printf("{name} %ld\\n", (long){name});' for name in constants]
    source = folder / "abi.c"
    source.write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run([compiler, "-std=c11", str(source), "-o", str(folder / "abi")], check=True)
    text = subprocess.run([folder / "abi"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


NONE = pytest.param(None, None, marks=pytest.mark.skip(reason="no package here has a dlpack.h"))


@pytest.mark.parametrize("package, header", upstream_headers() or [NONE])
def test_header_has_the_layout_of_upstream(package, header, tmp_path):
    text = header.read_text()
    structs = {
        name: fields
        for name, fields in {**STRUCTS, **EXCHANGE}.items()
        if re.search(rf"\b{name}\b", text)
    }
    constants = [name for name in CONSTANTS if re.search(rf"\b{name}\b", text)]
    assert "DLManagedTensor" in structs and "kDLBfloat" in constants
    (tmp_path / "ours").mkdir()
    ours = compile_and_run(tmp_path / "ours", OURS, structs, constants)
    assert ours == compile_and_run(tmp_path, header, structs, constants)


def test_ctypes_structs_of_the_tests_have_the_layout_of_the_header(tmp_path):
    numbers = compile_and_run(tmp_path, OURS, STRUCTS, CONSTANTS)
    pairs = {
        "DLDevice": producers.Device,
        "DLDataType": producers.DataType,
        "DLTensor": producers.Tensor,
        "DLManagedTensor": producers.Managed,
        "DLPackVersion": producers.Version,
        "DLManagedTensorVersioned": producers.ManagedVersioned,
    }
    for name, structure in pairs.items():
        assert ctypes.sizeof(structure) == numbers[name]
        offsets = [getattr(structure, field).offset for field, *_ in structure._fields_]
        assert offsets == [numbers[f"{name}.{field}"] for field in STRUCTS[name]]
