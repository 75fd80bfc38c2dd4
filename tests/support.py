"""What the test files share: backends, random layers, poison, and the comparison with the oracle.

A backend puts NumPy arrays (ml_dtypes bfloat16) on its device and gets them back. Tests are written
over a backend, so that the same test runs on the CPU with NumPy and on the GPU with torch.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, field, replace

import fusedmoe
import ml_dtypes
import numpy as np
from fusedmoe import reference

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
BY_NAME = {"bfloat16": BF16, "float16": F16, "float32": F32}

# What a call with wrong arguments may raise, and nothing else (DESIGN section 3).
ERRORS = (TypeError, ValueError, NotImplementedError, RuntimeError, MemoryError)


def have(module):
    """True where `module` is installed; it is not imported."""
    return importlib.util.find_spec(module) is not None


# -------------------------------------------------------------------------------------------------
# Backends
# -------------------------------------------------------------------------------------------------


class NumpyBackend:
    """The CPU backend, through NumPy arrays."""

    name = "cpu"
    dtypes = (BF16, F16, F32)

    def put(self, array):
        """A copy on the device."""
        return np.array(array, order="C")

    def get(self, tensor):
        """The same numbers as a NumPy array of their own."""
        return np.array(tensor)

    def empty(self, shape, dtype):
        """Uninitialised memory; pages that are never touched cost nothing on the CPU."""
        return np.empty(shape, dtype)

    def as_strided(self, base, shape, strides):
        """A view of a one-dimensional tensor, strides in elements."""
        return np.lib.stride_tricks.as_strided(base, shape, [s * base.itemsize for s in strides])

    def view(self, tensor, dtype):
        """The same bytes as another dtype."""
        return tensor.view(dtype)

    def address(self, tensor):
        return tensor.ctypes.data

    def owner(self, tensor):
        """The tensor that this one is a view of."""
        return tensor.base

    def broadcast(self, tensor, shape):
        return np.lib.stride_tricks.as_strided(
            tensor, shape, [0] * (len(shape) - tensor.ndim) + list(tensor.strides)
        )

    def synchronize(self):
        pass


class TorchBackend:
    """The CUDA backend, or the CPU's, through torch tensors."""

    def __init__(self, device="cuda:0"):
        import torch

        self.torch, self.device = torch, device
        self.name = device.partition(":")[0]
        self.dtypes = (BF16, F16) if self.name == "cuda" else (BF16, F16, F32)

    def torch_dtype(self, dtype):
        return getattr(self.torch, np.dtype(dtype).name)

    def put(self, array):
        array = np.array(array, order="C")
        if array.dtype == BF16:
            host = self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        else:
            host = self.torch.from_numpy(array)
        return host.to(self.device, copy=True)

    def get(self, tensor):
        host = tensor.detach().to("cpu").contiguous()
        if host.dtype == self.torch.bfloat16:
            return np.array(host.view(self.torch.int16).numpy()).view(BF16)
        return np.array(host.numpy())

    def empty(self, shape, dtype):
        return self.torch.empty(shape, dtype=self.torch_dtype(dtype), device=self.device)

    def as_strided(self, base, shape, strides):
        return self.torch.as_strided(base, shape, strides)

    def view(self, tensor, dtype):
        return tensor.view(self.torch_dtype(dtype))

    def address(self, tensor):
        return tensor.data_ptr()

    def owner(self, tensor):
        return tensor._base

    def broadcast(self, tensor, shape):
        return tensor.expand(shape)

    def synchronize(self):
        self.torch.cuda.synchronize()


@functools.cache
def no_gpu():
    """Why no GPU test can run here, or None."""
    if not have("torch"):
        return "torch is not installed, which the GPU tests allocate with"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


