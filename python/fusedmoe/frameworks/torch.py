"""PyTorch: the compiled ops, the Module, and tensors of releases without the exchange table.

    fused_experts(hidden_states, ...)      eager: straight into C, nothing of this file is loaded
    torch.compile, torch.export            the same call, through torch.ops.fusedmoe (torch_ops.py)
    FusedMoE(...)                          a torch.nn.Module (torch_module.py)

A call that is being traced registers the ops by itself. `register()` is for who calls
torch.ops.fusedmoe or loads an exported program that does.
"""

from __future__ import annotations

import sys

from .versions import installed

TESTED = "torch 2.11 to 2.13"
OLDEST = (2, 6)  # torch.library as torch_ops.py needs it


def status():
    """(version found or None, why the door is closed or None). Does not import torch."""
    return installed("torch", OLDEST)


def register():
    """Defines torch.ops.fusedmoe.* in this process; again: nothing.

    Raises:
        ImportError: no torch, or one without what the ops need.
    """
    from . import torch_ops  # noqa: F401


def __getattr__(name):
    if name == "FusedMoE":
        from .torch_module import FusedMoE

        return FusedMoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# What the extension asks for where the tensors have no exchange table (releases before 2.10):


def allocate(prototype, shape, dtype_name):
    torch = sys.modules["torch"]
    dtype = getattr(torch, dtype_name)
    return torch.empty(tuple(shape), dtype=dtype, device=prototype.device), None


def current_stream(prototype, device_id):
    return sys.modules["torch"].cuda.current_stream(device_id).cuda_stream


def stream_context(device_id, stream):
    cuda = sys.modules["torch"].cuda
    if stream in (0, 1):  # ExternalStream(0) would be a new stream, not the legacy default one
        return cuda.stream(cuda.default_stream(device_id))
    return cuda.stream(cuda.ExternalStream(stream, device=device_id))
