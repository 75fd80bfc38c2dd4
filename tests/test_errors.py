"""Wrong calls: one wrong thing each. The exception is the documented one, its text names the
argument, nothing is written, and nothing else happens.

The table runs on both backends: each row makes its wrong argument with the backend's own tensors.
"""

import fusedmoe
import numpy as np
import pytest
from fusedmoe import Experts, Routing, reference
from support import (
    BF16,
    F16,
    F32,
    Guarded,
    NumpyBackend,
    make_layer,
    no_gpu,
    same_bits,
    workspace_bytes,
)

# The valid call that each row spoils: 6 tokens, hidden 32, intermediate 16, 4 experts, topk 2.
T, H, N, E, K = 6, 32, 16, 4, 2


def base(backend, function):
    """Valid keyword arguments of `function`, on the backend, out and workspace included."""
    layer = make_layer(1, T, H, N, E, K)
    put = backend.put
    offsets, sorted_token_ids, row_of_slot = fusedmoe.reference.align(layer.topk_ids, E)
    logits = np.random.default_rng(2).standard_normal((T, E)).astype(F32)
    weights = {"topk_weights": put(layer.topk_weights), "topk_ids": put(layer.topk_ids)}
    layers = {
        "hidden_states": put(layer.hidden_states),
        "w13": put(layer.w13),
        "w2": put(layer.w2),
    }
    groups = {"expert_offsets": put(offsets), "sorted_token_ids": put(sorted_token_ids), "topk": K}

    def out(*shape, dtype=BF16):
        return Guarded(backend, shape, dtype, 0x5A)

    if function == "fused_experts":
        return {**layers, **weights, "out": out(T, H)}
    if function == "fused_moe":
        return {**layers, "router_logits": put(logits), "routing": Routing(K), "out": out(T, H)}
    if function == "route":
        return {
            "router_logits": put(logits),
            "routing": Routing(K),
            "out_weights": out(T, K, dtype=F32),
            "out_ids": out(T, K, dtype=np.int32),
        }
    if function == "align":
        return {
            "topk_ids": weights["topk_ids"],
            "num_experts": E,
            "out_expert_offsets": out(E + 1, dtype=np.int32),
            "out_sorted_token_ids": out(T * K, dtype=np.int32),
            "out_row_of_slot": out(T, K, dtype=np.int32),
        }
    if function == "gate_up":
        return {
            "hidden_states": layers["hidden_states"],
            "w13": layers["w13"],
            **groups,
            "out": out(T * K, N),
        }
    intermediate = np.ones((T * K, N), BF16)
    rows = np.ones((T * K, H), BF16)
    if function == "down":
        return {
            "intermediate": put(intermediate),
            "w2": layers["w2"],
            **groups,
            "out": out(T * K, H),
        }
    if function == "combine":
        return {"rows": put(rows), "row_of_slot": put(row_of_slot), "out": out(T, H)}
    if function == "Experts":
        return {"w13": layers["w13"], "w2": layers["w2"]}
    if function == "experts":  # the call of an Experts object
        return {"hidden_states": layers["hidden_states"], **weights, "out": out(T, H)}
    if function == "rebind":
        return {"w13": layers["w13"], "w2": layers["w2"]}
    if function in ("plan", "workspace_size"):
        return {
            "num_tokens": T,
            "hidden_size": H,
            "intermediate_size": N,
            "num_experts": E,
            "topk": K,
        }
    raise ValueError(function)


def target(backend, function, kwargs):
    """The callable for a row."""
    if function in ("experts", "rebind"):
        layer = make_layer(1, T, H, N, E, K)
        experts = Experts(backend.put(layer.w13), backend.put(layer.w2))
        return experts if function == "experts" else experts.rebind
    return getattr(fusedmoe, function)


def zeros(*shape, dtype=BF16):
    """A row's wrong tensor: made by the backend when the row runs."""
    return lambda b: b.put(np.zeros(shape, dtype))


def columns(*shape, dtype=BF16):
    """A tensor whose last stride is 2."""

    def make(b):
        wide = b.put(np.zeros((*shape[:-1], 2 * shape[-1]), dtype))
        return wide[..., ::2]

    return make


def transposed(*shape, dtype=BF16):
    """Column-major: the last two dimensions are swapped in memory."""

    def make(b):
        tensor = b.put(np.zeros((*shape[:-2], shape[-1], shape[-2]), dtype))
        return tensor.swapaxes(-1, -2)

    return make


def read_only(*shape, dtype=BF16):
    def make(b):
        array = np.zeros(shape, dtype)
        array.flags.writeable = False
        return array

    make.cpu_only = True
    return make


def repeated(*shape, dtype=BF16):
    """Rows on top of each other."""
    return lambda b: b.broadcast(b.put(np.zeros(shape[-1], dtype)), shape)


def skewed(*shape, dtype=BF16):
    """An address that is not a multiple of the element's size."""

    def make(b):
        size = np.dtype(dtype).itemsize
        raw = np.zeros(int(np.prod(shape)) * size + size, np.uint8)
        return raw[1 : 1 - size].view(dtype).reshape(shape)

    make.cpu_only = True
    return make


def of(name):
    """The tensor of another argument."""
    return lambda b, kwargs: kwargs[name]


def inside(name, *shape):
    """out within the memory of argument `name`, which is long enough."""

    def make(b, kwargs):
        return kwargs[name].reshape(-1)[: int(np.prod(shape))].reshape(shape)

    return make


def shifted(name):
    """The argument's memory, one row further."""

    def make(b, kwargs):
        wide = b.put(np.zeros((T + 1, H), BF16))
        kwargs[name] = wide[:T]
        return wide[1:]

    return make


class NoNumber:
    def __repr__(self):
        raise RuntimeError("a repr that fails must not matter")


TYPE, VALUE, NOT, RUNTIME = TypeError, ValueError, NotImplementedError, RuntimeError
U8 = np.uint8