# -------------------------------------------------------------------------------------------------
# Random layers
# -------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """One call of the layer: NumPy tensors and keyword arguments. `options` go to the oracle and to
    the package alike."""

    seed: int
    hidden_states: np.ndarray
    w13: np.ndarray
    w2: np.ndarray
    topk_weights: np.ndarray
    topk_ids: np.ndarray
    options: dict = field(default_factory=dict)

    TENSORS = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")
    TENSOR_OPTIONS = ("w13_bias", "w2_bias", "shared_output", "expert_map")

    @property
    def dtype(self):
        return self.hidden_states.dtype

    @property
    def sizes(self):
        """num_tokens, hidden_size, intermediate_size, num_experts, topk."""
        num_tokens, hidden_size = self.hidden_states.shape
        intermediate_size, num_experts = self.w2.shape[2], self.w2.shape[0]
        return num_tokens, hidden_size, intermediate_size, num_experts, self.topk_ids.shape[1]

    @property
    def out_shape(self):
        num_tokens, hidden_size, _, _, topk = self.sizes
        if self.options.get("no_combine", False):
            return num_tokens, topk, hidden_size
        return num_tokens, hidden_size

    def tensors(self):
        return {name: getattr(self, name) for name in self.TENSORS}

    def with_options(self, **options):
        return replace(self, options={**self.options, **options})

    def expected(self, tokens=None):
        """(want, Error) of the oracle."""
        return reference.fused_experts_error(**self.tensors(), **self.options, tokens=tokens)


def make_layer(
    seed=0,
    num_tokens=7,
    hidden_size=64,
    intermediate_size=48,
    num_experts=4,
    topk=2,
    dtype=BF16,
    *,
    ids_dtype=np.int32,
    weights_dtype=F32,
    routing="uniform",
    gated=True,
    w13_bias=None,
    w2_bias=None,
    shared_output=False,
    expert_map=None,
    expert_start=None,
    num_ids=None,
    **options,
):
    """A random layer. Hidden states are standard normal, weights are scaled so that every stage has
    results around 1 (nothing hides below an absolute tolerance, nothing overflows).

    routing   uniform, same (all slots on one expert), half (only even experts get rows), dropped
              (a third of the ids out of range), none (all out of range), duplicates
    w13_bias, w2_bias  dtypes or None
    num_ids   ids are drawn from 0 .. num_ids - 1 (with expert_map or expert_start)
    """
    rng = np.random.default_rng(seed)
    rows = intermediate_size * (2 if gated else 1)

    def normal(shape, scale, kind):
        return (rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(kind)

    x = normal((num_tokens, hidden_size), 1.0, dtype)
    w13 = normal((num_experts, rows, hidden_size), hidden_size**-0.5, dtype)
    w2 = normal((num_experts, hidden_size, intermediate_size), intermediate_size**-0.5, dtype)
    weights = (rng.random((num_tokens, topk)) + 0.25).astype(weights_dtype)
    ids = make_ids(rng, num_tokens, topk, num_ids or num_experts, routing).astype(ids_dtype)
    if w13_bias is not None:
        options["w13_bias"] = normal((num_experts, rows), 0.5, w13_bias)
    if w2_bias is not None:
        options["w2_bias"] = normal((num_experts, hidden_size), 0.5, w2_bias)
    if shared_output:
        options["shared_output"] = normal((num_tokens, hidden_size), 1.0, dtype)
    if expert_map is not None:
        options["expert_map"] = np.asarray(expert_map, np.int32)
    if expert_start is not None:
        options["expert_start"] = expert_start
    if not gated:
        options["gated"] = False
    return Layer(seed, x, w13, w2, weights, ids, options)


def make_ids(rng, num_tokens, topk, num_ids, routing):
    """int64 ids [num_tokens, topk] that also fit int32."""
    if routing == "same":
        return np.full((num_tokens, topk), num_ids // 2)
    if routing == "none":
        return rng.choice([-1, -7, num_ids, num_ids + 1, -(2**31), 2**31 - 1], (num_tokens, topk))
    if routing == "duplicates" or topk > num_ids:
        return rng.integers(0, num_ids, (num_tokens, topk))
    pool = np.arange(0, num_ids, 2) if routing == "half" else np.arange(num_ids)
    if topk > len(pool):
        return rng.choice(pool, (num_tokens, topk))
    ids = np.argsort(rng.random((num_tokens, len(pool))), axis=1)[:, :topk]
    ids = pool[ids]
    if routing == "dropped":
        wrong = rng.choice([-1, -2, num_ids, num_ids + 5, -(2**31), 2**31 - 1], ids.shape)
        ids = np.where(rng.random(ids.shape) < 1 / 3, wrong, ids)
    elif routing not in ("uniform", "half"):
        raise ValueError(routing)
    return ids


# -------------------------------------------------------------------------------------------------
# Poison: memory whose content must not matter, and memory that must not be touched
# -------------------------------------------------------------------------------------------------

GUARD = 256  # bytes before and after
GUARD_BYTE = 0xA5


class Guarded:
    """A tensor filled with one byte, between guard zones that `check` finds unchanged."""

    def __init__(self, backend, shape, dtype, fill=0xFF, offset=0):
        dtype = np.dtype(dtype)
        self.backend, self.before = backend, GUARD + offset * dtype.itemsize
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.storage = backend.put(
            np.full(self.before + self.nbytes + GUARD + 256, GUARD_BYTE, np.uint8)
        )
        # Start the first guard zone on a multiple of 256, wherever the allocator put it.
        self.begin = -backend.address(self.storage) % 256 + self.before
        body = self.storage[self.begin : self.begin + self.nbytes]
        body[:] = fill
        self.tensor = backend.view(body, dtype).reshape(shape)

    def check(self, what):
        host = self.backend.get(self.storage)
        before = host[self.begin - self.before : self.begin]
        after = host[self.begin + self.nbytes : self.begin + self.nbytes + GUARD]
        assert (before == GUARD_BYTE).all(), f"{what}: bytes before it were written"
        assert (after == GUARD_BYTE).all(), f"{what}: bytes after it were written"


def padded(backend, array, pad, *, offset=0, fill=np.nan):
    """`array` on the device as a view with `pad` more elements a row, `offset` elements after an
    aligned address. What lies between is NaN (largest number for integers)."""
    array = np.asarray(array)
    if array.dtype.kind in "iu":
        fill = np.iinfo(array.dtype).max
    *lead, last = array.shape
    wide = np.full((*lead, last + pad), fill, array.dtype)
    wide[..., :last] = array
    flat = np.full(wide.size + offset, fill, array.dtype)
    flat[offset:] = wide.reshape(-1)
    base = backend.put(flat)
    return base[offset:].reshape(wide.shape)[..., :last]


# -------------------------------------------------------------------------------------------------
# Running and comparing
# -------------------------------------------------------------------------------------------------


def assert_close(got, want, error, *, seed=None, name="out"):
    """The one comparison of the tests: reference.compare, with the seed in the message."""
    report = reference.compare(got, want, error, name=name)
    assert report.ok, f"seed {seed}: {report.message}"


def workspace_bytes(backend, layer):
    """What the call needs and not a byte more: workspace_size without its room for alignment."""
    plan = fusedmoe.plan(
        *layer.sizes,
        dtype=layer.dtype.name,
        device=backend.name,
        gated=layer.options.get("gated", True),
        no_combine=layer.options.get("no_combine", False),
    )
    return plan["workspace"]["total"]


def put_layer(backend, layer, **replaced):
    """(five tensors, keyword arguments) on the device; `replaced` tensors are taken as they are."""
    tensors = {
        name: replaced[name] if name in replaced else backend.put(array)
        for name, array in layer.tensors().items()
    }
    options = dict(layer.options)
    for name in Layer.TENSOR_OPTIONS:
        if name in replaced:
            options[name] = replaced[name]
        elif options.get(name) is not None:
            options[name] = backend.put(options[name])
    return tensors, options


def run_layer(backend, layer, *, fill=0xFF, function=None, **replaced):
    """fused_experts with poisoned out and workspace, both between guard zones. Returns NumPy."""
    tensors, options = put_layer(backend, layer, **replaced)
    out = Guarded(backend, layer.out_shape, layer.dtype)
    workspace = Guarded(backend, (workspace_bytes(backend, layer),), np.uint8, fill)
    function = function or fusedmoe.fused_experts
    result = function(**tensors, **options, out=out.tensor, workspace=workspace.tensor)
    assert result is out.tensor
    got = backend.get(out.tensor)
    out.check("out")
    workspace.check("workspace")
    for name, array in layer.tensors().items():
        if name not in replaced:
            assert same_bits(backend.get(tensors[name]), array), f"{name} was written"
    return got


def check_streams(gpu, layer, want, *, num_streams, calls=8):
    """Calls of one layer in several streams beside each other: each gives the bits of `want`."""
    torch = gpu.torch
    tensors, options = put_layer(gpu, layer)
    size = workspace_bytes(gpu, layer) + 256
    streams = [torch.cuda.Stream() for _ in range(num_streams)]
    outs = [[gpu.empty(layer.out_shape, layer.dtype) for _ in range(calls)] for _ in streams]
    scratch = [torch.full((size,), 0xFF, dtype=torch.uint8, device=gpu.device) for _ in streams]
    torch.cuda.synchronize()
    for i in range(calls):
        for stream, own, workspace in zip(streams, outs, scratch, strict=True):
            fusedmoe.fused_experts(
                **tensors, **options, out=own[i], workspace=workspace, stream=stream.cuda_stream
            )
    torch.cuda.synchronize()
    assert all(same_bits(gpu.get(out), want) for own in outs for out in own)


def check_layer(backend, layer, **replaced):
    """run_layer against the oracle; returns the result."""
    got = run_layer(backend, layer, **replaced)
    want, error = layer.expected()
    assert_close(got, want, error, seed=layer.seed)
    return got


def rms_of_unfused(backend, layer):
    """Relative RMS error of the layer's result, as a share of what unfused kernels would have."""
    got, (want, _) = run_layer(backend, layer), layer.expected()
    off = np.sqrt(((got.astype(np.float64) - want) ** 2).sum() / (want**2).sum())
    return off / reference.unfused_rms(*layer.tensors().values())


