"""Checkpoints: the experts of one layer, from safetensors files to w13 and w2.

    from fusedmoe.frameworks.checkpoints import load_experts
    weights = load_experts("Qwen3-30B-A3B/", layer=0, device="cuda")
    out = fused_experts(x, weights.w13, weights.w2, topk_weights, topk_ids, **weights.options)

Takes the names that Mixtral (w1, w3, w2), Qwen, DeepSeek and GLM (gate_proj, up_proj, down_proj)
and gpt-oss (gate_up_proj for all experts at once, with biases) have in their files, and the same of
every other model that uses them. Nothing but the slices of this rank is read.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from .versions import installed

TESTED = "safetensors 0.8"

_EXPERT = re.compile(
    r"(?P<prefix>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:\w+\.)*experts\.)"
    r"(?:(?P<expert>\d+)\.)?(?P<projection>.+)"
)
# What stands behind ".experts.<e>." or ".experts." -> the part it is.
_PARTS = {
    "gate_proj.weight": "gate",
    "w1.weight": "gate",
    "up_proj.weight": "up",
    "w3.weight": "up",
    "down_proj.weight": "down",
    "w2.weight": "down",
    "gate_proj.bias": "gate_bias",
    "up_proj.bias": "up_bias",
    "down_proj.bias": "down_bias",
    "fc1.weight": "gate_up",
    "fc2.weight": "down",
    "gate_up_proj": "gate_up",
    "gate_up_proj.weight": "gate_up",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj_bias": "gate_up_bias",
    "gate_up_proj.bias": "gate_up_bias",
    "down_proj_bias": "down_bias",
}
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PLAIN = "weights in bfloat16, float16 or float32"
_QUANTISED = re.compile(r"_blocks$|_scales?$|scale_inv$|qweight$|qzeros$|_packed$|zero_point$")


class ExpertWeights(NamedTuple):
    """The experts of one layer that one rank holds."""

    w13: Any  # [E, 2*I, H], or [E, I, H] where not gated
    w2: Any  # [E, H, I]
    w13_bias: Any  # [E, 2*I] or None
    w2_bias: Any  # [E, H] or None; under tensor parallelism on rank 0 only: ranks are summed
    w13_order: str
    gated: bool
    expert_start: int | None  # None where all experts are here

    @property
    def options(self):
        """The keyword arguments of `fused_experts` that belong to these weights."""
        return {name: getattr(self, name) for name in self._fields[2:]}


def status():
    """(version found or None, why it is not usable or None). Imports nothing."""
    return installed("safetensors")


def load_experts(
    path,
    layer,
    *,
    device="cpu",
    framework="torch",
    dtype=None,
    tp_rank=0,
    tp_size=1,
    ep_rank=0,
    ep_size=1,
    prefix=None,
    w13_order=None,
    progress=None,
):
    """Reads the experts of one layer into tensors of `framework` on `device`.

    Expert parallelism: rank r of R holds the experts r*E/R .. (r+1)*E/R - 1. Tensor parallelism: it
    holds the gate and up rows and the down columns r*I/R .. (r+1)*I/R - 1; the outputs of the ranks
    are to be summed.

    Args:
        path: a safetensors file, an index (...safetensors.index.json), or the folder that has them.
        layer: number of the layer, as in the names ("layers.<layer>.").
        device: where the weights go, each slice at once; for numpy "cpu".
        framework: "torch" or "numpy".
        dtype: "bfloat16", "float16", "float32": converted while reading. None: as stored.
        tp_rank, tp_size, ep_rank, ep_size: this rank's share.
        prefix: start of the tensor names, where there is more than one set of experts with that
            number ("model.", "mtp.", ...).
        w13_order: order of the stored gate_up_proj rows, "gate_up" or "interleaved". None: what the
            model_type of config.json beside the files says, else interleaved where there are biases
            (gpt-oss), else gate_up. w13 keeps that order.
        progress: a progress bar over bytes. None: on a terminal.

    Returns:
        ExpertWeights.

    Raises:
        ImportError: safetensors or the framework is not installed. FileNotFoundError: no such file.
        TypeError: a rank or size that is no int.
        ValueError: no experts in that layer, a tensor that is missing, there twice or of another
            shape than the first, a size that the ranks do not divide. NotImplementedError:
            quantised weights.
    """
    why = status()[1]
    if why is not None:
        raise ImportError(f"load_experts: {why}; pip install 'fusedmoe[safetensors]'")
    if framework not in ("torch", "numpy"):
        raise ValueError(f"framework: expected 'torch' or 'numpy', got {framework!r}")
    if framework == "numpy" and str(device) != "cpu":
        raise ValueError(f"device: expected 'cpu' for numpy arrays, got {device!r}")
    if dtype not in (None, *_DTYPES.values()):
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES.values())}, got {dtype!r}")
    for name, rank, size in (("tp", tp_rank, tp_size), ("ep", ep_rank, ep_size)):
        if not (isinstance(rank, int) and isinstance(size, int)):
            raise TypeError(f"{name}_rank, {name}_size: expected ints, got {rank!r} and {size!r}")
        if not 0 <= rank < size:
            raise ValueError(f"{name}_rank: expected 0 .. {name}_size - 1, got {rank} of {size}")
    if w13_order not in (None, "gate_up", "interleaved"):
        raise ValueError(f"w13_order: expected 'gate_up' or 'interleaved', got {w13_order!r}")
    files = _files(Path(path))
    parts = _parts(files, layer, prefix, path)
    config = _config(Path(path))
    with _Reader(files, framework, device) as reader:
        layout = _layout(parts, reader, layer, config)
        order = w13_order or _order(layout, config)
        return _read(
            parts, reader, layout, order, dtype, (tp_rank, tp_size, ep_rank, ep_size), progress
        )


def _files(path):
    """Tensor name -> file."""
    if path.is_dir():
        indexes = sorted(path.glob("*.safetensors.index.json"))
        main = path / "model.safetensors.index.json"
        if main in indexes or len(indexes) == 1:
            path = main if main in indexes else indexes[0]
        elif indexes:
            raise ValueError(
                f"path: expected one index, got {', '.join(i.name for i in indexes)} in {path}"
            )
        else:
            shards = sorted(path.glob("*.safetensors"))
            if not shards:
                raise FileNotFoundError(f"path: expected safetensors files, got none in {path}")
            return _names(shards)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a file or a folder, got {path}, which is neither")
    if path.suffix != ".json":
        return _names([path])
    index = json.loads(path.read_text(encoding="utf-8"))
    if "weight_map" not in index:
        raise ValueError(f"path: expected an index with a weight_map, got {path} without one")
    return {name: path.parent / shard for name, shard in index["weight_map"].items()}


def _names(shards):
    from safetensors import safe_open

    files = {}
    for shard in shards:
        with safe_open(shard, framework="np") as file:
            for name in file.keys():
                if name in files:
                    raise ValueError(
                        f"{name}: expected once, got it in {files[name].name} and in {shard.name}"
                    )
                files[name] = shard
    return files


def _parts(files, layer, prefix, path):
    """part -> {expert, or None where all are in one tensor: tensor name}."""
    found, layers = {}, set()
    for name in files:
        match = _EXPERT.fullmatch(name)
        if match is None or (prefix is not None and not name.startswith(prefix)):
            continue
        layers.add(int(match["layer"]))
        if int(match["layer"]) == layer:
            found.setdefault(match["prefix"], []).append((match, name))
    if not found:
        there = f"there are some in layers {_ranges(layers)}" if layers else "there are none"
        raise ValueError(f"layer: expected one with experts, got {layer}; {there} of {path}")
    if len(found) > 1:
        raise ValueError(
            f"prefix: expected the start of one of {', '.join(sorted(found))}, got {prefix!r}"
        )
    parts = {}
    for match, name in next(iter(found.values())):
        part = _PARTS.get(match["projection"])
        if part is None:
            if _QUANTISED.search(name):
                raise NotImplementedError(f"{name}: expected {_PLAIN}, got quantised weights")
            continue
        expert = None if match["expert"] is None else int(match["expert"])
        at = parts.setdefault(part, {})
        if expert in at:
            raise ValueError(f"expert {expert}: expected one {part}, got {at[expert]} and {name}")
        at[expert] = name
    return parts


def _ranges(numbers):
    numbers = sorted(numbers)
    gaps = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    runs = zip([0, *gaps], [*gaps, len(numbers)], strict=True)
    return ", ".join(
        f"{numbers[a]}" if b - a == 1 else f"{numbers[a]} to {numbers[b - 1]}" for a, b in runs
    )


class _Layout(NamedTuple):
    fused: bool  # gate_up (or up) and down are one tensor each for all experts
    transposed: bool  # of those: [E, H, 2I] and [E, I, H]
    gated: bool
    biased: bool
    num_experts: int
    intermediate_size: int
    hidden_size: int
    dtype: str


def _complete(parts, layer, config):
    """(fused, gated, biased, names of the parts); raises for a tensor that is missing or too much.
    Only names are looked at."""
    first = "gate_up" if "gate_up" in parts else "up"
    for part in (first, "down"):
        if part not in parts:
            raise ValueError(
                f"layer {layer}: expected a tensor for {part} of every expert, got none beside "
                f"{', '.join(_one(at) for at in parts.values()) or 'other tensors'}"
            )
    fused = None in parts[first]
    gated = first == "gate_up" or "gate" in parts
    wanted = [first, "down"] + (["gate"] if "gate" in parts else [])
    biased = any(f"{part}_bias" in parts for part in wanted)
    wanted += [f"{part}_bias" for part in wanted] if biased else []
    experts, who = [None], "all experts"
    if not fused:
        there = [e for part in wanted for e in parts.get(part, {}) if e is not None]
        said = [config[name] for name in _NUM_EXPERTS if isinstance(config.get(name), int)]
        experts = range(max([1 + max(there), *said[:1]]))
        who = f"experts 0 to {len(experts) - 1}"
    missing = [(part, e) for part in wanted for e in experts if e not in parts.get(part, {})]
    if missing:
        names = ", ".join(part if e is None else f"{part} of expert {e}" for part, e in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(
            f"layer {layer}: expected {', '.join(wanted)} of {who}, missing: {names}{more}"
        )
    extra = [_one(at) for part, at in parts.items() if part not in wanted]
    extra += [parts[part][e] for part in wanted for e in parts[part] if e not in experts]
    if extra:
        raise ValueError(f"layer {layer}: expected experts in one naming, got {extra[0]} besides")
    return fused, gated, biased, wanted


def _layout(parts, reader, layer, config):
    """What is there, from names and shapes. All tensors have to agree with that of the first down
    projection; of tensors for all experts, it and gate_up together say which way they lie."""
    fused, gated, biased, wanted = _complete(parts, layer, config)
    down = _one(parts["down"])
    shape, dtype = reader.about(down)
    if dtype not in _DTYPES:
        raise NotImplementedError(f"{down}: expected {_PLAIN}, got {dtype}")
    if len(shape) != (3 if fused else 2):
        raise ValueError(f"{down}: expected {3 if fused else 2} dimensions, got {list(shape)}")
    hidden_size, size = shape[-2:]
    transposed, num_experts = False, shape[0] if fused else len(parts["down"])
    if fused:
        times, name = 2 if gated else 1, _one(parts[wanted[0]])
        got, _ = reader.about(name)
        if got != (num_experts, times * size, hidden_size):
            transposed = True
            size, hidden_size = shape[1:]
            if got != (num_experts, hidden_size, times * size):
                raise ValueError(
                    f"{name}: expected a shape that goes with {list(shape)} of {down}, "
                    f"got {list(got)}"
                )
    layout = _Layout(
        fused, transposed, gated, biased, num_experts, size, hidden_size, _DTYPES[dtype]
    )
    for part in wanted:
        want = _shape(layout, part)
        for name in parts[part].values():
            shape, got = reader.about(name)
            if shape != want or (got != dtype and not part.endswith("bias")):
                raise ValueError(f"{name}: expected {dtype} {list(want)}, got {got} {list(shape)}")
    return layout


def _shape(layout, part):
    size, hidden_size = layout.intermediate_size, layout.hidden_size
    rows = {"gate": size, "up": size, "gate_up": 2 * size, "down": hidden_size}
    kind = part.removesuffix("_bias")
    shape = (rows[kind],)
    if kind == part:
        shape += (size if part == "down" else hidden_size,)
        if layout.transposed:
            shape = shape[::-1]
    return (layout.num_experts, *shape) if layout.fused else shape


def _config(path):
    """The fields of config.json beside the files, those of the language model last; {} without."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.exists():
        return {}
    fields = json.loads(file.read_text(encoding="utf-8"))
    return {**fields, **(fields.get("text_config") or {})}