# function, what is wrong, exception, what its text names (a regular expression; None: the argument)
TABLE = [
    # --- hidden_states
    ("fused_experts", {"hidden_states": None}, TYPE),
    ("fused_experts", {"hidden_states": [[1.0] * H] * T}, TYPE),
    ("fused_experts", {"hidden_states": "text"}, TYPE),
    ("fused_experts", {"hidden_states": 5}, TYPE),
    ("fused_experts", {"hidden_states": b"bytes"}, TYPE),
    ("fused_experts", {"hidden_states": object()}, TYPE),
    ("fused_experts", {"hidden_states": np.ndarray}, TYPE),
    ("fused_experts", {"hidden_states": NoNumber()}, TYPE),
    ("fused_experts", {"hidden_states": zeros(T, H, dtype=np.float64)}, TYPE),
    ("fused_experts", {"hidden_states": zeros(T, H, dtype=np.int32)}, TYPE),
    # numbers held by integers, without dtype=: the text has to name that keyword
    ("fused_experts", {"hidden_states": zeros(T, H, dtype=np.int16)}, TYPE, "states: .* dtype='bf"),
    ("Experts", {"w13": zeros(E, 2 * N, H, dtype=np.uint16)}, TYPE, "w13: .* dtype='bfloat16'"),
    ("fused_experts", {"hidden_states": zeros(T, H, dtype=bool)}, TYPE),
    ("fused_experts", {"hidden_states": zeros(T, H, dtype=np.complex64)}, TYPE),
    ("fused_experts", {"hidden_states": zeros(T * H)}, VALUE),
    ("fused_experts", {"hidden_states": zeros(1, T, H)}, VALUE),
    ("fused_experts", {"hidden_states": zeros(1, 1, 1, 1, T, H)}, VALUE),
    ("fused_experts", {"hidden_states": zeros(T, H - 1)}, VALUE, "w13|hidden_states"),
    ("fused_experts", {"hidden_states": zeros(T, 0)}, VALUE),
    ("fused_experts", {"hidden_states": zeros(T + 1, H)}, VALUE, "topk_ids|hidden_states"),
    ("fused_experts", {"hidden_states": zeros(T - 1, H)}, VALUE, "topk_ids|hidden_states"),
    ("fused_experts", {"hidden_states": columns(T, H)}, VALUE),
    ("fused_experts", {"hidden_states": transposed(T, H)}, VALUE),
    ("fused_experts", {"hidden_states": skewed(T, H)}, VALUE),
    # --- w13
    ("fused_experts", {"w13": None}, TYPE),
    ("fused_experts", {"w13": [1, 2, 3]}, TYPE),
    ("fused_experts", {"w13": zeros(E, 2 * N, H, dtype=F16)}, TYPE),
    ("fused_experts", {"w13": zeros(E, 2 * N, H, dtype=F32)}, TYPE),
    ("fused_experts", {"w13": zeros(E, 2 * N, H, dtype=np.int8)}, TYPE),
    ("fused_experts", {"w13": zeros(2 * N, H)}, VALUE),
    ("fused_experts", {"w13": zeros(1, E, 2 * N, H)}, VALUE),
    ("fused_experts", {"w13": zeros(E, 2 * N, H + 1)}, VALUE),
    ("fused_experts", {"w13": zeros(E, 2 * N - 1, H)}, VALUE),
    ("fused_experts", {"w13": zeros(E, 2 * N - 2, H)}, VALUE, "w13|w2"),
    ("fused_experts", {"w13": zeros(E, 0, H)}, VALUE),
    ("fused_experts", {"w13": zeros(0, 2 * N, H)}, VALUE),
    ("fused_experts", {"w13": zeros(E + 1, 2 * N, H)}, VALUE, "w13|w2"),
    ("fused_experts", {"w13": zeros(1025, 2 * N, H)}, VALUE),
    ("fused_experts", {"w13": columns(E, 2 * N, H)}, VALUE),
    ("fused_experts", {"w13": transposed(E, 2 * N, H)}, VALUE),
    ("fused_experts", {"w13": skewed(E, 2 * N, H)}, VALUE),
    # --- w2
    ("fused_experts", {"w2": None}, TYPE),
    ("fused_experts", {"w2": 1.5}, TYPE),
    ("fused_experts", {"w2": zeros(E, H, N, dtype=F16)}, TYPE),
    ("fused_experts", {"w2": zeros(E, H, N, dtype=np.float64)}, TYPE),
    ("fused_experts", {"w2": zeros(H, N)}, VALUE),
    ("fused_experts", {"w2": zeros(E, H, N, 1)}, VALUE),
    ("fused_experts", {"w2": zeros(E - 1, H, N)}, VALUE),
    ("fused_experts", {"w2": zeros(E, H + 1, N)}, VALUE),
    ("fused_experts", {"w2": zeros(E, H, N + 1)}, VALUE),
    ("fused_experts", {"w2": zeros(E, N, H)}, VALUE),
    ("fused_experts", {"w2": columns(E, H, N)}, VALUE),
    ("fused_experts", {"w2": transposed(E, H, N)}, VALUE),
    # --- topk_weights
    ("fused_experts", {"topk_weights": None}, TYPE),
    ("fused_experts", {"topk_weights": 0.5}, TYPE),
    ("fused_experts", {"topk_weights": zeros(T, K, dtype=np.float64)}, TYPE),
    ("fused_experts", {"topk_weights": zeros(T, K, dtype=np.int32)}, TYPE),
    ("fused_experts", {"topk_weights": zeros(T * K, dtype=F32)}, VALUE),
    ("fused_experts", {"topk_weights": zeros(T, K, 1, dtype=F32)}, VALUE),
    ("fused_experts", {"topk_weights": zeros(T - 1, K, dtype=F32)}, VALUE),
    ("fused_experts", {"topk_weights": zeros(T, K + 1, dtype=F32)}, VALUE),
    ("fused_experts", {"topk_weights": columns(T, K, dtype=F32)}, VALUE),
    ("fused_experts", {"topk_weights": transposed(T, K, dtype=F32)}, VALUE),
    # --- topk_ids
    ("fused_experts", {"topk_ids": None}, TYPE),
    ("fused_experts", {"topk_ids": [[0, 1]] * T}, TYPE),
    ("fused_experts", {"topk_ids": zeros(T, K, dtype=F32)}, TYPE),
    ("fused_experts", {"topk_ids": zeros(T, K, dtype=np.int16)}, TYPE),
    ("fused_experts", {"topk_ids": zeros(T, K, dtype=U8)}, TYPE),
    ("fused_experts", {"topk_ids": zeros(T, K, dtype=bool)}, TYPE),
    ("fused_experts", {"topk_ids": zeros(T, K, dtype=np.uint32)}, TYPE),
    ("fused_experts", {"topk_ids": zeros(T * K, dtype=np.int32)}, VALUE),
    ("fused_experts", {"topk_ids": zeros(T + 1, K, dtype=np.int32)}, VALUE),
    ("fused_experts", {"topk_ids": zeros(T, 0, dtype=np.int32)}, VALUE),
    ("fused_experts", {"topk_ids": zeros(T, 33, dtype=np.int32)}, VALUE, "topk"),
    ("fused_experts", {"topk_ids": columns(T, K, dtype=np.int32)}, VALUE),
    # --- biases
    ("fused_experts", {"w13_bias": zeros(E, 2 * N, dtype=F16)}, TYPE),
    ("fused_experts", {"w13_bias": zeros(E, 2 * N, dtype=np.int32)}, TYPE),
    ("fused_experts", {"w13_bias": 0.0}, TYPE),
    ("fused_experts", {"w13_bias": zeros(2 * N)}, VALUE),
    ("fused_experts", {"w13_bias": zeros(E - 1, 2 * N)}, VALUE),
    ("fused_experts", {"w13_bias": zeros(E, N)}, VALUE),
    ("fused_experts", {"w13_bias": columns(E, 2 * N)}, VALUE),
    ("fused_experts", {"w2_bias": zeros(E, H, dtype=np.float64)}, TYPE),
    ("fused_experts", {"w2_bias": True}, TYPE),
    ("fused_experts", {"w2_bias": zeros(E, H, 1)}, VALUE),
    ("fused_experts", {"w2_bias": zeros(E + 1, H)}, VALUE),
    ("fused_experts", {"w2_bias": zeros(E, H - 1)}, VALUE),
    ("fused_experts", {"w2_bias": transposed(E, H)}, VALUE),
    # --- shared_output
    ("fused_experts", {"shared_output": zeros(T, H, dtype=F32)}, TYPE),
    ("fused_experts", {"shared_output": "shared"}, TYPE),
    ("fused_experts", {"shared_output": zeros(H)}, VALUE),
    ("fused_experts", {"shared_output": zeros(T + 1, H)}, VALUE),
    ("fused_experts", {"shared_output": zeros(T, H - 1)}, VALUE),
    ("fused_experts", {"shared_output": columns(T, H)}, VALUE),
    (
        "fused_experts",
        {"shared_output": zeros(T, H), "no_combine": "weighted", "out": None},
        VALUE,
        "shared_output",
    ),
    # --- expert_map, expert_start
    ("fused_experts", {"expert_map": [0, 1, 2, 3]}, TYPE),
    ("fused_experts", {"expert_map": zeros(8, dtype=np.int64)}, TYPE),
    ("fused_experts", {"expert_map": zeros(8, dtype=F32)}, TYPE),
    ("fused_experts", {"expert_map": zeros(2, 4, dtype=np.int32)}, VALUE),
    ("fused_experts", {"expert_map": zeros(0, dtype=np.int32)}, VALUE),
    ("fused_experts", {"expert_map": columns(8, dtype=np.int32)}, VALUE),
    (
        "fused_experts",
        {"expert_map": zeros(8, dtype=np.int32), "expert_start": 0},
        VALUE,
        "expert_start|expert_map",
    ),
    ("fused_experts", {"expert_start": -1}, VALUE),
    ("fused_experts", {"expert_start": 2**40}, VALUE),
    ("fused_experts", {"expert_start": 2**70}, VALUE),
    ("fused_experts", {"expert_start": "0"}, TYPE),
    ("fused_experts", {"expert_start": 1.5}, TYPE),
    ("fused_experts", {"expert_start": zeros(1, dtype=np.int32)}, TYPE),
    # --- out
    ("fused_experts", {"out": "out"}, TYPE),
    ("fused_experts", {"out": zeros(T, H, dtype=F32)}, TYPE),
    ("fused_experts", {"out": zeros(T, H, dtype=F16)}, TYPE),
    ("fused_experts", {"out": zeros(T * H)}, VALUE),
    ("fused_experts", {"out": zeros(T, K, H)}, VALUE),
    ("fused_experts", {"out": zeros(T - 1, H)}, VALUE),
    ("fused_experts", {"out": zeros(T, H + 1)}, VALUE),
    ("fused_experts", {"out": columns(T, H)}, VALUE),
    ("fused_experts", {"out": transposed(T, H)}, VALUE),
    ("fused_experts", {"out": read_only(T, H)}, VALUE, "out.*read-only"),
    ("fused_experts", {"out": repeated(T, H)}, VALUE, "out.*overlap"),
    ("fused_experts", {"out": skewed(T, H)}, VALUE),
    ("fused_experts", {"out": inside("w13", T, H)}, VALUE, "out.*overlap.*w13"),
    ("fused_experts", {"out": inside("w2", T, H)}, VALUE, "out.*overlap.*w2"),
    ("fused_experts", {"out": shifted("hidden_states")}, VALUE, "out.*overlap.*hidden_states"),
    (
        "fused_experts",
        {"shared_output": zeros(T, H), "out": shifted("shared_output")},
        VALUE,
        "out.*overlap.*shared_output",
    ),
    ("fused_experts", {"no_combine": "weighted"}, VALUE, "out"),
    (
        "fused_experts",
        {"no_combine": "weighted", "out": zeros(T, K + 1, H)},
        VALUE,
        "out",
    ),
    # --- workspace
    ("fused_experts", {"workspace": 4096}, TYPE),
    ("fused_experts", {"workspace": zeros(1 << 20, dtype=np.int8)}, TYPE),
    ("fused_experts", {"workspace": zeros(1 << 18, dtype=F32)}, TYPE),
    ("fused_experts", {"workspace": zeros(1 << 10, 1 << 10, dtype=U8)}, VALUE),
    ("fused_experts", {"workspace": zeros(0, dtype=U8)}, VALUE),
    ("fused_experts", {"workspace": zeros(256, dtype=U8)}, VALUE),
    ("fused_experts", {"workspace": columns(1 << 20, dtype=U8)}, VALUE),
    ("fused_experts", {"workspace": read_only(1 << 20, dtype=U8)}, VALUE, "workspace.*read-only"),
    ("fused_experts", {"workspace": repeated(1 << 20, 1, dtype=U8)}, VALUE),
    # --- activation and what belongs to it
    ("fused_experts", {"activation": "relu"}, VALUE),
    ("fused_experts", {"activation": "SiLU"}, VALUE),
    ("fused_experts", {"activation": ""}, VALUE),
    ("fused_experts", {"activation": 0}, TYPE),
    ("fused_experts", {"activation": b"silu"}, TYPE),
    ("fused_experts", {"activation_alpha": 1.0}, VALUE),
    ("fused_experts", {"activation_alpha": 1.0, "activation": "gelu"}, VALUE, "activation_alpha"),
    ("fused_experts", {"activation_alpha": "1", "activation": "situ"}, TYPE, "activation_alpha"),
    (
        "fused_experts",
        {"activation_alpha": float("nan"), "activation": "situ"},
        VALUE,
        "activation_alpha",
    ),
    ("fused_experts", {"activation_alpha": 0.0, "activation": "situ"}, VALUE, "activation_alpha"),
    ("fused_experts", {"activation_limit": 7.0, "activation": "gelu"}, VALUE, "activation_limit"),
    ("fused_experts", {"activation_limit": 7.0, "activation": "relu2"}, VALUE, "activation_limit"),
    ("fused_experts", {"activation_limit": 0.0}, VALUE),
    ("fused_experts", {"activation_limit": -1.0}, VALUE),
    ("fused_experts", {"activation_limit": float("nan")}, VALUE),
    ("fused_experts", {"activation_limit": float("inf")}, VALUE),
    ("fused_experts", {"activation_limit": 1e39}, VALUE),
    ("fused_experts", {"activation_limit": "7"}, TYPE),
    ("fused_experts", {"activation_limit": 7j}, TYPE),
    ("fused_experts", {"clamp": "both"}, VALUE),
    ("fused_experts", {"clamp": 1}, TYPE),
    ("fused_experts", {"gated": "yes"}, TYPE),
    ("fused_experts", {"gated": 1}, TYPE),
    ("fused_experts", {"gated": False}, VALUE, "w2|w13"),
    (
        "fused_experts",
        {"gated": False, "w13": zeros(E, N, H), "activation": "swiglu_oai"},
        VALUE,
        "gated",
    ),
    (
        "fused_experts",
        {"gated": False, "w13": zeros(E, N, H), "w13_order": "up_gate"},
        VALUE,
        "w13_order",
    ),
    ("fused_experts", {"w13_order": "gate"}, VALUE),
    ("fused_experts", {"w13_order": 2}, TYPE),
    # --- the other scalars
    ("fused_experts", {"apply_router_weight_on_input": "no"}, TYPE),
    ("fused_experts", {"apply_router_weight_on_input": 0}, TYPE),
    ("fused_experts", {"routed_scaling_factor": float("nan")}, VALUE),
    ("fused_experts", {"routed_scaling_factor": float("-inf")}, VALUE),
    ("fused_experts", {"routed_scaling_factor": 1e39}, VALUE),
    ("fused_experts", {"routed_scaling_factor": 10**400}, VALUE),
    ("fused_experts", {"routed_scaling_factor": "2"}, TYPE),
    ("fused_experts", {"routed_scaling_factor": True}, TYPE),
    ("fused_experts", {"routed_scaling_factor": zeros(1, dtype=F32)}, TYPE),
    ("fused_experts", {"no_combine": True}, TYPE),
    ("fused_experts", {"no_combine": 1}, TYPE),
    ("fused_experts", {"no_combine": "both"}, VALUE),
    ("fused_experts", {"deterministic": "yes"}, TYPE),
    ("fused_experts", {"batch_invariant": True}, NOT),
    ("fused_experts", {"batch_invariant": "yes"}, TYPE),
    ("fused_experts", {"stream": "default"}, TYPE),
    ("fused_experts", {"stream": 1.5}, TYPE),
    ("fused_experts", {"stream": object()}, TYPE),
    ("fused_experts", {"stream": 2**70}, VALUE),
    ("fused_experts", {"stream": -1}, VALUE),
    ("fused_experts", {"dtype": "float64"}, TYPE),
    ("fused_experts", {"dtype": "float8_e4m3fn"}, NOT),
    ("fused_experts", {"dtype": 16}, TYPE),
    ("fused_experts", {"dtype": "float16"}, TYPE, "dtype|hidden_states"),
    # --- reserved
    ("fused_experts", {"quant": "fp8_block"}, NOT),
    ("fused_experts", {"quant": "no such scheme"}, NOT),
    ("fused_experts", {"w13_scale": zeros(E, dtype=F32)}, NOT),
    ("fused_experts", {"w2_scale": zeros(E, dtype=F32)}, NOT),
    ("fused_experts", {"w13_zero_point": zeros(E, dtype=F32)}, NOT),
    ("fused_experts", {"w2_zero_point": zeros(E, dtype=F32)}, NOT),
    ("fused_experts", {"hidden_states_scale": zeros(T, dtype=F32)}, NOT),
    ("fused_experts", {"intermediate_scale": 1.0}, NOT),
    # --- fused_moe
    ("fused_moe", {"routing": None}, TYPE),
    ("fused_moe", {"routing": 2}, TYPE),
    ("fused_moe", {"routing": {"topk": 2}}, TYPE),
    ("fused_moe", {"routing": Routing(5)}, VALUE, "topk"),
    ("fused_moe", {"router_logits": None}, TYPE),
    ("fused_moe", {"router_logits": zeros(T, E, dtype=np.float64)}, TYPE),
    ("fused_moe", {"router_logits": zeros(T, E, dtype=np.int32)}, TYPE),
    ("fused_moe", {"router_logits": zeros(E, dtype=F32)}, VALUE),
    ("fused_moe", {"router_logits": zeros(T - 1, E, dtype=F32)}, VALUE),
    ("fused_moe", {"router_logits": zeros(T, E + 1, dtype=F32)}, VALUE),
    ("fused_moe", {"router_logits": zeros(T, 1025, dtype=F32), "expert_start": 0}, VALUE, "router"),
    ("fused_moe", {"router_logits": columns(T, E, dtype=F32)}, VALUE),
    ("fused_moe", {"w13": zeros(E, 2 * N, H, dtype=F16)}, TYPE),
    ("fused_moe", {"out": zeros(T, H + 1)}, VALUE),
    ("fused_moe", {"workspace": zeros(256, dtype=U8)}, VALUE),
    ("fused_moe", {"quant": "int8"}, NOT),
    ("fused_moe", {"routed_scaling_factor": float("nan")}, VALUE),
    # --- route
    ("route", {"routing": 8}, TYPE),
    ("route", {"routing": Routing(5)}, VALUE, "topk"),
    ("route", {"router_logits": zeros(T, E, dtype=np.float64)}, TYPE),
    ("route", {"router_logits": zeros(E, dtype=F32)}, VALUE),
    ("route", {"router_logits": zeros(T, 1025, dtype=F32)}, VALUE),
    ("route", {"router_logits": zeros(T, 0, dtype=F32)}, VALUE),
    ("route", {"out_weights": zeros(T, K, dtype=np.int32)}, TYPE),
    ("route", {"out_weights": zeros(T, K + 1, dtype=F32)}, VALUE),
    ("route", {"out_weights": read_only(T, K, dtype=F32)}, VALUE),
    ("route", {"out_ids": zeros(T, K, dtype=F32)}, TYPE),
    ("route", {"out_ids": zeros(T - 1, K, dtype=np.int32)}, VALUE),
    ("route", {"out_ids": of("router_logits")}, TYPE),
    ("route", {"stream": "x"}, TYPE),
    # --- align
    ("align", {"topk_ids": zeros(T, K, dtype=F32)}, TYPE),
    ("align", {"topk_ids": zeros(T, dtype=np.int32)}, VALUE),
    ("align", {"topk_ids": zeros(T, 33, dtype=np.int32)}, VALUE, "topk"),
    ("align", {"num_experts": 0}, VALUE),
    ("align", {"num_experts": 1025}, VALUE),
    ("align", {"num_experts": 2**70}, VALUE),
    ("align", {"num_experts": 4.0}, TYPE),
    ("align", {"num_experts": None}, TYPE),
    ("align", {"expert_start": -5}, VALUE),
    ("align", {"expert_map": zeros(4, dtype=np.int64)}, TYPE),
    ("align", {"out_expert_offsets": zeros(E, dtype=np.int32)}, VALUE),
    ("align", {"out_sorted_token_ids": zeros(T * K, dtype=np.int64)}, TYPE),
    ("align", {"out_sorted_token_ids": zeros(T * K + 1, dtype=np.int32)}, VALUE),
    ("align", {"out_row_of_slot": zeros(T * K, dtype=np.int32)}, VALUE),
    ("align", {"out_row_of_slot": of("topk_ids")}, VALUE, "out_row_of_slot.*overlap"),
    # --- gate_up
    ("gate_up", {"hidden_states": zeros(T, H - 1)}, VALUE, "w13|hidden_states"),
    ("gate_up", {"w13": zeros(E, 2 * N, H, dtype=F32)}, TYPE),
    ("gate_up", {"w13": zeros(E, 2 * N + 1, H)}, VALUE),
    ("gate_up", {"expert_offsets": zeros(E, dtype=np.int32)}, VALUE),
    ("gate_up", {"expert_offsets": zeros(E + 1, dtype=np.int64)}, TYPE),
    ("gate_up", {"sorted_token_ids": zeros(T * K - 1, dtype=np.int32)}, VALUE),
    ("gate_up", {"sorted_token_ids": zeros(T * K, dtype=F32)}, TYPE),
    ("gate_up", {"topk": 0}, VALUE),
    ("gate_up", {"topk": 33}, VALUE),
    ("gate_up", {"topk": "2"}, TYPE),
    ("gate_up", {"topk": None}, TYPE),
    ("gate_up", {"topk_weights": zeros(T, K + 1, dtype=F32)}, VALUE),
    ("gate_up", {"out": zeros(T * K, N + 1)}, VALUE),
    ("gate_up", {"out": zeros(T * K, N, dtype=F32)}, TYPE),
    ("gate_up", {"activation": "tanh"}, VALUE),
    # --- down
    ("down", {"intermediate": zeros(T * K, N, dtype=np.int32)}, TYPE),
    ("down", {"intermediate": zeros(T * K, N + 1)}, VALUE, "w2|intermediate"),
    ("down", {"intermediate": zeros(T * K + 1, N)}, VALUE, "intermediate|sorted_token_ids|topk"),
    ("down", {"w2": zeros(E, H, N, dtype=F16)}, TYPE),
    ("down", {"w2_bias": zeros(E, N)}, VALUE),
    ("down", {"topk_weights": zeros(T, K, dtype=np.int32)}, TYPE),
    ("down", {"expert_offsets": zeros(E + 2, dtype=np.int32)}, VALUE),
    ("down", {"out": zeros(T, H)}, VALUE),
    ("down", {"out": inside("w2", T * K, H)}, VALUE, "out.*overlap.*w2"),
    # --- combine
    ("combine", {"rows": zeros(T * K, H, dtype=np.float64)}, TYPE),
    ("combine", {"rows": zeros(H)}, VALUE),
    ("combine", {"row_of_slot": zeros(T, K, dtype=np.int64)}, TYPE),
    ("combine", {"row_of_slot": zeros(T, 33, dtype=np.int32)}, VALUE, "row_of_slot|topk"),
    ("combine", {"row_of_slot": zeros(T * K, dtype=np.int32)}, VALUE),
    ("combine", {"routed_scaling_factor": float("nan")}, VALUE),
    ("combine", {"shared_output": zeros(T, H + 1)}, VALUE),
    ("combine", {"out": zeros(T + 1, H)}, VALUE),
    ("combine", {"out": inside("rows", T, H)}, VALUE, "out.*overlap.*rows"),
    # --- Experts
    ("Experts", {"w13": None}, TYPE),
    ("Experts", {"w13": zeros(E, 2 * N, H, dtype=np.float64)}, TYPE),
    ("Experts", {"w13": zeros(E, 2 * N + 1, H)}, VALUE),
    ("Experts", {"w2": zeros(E, H, N + 1)}, VALUE),
    ("Experts", {"w2": zeros(E, H, N, dtype=F16)}, TYPE),
    ("Experts", {"w13_bias": zeros(E, N)}, VALUE),
    ("Experts", {"activation": "relu"}, VALUE),
    ("Experts", {"activation_limit": 1.0, "activation": "gelu"}, VALUE, "activation_limit"),
    ("Experts", {"routed_scaling_factor": float("inf")}, VALUE),
    ("Experts", {"max_tokens": -1}, VALUE),
    ("Experts", {"max_tokens": "64"}, TYPE),
    ("Experts", {"max_tokens": 2**70}, VALUE),
    ("Experts", {"max_tokens": 2**40}, VALUE),
    ("Experts", {"w13_scale": zeros(E, dtype=F32)}, NOT),
    ("Experts", {"batch_invariant": True}, NOT),
    ("Experts", {"shared_output": None}, TYPE),
    ("experts", {"hidden_states": zeros(T, H, dtype=F16)}, TYPE, "hidden_states|w13"),
    ("experts", {"hidden_states": zeros(T, H + 1)}, VALUE, "hidden_states|w13"),
    ("experts", {"topk_ids": None}, TYPE),
    ("experts", {"topk_weights": zeros(T, K + 1, dtype=F32)}, VALUE),
    ("experts", {"out": zeros(T, H, dtype=F32)}, TYPE),
    ("experts", {"workspace": zeros(256, dtype=U8)}, VALUE),
    ("experts", {"shared_output": zeros(T, H + 1)}, VALUE),
    ("experts", {"activation": "silu"}, TYPE),
    ("rebind", {"w13": zeros(E, 2 * N, H, dtype=F16)}, TYPE, "w13|w2"),
    ("rebind", {"w13": zeros(E + 1, 2 * N, H)}, VALUE, "w13|w2"),
    ("rebind", {"w2": zeros(E, H, N + 1)}, VALUE),
    ("rebind", {"w13": zeros(2, 2 * N, H), "w2": zeros(2, H, N)}, VALUE),
    ("rebind", {"w13_bias": zeros(E, N)}, VALUE),
    # --- plan and workspace_size
    ("plan", {"num_tokens": -1}, VALUE),
    ("plan", {"num_tokens": 2**70}, VALUE),
    ("plan", {"num_tokens": 2**31}, VALUE),
    ("plan", {"num_tokens": 1.0}, TYPE),
    ("plan", {"hidden_size": 0}, VALUE),
    ("plan", {"hidden_size": 2**40}, VALUE),
    ("plan", {"intermediate_size": -3}, VALUE),
    ("plan", {"num_experts": 1025}, VALUE),
    ("plan", {"topk": 0}, VALUE),
    ("plan", {"topk": 33}, VALUE),
    ("plan", {"dtype": "int8"}, TYPE),
    ("plan", {"dtype": "float32", "device": "cuda"}, NOT, "dtype|float32"),
    ("plan", {"device": "tpu"}, VALUE),
    ("plan", {"num_sms": -1}, VALUE),
    ("plan", {"no_combine": True}, TYPE),
    ("plan", {"gated": 2}, TYPE),
    ("plan", {"vector_bytes": 3}, VALUE),
    ("plan", {"workspace_limit": 1}, VALUE),
    ("plan", {"workspace_limit": "1 GiB"}, TYPE),
    ("workspace_size", {"num_tokens": None}, TYPE),
    ("workspace_size", {"topk": 1000}, VALUE),
]


