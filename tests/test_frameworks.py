"""Tensors in and out: NumPy, torch, JAX, CuPy, and hand-written DLPack producers."""

import gc
import sys
import warnings

import fusedmoe
import numpy as np
import producers
import pytest
from fusedmoe import Experts, Routing, fused_experts, fused_moe
from producers import NoCapsule, OldProducer, Producer, UsedCapsule
from support import (
    BF16,
    F16,
    F32,
    TorchBackend,
    assert_close,
    have,
    make_layer,
    no_gpu,
    run_layer,
    same_bits,
)

TENSORS = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")


def need(module):
    """The module, or skip. What importing it warns about is not ours to fix."""
    if not have(module):
        pytest.skip(f"{module} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        __import__(module)
    return sys.modules[module]


@pytest.fixture
def layer(seed):
    return make_layer(seed, 9, 48, 32, 4, 2, w13_bias=F32, w2_bias=BF16, shared_output=True)


# -------------------------------------------------------------------------------------------------
# NumPy
# -------------------------------------------------------------------------------------------------


def test_numpy_read_only_inputs(cpu, layer):
    want = run_layer(cpu, layer)
    arrays = layer.tensors()
    for array in (*arrays.values(), *layer.options.values()):
        array.flags.writeable = False
    assert same_bits(fused_experts(**arrays, **layer.options), want)


def test_numpy_subclass(cpu, layer):
    class Named(np.ndarray):
        pass

    arrays = {name: array.view(Named) for name, array in layer.tensors().items()}
    assert same_bits(np.asarray(fused_experts(**arrays, **layer.options)), run_layer(cpu, layer))


def test_numpy_memmap(cpu, layer, tmp_path):
    arrays = layer.tensors()
    layer.w13.tofile(tmp_path / "w13")
    arrays["w13"] = np.memmap(tmp_path / "w13", BF16, "r", shape=layer.w13.shape)
    assert same_bits(fused_experts(**arrays, **layer.options), run_layer(cpu, layer))


def test_numpy_swapped_bytes_are_refused(layer):
    arrays = layer.tensors()
    arrays["topk_weights"] = layer.topk_weights.astype(">f4")
    with pytest.raises(TypeError, match="topk_weights"):
        fused_experts(**arrays)


def test_numpy_extent_1_dimensions_have_free_strides(cpu, seed):
    layer = make_layer(seed, 1, 48, 32, 1, 1)
    want = run_layer(cpu, layer)
    arrays = {}
    for name, array in layer.tensors().items():
        strides = [12344 if array.shape[i] == 1 else s for i, s in enumerate(array.strides)]
        arrays[name] = np.lib.stride_tricks.as_strided(array, array.shape, strides)
    assert same_bits(fused_experts(**arrays), want)


# -------------------------------------------------------------------------------------------------
# torch
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return need("torch")


@pytest.fixture
def host(torch):
    """torch on the CPU."""
    return TorchBackend("cpu")


def to_torch(host, layer):
    options = {k: host.put(v) if isinstance(v, np.ndarray) else v for k, v in layer.options.items()}
    return {name: host.put(array) for name, array in layer.tensors().items()}, options


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_torch_cpu(cpu, host, seed, dtype, ids_dtype):
    layer = make_layer(seed, 9, 48, 32, 4, 2, dtype, ids_dtype=ids_dtype, shared_output=True)
    tensors, options = to_torch(host, layer)
    out = fused_experts(**tensors, **options)
    assert type(out) is host.torch.Tensor
    assert out.dtype == host.torch_dtype(dtype) and out.is_contiguous()
    assert same_bits(host.get(out), run_layer(cpu, layer))


def test_torch_every_function(cpu, host, layer, rng):
    torch = host.torch
    tensors, options = to_torch(host, layer)
    x, w13, w2 = tensors["hidden_states"], tensors["w13"], tensors["w2"]
    logits = rng.standard_normal((9, 4)).astype(F32)
    weights, ids = fusedmoe.route(host.put(logits), Routing(2))
    assert isinstance(weights, torch.Tensor) and ids.dtype == torch.int32
    offsets, sorted_token_ids, row_of_slot = fusedmoe.align(ids, 4)
    bias = options["w13_bias"]
    intermediate = fusedmoe.gate_up(x, w13, offsets, sorted_token_ids, 2, w13_bias=bias)
    rows = fusedmoe.down(
        intermediate,
        w2,
        offsets,
        sorted_token_ids,
        2,
        topk_weights=weights,
        w2_bias=options["w2_bias"],
    )
    out = fusedmoe.combine(rows, row_of_slot, shared_output=options["shared_output"])
    whole = fused_moe(x, w13, w2, host.put(logits), routing=Routing(2), **options)
    assert all(isinstance(t, torch.Tensor) for t in (offsets, intermediate, rows, out, whole))
    assert torch.equal(out, whole)


def test_torch_out_and_workspace(cpu, host, layer):
    torch = host.torch
    tensors, options = to_torch(host, layer)
    size = fusedmoe.workspace_size(*layer.sizes, dtype="bfloat16", device="cpu")
    out = torch.full((9, 48), torch.nan, dtype=torch.bfloat16)
    workspace = torch.full((size + 256,), 255, dtype=torch.uint8)
    workspace = workspace[-workspace.data_ptr() % 256 :][:size]
    assert fused_experts(**tensors, **options, out=out, workspace=workspace) is out
    assert same_bits(host.get(out), run_layer(cpu, layer))


def test_torch_strided_views(cpu, host, layer):
    tensors, options = to_torch(host, layer)
    for name in ("hidden_states", "w13", "w2"):
        wide = host.torch.nn.functional.pad(tensors[name], (0, 5), value=float("nan"))
        tensors[name] = wide[..., :-5]
        assert not tensors[name].is_contiguous()
    assert same_bits(host.get(fused_experts(**tensors, **options)), run_layer(cpu, layer))


def test_torch_parameters(cpu, host, layer):
    """Parameters and tensors that require a gradient are taken; nothing is recorded."""
    torch = host.torch
    tensors, options = to_torch(host, layer)
    tensors["w13"] = torch.nn.Parameter(tensors["w13"])
    tensors["w2"] = torch.nn.Parameter(tensors["w2"])
    tensors["hidden_states"].requires_grad_(True)
    tensors["topk_weights"] = tensors["topk_weights"].requires_grad_(True) * 1
    out = fused_experts(**tensors, **options)
    assert not out.requires_grad and out.grad_fn is None
    assert same_bits(host.get(out), run_layer(cpu, layer))
    experts = Experts(tensors["w13"], tensors["w2"], w13_bias=options["w13_bias"])
    experts(tensors["hidden_states"], tensors["topk_weights"], tensors["topk_ids"])


def test_torch_buffers_and_inference_mode(cpu, host, layer):
    torch = host.torch
    with torch.inference_mode():
        tensors, options = to_torch(host, layer)
        tensors["w13"] = torch.nn.Buffer(tensors["w13"])
        out = fused_experts(**tensors, **options)
    assert same_bits(host.get(out), run_layer(cpu, layer))


def test_torch_keeps_nothing(host, layer):
    """The call holds no reference to what it was given, nor to what it returned."""
    tensors, options = to_torch(host, layer)
    before = {name: sys.getrefcount(t) for name, t in tensors.items()}
    out = fused_experts(**tensors, **options)
    assert {name: sys.getrefcount(t) for name, t in tensors.items()} == before
    alone = object()
    assert sys.getrefcount(out) == sys.getrefcount(alone)


def test_torch_fake_tensors_are_refused(torch, host, layer):
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors, options = to_torch(host, layer)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(tensors["hidden_states"])
    for name in TENSORS:
        with pytest.raises(TypeError, match=rf"{name}.*FakeTensor"):
            fused_experts(**{**tensors, name: fake}, **options)


def test_torch_dispatch_subclasses_are_refused(torch, host, layer):
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("no operation of the subclass may run")

    tensors, options = to_torch(host, layer)
    with pytest.raises(TypeError, match=r"w13.*Wrapper"):
        fused_experts(**{**tensors, "w13": Wrapper(tensors["w13"])}, **options)


def test_torch_functional_tensors_are_refused(torch, host, layer):
    tensors, options = to_torch(host, layer)
    functional = torch._to_functional_tensor(tensors["hidden_states"])
    with pytest.raises((TypeError, ValueError), match="hidden_states"):
        fused_experts(**{**tensors, "hidden_states": functional}, **options)


def test_torch_meta_and_sparse_tensors_are_refused(torch, host, layer):
    tensors, options = to_torch(host, layer)
    meta = tensors["w13"].to("meta")
    with pytest.raises((TypeError, ValueError), match="w13"):
        fused_experts(**{**tensors, "w13": meta}, **options)
    sparse = tensors["topk_weights"].to_sparse()
    with pytest.raises((TypeError, ValueError), match="topk_weights"):
        fused_experts(**{**tensors, "topk_weights": sparse}, **options)


def test_torch_integers_with_an_explicit_dtype(cpu, torch, host, layer):
    tensors, options = to_torch(host, layer)
    for name in ("hidden_states", "w13", "w2"):
        tensors[name] = tensors[name].view(torch.int16)
    for name in ("w2_bias", "shared_output"):
        options[name] = options[name].view(torch.int16)
    out = fused_experts(**tensors, **options, dtype="bfloat16")
    assert out.dtype == torch.int16
    assert same_bits(host.get(out).view(BF16), run_layer(cpu, layer))


def test_frameworks_may_be_mixed_on_one_device(cpu, host, layer):
    """The result belongs to the framework of hidden_states."""
    want = run_layer(cpu, layer)
    tensors, options = to_torch(host, layer)
    out = fused_experts(layer.hidden_states, **{k: tensors[k] for k in TENSORS[1:]}, **options)
    assert type(out) is np.ndarray and same_bits(out, want)
    arrays = {k: getattr(layer, k) for k in TENSORS[1:]}
    out = fused_experts(tensors["hidden_states"], **arrays, **layer.options)
    assert type(out) is host.torch.Tensor and same_bits(host.get(out), want)


@pytest.mark.gpu
def test_torch_cuda_output_and_stream(gpu, layer):
    """The call is queued on torch's current stream, behind what makes its inputs."""
    torch = gpu.torch
    tensors, options = to_torch(gpu, layer)
    want, error = layer.expected()
    stream = torch.cuda.Stream()
    x = tensors.pop("hidden_states")
    late = torch.zeros_like(x)
    fused_experts(
        late, **tensors, **options
    )  # loads the kernels, which takes longer than the sleep
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        out = fused_experts(late, **tensors, **options)
        assert out.device == x.device and not stream.query()
    stream.synchronize()
    assert_close(gpu.get(out), want, error)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["int", "protocol"])
