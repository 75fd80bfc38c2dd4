"""PyTorch, where its DLPack exchange table is missing (releases before 2.10)."""

from __future__ import annotations

import torch


def allocate(prototype, shape, dtype_name):
    dtype = getattr(torch, dtype_name)
    return torch.empty(tuple(shape), dtype=dtype, device=prototype.device), None


def current_stream(prototype, device_id):
    return torch.cuda.current_stream(device_id).cuda_stream


def stream_context(device_id, stream):
    if stream in (0, 1):  # ExternalStream(0) would be a new stream, not the legacy default one
        return torch.cuda.stream(torch.cuda.default_stream(device_id))
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device_id))