def row_id(row):
    wrong = "-".join(row[1])
    return f"{row[0]}-{wrong}-{row[2].__name__}"


def test_the_table_is_long_enough():
    assert len(TABLE) >= 120
    names = {name for _, wrong, *_ in TABLE for name in wrong}
    import inspect

    for function in (fusedmoe.fused_experts, fusedmoe.fused_moe):
        missing = set(inspect.signature(function).parameters) - names
        assert not missing, f"{function.__name__} has arguments that no row spoils: {missing}"


@pytest.mark.parametrize("row", TABLE, ids=row_id)
def test_wrong_call(backend, row):
    function, wrong, exception = row[:3]
    match = row[3] if len(row) > 3 else next(iter(wrong))
    kwargs = base(backend, function)
    outs = {name: t for name, t in kwargs.items() if isinstance(t, Guarded)}
    kwargs.update({name: guarded.tensor for name, guarded in outs.items()})
    before = {name: backend.get(guarded.tensor) for name, guarded in outs.items()}
    call = target(backend, function, kwargs)
    for name, value in wrong.items():
        if getattr(value, "cpu_only", False) and not isinstance(backend, NumpyBackend):
            pytest.skip("only NumPy makes such a tensor")
        if callable(value) and not isinstance(value, type):
            takes = value.__code__.co_argcount
            value = value(backend) if takes == 1 else value(backend, kwargs)
        kwargs[name] = value
    inputs = {name: t for name, t in kwargs.items() if hasattr(t, "shape") and hasattr(t, "dtype")}
    inputs = {name: t for name, t in inputs.items() if not isinstance(t, type)}
    contents = {name: backend.get(t) for name, t in inputs.items()}
    with pytest.raises(exception, match=match) as caught:
        call(**kwargs)
    assert type(caught.value) is exception, "the class itself, not one derived from it"
    text = str(caught.value)
    assert "expected" in text or "overflow" in text or "unexpected" in text, text
    for name, guarded in outs.items():
        assert same_bits(backend.get(guarded.tensor), before[name]), f"{name} was written"
        guarded.check(name)
    for name, array in contents.items():
        assert same_bits(backend.get(inputs[name]), array), f"{name} was written"


