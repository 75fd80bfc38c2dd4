"""What is measured: the layers that benchmarks, demo and plan know by name, and the batch sizes."""

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


TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_TOKENS = (1, 16, 256, 4096)
# The models whose own weights are bf16; dsv3_tp8 is for fp8.
BF16_MODELS = tuple(name for name in MODELS if name != "dsv3_tp8")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def model(name: str) -> Model:
    """The row of `name`; ValueError with all names where there is none."""
    try:
        return MODELS[name]
    except KeyError:
        known = ", ".join(MODELS)
        raise ValueError(f"model: expected one of {known}, got {name!r}") from None


def add_arguments(parser, models, tokens):
    """The choice of points, the same for every script."""
    parser.add_argument("--models", "--model", default=",".join(models), help="comma-separated")
    parser.add_argument("--tokens", default=",".join(map(str, tokens)), help="comma-separated")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--quick", action="store_true", help="one model, a few batch sizes")


def batch_sizes(text):
    """ "1,16" as [1, 16]; ValueError where that is not one number of at least 1 or more of them."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) >= 1 for word in words):
        raise ValueError(f"tokens: expected numbers of at least 1, comma-separated, got {text!r}")
    return [int(word) for word in words]


def chosen_points(args):
    """(models, tokens) of parsed arguments; ValueError for an unknown model or no batch size."""
    models = [name for name in args.models.split(",") if name]
    for name in models:
        model(name)
    tokens = batch_sizes(args.tokens)
    if args.quick:
        models, tokens = models[:1], [n for n in tokens if n in QUICK_TOKENS] or tokens[:1]
    return models, tokens