def _order(layout, config):
    if not layout.fused or not layout.gated:
        return "gate_up"
    if "model_type" in config:
        return "interleaved" if config["model_type"] == "gpt_oss" else "gate_up"
    return "interleaved" if layout.biased else "gate_up"


def _one(at):
    return next(iter(at.values()))


def _read(parts, reader, layout, order, dtype, ranks, progress):
    tp_rank, tp_size, ep_rank, ep_size = ranks
    size, hidden_size = layout.intermediate_size, layout.hidden_size
    if size % tp_size:
        raise ValueError(f"tp_size: expected a divisor of intermediate_size {size}, got {tp_size}")
    if layout.num_experts % ep_size:
        raise ValueError(
            f"ep_size: expected a divisor of {layout.num_experts} experts, got {ep_size}"
        )
    count, part_size = layout.num_experts // ep_size, size // tp_size
    start, a = ep_rank * count, tp_rank * part_size
    b = a + part_size
    dtype = dtype or layout.dtype
    times = 2 if layout.gated else 1
    w13 = reader.empty((count, times * part_size, hidden_size), dtype)
    w2 = reader.empty((count, hidden_size, part_size), dtype)
    w13_bias = w2_bias = None
    if layout.biased:
        w13_bias = reader.empty((count, times * part_size), dtype)
        w2_bias = reader.empty((count, hidden_size), dtype) if tp_rank == 0 else None

    # (part, destination of one expert, rows of the stored tensor, which of its dimensions)
    copies = []
    if "gate_up" in parts and order == "interleaved":
        copies.append(("gate_up", slice(None), slice(2 * a, 2 * b)))
    elif "gate_up" in parts:
        copies.append(("gate_up", slice(0, part_size), slice(a, b)))
        copies.append(("gate_up", slice(part_size, None), slice(size + a, size + b)))
    else:
        if layout.gated:
            copies.append(("gate", slice(0, part_size), slice(a, b)))
        copies.append(("up", slice((times - 1) * part_size, None), slice(a, b)))
    every = slice(None)
    itemsize = {"float32": 4}.get(layout.dtype, 2)
    total = count * (times + 1) * part_size * hidden_size * itemsize
    with _Bar(total, progress) as bar:
        for local in range(count):
            expert = start + local
            for part, to, rows in copies:
                bar(reader.copy(w13[local, to], parts[part], expert, (rows, every), layout))
                if layout.biased:
                    reader.copy(w13_bias[local, to], parts[f"{part}_bias"], expert, (rows,), layout)
            bar(reader.copy(w2[local], parts["down"], expert, (every, slice(a, b)), layout))
            if w2_bias is not None:
                reader.copy(w2_bias[local], parts["down_bias"], expert, (every,), layout)
    return ExpertWeights(
        w13, w2, w13_bias, w2_bias, order, layout.gated, start if ep_size > 1 else None
    )