# -------------------------------------------------------------------------------------------------
# Calls that are wrong as calls
# -------------------------------------------------------------------------------------------------

CALLABLES = ["fused_experts", "fused_moe", "route", "align", "gate_up", "down", "combine", "plan"]


@pytest.mark.parametrize("function", CALLABLES)
def test_unknown_keyword(cpu, function):
    kwargs = {k: getattr(v, "tensor", v) for k, v in base(cpu, function).items()}
    with pytest.raises(TypeError, match="no_such_argument"):
        getattr(fusedmoe, function)(**kwargs, no_such_argument=1)


@pytest.mark.parametrize("function", CALLABLES)
def test_missing_arguments(cpu, function):
    import inspect

    kwargs = {k: getattr(v, "tensor", v) for k, v in base(cpu, function).items()}
    parameters = inspect.signature(getattr(fusedmoe, function)).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    assert required
    for name in required:
        with pytest.raises(TypeError, match=name):
            getattr(fusedmoe, function)(**{k: v for k, v in kwargs.items() if k != name})


@pytest.mark.parametrize("function", CALLABLES)
def test_too_many_positional_arguments(function):
    with pytest.raises(TypeError, match="positional argument"):
        getattr(fusedmoe, function)(*range(60))


def test_the_extension_checks_its_arguments_itself():
    from fusedmoe import _C

    with pytest.raises(TypeError, match="hidden_states"):
        _C.fused_experts()
    with pytest.raises(TypeError, match="fused_experts"):
        _C.fused_experts(*range(60))
    with pytest.raises(TypeError, match="no_such_argument"):
        _C.fused_experts(no_such_argument=1)
    with pytest.raises(TypeError, match="hidden_states.*by position and by keyword"):
        _C.fused_experts(1, hidden_states=2)
    with pytest.raises(TypeError, match="w13"):
        _C.Experts()
    with pytest.raises(TypeError):
        _C.Experts(1, 2, **{"": 3})


