"""transformers: the experts of its models through `experts_implementation="fusedmoe"`.

    from fusedmoe.frameworks import transformers as door
    door.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="fusedmoe")

The weights stay the model's own Parameters, in their places; routers, shared experts and all else
stay transformers'. Which model classes it takes: docs/transformers.md.
"""

from __future__ import annotations

import itertools

from .versions import installed

TESTED = "transformers 5.10 to 5.24"
OLDEST = (5, 10)  # older ones take no names of experts implementations but their own
NAME = "fusedmoe"

# Attributes, of an experts module or of its config, that hold the numbers of its activation.
_ALPHAS = ("alpha", "swiglu_alpha", "mlp_gate_softcap")
_LIMITS = ("limit", "swiglu_limit", "mlp_up_softcap")
# (activation, clamp, takes an alpha, takes a limit), the plain ones first.
_FORMULAS = (
    ("silu", "after", False, False),
    ("gelu", "after", False, False),
    ("gelu_tanh", "after", False, False),
    ("relu2", "after", False, False),
    ("silu", "before", False, True),
    ("silu", "after", False, True),
    ("swiglu_oai", "after", True, True),
    ("situ", "after", True, False),
    ("situ", "after", True, True),
)


def status():
    """(version found or None, why it is not usable or None). Imports nothing."""
    version, why = installed("transformers", OLDEST)
    return version, why or installed("torch")[1]


def register(name=NAME):
    """Makes `experts_implementation=name` known to transformers, in this process.

    Raises:
        ImportError: transformers is not there, or has no experts interface as this needs it.
    """
    why = status()[1]
    if why is not None:
        raise ImportError(f"fusedmoe for transformers: {why}")
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"fusedmoe for transformers: tested with {TESTED}, and transformers {status()[0]} has "
            f"no transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS.register"
        ) from error


