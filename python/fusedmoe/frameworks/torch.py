"""PyTorch, where its DLPack exchange table is missing (releases before 2.10)."""

from __future__ import annotations

import torch


def allocate(prototype, shape, dtype_name):
    dtype = getattr(torch, dtype_name)
    return torch.empty(tuple(shape), dtype=dtype, device=prototype.device), None


def current_stream(prototype, device_id):
    return torch.cuda.current_stream(device_id).cuda_stream