def test_experts_run_takes_positions_only(cpu):
    layer = make_layer(1, T, H, N, E, K)
    experts = Experts(layer.w13, layer.w2)
    with pytest.raises(TypeError):
        experts.run(hidden_states=layer.hidden_states)
    with pytest.raises(TypeError):
        experts.run(layer.hidden_states)
    with pytest.raises(TypeError):
        experts.run(*range(9))


def test_experts_has_no_subclasses_and_no_new_attributes():
    layer = make_layer(1, T, H, N, E, K)
    with pytest.raises(TypeError):
        type("Mine", (Experts,), {})
    with pytest.raises(AttributeError):
        Experts(layer.w13, layer.w2).anything = 1


def test_quantize_is_reserved():
    with pytest.raises(NotImplementedError, match="quantize"):
        fusedmoe.quantize(np.zeros((2, 128), BF16), quant="fp8_block")


# -------------------------------------------------------------------------------------------------
# Routing
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, exception",
    [
        ({"topk": 0}, VALUE),
        ({"topk": 33}, VALUE),
        ({"topk": -1}, VALUE),
        ({"topk": "2"}, TYPE),
        ({"topk": 2.0}, TYPE),
        ({"topk": True}, TYPE),
        ({"topk": None}, TYPE),
        ({"method": "best"}, VALUE),
        ({"method": 1}, TYPE),
        ({"renormalize": 1}, TYPE),
        ({"renormalize": False, "method": "topk_softmax"}, VALUE),
        ({"routed_scaling_factor": "1"}, TYPE),
        ({"routed_scaling_factor": float("nan")}, VALUE),
        ({"ids_dtype": "int16"}, TYPE),
        ({"weights_dtype": "float64"}, TYPE),
        ({"correction_bias": np.zeros(4)}, VALUE),
        ({"correction_bias": None, "method": "sigmoid_bias"}, VALUE),
        ({"num_groups": 8}, VALUE),
        ({"num_groups": 2.0, "method": "softmax_grouped", "topk_groups": 1}, TYPE),
        ({"num_groups": 33, "method": "softmax_grouped", "topk_groups": 1}, VALUE),
        ({"topk_groups": 4}, VALUE),
        ({"topk_groups": 4, "num_groups": 2, "method": "softmax_grouped"}, VALUE),
        ({"topk": 3, "num_groups": 2, "method": "softmax_quota"}, VALUE),
        ({"topk": 2, "method": "llama4"}, VALUE),
        ({"topk": 3, "method": "sparsemixer"}, VALUE),
        ({"num_fused_shared_experts": -1}, VALUE),
        ({"num_fused_shared_experts": 31}, VALUE),
        ({"num_zero_experts": -1}, VALUE),
        ({"shared_weight": 1.0}, VALUE),
        ({"shared_weight": "all", "num_fused_shared_experts": 1}, VALUE),
        ({"shared_weight": float("inf"), "num_fused_shared_experts": 1}, VALUE),
        ({"shared_weight": "sink", "num_fused_shared_experts": 1}, VALUE),
        ({"tid2eid": np.zeros(4)}, VALUE),
        ({"tid2eid": None, "method": "forced"}, VALUE),
        ({"token_ids": np.zeros(4)}, VALUE),
        ({"softcap": 0.0}, VALUE),
        ({"softcap": "30"}, TYPE),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else v.__name__,
)
def test_wrong_routing(wrong, exception):
    with pytest.raises(exception, match=next(iter(wrong))):
        Routing(**{"topk": 2, **wrong})


