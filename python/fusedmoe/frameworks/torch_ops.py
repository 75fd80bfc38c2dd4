"""torch.ops.fusedmoe: what torch.compile and torch.export see of a call.

    fused_experts(hidden_states, w13, w2, topk_weights, topk_ids, ...) -> out
    fused_moe(hidden_states, w13, w2, router_logits, topk, ...) -> out
    route(router_logits, topk, ...) -> (topk_weights, topk_ids)
    align(topk_ids, num_experts, ...) -> (expert_offsets, sorted_token_ids, row_of_slot)

each also as overload `.out`, which writes the tensors it is given and returns nothing. The
arguments are those of the functions of the same name; the fields of Routing are arguments. An eager
call does not come here: the dispatcher's conversions cost more than the call itself.

An op is four things: schema, kernel (the C function, or a few lines over it), the shapes of its
results for a tracer, and an autograd kernel whose backward raises, because nothing here has a
gradient.

`fused_experts`, `fused_moe`, `route` and `align` below take by position what the extension's
functions of the same names take. ops.py calls them instead while torch is tracing.
"""

from __future__ import annotations

from functools import lru_cache, partial

try:
    import torch
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _after_autograd_keyset,
        _AutoDispatchBelowAutograd,
    )
    from torch._C import _any_requires_grad as any_requires_grad
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.library import Library, register_fake
except ImportError as error:
    from .torch import TESTED

    raise ImportError(f"torch.ops.fusedmoe: expected {TESTED}, got: {error}") from error

from .. import _C
from ..routing import Routing

# -------------------------------------------------------------------------------------------------
# Schemas, in the order of the extension's arguments: kernels hand them on by position
# -------------------------------------------------------------------------------------------------

_OPTIONS = """str? quant=None, Tensor? w13_scale=None, Tensor? w2_scale=None,
    Tensor? w13_zero_point=None, Tensor? w2_zero_point=None, Tensor? hidden_states_scale=None,
    Tensor? intermediate_scale=None, Tensor? w13_bias=None, Tensor? w2_bias=None,
    str? activation="silu", float? activation_alpha=None, float? activation_limit=None,
    str? clamp="after", bool? gated=True, str? w13_order="gate_up",
    bool? apply_router_weight_on_input=False, float? routed_scaling_factor=None,
    Tensor? shared_output=None, str? no_combine=None, Tensor? expert_map=None,
    SymInt? expert_start=None, bool? deterministic=True, bool? batch_invariant=False"""

# The fields of Routing, with its knobs in their order. No type of a schema is "a number or a
# string", so shared_weight is two arguments.
_ROUTING = """int topk, str method="softmax_topk", float routed_scaling_factor=1.0,
    bool? renormalize=None, int? num_groups=None, int? topk_groups=None,
    int num_fused_shared_experts=0, float? shared_weight=None, str? shared_weight_from=None,
    int num_zero_experts=0, float? softcap=None, str weights_dtype="float32",
    int? first_shared_id=None,
    Tensor? correction_bias=None, Tensor? expert_scale=None, Tensor? num_token_non_padded=None,
    Tensor? expert_map=None, Tensor? replica_map=None, Tensor? tid2eid=None,
    Tensor? token_ids=None"""

# Two names are the layer's and the router's.
_ROUTING_IN_LAYER = _ROUTING.replace("routed_scaling", "routing_scaling").replace(
    "expert_map", "routing_expert_map"
)

_LAYER_OUT = "Tensor(a!) out, Tensor(b!)? workspace=None, str? dtype=None"
_SCHEMAS = {
    "fused_experts": (
        f"Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, "
        f"{_OPTIONS}",
        "str? dtype=None",
        "Tensor",
        _LAYER_OUT,
    ),
    "fused_moe": (
        f"Tensor hidden_states, Tensor w13, Tensor w2, Tensor router_logits, {_ROUTING_IN_LAYER}, "
        f"{_OPTIONS}",
        "str? dtype=None",
        "Tensor",
        _LAYER_OUT,
    ),
    "route": (
        f"Tensor router_logits, {_ROUTING}",
        'str ids_dtype="int32"',
        "(Tensor, Tensor)",
        "Tensor(a!) out_weights, Tensor(b!) out_ids",
    ),
    "align": (
        "Tensor topk_ids, SymInt num_experts, Tensor? expert_map=None, SymInt? expert_start=None",
        "",
        "(Tensor, Tensor, Tensor)",
        "Tensor(a!) out_expert_offsets, Tensor(b!) out_sorted_token_ids, "
        "Tensor(c!) out_row_of_slot, Tensor(d!)? workspace=None",
    ),
}
_NUM_ROUTING = len(_ROUTING.split(","))
_NO_COMBINE = [option.split("=")[0].split()[-1] for option in _OPTIONS.split(",")].index(
    "no_combine"
)

