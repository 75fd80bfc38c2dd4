"""Checks of the vLLM plug-in against the real package, run by test_vllm.py in a process of their
own: `python vllm_package.py FOLDER`, where vllm is unpacked (with the packages it imports there or
installed). See package_checks.py.

All of vLLM is its own code: the registry of out-of-tree ops, the choice of kernels, the modular
kernel with its workspaces, prepare and finalize. There is no GPU: the tensors are on the CPU, vLLM
is told that its platform is a Hopper GPU, and its compiled kernels are missing and not called.
"""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import torch
from package_checks import patched, report
from support import F32, TorchBackend, assert_close, make_layer

MOE = "vllm.model_executor.layers.fused_moe"
FOLDER = sys.argv[1] if __name__ == "__main__" else None
T, H, I, E, K = 5, 64, 48, 4, 2  # noqa: E741


def prepare(folder):
    sys.path[:0] = [folder]
    warnings.simplefilter("ignore")
    from fusedmoe.frameworks import vllm as door
    from fusedmoe.frameworks import vllm_experts
    from vllm.platforms import current_platform
    from vllm.v1.worker import workspace

    kind = type(current_platform)
    kind.is_cuda = kind.is_cuda_alike = lambda self: True
    kind.is_device_capability_family = classmethod(lambda cls, family, *_: family == 90)
    torch.accelerator.empty_cache = lambda: None
    workspace.init_workspace_manager(torch.device("cpu"))
    vllm_experts._usable = lambda: True
    cpu = vllm_experts.ops.workspace_size  # the tensors are on the CPU, and so is the workspace

    def workspace_size(*args, **kwargs):
        return cpu(*args, **{**kwargs, "device": "cpu"})

    vllm_experts.ops.workspace_size = workspace_size
    door.register()


@contextmanager
def vllm_config():
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        yield


def moe_config(num_experts=E, num_local_experts=E, activation="silu", **fields):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    sizes = ("tp_size", "pcp_size", "dp_size", "ep_size", "sp_size")
    ranks = ("tp_rank", "pcp_rank", "dp_rank", "ep_rank")
    parallel = FusedMoEParallelConfig(
        **dict.fromkeys(sizes, 1),
        **dict.fromkeys(ranks, 0),
        use_ep=False,
        all2all_backend="naive",
        enable_eplb=False,
    )
    return FusedMoEConfig(
        **{
            "num_experts": num_experts,
            "experts_per_token": K,
            "hidden_dim": H,
            "intermediate_size": I,
            "num_local_experts": num_local_experts,
            "num_logical_experts": num_experts,
            "activation": MoEActivation(activation),
            "device": "cpu",
            "routing_method": RoutingMethodType.Renormalize,
            "moe_parallel_config": parallel,
            "in_dtype": torch.bfloat16,
            **fields,
        }
    )


def make_method(moe):
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    with vllm_config():
        return UnquantizedFusedMoEMethod(moe)


def run_method(case, **fields):
    """The layer through vLLM's method, from its weights to the output of its modular kernel."""
    backend = TorchBackend("cpu")
    put = {name: backend.put(array) for name, array in case.tensors().items()}
    expert_map = case.options.get("expert_map")
    num_experts = case.w13.shape[0] if expert_map is None else len(expert_map)
    biased = case.options.get("w13_bias") is not None
    moe = moe_config(num_experts, case.w13.shape[0], has_bias=biased, **fields)
    method, layer = make_method(moe), torch.nn.Module()
    method.create_weights(layer, case.w13.shape[0], H, I, torch.bfloat16)
    layer.w13_weight.data.copy_(put["w13"])
    layer.w2_weight.data.copy_(put["w2"])
    if biased:
        layer.w13_bias.data.copy_(backend.put(case.options["w13_bias"]))
        layer.w2_bias.data.copy_(backend.put(case.options["w2_bias"]))
    layer.moe_config, layer._expert_routing_tables = moe, lambda: None
    layer.activation, layer.global_num_experts = moe.activation, num_experts
    layer.apply_router_weight_on_input = False
    layer.expert_map = None if expert_map is None else backend.put(expert_map)
    x, weights, ids = (put[n] for n in ("hidden_states", "topk_weights", "topk_ids"))
    before = x.clone()
    with vllm_config():
        method._init_moe_kernel(layer)

    def forward():
        with vllm_config():
            return method.forward_native(layer, x, weights, ids, None, None)

    out = backend.get(forward())
    assert torch.equal(x, before)
    return method, out, layer, forward


def check_base_classes():
    from fusedmoe.frameworks.vllm_experts import FusedMoeExperts

    assert not FusedMoeExperts.__abstractmethods__


def check_vllm_chooses_it_and_runs_it():
    from fusedmoe.frameworks.vllm_experts import FusedMoeExperts, FusedMoeMethod

    for seed, num_tokens in enumerate((1, T, 65)):
        case = make_layer(seed, num_tokens)
        method, out, _, _ = run_method(case)
        assert type(method) is FusedMoeMethod
        assert type(method.moe_kernel.fused_experts) is FusedMoeExperts
        assert_close(out, *case.expected(), seed=seed)


def check_biases_and_activations():
    from support import BF16

    for seed, (name, options) in enumerate(
        {
            "gelu": {"activation": "gelu"},
            "relu2_no_mul": {"activation": "relu2", "gated": False},
            "swigluoai": {
                "activation": "swiglu_oai",
                "activation_alpha": 1.702,
                "activation_limit": 7.0,
                "w13_order": "interleaved",
            },
        }.items()
    ):
        gated = options.get("gated", True)
        case = make_layer(seed, T, gated=gated, w13_bias=BF16, w2_bias=BF16)
        case = case.with_options(**options)
        _, out, _, _ = run_method(case, activation=name)
        assert_close(out, *case.expected(), seed=seed)


def check_expert_map():
    expert_map = np.full(16, -1, np.int32)
    expert_map[[3, 5, 8, 13]] = [2, 0, 3, 1]
    case = make_layer(7, 33, topk=K, expert_map=expert_map, num_ids=16)
    _, out, _, _ = run_method(case)
    assert_close(out, *case.expected(), seed=7)


def check_weights_rewritten_in_place_are_seen():
    _, out, layer, forward = run_method(make_layer(1, T))
    layer.w2_weight.data.zero_()
    assert out.astype(F32).any() and not forward().any()


def takes(**fields):
    from fusedmoe.frameworks.vllm_experts import FusedMoeExperts

    try:
        return make_method(moe_config(**fields)).experts_cls is FusedMoeExperts
    except NotImplementedError:  # vLLM itself has no kernel for it
        return False


def check_what_is_left_to_vllm():
    import vllm.envs as envs

    assert takes() and takes(in_dtype=torch.float16) and takes(activation="situ")
    assert not takes(in_dtype=torch.float32)
    assert not takes(moe_backend="triton")
    assert not takes(experts_per_token=33)
    assert not takes(num_experts=1025, num_local_experts=1025)
    assert not takes(activation="relu2")
    with patched(envs, VLLM_BATCH_INVARIANT=True):
        assert not takes()


if __name__ == "__main__":
    prepare(FOLDER)
    logging.getLogger("fusedmoe").setLevel(logging.INFO)
    report(globals())