def test_routing_is_frozen():
    with pytest.raises(AttributeError):
        Routing(2).topk = 3


# -------------------------------------------------------------------------------------------------
# Size of the workspace, exactly
# -------------------------------------------------------------------------------------------------


def test_workspace_one_byte_too_small(backend):
    layer = make_layer(1, T, H, N, E, K)
    tensors = {name: backend.put(array) for name, array in layer.tensors().items()}
    size = workspace_bytes(backend, layer)
    out = Guarded(backend, (T, H), BF16, 0x5A)
    before = backend.get(out.tensor)
    small = Guarded(backend, (size - 1,), U8)
    with pytest.raises(ValueError, match=f"workspace.*{size}.*{size - 1}"):
        fusedmoe.fused_experts(**tensors, out=out.tensor, workspace=small.tensor)
    assert same_bits(backend.get(out.tensor), before)
    assert (backend.get(small.tensor) == 0xFF).all()
    enough = Guarded(backend, (size,), U8)
    fusedmoe.fused_experts(**tensors, out=out.tensor, workspace=enough.tensor)
    enough.check("workspace")


@pytest.mark.parametrize("offset", [1, 16, 255])
def test_workspace_off_alignment(backend, offset):
    """What an address that is no multiple of 256 loses has to be there in addition."""
    layer = make_layer(1, T, H, N, E, K)
    tensors = {name: backend.put(array) for name, array in layer.tensors().items()}
    size = workspace_bytes(backend, layer)
    short = Guarded(backend, (size + 255 - offset,), U8, offset=offset)
    with pytest.raises(ValueError, match="workspace.*multiple of 256"):
        fusedmoe.fused_experts(**tensors, workspace=short.tensor)
    enough = Guarded(backend, (size + 256 - offset,), U8, offset=offset)
    fusedmoe.fused_experts(**tensors, workspace=enough.tensor)
    enough.check("workspace")