# -------------------------------------------------------------------------------------------------
# Kernels. The dispatcher leaves out arguments at the end that have their defaults.
# -------------------------------------------------------------------------------------------------


def _fused_moe(hidden_states, w13, w2, router_logits, *arguments, **keywords):
    routing, options = arguments[:_NUM_ROUTING], arguments[_NUM_ROUTING:]
    return _C.fused_moe(
        hidden_states, w13, w2, router_logits, *_router(*routing), *options, **keywords
    )


def _route(router_logits, *routing, ids_dtype="int32", **outs):
    routing = _router(*routing, ids_dtype=ids_dtype)
    return _C.route(router_logits, *routing, ids_dtype, **outs)


def _router(
    topk,
    method="softmax_topk",
    scale=1.0,
    renormalize=None,
    num_groups=None,
    topk_groups=None,
    num_shared=0,
    shared_weight=None,
    shared_weight_from=None,
    num_zero=0,
    softcap=None,
    weights_dtype="float32",
    first_shared_id=None,
    *tensors,
    ids_dtype="int32",
):
    """(topk, method, scale, knobs) as the extension takes them, checked as Routing checks them."""
    tensors += (None,) * (_NUM_ROUTING - 13 - len(tensors))
    method, knobs = _checked(
        topk,
        method,
        scale,
        renormalize,
        num_groups,
        topk_groups,
        num_shared,
        shared_weight if shared_weight_from is None else shared_weight_from,
        num_zero,
        softcap,
        weights_dtype,
        first_shared_id,
        ids_dtype,
        *(tensor is not None for tensor in tensors),
    )
    if knobs is not None:
        knobs = knobs[: -len(tensors)] + tensors
    return topk, method, scale, knobs


@lru_cache(maxsize=256, typed=True)
def _checked(
    topk,
    method,
    scale,
    renormalize,
    num_groups,
    topk_groups,
    num_shared,
    shared_weight,
    num_zero,
    softcap,
    weights_dtype,
    first_shared_id,
    ids_dtype,
    *given,
):
    """Routing is slow to make and looks at no tensor, so one is made for each set of numbers."""
    names = (
        "correction_bias",
        "expert_scale",
        "num_token_non_padded",
        "expert_map",
        "replica_map",
        "tid2eid",
        "token_ids",
    )
    routing = Routing(
        topk,
        method,
        renormalize=renormalize,
        routed_scaling_factor=scale,
        num_groups=num_groups,
        topk_groups=topk_groups,
        num_fused_shared_experts=num_shared,
        shared_weight=shared_weight,
        num_zero_experts=num_zero,
        softcap=softcap,
        weights_dtype=weights_dtype,
        first_shared_id=first_shared_id,
        ids_dtype=ids_dtype,
        **{name: "given" for name, is_given in zip(names, given, strict=True) if is_given},
    )
    return routing.kernel_method, routing.knobs


# -------------------------------------------------------------------------------------------------
# Shapes for a tracer. What is wrong with the arguments is said by the kernel when it runs, in the
# words of an eager call, so nothing is checked here.
# -------------------------------------------------------------------------------------------------


def _like_layer(hidden_states, num_slots, options):
    shape = hidden_states.shape
    if len(options) > _NO_COMBINE and options[_NO_COMBINE] and len(shape) == 2:
        shape = shape[0], num_slots, shape[1]
    return hidden_states.new_empty(shape)


def _last(tensor):
    return tensor.shape[-1] if tensor.dim() else 1


def _fused_experts_fake(hidden_states, w13, w2, topk_weights, topk_ids, *options, dtype=None):
    return _like_layer(hidden_states, _last(topk_ids), options)


def _fused_moe_fake(hidden_states, w13, w2, router_logits, topk, *arguments, dtype=None):
    num_shared = arguments[5] if len(arguments) > 5 else 0
    return _like_layer(hidden_states, topk + num_shared, arguments[_NUM_ROUTING - 1 :])


def _route_fake(router_logits, topk, *fields, ids_dtype="int32"):
    num_shared = fields[5] if len(fields) > 5 else 0
    weights_dtype = fields[10] if len(fields) > 10 else "float32"
    shape = *router_logits.shape[:-1], topk + num_shared
    return (
        router_logits.new_empty(shape, dtype=_dtype(weights_dtype, torch.float32)),
        router_logits.new_empty(shape, dtype=_dtype(ids_dtype, torch.int32)),
    )


def _dtype(name, otherwise):
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else otherwise


def _align_fake(topk_ids, num_experts, expert_map=None, expert_start=None):
    new = partial(topk_ids.new_empty, dtype=torch.int32)
    return new(num_experts + 1), new(topk_ids.numel()), new(topk_ids.shape)


