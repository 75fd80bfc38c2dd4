"""What a user hears of a driver that is absent, too old, or sees no GPU.

With stand-ins for libcuda, so that it is tested on machines without one."""

import os
import shutil
import subprocess
import sys

import fusedmoe
import pytest

pytestmark = [
    pytest.mark.skipif(not fusedmoe.info()["cuda_built"], reason="built without GPU code"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stand-in"),
]

# cuGetProcAddress_v2 as of CUDA 12, naming whatever the table below has.
PROC_ADDRESS = """
#include <stddef.h>
#include <string.h>
static int init(unsigned flags) { (void)flags; return INIT_RESULT; }
static int error_text(int code, const char **text) { (void)code; *text = "STAND_IN"; return 0; }
static int anything(void) { return 0; }
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags,
                        int *found)
{
    (void)version, (void)flags, (void)found;
    *function = NULL;
    if (strcmp(name, MISSING) == 0) return 500;
    if (strcmp(name, "cuInit") == 0) *function = (void *)init;
    else if (strncmp(name, "cuGetError", 10) == 0) *function = (void *)error_text;
    else *function = (void *)anything;
    return 0;
}
"""


def message_of_load(tmp_path, source, **defines):
    """Exception type and text of fusedmoe.load(0) in a process whose libcuda is `source`."""
    if source is not None:
        (tmp_path / "stand_in.c").write_text(source)
        flags = [f"-D{name}={value}" for name, value in defines.items()]
        library = str(tmp_path / "libcuda.so.1")
        command = ["cc", "-shared", "-fPIC", *flags, "-o", library, str(tmp_path / "stand_in.c")]
        subprocess.run(command, check=True, timeout=60)
    code = (
        "import fusedmoe\n"
        "try:\n"
        "    fusedmoe.load(0)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    environment = dict(
        os.environ, LD_LIBRARY_PATH=str(tmp_path), PYTHONPATH=os.pathsep.join(sys.path)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_driver_of_cuda_11_is_called_too_old(tmp_path):
    text = message_of_load(tmp_path, "int cuInit(unsigned flags) { return (int)flags; }\n")
    assert text.startswith("RuntimeError device: the NVIDIA driver is too old")
    assert "580" in text


def test_a_driver_that_lacks_one_function_names_it(tmp_path):
    defines = {"INIT_RESULT": "0", "MISSING": '"cuTensorMapEncodeTiled"'}
    text = message_of_load(tmp_path, PROC_ADDRESS, **defines)
    assert text.startswith("RuntimeError device: the NVIDIA driver is too old")
    assert "cuTensorMapEncodeTiled of CUDA 12.0" in text


def test_a_driver_that_sees_no_gpu_says_where_to_look(tmp_path):
    text = message_of_load(tmp_path, PROC_ADDRESS, INIT_RESULT="100", MISSING='"none"')
    assert text.startswith("RuntimeError device: expected a GPU")
    assert "CUDA_VISIBLE_DEVICES" in text


def test_a_driver_that_fails_to_start_is_quoted(tmp_path):
    text = message_of_load(tmp_path, PROC_ADDRESS, INIT_RESULT="999", MISSING='"none"')
    assert text.startswith("RuntimeError cuInit: STAND_IN")


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has a driver")
def test_no_driver_at_all(tmp_path):
    text = message_of_load(tmp_path, None)
    assert text.startswith("RuntimeError device: expected an NVIDIA driver, found none")
    assert "CPU tensors work" in text
