"""The layers that benchmarks, demo and plan know by name: one row per model as it is served."""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    """Sizes of one layer on one GPU; with tensor parallelism (tpN) intermediate_size is a share."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    topk: int

    @property
    def expert_elements(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.intermediate_size * self.hidden_size


MODELS = {
    "qwen3_30b": Model(2048, 768, 128, 8),  # Qwen3-30B-A3B
    "qwen3_235b_tp8": Model(4096, 192, 128, 8),  # Qwen3-235B-A22B
    "qwen35_35b": Model(2048, 512, 256, 8),
    "qwen35_122b_tp4": Model(3072, 256, 256, 8),
    "qwen3next_tp4": Model(2048, 128, 512, 10),
    "mixtral_tp8": Model(4096, 1792, 8, 2),  # Mixtral-8x7B
    "gptoss_120b_tp4": Model(2880, 720, 128, 4),
    "dsv3_tp8": Model(7168, 256, 256, 8),  # DeepSeek-V3; its own weights are fp8
}


def model(name: str) -> Model:
    """The row of `name`; ValueError with all names where there is none."""
    try:
        return MODELS[name]
    except KeyError:
        known = ", ".join(MODELS)
        raise ValueError(f"model: expected one of {known}, got {name!r}") from None
