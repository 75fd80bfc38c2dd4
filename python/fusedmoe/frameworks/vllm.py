"""vLLM: a plug-in that makes an unmodified vLLM use the library for bf16 and fp16 experts.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). It puts a
subclass of vLLM's unquantised MoE method in the place of that method, by vLLM's own registry of
out-of-tree ops. The subclass lets vLLM choose its kernels, and where the choice is the Triton
experts on a Hopper GPU and nothing speaks against it, it takes `FusedMoeExperts` of `vllm_experts`
instead, a class of experts for vLLM's modular kernels. All else runs as without the plug-in.

FUSEDMOE_VLLM=0 turns the plug-in off; so does leaving it out of VLLM_PLUGINS, and so does asking
for a kernel with `moe_backend`.
"""

from __future__ import annotations

import functools
import logging
import os
from importlib import metadata

from .. import _version

TESTED = "vllm 0.33.0"
logger = logging.getLogger("fusedmoe")


def status():
    """(version of vLLM found or None, why it cannot be used or None)."""
    try:
        return metadata.version("vllm"), None
    except metadata.PackageNotFoundError:
        return None, "vllm is not installed"


def register():
    """Takes the unquantised MoE method over and says so. A second call does nothing. Where vLLM is
    not as expected, says in one sentence what is missing and leaves it as it is."""
    if os.environ.get("FUSEDMOE_VLLM") == "0":
        logger.warning("fusedmoe: not active in vLLM, because FUSEDMOE_VLLM=0")
        return
    try:
        _register()
    except (ImportError, AttributeError, AssertionError) as error:
        found, _ = status()
        logger.error(
            "fusedmoe: not active in vLLM %s, which is not as expected (%s: %s); tested with %s",
            found,
            type(error).__name__,
            error,
            TESTED,
        )


@functools.cache
def _register():
    from . import vllm_experts

    vllm_experts.take_over()
    logger.warning(
        "fusedmoe %s is active in vLLM: unquantised bf16 and fp16 experts run on it on Hopper "
        "GPUs, everything else on vLLM's own kernels; FUSEDMOE_VLLM=0 turns it off",
        _version.__version__,
    )


def activation_keywords(
    activation, clamp_limit=None, alpha=1.0, beta=0.0, situ_beta=None, situ_linear_beta=None
):
    """The keywords of `fusedmoe.fused_experts` for an activation of vLLM's.

    Args:
        activation: the value of a MoEActivation: "silu", "swigluoai", "relu2_no_mul", ...
        clamp_limit, alpha, beta, situ_beta, situ_linear_beta: the fields of vLLM's
            ApplyMoEActivationConfig. An activation looks at those that vLLM's looks at.

    Raises:
        NotImplementedError: the library has no such activation.
    """
    if activation.endswith("_no_mul"):
        name = activation.removesuffix("_no_mul")
        if name in ("silu", "gelu", "gelu_tanh", "relu2"):
            return {"activation": name, "gated": False}
    elif activation == "silu":
        return {"activation": "silu", "activation_limit": clamp_limit, "clamp": "before"}
    elif activation in ("gelu", "gelu_tanh"):
        return {"activation": activation}
    elif activation == "situ" and situ_beta is not None:
        return {
            "activation": "situ",
            "activation_alpha": situ_beta,
            # Not above 0 means none to vLLM's kernel.
            "activation_limit": situ_linear_beta if (situ_linear_beta or 0) > 0 else None,
        }
    elif activation == "swigluoai":  # with gpt-oss's numbers, whatever the configuration says
        return {
            "activation": "swiglu_oai",
            "activation_alpha": 1.702,
            "activation_limit": 7.0,
            "w13_order": "interleaved",
        }
    elif activation == "swigluoai_uninterleave" and clamp_limit is not None:
        if (alpha, beta) == (1.0, 0.0):
            return {"activation": "silu", "activation_limit": clamp_limit, "clamp": "before"}
        if beta == 1.0:
            return {
                "activation": "swiglu_oai",
                "activation_alpha": alpha,
                "activation_limit": clamp_limit,
            }
    elif activation == "swiglustep":
        return {"activation": "silu", "activation_limit": 7.0, "clamp": "after"}
    raise NotImplementedError(
        f"activation: {activation!r} with clamp_limit {clamp_limit}, alpha {alpha}, beta {beta}, "
        f"situ_beta {situ_beta} is not built"
    )