def same_bits(a, b):
    """Bitwise equality, NaN included."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# -------------------------------------------------------------------------------------------------
# Routing
# -------------------------------------------------------------------------------------------------

# f32 units in the last place of a score, and of one key against the oracle's.
SCORE_ULP = 8


def assert_choice(logits, num_experts, topk, method, fields, ids):
    """Each slot holds the largest key that is left, to the rounding of a key; ties exactly."""
    row = reference.METHODS[method]
    x, score = reference.route_scores(
        logits[:, :num_experts], method, fields.get("correction_bias"), fields.get("softcap")
    )
    if row.ids != "largest":
        want = reference.route_choice(
            None, x.shape, topk, method, None, None, fields.get("tid2eid"), fields.get("token_ids")
        )
        assert (ids[:, :topk] == want).all()
        return  # such a method chooses by no key: there is nothing else to hold
    key = reference.route_keys(x, score, method, fields.get("correction_bias"))
    terms = num_experts + 2 * np.ptp(x) if row.score == "softmax" else 0
    made = 1 if row.key == "score" else 0
    unit = 2.0**-24
    tolerance = unit * (
        made * (SCORE_ULP + terms) * np.abs(score)
        + (np.abs(key) if row.bias != "none" else 0)
        + (SCORE_ULP * np.abs(x) if fields.get("softcap") else 0)
    ).max(axis=-1)
    for t in range(len(key)):
        left = dict(enumerate(key[t]))
        if row.groups == "quota":
            per_group = num_experts // fields["num_groups"]
            counts = np.bincount(ids[t, :topk] // per_group, minlength=fields["num_groups"])
            assert (counts == topk // fields["num_groups"]).all()
            for g in range(fields["num_groups"]):
                mine = [e for e in ids[t, :topk] if e // per_group == g]
                rest = [key[t, e] for e in range(num_experts) if e // per_group == g]
                rest = sorted(rest)[::-1][: len(mine)]
                assert np.allclose(sorted(key[t, mine])[::-1], rest, rtol=0, atol=tolerance[t])
            continue
        if row.groups != "none":
            groups = key[t].reshape(fields["num_groups"], -1)
            two = np.sort(groups, axis=-1)[:, -2:]
            order = np.sort(two.sum(axis=-1) if row.groups == "top2" else two[:, -1])
            gap = order[-fields["topk_groups"]] - order[-fields["topk_groups"] - 1]
            if gap <= 4 * tolerance[t]:
                continue
            want = reference.route_choice(
                key[t : t + 1],
                (1, num_experts),
                num_experts // fields["num_groups"] * fields["topk_groups"],
                method,
                fields["num_groups"],
                fields["topk_groups"],
            )
            left = {int(e): key[t, e] for e in want[0]}
        for e in ids[t, :topk]:
            best = max(left.values())
            assert e in left, f"token {t}: {e} twice or not allowed, {ids[t]}"
            assert left[e] >= best - 2 * tolerance[t], f"token {t}: {ids[t]}"
            del left[e]
