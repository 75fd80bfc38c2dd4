"""fusedmoe: the Mixture-of-Experts layer of a large language model in a handful of kernel launches.

    from fusedmoe import Routing, fused_moe
    out = fused_moe(hidden_states, w13, w2, router_logits, routing=Routing(topk=8))

Takes NumPy, PyTorch, CuPy and JAX arrays; runs on the CPU and on NVIDIA GPUs. Importing this
package loads one C extension and nothing else: no NumPy, no framework, no GPU driver. The rest is
loaded at first use.
"""

from . import _C  # noqa: F401  (a broken build is heard of here, not at the first call)
from ._version import __version__

# Public name -> module that defines it, loaded at first use (PEP 562).
_WHERE = {
    "fused_moe": "ops",
    "fused_experts": "ops",
    "route": "ops",
    "route_align": "ops",
    "align": "ops",
    "gate_up": "ops",
    "down": "ops",
    "combine": "ops",
    "quantize": "ops",
    "align_block_size": "ops",
    "count_tokens_per_expert": "ops",
    "plan": "ops",
    "workspace_size": "ops",
    "load": "ops",
    "Experts": "experts",
    "Routing": "routing",
    "routing_config": "presets",
    "from_hf_config": "presets",
    "info": "diagnostics",
    "check": "diagnostics",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name):
    module = _WHERE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_WHERE})
