"""Random calls: each either matches the oracle or raises one of the five exception types, and a
call without a fault in it matches.

500 cases by default, FUSEDMOE_PROPERTY_CASES for more (5000 in a long run).
"""

import os

import numpy as np
import pytest
from fusedmoe import fused_experts, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    BF16,
    ERRORS,
    F16,
    F32,
    NumpyBackend,
    TorchBackend,
    assert_close,
    make_layer,
    no_gpu,
    padded,
)

CASES = int(os.environ.get("FUSEDMOE_PROPERTY_CASES", "500"))

SETTINGS = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="FUSEDMOE_PROPERTY_CASES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def layers(draw, dtypes):
    """(Layer, padding): sizes, dtypes, options and routing of a call that is in order."""
    gated = draw(st.booleans())
    choices = [a for a in reference.ACTIVATIONS if gated or a != "swiglu_oai"]
    activation = draw(st.sampled_from(choices))
    options = {"activation": activation}
    if activation in ("swiglu_oai", "situ") and draw(st.booleans()):
        options["activation_alpha"] = draw(st.floats(0.25, 4))
    if activation in ("silu", "swiglu_oai", "situ") and draw(st.booleans()):
        options["activation_limit"] = draw(st.floats(0.25, 8))
        options["clamp"] = draw(st.sampled_from(["after", "before"]))
    if gated:
        options["w13_order"] = draw(st.sampled_from(reference.ORDERS))
    dtype = draw(st.sampled_from(dtypes))
    no_combine = draw(st.sampled_from([False, False, "weighted", "unweighted"]))
    options["no_combine"] = no_combine
    options["apply_router_weight_on_input"] = draw(st.booleans())
    options["shared_output"] = not no_combine and draw(st.booleans())
    if draw(st.booleans()):
        options["routed_scaling_factor"] = draw(st.floats(-4, 4))
    for bias in ("w13_bias", "w2_bias"):
        options[bias] = draw(st.sampled_from([None, F32, dtype]))
    num_experts = draw(st.integers(1, 12))
    ranks = draw(st.sampled_from(["all", "start", "map"]))
    if ranks != "all":
        num_ids = options["num_ids"] = num_experts + draw(st.integers(0, 8))
        if ranks == "start":
            options["expert_start"] = draw(st.integers(0, num_ids))
        else:
            value = st.integers(-2, num_experts)
            options["expert_map"] = draw(st.lists(value, min_size=num_ids, max_size=num_ids))
    layer = make_layer(
        draw(st.integers(0, 2**20)),
        draw(st.integers(0, 40)),
        draw(st.integers(1, 70)),
        draw(st.integers(1, 70)),
        num_experts,
        draw(st.integers(1, 8)),
        dtype,
        gated=gated,
        ids_dtype=draw(st.sampled_from([np.int32, np.int64])),
        weights_dtype=draw(st.sampled_from([F32, BF16, F16])),
        routing=draw(st.sampled_from(["uniform", "same", "half", "dropped", "none", "duplicates"])),
        **options,
    )
    pads = st.sampled_from([0, 0, 1, 3, 8, 64])
    padding = {name: (draw(pads), draw(pads)) for name in ("hidden_states", "w13", "w2")}
    return layer, padding


# One fault each: what it does to the keyword arguments of an otherwise valid call.
def _narrower(kwargs, name):
    kwargs[name] = kwargs[name][..., :-1]


def _fewer(kwargs, name):
    kwargs[name] = kwargs[name][:-1]


def _cast(kwargs, name):
    tensor = kwargs[name]
    kwargs[name] = tensor.astype(np.float64) if hasattr(tensor, "astype") else tensor.double()


def _flat(kwargs, name):
    kwargs[name] = kwargs[name].reshape(-1)


def _none(kwargs, name):
    kwargs[name] = None


def _strided(kwargs, name):
    kwargs[name] = kwargs[name][..., ::2]


FAULTS = (_narrower, _fewer, _cast, _flat, _none, _strided)
TENSORS = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")


def put(backend, layer, padding):
    kwargs = {}
    for name, array in layer.tensors().items():
        pad, offset = padding.get(name, (0, 0))
        kwargs[name] = padded(backend, array, pad, offset=offset)
    for name, value in layer.options.items():
        kwargs[name] = backend.put(value) if isinstance(value, np.ndarray) else value
    return kwargs


def check_valid(backend, layer, padding):
    got = backend.get(fused_experts(**put(backend, layer, padding)))
    want, error = layer.expected()
    assert_close(got, want, error, seed=layer.seed)


def check_faulty(backend, layer, padding, fault, name):
    kwargs = put(backend, layer, padding)
    fault(kwargs, name)
    try:
        got = backend.get(fused_experts(**kwargs))
    except ERRORS as error:
        assert type(error) in ERRORS and str(error)
        return
    # Not a fault in this call after all (every second of one column): then it has to be right.
    arrays = {n: backend.get(kwargs[n]) for n in TENSORS}
    want, error = reference.fused_experts_error(**arrays, **layer.options)
    assert_close(got, want, error, seed=layer.seed)


CPU = NumpyBackend()


@SETTINGS
@given(layers((BF16, F16, F32)))
def test_valid_calls_match_the_oracle(case):
    check_valid(CPU, *case)


@SETTINGS
@given(layers((BF16, F16, F32)), st.sampled_from(FAULTS), st.sampled_from(TENSORS))
def test_faulty_calls_raise_or_match(case, fault, name):
    check_faulty(CPU, *case, fault, name)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.sampled_from([[], (), {}, object(), np.float32(1), np.int64(1), np.zeros(3), 1j]),
)
SCALAR_NAMES = (
    "activation",
    "activation_alpha",
    "activation_limit",
    "clamp",
    "gated",
    "w13_order",
    "apply_router_weight_on_input",
    "routed_scaling_factor",
    "shared_output",
    "no_combine",
    "expert_map",
    "expert_start",
    "deterministic",
    "batch_invariant",
    "out",
    "workspace",
    "stream",
    "dtype",
    "quant",
    *TENSORS,
)


@SETTINGS
@given(st.dictionaries(st.sampled_from(SCALAR_NAMES), SCALARS, min_size=1, max_size=3))
def test_any_object_as_any_argument(wrong):
    layer = make_layer(3, 3, 16, 8, 2, 2)
    try:
        out = fused_experts(**{**layer.tensors(), **wrong})
    except ERRORS as error:
        assert type(error) in ERRORS and str(error)
        return
    known = {k: v for k, v in wrong.items() if k not in ("stream", "dtype", "deterministic")}
    known = {k: v for k, v in known.items() if v is not None}
    known = {k: v for k, v in known.items() if k not in ("batch_invariant", "out", "workspace")}
    want, error = reference.fused_experts_error(**layer.tensors(), **known)
    assert_close(out, want, error)


@pytest.mark.gpu
def test_valid_calls_match_the_oracle_on_the_gpu():
    if no_gpu():
        pytest.skip(no_gpu())
    gpu = TorchBackend()

    @SETTINGS
    @given(layers((BF16, F16)))
    def run(case):
        check_valid(gpu, *case)

    run()


@pytest.mark.gpu
def test_faulty_calls_raise_or_match_on_the_gpu():
    if no_gpu():
        pytest.skip(no_gpu())
    gpu = TorchBackend()

    @SETTINGS
    @given(layers((BF16, F16)), st.sampled_from(FAULTS), st.sampled_from(TENSORS))
    def run(case, fault, name):
        check_faulty(gpu, *case, fault, name)

    run()
