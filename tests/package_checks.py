"""Scripts of checks that need a process of their own, because they import a whole engine, with
placeholders for what it has in the way of compilers: sglang_package.py and vllm_package.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import fusedmoe

HERE = Path(__file__).parent


def names(script):
    """The checks of a script, in order."""
    return re.findall(r"^def (check_\w+)", (HERE / script).read_text(encoding="utf-8"), re.M)


def run(script, folder):
    """{check: None or what went wrong} of `python script folder`."""
    path = [str(Path(fusedmoe.__file__).parents[1]), str(HERE)]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    done = subprocess.run(
        [sys.executable, str(HERE / script), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def report(scope):
    """In the script: runs the checks among its globals, prints the line that `run` reads."""
    result = {}
    for name, check in list(scope.items()):
        if name.startswith("check_"):
            try:
                check()
                result[name] = None
            except BaseException:
                result[name] = traceback.format_exc()
    print(json.dumps(result))


@contextmanager
def patched(target, **values):
    old = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(target, name, value)