# -------------------------------------------------------------------------------------------------
# Autograd
# -------------------------------------------------------------------------------------------------


class _NoGradient(torch.autograd.Function):
    """A call whose backward raises when it is run. Not when it is traced: compiled code that needs
    only the forward of tensors that require a gradient is fine."""

    @staticmethod
    def forward(ctx, name, call, *arguments):
        ctx.name = name
        ctx.inputs = [
            (a.shape, a.dtype) if isinstance(a, torch.Tensor) else None for a in arguments
        ]
        return call(*arguments)

    @staticmethod
    def backward(ctx, *gradients):
        asked = zip(ctx.inputs, ctx.needs_input_grad[2:], strict=True)
        no_gradient = torch.ops.fusedmoe.no_gradient.default
        return (
            None,
            None,
            *(no_gradient(gradients[0], ctx.name, *x) if needed else None for x, needed in asked),
        )


def _no_gradient(gradient, name, size, dtype):
    raise NotImplementedError(
        f"{name}: expected a call under torch.no_grad(), or with tensors that do not require a "
        "gradient, got a backward pass: the layer has none"
    )


# What is left of the dispatch keys of a call that only the kernel has still to see.
_PLAIN = {
    (
        DispatchKeySet(getattr(DispatchKey, key)) | DispatchKeySet(getattr(DispatchKey, autograd))
    ).raw_repr()
    for key, autograd in (("CPU", "AutogradCPU"), ("CUDA", "AutogradCUDA"))
}


def _autograd_kernel(name, op, kernel):
    def below(keyset, arguments, keywords):
        if keyset.raw_repr() in _PLAIN:  # where redispatch leads, 7 us later
            return kernel(*arguments, **keywords)
        with _AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _after_autograd_keyset, *arguments, **keywords)

    def functional(keyset, *arguments, **keywords):
        if torch.is_grad_enabled() and any_requires_grad(*arguments):
            return _NoGradient.apply(name, lambda *a: below(keyset, a, keywords), *arguments)
        return below(keyset, arguments, keywords)

    def out(keyset, *arguments, **keywords):
        if torch.is_grad_enabled() and any_requires_grad(*arguments, **keywords):
            names = [a.name for a in op._schema.arguments]
            given = {**dict(zip(names, arguments, strict=False)), **keywords}
            which = [k for k, v in given.items() if isinstance(v, torch.Tensor) and v.requires_grad]
            raise RuntimeError(
                f"{name}: expected a call with out= under torch.no_grad(), or with tensors that do "
                f"not require a gradient, got {', '.join(which)}: the layer has no backward"
            )
        return below(keyset, arguments, keywords)

    return out if op._overloadname == "out" else functional


# -------------------------------------------------------------------------------------------------
# Registration
# -------------------------------------------------------------------------------------------------

_library = Library("fusedmoe", "FRAGMENT")
# The kernels take any strides but need the last one to be 1: a compiler keeps those of eager code.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)


def _define(name, schema, kernel, fake):
    _library.define(f"{name}{schema}", tags=_TAGS)
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.fusedmoe, packet), overload or "default")
    # Tensors of whatever device: the extension has the words for those that it does not take.
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, _autograd_kernel(packet, op, kernel), "Autograd", with_keyset=True)

    def shapes(prototype, *arguments, **keywords):
        if prototype.is_meta or isinstance(prototype, FakeTensor):
            return fake(prototype, *arguments, **keywords)
        # Another argument is on "meta", which came here: an error, said as ever.
        return kernel(prototype, *arguments, **keywords)

    register_fake(f"fusedmoe::{name}", shapes, lib=_library)


def _returns_nothing(function):
    def kernel(*arguments, **keywords):
        function(*arguments, **keywords)

    return kernel


def _define_all():
    for name, kernel, fake in (
        ("fused_experts", _C.fused_experts, _fused_experts_fake),
        ("fused_moe", _fused_moe, _fused_moe_fake),
        ("route", _route, _route_fake),
        ("align", _C.align, _align_fake),
    ):
        arguments, keywords, returns, outs = _SCHEMAS[name]
        star = f", *, {keywords}" if keywords else ""
        _define(name, f"({arguments}{star}) -> {returns}", kernel, fake)
        _define(
            f"{name}.out",
            f"({arguments}, *, {outs}) -> ()",
            _returns_nothing(kernel),
            lambda *arguments, **keywords: None,
        )
    _library.define(
        "no_gradient(Tensor gradient, str name, SymInt[] size, ScalarType dtype) -> Tensor",
        tags=_TAGS,
    )
    _library.impl("no_gradient", _no_gradient, "CompositeExplicitAutograd")
    register_fake(
        "fusedmoe::no_gradient",
        lambda gradient, name, size, dtype: gradient.new_empty(size, dtype=dtype),
        lib=_library,
    )


