"""Compile sources to objects, in parallel; keep each under the hash of all that it depends on.

No time stamps: an object is found again after a fresh clone, in a build environment at another
path, and by two checkouts at once. A result is written beside its place and renamed, so that a
reader never sees half of one.
"""

import contextlib
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

KEEP_DAYS = 30  # objects nobody asked for in that time are removed
BYTES_PER_JOB = 2 << 30  # what one nvcc needs at its worst

_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)

# What the compilers say when the machine, not the source, is at fault: (pattern, what to do).
_HINTS = (
    (
        r"Python\.h: No such file",
        "install Python's headers (Debian, Ubuntu: apt install python3-dev)",
    ),
    (
        r"cc1plus|Failed to preprocess host compiler|(g\+\+|gcc).*(not found|No such file)",
        "nvcc needs a C++ compiler beside it (Debian, Ubuntu: apt install g++)",
    ),
    (
        r"unsupported GNU version|unsupported clang version",
        "this nvcc refuses this host compiler: point NVCC_CCBIN at an older g++",
    ),
    (r"Killed|signal 9|out of memory|bad_alloc", "out of memory: try again with FUSEDMOE_JOBS=1"),
    (
        r"No space left on device",
        "the disk is full: FUSEDMOE_CACHE_DIR moves the cache, TMPDIR the rest",
    ),
    (r"[Rr]egisters are spilled", "FUSEDMOE_WERROR=1 refuses kernels that spill registers"),
)


class CompileError(Exception):
    """A compiler failed. The text is the command, the compiler's message and what may help."""


@dataclass(frozen=True)
class Step:
    """One source to one object."""

    source: str  # relative to the root
    suffix: str  # of the object
    command: tuple[str, ...]  # compiler and the flags that shape the object
    identity: str  # versions of the compiler and of everything else outside the tree
    search: tuple[str, ...] = ()  # flags that name this machine's folders: not part of the key


def _cores():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _free_memory():
    """Bytes this process may still use: the machine's or the container's, whichever is less."""
    free = BYTES_PER_JOB
    with contextlib.suppress(OSError, ValueError, TypeError):
        text = Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) << 10
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def num_jobs():
    """Compilers to run at once: FUSEDMOE_JOBS, else as many as cores and memory allow."""
    asked_for = os.environ.get("FUSEDMOE_JOBS")
    if asked_for:
        return max(1, int(asked_for))
    return max(1, min(_cores(), _free_memory() // BYTES_PER_JOB))


def cache_folder():
    """FUSEDMOE_CACHE_DIR, else fusedmoe in the user's cache folder."""
    chosen = os.environ.get("FUSEDMOE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "fusedmoe")


class Objects:
    def __init__(self, root, include, fallback):
        """root: the source tree; include: its folders for quoted includes; fallback: the folder for
        objects when the cache cannot be written."""
        self.root = Path(root)
        self.include = include
        self.folder = cache_folder() / "objects"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            print(f"fusedmoe: no cache ({error}); FUSEDMOE_CACHE_DIR moves it", flush=True)
            self.folder = Path(fallback, "objects")
            self.folder.mkdir(parents=True, exist_ok=True)

    def _closure(self, source):
        """The source and all files of the tree that it may include, by way of any #if."""
        seen, todo = {}, [source]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen[name] = (self.root / name).read_bytes()
            for header in _INCLUDE.findall(seen[name].decode("utf-8", "replace")):
                for folder in (os.path.dirname(name), *self.include):
                    path = os.path.normpath(os.path.join(folder, header))
                    if (self.root / path).is_file():
                        todo.append(path)
                        break
        return seen

    def _place(self, step):
        key = hashlib.sha256()
        for part in (step.suffix, *step.command[1:], step.identity):  # [0] is a path: see identity
            key.update(part.encode() + b"\0")
        for name, text in sorted(self._closure(step.source).items()):
            key.update(f"{name} {len(text)}\0".encode() + text)
        return self.folder / f"{Path(step.source).stem}-{key.hexdigest()[:40]}{step.suffix}"

    def _compile(self, step, place):
        command = [*step.command, *step.search, step.source, "-o"]
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            result = Path(folder, place.name)
            run_compiler([*command, str(result)], step.source, self.root)
            os.replace(result, place)

    def build(self, steps):
        """Paths of the steps' objects, in the steps' order. Raises CompileError."""
        places = [self._place(step) for step in steps]
        missing = []
        for step, place in zip(steps, places, strict=True):
            if place.exists():
                with contextlib.suppress(OSError):
                    os.utime(place)  # still in use: see _prune
            else:
                missing.append((step, place))
        # The longest first, so that no core idles at the end: kernels, then by size.
        missing.sort(key=lambda m: (m[0].suffix == ".o", -(self.root / m[0].source).stat().st_size))
        jobs = min(num_jobs(), max(1, len(missing)))
        print(
            f"fusedmoe: {len(missing)} of {len(steps)} objects to compile"
            + (f", {jobs} at a time" if missing else f", all in {self.folder}"),
            flush=True,
        )
        with ThreadPoolExecutor(jobs) as pool:
            started = {}

            def work(step, place):
                started[place] = time.monotonic()
                self._compile(step, place)

            running = {pool.submit(work, *item): item for item in missing}
            try:
                for count, done in enumerate(as_completed(running), 1):
                    done.result()
                    step, place = running[done]
                    seconds = time.monotonic() - started[place]
                    print(f"  [{count}/{len(missing)}] {step.source} {seconds:.1f} s", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self._prune()
        return [str(place) for place in places]

    def _prune(self):
        oldest = time.time() - KEEP_DAYS * 24 * 3600
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                if path.is_file() and path.stat().st_mtime < oldest:
                    path.unlink()


def run_compiler(command, what, root):
    """Runs it; prints its warnings. Raises CompileError with its message and what may help."""
    try:
        answer = subprocess.run(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise CompileError(f"{what}: cannot run {command[0]}: {error.strerror}") from error
    message = answer.stdout.strip()
    if answer.returncode:
        if answer.returncode < 0:
            message += f"\nended by signal {-answer.returncode}"
        lines = [f"{what} did not compile", f"  {shlex.join(command)}", message]
        lines += [
            f"What may help: {text}" for pattern, text in _HINTS if re.search(pattern, message)
        ]
        raise CompileError("\n".join(lines))
    if message:
        print(message, flush=True)