def test_workspace_size_serves_any_numpy_array():
    """NumPy aligns to 16 bytes or so: on the CPU the size leaves room for the rest."""
    layer = make_layer(1, T, H, N, E, K)
    size = fusedmoe.workspace_size(T, H, N, E, K, dtype="bfloat16", device="cpu")
    for offset in (0, 1, 16, 64, 255):
        workspace = np.zeros(size + 255, np.uint8)[offset : offset + size]
        fusedmoe.fused_experts(**layer.tensors(), workspace=workspace)


def test_workspace_over_an_input(backend):
    layer = make_layer(1, T, H, N, E, K)
    size = fusedmoe.workspace_size(T, H, N, E, K, dtype="bfloat16", device=backend.name)
    tensors = {name: backend.put(array) for name, array in layer.tensors().items()}
    room = Guarded(backend, (size + (1 << 16),), U8)
    array = layer.hidden_states
    inside = room.tensor[size - 256 : size - 256 + array.nbytes]
    tensors["hidden_states"] = backend.view(inside, BF16).reshape(T, H)
    with pytest.raises(ValueError, match="workspace.*overlap.*hidden_states"):
        fusedmoe.fused_experts(**tensors, workspace=room.tensor[:size])


# -------------------------------------------------------------------------------------------------
# Ids out of range, on request
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["", "3000"], ids=["one pass", "chunks"])
def test_check_mode_raises_on_ids_out_of_range(cpu, limit):
    """FUSEDMOE_CHECK=1 makes the CPU backend refuse what it otherwise drops. Nothing is written,
    also where the bad id is in a later chunk of tokens: the chunks before it once were."""
    import os
    import subprocess
    import sys

    code = """
import numpy as np, ml_dtypes, fusedmoe
x = np.ones((200, 8), ml_dtypes.bfloat16)
w13, w2 = np.ones((2, 4, 8), x.dtype), np.ones((2, 8, 2), x.dtype)
weights, ids = np.ones((200, 1), np.float32), np.zeros((200, 1), np.int32)
fusedmoe.fused_experts(x, w13, w2, weights, ids)
out = np.full_like(x, 7)
ids[190] = 2
try:
    fusedmoe.fused_experts(x, w13, w2, weights, ids, out=out)
except ValueError as error:
    assert "topk_ids" in str(error) and "got 2 at [190, 0]" in str(error), error
    assert (out == 7).all()
    print("refused")
"""
    environment = {**os.environ, "FUSEDMOE_CHECK": "1"}
    if limit:
        environment["FUSEDMOE_WORKSPACE_LIMIT"] = limit
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n", done.stderr


