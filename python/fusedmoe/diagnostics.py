"""info and check: what is here, and whether it works. Both are meant to be pasted into a report."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from . import _C
from ._version import __version__

# Framework -> (distributions that provide it, the door its tensors come in through).
_FRAMEWORKS = {
    "numpy": (("numpy",), "NumPy's C API"),
    "ml_dtypes": (("ml_dtypes",), "bfloat16 of NumPy"),
    "torch": (("torch",), "DLPack exchange table from 2.10, else __dlpack__"),
    "jax": (("jax",), "custom call of XLA; __dlpack__ on the CPU"),
    "cupy": (("cupy", "cupy-cuda13x", "cupy-cuda12x"), "__dlpack__"),
}

# Every environment variable that the library reads at run time -> what it does.
ENVIRONMENT = {
    "FUSEDMOE_NUM_THREADS": "threads of the CPU backend",
    "FUSEDMOE_CPU_ISA": "highest the CPU backend takes: scalar, avx2, avx512, avx512_bf16",
    "FUSEDMOE_WORKSPACE_LIMIT": "bytes; a call that needs more is cut into chunks",
    "FUSEDMOE_CHECK": "1: the CPU backend raises on topk_ids out of range",
    "FUSEDMOE_SYNC": "1: synchronise after each kernel and name the one that failed",
    "FUSEDMOE_NO_LAUNCH": "1: leave the kernels out (host time only, results are garbage)",
    "CUDA_VISIBLE_DEVICES": "GPUs that the driver shows",
}


def info():
    """What this installation is and finds. Imports no framework.

    Returns:
        dict: version, python, platform; what the extension says of itself (cpu, cuda_built, driver,
        devices, kernels); driver_needed; frameworks {name: version, or None where not installed};
        doors [{name, version, usable, why}]; environment {variable: value}, those that are set.
    """
    from .frameworks import doors

    native = {key: value for key, value in _C.info().items() if key != "version"}
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **native,
        "driver_needed": _driver_needed(native["cuda_version"]) if native["cuda_built"] else None,
        "frameworks": {name: _installed(names) for name, (names, _) in _FRAMEWORKS.items()},
        "doors": [
            dict(zip(("name", "version", "usable", "why"), row, strict=True)) for row in doors()
        ],
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def check(device="auto"):
    """Runs one tiny layer per backend and dtype and holds it against the oracle.

    Args:
        device: "cpu", "cuda" or "auto" (the CPU, and every GPU there is).

    Returns:
        dict: ok (bool), cases [{name, ok, message}], text (a block to paste into a report).
    """
    from .backend import Cpu, Gpu

    cases = []
    if device in ("auto", "cpu"):
        cases += _check_backend(Cpu, ("bfloat16", "float16", "float32"))
    if device in ("auto", "cuda"):
        count, reason = _device_count()
        for index in range(count):
            cases += _check_backend(lambda index=index: Gpu(index), ("bfloat16", "float16"))
            cases.append(_check_hopper(index))
        if not count and device == "cuda":
            cases.append({"name": "cuda", "ok": False, "message": reason})
    ok = all(case["ok"] for case in cases)
    return {"ok": ok, "cases": cases, "text": _verdict(ok, cases)}


def _check_backend(make, dtypes):
    """One case per dtype: fused_moe of 5 tokens, one of them with a slot on an absent expert."""
    try:
        backend = make()
    except Exception as error:
        return [{"name": "backend", "ok": False, "message": _one_line(error)}]
    where = backend.name if backend.index is None else f"{backend.name}:{backend.index}"
    return [_check_layer(backend, where, dtype) for dtype in dtypes]


def _check_layer(backend, where, dtype):
    import numpy as np

    from . import ops, reference
    from .generate import normal
    from .models import Model
    from .routing import Routing

    case = {"name": f"{where} {dtype}", "ok": False}
    sizes = Model(hidden_size=72, intermediate_size=40, num_experts=6, topk=2)
    try:
        x = normal((5, sizes.hidden_size), dtype, 1.0, 1)
        w13 = normal((6, 2 * sizes.intermediate_size, sizes.hidden_size), dtype, 0.2, 2)
        w2 = normal((6, sizes.hidden_size, sizes.intermediate_size), dtype, 0.2, 3)
        logits = normal((5, sizes.num_experts), "float32", 1.0, 4)
        out = backend.empty(x.shape, dtype)
        nbytes = ops.workspace_size(
            5, *sizes, dtype=dtype, device=backend.name, routed=True, router_experts=6
        )
        routing = Routing(topk=sizes.topk, method="topk_softmax")
        ops.fused_moe(
            *(backend.put(array) for array in (x, w13, w2, logits)),
            routing=routing,
            out=out,
            workspace=backend.empty((nbytes,), "uint8"),
            stream=backend.stream,
        )
        want, error = reference.fused_moe_error(
            x, w13, w2, logits, sizes.topk, method="topk_softmax"
        )
        report = reference.compare(np.asarray(backend.get(out)), want, error)
        within = f"relative error {report.rel_rms:.2g}, at most {report.rel_rms_bound:.2g} allowed"
        case.update(ok=report.ok, message=within if report.ok else report.message)
    except Exception as error:
        case["message"] = _one_line(error)
    return case


def _check_hopper(index):
    """Tensor map, bulk copy and wgmma on a GPU that has them."""
    case = {"name": f"cuda:{index} sm_90a", "ok": True}
    capability = _C.info()["devices"][index]["capability"]
    if capability != 90:
        case["message"] = f"not run: this GPU is sm_{capability}, the probe needs sm_90"
        return case
    try:
        worst = _C._device_probe_hopper(index)
        case.update(ok=worst == 0.0, message=f"largest error {worst:g}, expected 0")
    except NotImplementedError as error:  # CUDA_FORCE_PTX_JIT: there is no PTX of sm_90a code
        case["message"] = f"not run: {_one_line(error)}"
    except Exception as error:
        case.update(ok=False, message=_one_line(error))
    return case


def _verdict(ok, cases):
    facts = info()
    lines = [
        f"fusedmoe {facts['version']}, Python {facts['python']}, {facts['platform']}",
        *(f"{name} {value}" for name, value in facts["environment"].items()),
        *(
            f"{'ok  ' if case['ok'] else 'FAIL'} {case['name']}: {case['message']}"
            for case in cases
        ),
        f"verdict: {'everything works' if ok else 'something does not work'}",
    ]
    return "\n".join(lines)


def _driver_needed(cuda_version):
    """The oldest GPU driver that loads code of this CUDA version."""
    for least, driver in ((13000, "580"), (12090, "575"), (12080, "570")):
        if cuda_version >= least:
            return driver
    return None


def _device_count():
    try:
        count = _C.device_count()
        return count, "" if count else "no CUDA device"
    except RuntimeError as error:
        return 0, _one_line(error)


def _installed(distributions):
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def print_info(stream=None):
    """`info` as text."""
    facts = info()
    facts["frameworks"] = {
        name: f"{version} ({_FRAMEWORKS[name][1]})" if version else "-"
        for name, version in facts["frameworks"].items()
    }
    for name in ("cuda_version", "driver"):
        if facts[name]:
            facts[name] = f"CUDA {facts[name] // 1000}.{facts[name] % 1000 // 10}"
    facts["environment"] = {
        f"{name}={facts['environment'].get(name, '')}": text for name, text in ENVIRONMENT.items()
    }
    for key, value in facts.items():
        if isinstance(value, dict):
            print(key, file=stream)
            for name, item in value.items():
                print(f"  {name:<26} {item}", file=stream)
        elif key == "doors":
            print(key, file=stream)
            for door in value:
                state = "usable" if door["usable"] else f"not usable: {door['why']}"
                print(f"  {door['name']:<14} {door['version'] or '-':<12} {state}", file=stream)
        elif key == "kernels":
            print(f"{key:<13} {len(value)} GEMM variants", file=stream)
        elif isinstance(value, list):
            lines = [", ".join(f"{name} {x}" for name, x in item.items()) for item in value]
            print(key, *(f"  {line}" for line in lines or ["none"]), sep="\n", file=stream)
        else:
            print(f"{key:<13} {'-' if value is None else value}", file=stream)