def test_torch_cuda_stream_argument(gpu, layer, how):
    torch = gpu.torch
    tensors, options = to_torch(gpu, layer)
    want, error = layer.expected()
    stream = torch.cuda.Stream()

    class Protocol:
        def __cuda_stream__(self):
            return 0, stream.cuda_stream

    x = tensors.pop("hidden_states")
    late = torch.zeros_like(x)
    out = torch.empty_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
    argument = stream.cuda_stream if how == "int" else Protocol()
    fused_experts(late, **tensors, **options, out=out, stream=argument)
    stream.synchronize()
    assert_close(gpu.get(out), want, error)


@pytest.mark.gpu
def test_torch_tensors_on_two_devices_are_refused(gpu, layer):
    on_gpu, options = to_torch(gpu, layer)
    host = TorchBackend("cpu")
    on_host, host_options = to_torch(host, layer)
    for name in TENSORS[1:]:
        with pytest.raises(ValueError, match=f"{name}: .*cuda:0.*cpu"):
            fused_experts(**{**on_gpu, name: on_host[name]}, **options)
        with pytest.raises(ValueError, match=f"{name}: .*cpu.*cuda:0"):
            fused_experts(**{**on_host, name: on_gpu[name]}, **host_options)
    for name in options:
        with pytest.raises(ValueError, match=f"{name}: .*cuda:0.*cpu"):
            fused_experts(**on_gpu, **{**options, name: host_options[name]})
    for name, tensor in {
        "out": host.empty((9, 48), BF16),
        "workspace": host.empty((1 << 20,), np.uint8),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: .*cuda:0.*cpu"):
            fused_experts(**on_gpu, **options, **{name: tensor})


@pytest.mark.gpu
def test_torch_cuda_float32_says_what_to_do(gpu, seed):
    layer = make_layer(seed, 4, 32, 16, 2, 1, F32)
    tensors, _ = to_torch(gpu, layer)
    with pytest.raises(NotImplementedError, match=r"hidden_states.*float32.*(bfloat16|float16)"):
        fused_experts(**tensors)


# -------------------------------------------------------------------------------------------------
# JAX
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def jax():
    jax = need("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        yield jax


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_jax_cpu(cpu, jax, seed, dtype):
    layer = make_layer(seed, 9, 48, 32, 4, 2, dtype, shared_output=True)
    arrays = {name: jax.numpy.asarray(array) for name, array in layer.tensors().items()}
    shared_output = jax.numpy.asarray(layer.options["shared_output"])
    out = fused_experts(**arrays, shared_output=shared_output)
    assert isinstance(out, jax.Array) and out.dtype == dtype
    assert same_bits(np.asarray(out), run_layer(cpu, layer))


def test_jax_every_function(jax, layer, rng):
    put = jax.numpy.asarray
    logits = put(rng.standard_normal((9, 4)).astype(F32))
    weights, ids = fusedmoe.route(logits, Routing(2))
    offsets, sorted_token_ids, row_of_slot = fusedmoe.align(ids, 4)
    intermediate = fusedmoe.gate_up(
        put(layer.hidden_states), put(layer.w13), offsets, sorted_token_ids, 2
    )
    rows = fusedmoe.down(
        intermediate, put(layer.w2), offsets, sorted_token_ids, 2, topk_weights=weights
    )
    out = fusedmoe.combine(rows, row_of_slot)
    whole = fused_moe(
        put(layer.hidden_states), put(layer.w13), put(layer.w2), logits, routing=Routing(2)
    )
    assert all(isinstance(t, jax.Array) for t in (weights, ids, offsets, rows, out, whole))
    assert same_bits(np.asarray(out), np.asarray(whole))


def test_jax_arrays_are_not_written(jax, layer):
    arrays = {name: jax.numpy.asarray(array) for name, array in layer.tensors().items()}
    with pytest.raises(ValueError, match="out.*read-only"):
        fused_experts(**arrays, out=arrays["hidden_states"])
    assert same_bits(np.asarray(arrays["hidden_states"]), layer.hidden_states)


def test_jax_tracers_are_refused(jax, layer):
    arrays = {name: jax.numpy.asarray(array) for name, array in layer.tensors().items()}
    x = arrays.pop("hidden_states")
    with pytest.raises(TypeError, match=r"hidden_states.*(tracer|Tracer|traced|jit)"):
        jax.jit(lambda x: fused_experts(x, **arrays))(x)


# -------------------------------------------------------------------------------------------------
# CuPy
# -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cupy(gpu, seed):
    cupy = need("cupy")
    layer = make_layer(seed, 9, 48, 32, 4, 2, F16, shared_output=True)
    arrays = {name: cupy.asarray(array) for name, array in layer.tensors().items()}
    shared_output = cupy.asarray(layer.options["shared_output"])
    out = fused_experts(**arrays, shared_output=shared_output)
    assert isinstance(out, cupy.ndarray) and out.dtype == F16
    want, error = layer.expected()
    assert_close(cupy.asnumpy(out), want, error)


# -------------------------------------------------------------------------------------------------
# DLPack, by hand
# -------------------------------------------------------------------------------------------------

KINDS = {
    "versioned": dict(cls=Producer),
    "unversioned": dict(cls=Producer, versioned=False),
    "rejects_max_version": dict(cls=OldProducer),
    "null_strides": dict(cls=Producer, null_strides=True),
    "old_null_strides": dict(cls=OldProducer, null_strides=True),
    "byte_offset": dict(cls=Producer, before=64),
    "later_minor": dict(cls=Producer, version=(1, 99)),
    "pinned": dict(cls=Producer, device=producers.CUDA_HOST),
}


def wrap(kind, array):
    options = dict(KINDS[kind])
    return options.pop("cls")(array, **options)


@pytest.fixture
def want(cpu, layer):
    return run_layer(cpu, layer)


@pytest.fixture
def workspace():
    """More than any layer here needs: beside a bare producer nothing can be allocated."""
    return np.full(1 << 16, 0xFF, np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_producers(layer, want, workspace, kind):
    given = {name: wrap(kind, array) for name, array in layer.tensors().items()}
    options = {name: wrap(kind, array) for name, array in layer.options.items()}
    out = np.empty((9, 48), BF16)
    fused_experts(**given, **options, out=out, workspace=workspace)
    assert same_bits(out, want)
    for producer in (*given.values(), *options.values()):
        assert producer.exported >= 1
        producer.check_released()


@pytest.mark.parametrize("kind", KINDS)
def test_producer_as_out_and_workspace(layer, want, kind):
    array = np.zeros((9, 48), BF16)
    size = fusedmoe.workspace_size(*layer.sizes, dtype="bfloat16", device="cpu")
    buffer = np.zeros(size + 256, np.uint8)
    buffer = buffer[-buffer.ctypes.data % 256 :][:size]
    out, workspace = wrap(kind, array), wrap(kind, buffer)
    result = fused_experts(**layer.tensors(), **layer.options, out=out, workspace=workspace)
    assert result is out
    assert same_bits(array, want)
    out.check_released()
    workspace.check_released()


def test_producer_in_a_stage(layer):
    ids = Producer(layer.topk_ids)
    arrays = [Producer(np.empty(shape, np.int32)) for shape in [(5,), (18,), (9, 2)]]
    fusedmoe.align(
        ids,
        4,
        out_expert_offsets=arrays[0],
        out_sorted_token_ids=arrays[1],
        out_row_of_slot=arrays[2],
    )
    want = fusedmoe.align(layer.topk_ids, 4)
    for producer, array in zip(arrays, want, strict=True):
        assert same_bits(producer.array, array)
        producer.check_released()
    ids.check_released()


def test_experts_own_their_weights(layer, want):
    """The deleter runs when the Experts object goes, not before, and once."""
    w13, w2 = Producer(layer.w13), OldProducer(layer.w2)
    options = {name: Producer(layer.options[name]) for name in ("w13_bias", "w2_bias")}
    experts = Experts(w13, w2, **options)
    args = layer.hidden_states, layer.topk_weights, layer.topk_ids
    for _ in range(3):
        out = experts(*args, shared_output=layer.options["shared_output"])
        assert same_bits(out, want)
    assert w13.deleted == w2.deleted == 0
    again = Producer(layer.w13), Producer(layer.w2)
    experts.rebind(*again, options["w13_bias"], options["w2_bias"])
    assert w13.deleted == w13.exported and w2.deleted == w2.exported
    del experts
    gc.collect()
    for producer in (w13, w2, *again, *options.values()):
        producer.check_released()


def test_result_needs_a_framework(layer):
    """Beside a bare producer nothing can be allocated: say so, or ask for out."""
    given = {name: Producer(array) for name, array in layer.tensors().items()}
    with pytest.raises(TypeError, match="out: .*Producer"):
        fused_experts(**given, **layer.options)
    with pytest.raises(TypeError, match="workspace: .*Producer"):
        fused_experts(**given, **layer.options, out=np.empty((9, 48), BF16))
    for producer in given.values():
        producer.check_released()


def test_allocation_of_another_shape(layer):
    """What the framework allocated was written as if it had the shape that it was asked for."""
    torch = need("torch")

    class Stubborn(torch.Tensor):
        def new_empty(self, size, **options):
            return made

    as_torch = {n: torch.from_numpy(a.astype(F32)) for n, a in layer.tensors().items()}
    as_torch["topk_ids"] = torch.from_numpy(layer.topk_ids)
    as_torch["hidden_states"] = as_torch["hidden_states"].as_subclass(Stubborn)
    for made in (torch.full((1, 48), 7.0), torch.full((9, 96), 7.0)[:, ::2], torch.ones(9 * 48)):
        before = made.clone()
        with pytest.raises((ValueError, RuntimeError), match="^out: "):
            fused_experts(**as_torch)
        assert torch.equal(made, before)
    made = torch.empty(9, 48)
    assert fused_experts(**as_torch) is made


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    "trouble, error",
    [
        (dict(strides=(2**61, 2**61, 1)), ValueError),
        (dict(shape=(2**62, 2**62, 2**62)), ValueError),
        (dict(shape=(2**40, 2**40, 2**40), null_strides=True), ValueError),
        (dict(shape=(-1, -1, -1)), ValueError),
        (dict(ndim=9), ValueError),
        (dict(ndim=-1), ValueError),
        (dict(null_data=True), ValueError),
        (dict(null_shape=True), ValueError),  # was read
        (dict(before=-64), ValueError),  # a byte_offset of 2^64 - 64 came around to the tensor
        (dict(lanes=2), TypeError),
        (dict(code=producers.COMPLEX, bits=64), TypeError),
        (dict(code=99), TypeError),
        (dict(bits=24), TypeError),
        (dict(bits=0), TypeError),
        (dict(device=producers.ROCM), ValueError),
        (dict(device=(99, 0)), ValueError),
        (dict(version=(2, 0)), (TypeError, ValueError)),
        (dict(export_error=BufferError("not today")), (TypeError, ValueError)),
    ],
    ids=lambda v: "-".join(f"{k}={w}" for k, w in v.items()) if isinstance(v, dict) else "",
)
def test_bad_producers(layer, name, trouble, error):
    array = getattr(layer, name)
    trouble = {
        k: v[-array.ndim :] if isinstance(v, tuple) and k in ("shape", "strides") else v
        for k, v in trouble.items()
    }
    if "ndim" in trouble:  # as many extents as it says
        extra = max(0, trouble["ndim"] - array.ndim)
        trouble["shape"] = (1,) * extra + array.shape
        trouble["strides"] = (0,) * extra + tuple(s // array.itemsize for s in array.strides)
    given = {n: Producer(a) for n, a in layer.tensors().items()}
    given[name] = Producer(array, **trouble)
    out = np.full((9, 48), 7, BF16)
    with pytest.raises(error, match=name):
        fused_experts(**given, **layer.options, out=out)
    assert (out == 7).all()
    for producer in given.values():
        producer.check_released()


def test_overflowing_stride_of_a_long_row(layer):
    """shape * stride overflows 64 bits though each fits."""
    x = Producer(layer.hidden_states, shape=(2**33, 48), strides=(2**33, 1))
    with pytest.raises(ValueError, match="hidden_states"):
        fused_experts(**{**layer.tensors(), "hidden_states": x})
    x.check_released()


def test_stride_of_extent_1_is_free(cpu, seed, workspace):
    layer = make_layer(seed, 1, 48, 32, 4, 2)
    want = run_layer(cpu, layer)
    x = Producer(layer.hidden_states, strides=(-(2**62), 1))
    arrays = {**layer.tensors(), "hidden_states": x}
    out = np.empty((1, 48), BF16)
    assert same_bits(fused_experts(**arrays, out=out, workspace=workspace), want)
    x.check_released()


def test_null_data_of_an_empty_tensor(seed, workspace):
    layer = make_layer(seed, 0, 48, 32, 4, 2)
    given = {name: Producer(a, null_data=a.size == 0) for name, a in layer.tensors().items()}
    out = Producer(np.empty((0, 48), BF16), null_data=True)
    assert fused_experts(**given, out=out, workspace=workspace) is out
    for producer in (*given.values(), out):
        producer.check_released()


def test_read_only_flag_of_out(layer, workspace):
    array = np.full((9, 48), 7, BF16)
    out = Producer(array, flags=producers.READ_ONLY)
    with pytest.raises(ValueError, match="out.*read-only"):
        fused_experts(**layer.tensors(), **layer.options, out=out)
    assert (array == 7).all()
    out.check_released()
    inputs = {n: Producer(a, flags=producers.READ_ONLY) for n, a in layer.tensors().items()}
    fused_experts(**inputs, **layer.options, out=array, workspace=workspace)
    for producer in inputs.values():
        producer.check_released()


def test_no_capsule(layer):
    with pytest.raises(TypeError, match="w2"):
        fused_experts(**{**layer.tensors(), "w2": NoCapsule(layer.w2)})


def test_used_capsule(layer, want, workspace):
    x = UsedCapsule(layer.hidden_states)
    out = np.empty((9, 48), BF16)
    kwargs = {**layer.tensors(), **layer.options, "out": out, "workspace": workspace}
    assert same_bits(fused_experts(**{**kwargs, "hidden_states": x}), want)
    with pytest.raises((TypeError, ValueError), match="hidden_states"):
        fused_experts(**{**kwargs, "hidden_states": x})
    x.check_released()


def test_cuda_tensors_without_a_gpu(layer):
    """A tensor that says it lies on a GPU, on a machine without one."""
    if no_gpu() is None:
        pytest.skip("there is a GPU here, and the address would be wrong on it")
    given = {n: Producer(a, device=producers.CUDA) for n, a in layer.tensors().items()}
    out = Producer(np.full((9, 48), 7, BF16), device=producers.CUDA)
    with pytest.raises(RuntimeError, match=r"GPU|CUDA|driver|libcuda"):
        fused_experts(**given, out=out)
    for producer in (*given.values(), out):
        producer.check_released()
    assert (out.array == 7).all()