# -------------------------------------------------------------------------------------------------
# Calls like the last one
# -------------------------------------------------------------------------------------------------


def _memo_arrays(num_tokens=3, pad=0, dtype=np.float32):
    rng = np.random.default_rng(num_tokens)
    x = rng.standard_normal((num_tokens, 16 + pad)).astype(dtype)[:, :16]
    weights = np.full((num_tokens, 2), 0.5, np.float32)
    ids = np.tile(np.array([[0, 2]], np.int32), (num_tokens, 1))
    out = np.empty((num_tokens, 16), dtype)
    nbytes = fusedmoe.workspace_size(num_tokens, 16, 8, 3, 2, dtype="float32", device="cpu")
    memory = np.empty(nbytes + 512, np.uint8)
    start = -memory.ctypes.data % 256
    return [x, weights, ids, out, memory[start : start + nbytes]]


def _misaligned(array):
    memory = np.empty(array.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16 + array.itemsize
    moved = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


def _read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


# After some calls with (x, weights, ids, out, workspace), one with what these make of it: right,
# or wrong.
RIGHT_AFTER = {
    "the same": lambda a: a,
    "other arrays": lambda a: _memo_arrays(),
    "more tokens": lambda a: _memo_arrays(5),
    "other strides": lambda a: _memo_arrays(pad=4),
    "misaligned": lambda a: [_misaligned(a[0]), *a[1:3], _misaligned(a[3]), a[4]],
    "no out": lambda a: [*a[:3], None, a[4]],
    "no workspace": lambda a: [*a[:4], None],
    "in place": lambda a: [a[0], *a[1:3], a[0], a[4]],
}
WRONG_AFTER = {
    "x of another dtype": (
        lambda a: [a[0].astype(np.float64), *a[1:]],
        (TypeError, "hidden_states"),
    ),
    "ids of another dtype": (
        lambda a: [*a[:2], a[2].astype(np.int16), *a[3:]],
        (TypeError, "topk_ids"),
    ),
    "x too wide": (
        lambda a: [np.zeros((3, 17), np.float32), *a[1:]],
        (ValueError, "w13|hidden_states"),
    ),
    "weights of fewer tokens": (lambda a: [a[0], a[1][:2], *a[2:]], (ValueError, "topk_weights")),
    "read-only out": (lambda a: [*a[:3], _read_only(a[3]), a[4]], (ValueError, "out")),
    "out over the ids": (
        lambda a: [a[0], a[1], a[3].view(np.int32)[:, :2], a[3], a[4]],
        (ValueError, "out: .*overlaps topk_ids"),
    ),
    "workspace over x": (
        lambda a: [a[4][:192].view(np.float32).reshape(3, 16), *a[1:]],
        (ValueError, "workspace: .*overlaps hidden_states"),
    ),
    "small workspace": (lambda a: [*a[:4], a[4][:256]], (ValueError, "workspace")),
}


def _assert_layer(got, x, w13, w2, weights, ids, **options):
    want, error = reference.fused_experts_error(x, w13, w2, weights, ids, **options)
    report = reference.compare(np.asarray(got), want, error)
    assert report.ok, report.message


def _layer_after_some_calls(how):
    """w13, w2 and a function of one call, after three with the same arrays."""
    rng = np.random.default_rng(0)
    w13, w2 = (rng.standard_normal(s).astype(np.float32) for s in ((3, 16, 16), (3, 16, 8)))
    experts = Experts(w13, w2)

    def run(a):
        if how == "Experts":
            return experts.run(*a)
        return fusedmoe.fused_experts(a[0], w13, w2, *a[1:3], out=a[3], workspace=a[4])

    first = _memo_arrays()
    for _ in range(3):
        run(first)
    return w13, w2, run


@pytest.mark.parametrize("what", RIGHT_AFTER)
@pytest.mark.parametrize("how", ["Experts", "fused_experts"])
def test_a_call_after_others_is_right(how, what):
    """Checks of shapes are left out where only addresses are new."""
    w13, w2, run = _layer_after_some_calls(how)
    for arrays in (RIGHT_AFTER[what](_memo_arrays()), _memo_arrays()):
        x = arrays[0].copy()  # out may be x
        _assert_layer(run(arrays), x, w13, w2, *arrays[1:3])


@pytest.mark.parametrize("what", WRONG_AFTER)
@pytest.mark.parametrize("how", ["Experts", "fused_experts"])
def test_a_call_after_others_is_checked(how, what):
    _, _, run = _layer_after_some_calls(how)
    change, (error, text) = WRONG_AFTER[what]
    arrays = change(_memo_arrays())
    for _ in range(2):  # what was refused is not what the next call is compared with
        with pytest.raises(error, match=text):
            run(arrays)


def test_new_weights_and_options_are_checked():
    rng = np.random.default_rng(0)
    w13, w2 = (rng.standard_normal(s).astype(np.float32) for s in ((3, 16, 16), (3, 16, 8)))
    x, weights, ids, out, workspace = _memo_arrays()
    experts = Experts(w13, w2)
    experts.run(x, weights, ids, out, workspace)
    wide = np.zeros((3, 16, 12), np.float32)
    wide[:, :, :8] = 2 * w2
    experts.rebind(w13, wide[:, :, :8])
    got = experts.run(x, weights, ids, out, workspace)
    _assert_layer(got, x, w13, 2 * w2, weights, ids)
    call = (x, w13, w2, weights, ids)
    fusedmoe.fused_experts(*call, out=out, workspace=workspace)
    for options in (
        {"activation": "gelu"},
        {"routed_scaling_factor": 2.0},
        {"w13_order": "up_gate"},
    ):
        got = fusedmoe.fused_experts(*call, out=out, workspace=workspace, **options)
        _assert_layer(got, *call, **options)
    with pytest.raises(ValueError, match="shared_output"):
        fusedmoe.fused_experts(*call, out=out, workspace=workspace, shared_output=out[:2])
    with pytest.raises(ValueError, match="w13"):
        fusedmoe.fused_experts(x, w13[:, :, :15], w2, weights, ids, out=out, workspace=workspace)


# -------------------------------------------------------------------------------------------------
# No GPU
# -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(no_gpu() is None, reason="there is a GPU here")
def test_asking_for_a_gpu_that_is_absent():
    with pytest.raises(RuntimeError, match=r"(?i)gpu|cuda|driver"):
        fusedmoe.load(0)
    with pytest.raises((RuntimeError, ValueError)):
        fusedmoe.load(-1)
    assert fusedmoe.info()["devices"] == []