class _Reader:
    """Open files, and the two things that differ between torch and numpy."""

    def __init__(self, files, framework, device):
        self.files, self.framework, self.device = files, framework, str(device)
        self.open, self.slices = {}, {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.slices.clear()
        for file in self.open.values():
            file.__exit__(None, None, None)

    def slice(self, name):
        from safetensors import safe_open

        if name not in self.slices:
            path = self.files[name]
            if path not in self.open:
                if not path.exists():
                    raise FileNotFoundError(f"{name}: expected in {path}, which does not exist")
                kind = "pt" if self.framework == "torch" else "np"
                file = safe_open(path, framework=kind, device=self.device)
                self.open[path] = file.__enter__()
            if name not in self.open[path].keys():
                raise ValueError(f"{name}: expected in {os.path.basename(path)}, got none there")
            self.slices[name] = self.open[path].get_slice(name)
        return self.slices[name]

    def about(self, name):
        piece = self.slice(name)
        return tuple(piece.get_shape()), piece.get_dtype()

    def empty(self, shape, dtype):
        if self.framework == "torch":
            import torch

            return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
        import ml_dtypes
        import numpy as np

        return np.empty(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def copy(self, to, at, expert, region, layout):
        """One expert's region of a stored tensor into `to`; returns the bytes read."""
        flip = layout.transposed and len(region) == 2
        region = region[::-1] if flip else region
        if layout.fused:
            read = self.slice(at[None])[(slice(expert, expert + 1), *region)][0]
        else:
            read = self.slice(at[expert])[region]
        read = read.T if flip else read
        if self.framework == "torch":
            to.copy_(read)
        else:
            to[...] = read
        return read.nbytes


class _Bar:
    """A tqdm bar over bytes; calling it moves it on."""

    def __init__(self, total, progress):
        self.total, self.disable = total, None if progress is None else not progress

    def __enter__(self):
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.total, unit="B", unit_scale=True, desc="experts", disable=self.disable
        )
        return self.bar.update

    def __exit__(self, *error):
        self.bar.close()