def experts_forward(module, hidden_states, top_k_index, top_k_weights):
    """The experts of one layer, as transformers calls them.

    Args:
        module: an experts module of transformers (decorated with use_experts_implementation).
        hidden_states: [num_tokens, hidden_size].
        top_k_index: [num_tokens, topk]. With expert parallelism, ids from num_experts on are other
            ranks' and contribute nothing.
        top_k_weights: [num_tokens, topk].

    Returns:
        [num_tokens, hidden_size], dtype of hidden_states. Asking for its gradient raises.

    Raises:
        NotImplementedError: a gate that is none of the activations here. ValueError: transposed
            weights that `convert_experts` has not been given. Else as `fused_experts`.
    """
    import torch

    from ..ops import fused_experts

    try:
        options = module._fusedmoe_options
    except AttributeError:
        options = module._fusedmoe_options = experts_options(module)
    gated = options["gated"]
    w13 = module.gate_up_proj if gated else module.up_proj
    w2 = module.down_proj
    biases = {}
    if module.has_bias:
        w13_bias = module.gate_up_proj_bias if gated else module.up_proj_bias
        biases = {"w13_bias": w13_bias, "w2_bias": module.down_proj_bias}
    if module.is_transposed:
        w13, w2 = _rows(module, w13), _rows(module, w2)
    norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    out = fused_experts(
        hidden_states,
        w13,
        w2,
        top_k_weights,
        top_k_index,
        no_combine="unweighted" if norm else False,
        **biases,
        **options,
    )
    if norm is not None:  # between down and the weights, where the layer has no place for it
        out = (norm(out) * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # there the op says it
        asking = (hidden_states, top_k_weights, w13, w2)
        if any(tensor.requires_grad for tensor in asking):
            out = _without_gradient(out, *asking)
    return out


def convert_experts(model):
    """Once, after loading: gives transposed expert weights ([E, H, 2I] and [E, I, H], as gpt-oss
    has them) the order in memory that the kernels read. Shapes, values and names stay, so that
    everything else, state_dict included, sees what it saw before. One tensor is copied at a time.
    Gates are looked at, too, which torch.compile(fullgraph=True) could not do at a first call.

    Args:
        model: a model of transformers, or any module that has such experts inside.

    Returns:
        How many tensors were converted; those that are in order already are left alone.

    Raises:
        ValueError: no experts in it go through the experts interface, so that transformers would
            take `experts_implementation="fusedmoe"` and run its own. NotImplementedError: a gate
            that is none of the activations here.
    """
    experts = [module for module in model.modules() if hasattr(module, "is_transposed")]
    if not experts:
        raise ValueError(
            f"model: expected experts that go through transformers' experts interface, got none in "
            f"{type(model).__name__}"
        )
    count = 0
    for module in experts:
        module._fusedmoe_options = experts_options(module)
        if not module.is_transposed:
            continue
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            weight = getattr(module, name, None)
            if weight is not None and weight.shape[1] > 1 and weight.stride(1) != 1:
                weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
                count += 1
    return count


def experts_options(module):
    """The keyword arguments of `fused_experts` for the gate of an experts module: activation,
    activation_alpha, activation_limit, clamp, gated, w13_order.

    The module's own gate is run once on a few hundred numbers and has to be one of the activations
    here, everywhere: a gate of some new model is refused, never guessed.

    Raises:
        NotImplementedError: it is none of them.
    """
    import numpy as np
    import torch

    from .. import reference

    gated = getattr(module, "has_gate", True)
    alphas, limits = _numbers(module, _ALPHAS), _numbers(module, _LIMITS)
    edge = 1.5 * max([8.0, *limits])
    line = np.concatenate([np.linspace(-edge, edge, 61), np.linspace(-3, 3, 31)])
    gate, up = (axis.ravel() for axis in np.meshgrid(line, line[::5] + 0.1))
    function = module._apply_gate if gated else module.act_fn
    for order in ("gate_up", "interleaved", "up_gate") if gated else ("gate_up",):
        probe = torch.from_numpy(_joined(gate, up, order) if gated else gate)[None]
        with torch.no_grad():
            got = function(probe.to(module.down_proj.device))[0].double().cpu().numpy()
        for activation, clamp, has_alpha, has_limit in _FORMULAS:
            choices = itertools.product(
                alphas if has_alpha else [None], limits if has_limit else [None]
            )
            for alpha, limit in choices:
                options = {"activation": activation, "alpha": alpha, "limit": limit, "clamp": clamp}
                want = reference.activate(gate, up if gated else None, **options)
                # Some gates compute in float32, whatever comes in; formulas differ by far more.
                if np.allclose(got, want, rtol=1e-5, atol=1e-5):
                    return {
                        "activation": activation,
                        "activation_alpha": alpha,
                        "activation_limit": limit,
                        "clamp": clamp,
                        "gated": gated,
                        "w13_order": order,
                    }
    raise NotImplementedError(
        f"experts_implementation={NAME!r}: expected a gate that is one of "
        f"{', '.join(dict.fromkeys(row[0] for row in _FORMULAS))}, got that of "
        f"{type(module).__name__}, which is none of them"
    )


def _numbers(module, names):
    """The values of those attributes that are there, of the module first."""
    holders = (module, getattr(module, "config", None))
    values = [getattr(holder, name, None) for holder in holders for name in names]
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    return [value for value in dict.fromkeys(numbers) if value < float("inf")]


def _joined(gate, up, order):
    import numpy as np

    if order == "interleaved":
        return np.stack([gate, up], axis=1).ravel()
    return np.concatenate([gate, up] if order == "gate_up" else [up, gate])


def _rows(module, weight):
    """A transposed weight as [E, rows, columns], a view."""
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(
            f"experts_implementation={NAME!r}: expected weights with contiguous rows, got "
            f"transposed ones in {type(module).__name__}: call "
            f"fusedmoe.frameworks.transformers.convert_experts(model) once after loading"
        )
    return weight.transpose(1, 2)


def _without_gradient(out, *inputs):
    """`out`, with a history that says what is wrong when a gradient is asked for; a result without
    history would leave the experts out of a training silently."""
    import torch

    global _Experts
    if _Experts is None:

        class Experts(torch.autograd.Function):
            @staticmethod
            def forward(ctx, out, *inputs):
                return out.view_as(out)

            @staticmethod
            def backward(ctx, *gradients):
                raise NotImplementedError(
                    f"experts_implementation={NAME!r}: there is no gradient; train with "
                    f"experts_implementation='grouped_mm'"
                )

        _Experts = Experts
    return _Experts.apply(out, *inputs)


_Experts = None  # a class, made when torch is there