_define_all()

# -------------------------------------------------------------------------------------------------
# The extension's functions, traced
# -------------------------------------------------------------------------------------------------


def fused_experts(hidden_states, w13, w2, topk_weights, topk_ids, *options):
    if not isinstance(hidden_states, torch.Tensor):  # of another thread than the one that traces
        return _C.fused_experts(hidden_states, w13, w2, topk_weights, topk_ids, *options)
    tensors = hidden_states, w13, w2, topk_weights, topk_ids
    return _layer(torch.ops.fusedmoe.fused_experts, tensors, _last(topk_ids), options)


def fused_moe(hidden_states, w13, w2, router_logits, topk, method, scale, knobs, *options):
    if not isinstance(hidden_states, torch.Tensor):
        routing = topk, method, scale, knobs
        return _C.fused_moe(hidden_states, w13, w2, router_logits, *routing, *options)
    fields = _fields(topk, method, scale, knobs)
    arguments = hidden_states, w13, w2, router_logits, *fields
    return _layer(torch.ops.fusedmoe.fused_moe, arguments, topk + fields[6], options)


def _layer(op, arguments, num_slots, options):
    *_, out, workspace, stream, dtype = options
    _no_stream(stream)
    no_combine = options[_NO_COMBINE]
    no_combine = None if no_combine is False else no_combine
    options = *options[:_NO_COMBINE], no_combine, *options[_NO_COMBINE + 1 : -4]
    keywords = {} if dtype is None else {"dtype": dtype}
    if out is None and workspace is None:
        return op.default(*arguments, *options, **keywords)
    if out is None:
        out = _like_layer(arguments[0], num_slots, options)
    op.out(*arguments, *options, out=out, workspace=workspace, **keywords)
    return out


def route(
    router_logits,
    topk,
    method,
    scale,
    knobs,
    ids_dtype,
    out_weights=None,
    out_ids=None,
    out_packed=None,
    out_counts=None,
    stream=None,
):
    if not isinstance(router_logits, torch.Tensor):
        outs = out_weights, out_ids, out_packed, out_counts, stream
        return _C.route(router_logits, topk, method, scale, knobs, ids_dtype, *outs)
    _no_stream(stream)
    for name, out in ("out_packed", out_packed), ("out_counts", out_counts):
        if out is not None:
            raise NotImplementedError(f"{name}: expected None in a traced call, got a tensor")
    op, fields = torch.ops.fusedmoe.route, _fields(topk, method, scale, knobs)
    if out_weights is None and out_ids is None:
        return op.default(router_logits, *fields, ids_dtype=ids_dtype)
    weights, ids = _route_fake(router_logits, *fields, ids_dtype=ids_dtype)
    out_weights = weights if out_weights is None else out_weights
    out_ids = ids if out_ids is None else out_ids
    op.out(router_logits, *fields, out_weights=out_weights, out_ids=out_ids)
    return out_weights, out_ids


# Those of a Routing that has only topk, method and scale.
_NO_KNOBS = (None, None, None, 0, None, 0, None, "float32", *(None,) * 8)


def _fields(topk, method, scale, knobs):
    """The arguments of _ROUTING."""
    if knobs is None:
        knobs = _NO_KNOBS
    renormalize, num_groups, topk_groups, num_shared, shared_weight, *others = knobs
    is_name = isinstance(shared_weight, str)
    shared = (None, shared_weight) if is_name else (shared_weight, None)
    return topk, method, scale, renormalize, num_groups, topk_groups, num_shared, *shared, *others


def align(
    topk_ids,
    num_experts,
    expert_map=None,
    expert_start=None,
    out_expert_offsets=None,
    out_sorted_token_ids=None,
    out_row_of_slot=None,
    workspace=None,
    stream=None,
):
    given = out_expert_offsets, out_sorted_token_ids, out_row_of_slot
    if not isinstance(topk_ids, torch.Tensor):
        return _C.align(topk_ids, num_experts, expert_map, expert_start, *given, workspace, stream)
    _no_stream(stream)
    op, arguments = torch.ops.fusedmoe.align, (topk_ids, num_experts, expert_map, expert_start)
    if workspace is None and all(g is None for g in given):
        return op.default(*arguments)
    made = _align_fake(*arguments)
    outs = tuple(m if g is None else g for g, m in zip(given, made, strict=True))
    op.out(
        *arguments,
        out_expert_offsets=outs[0],
        out_sorted_token_ids=outs[1],
        out_row_of_slot=outs[2],
        workspace=workspace,
    )
    return outs


def _no_stream(stream):
    if stream is not None:
        raise NotImplementedError(
            "stream: expected None in code that torch compiles (its kernels are queued on torch's "
            f"current stream), got {type(stream).__name__}"
        )
