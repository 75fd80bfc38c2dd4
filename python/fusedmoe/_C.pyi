"""The C extension. Private: use the functions of `fusedmoe`, which document the arguments.

Every function takes its parameters by position or by keyword; None means "not given". A tensor is
anything with the DLPack exchange table (torch >= 2.10), a NumPy array, or an object with
`__dlpack__`. Errors: TypeError (kind, dtype), ValueError (shape, stride, alignment, device,
overflow, read-only, overlap), NotImplementedError, RuntimeError (driver), MemoryError; a failed
call has written nothing.
"""

from typing import Any, Literal, final

__version__: str

_Tensor = Any
_Stream = (
    Any  # int (a CUstream), or an object with __cuda_stream__; None: the framework's current stream
)
_Activation = Literal["silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai", "situ"]
_Clamp = Literal["after", "before"]
_Order = Literal["gate_up", "up_gate", "interleaved"]
_NoCombine = Literal[False, "weighted", "unweighted"]
_Method = str  # a row of kernels/route_methods.def
_DType = Literal["bfloat16", "float16", "float32"]  # how 16-bit integer tensors are read

def fused_experts(
    hidden_states: _Tensor,
    w13: _Tensor,
    w2: _Tensor,
    topk_weights: _Tensor,
    topk_ids: _Tensor,
    quant: None = None,
    w13_scale: None = None,
    w2_scale: None = None,
    w13_zero_point: None = None,
    w2_zero_point: None = None,
    hidden_states_scale: None = None,
    intermediate_scale: None = None,
    w13_bias: _Tensor | None = None,
    w2_bias: _Tensor | None = None,
    activation: _Activation | None = "silu",
    activation_alpha: float | None = None,
    activation_limit: float | None = None,
    clamp: _Clamp | None = "after",
    gated: bool | None = True,
    w13_order: _Order | None = "gate_up",
    apply_router_weight_on_input: bool | None = False,
    routed_scaling_factor: float | None = None,
    shared_output: _Tensor | None = None,
    no_combine: _NoCombine | None = False,
    expert_map: _Tensor | None = None,
    expert_start: int | None = None,
    deterministic: bool | None = True,
    batch_invariant: bool | None = False,
    out: _Tensor | None = None,
    workspace: _Tensor | None = None,
    stream: _Stream | None = None,
    dtype: _DType | None = None,
) -> _Tensor: ...
def fused_moe(
    hidden_states: _Tensor,
    w13: _Tensor,
    w2: _Tensor,
    router_logits: _Tensor,
    topk: int,
    method: _Method | None = "softmax_topk",
    routing_scale: float | None = None,
    knobs: tuple | None = None,
    quant: None = None,
    w13_scale: None = None,
    w2_scale: None = None,
    w13_zero_point: None = None,
    w2_zero_point: None = None,
    hidden_states_scale: None = None,
    intermediate_scale: None = None,
    w13_bias: _Tensor | None = None,
    w2_bias: _Tensor | None = None,
    activation: _Activation | None = "silu",
    activation_alpha: float | None = None,
    activation_limit: float | None = None,
    clamp: _Clamp | None = "after",
    gated: bool | None = True,
    w13_order: _Order | None = "gate_up",
    apply_router_weight_on_input: bool | None = False,
    routed_scaling_factor: float | None = None,
    shared_output: _Tensor | None = None,
    no_combine: _NoCombine | None = False,
    expert_map: _Tensor | None = None,
    expert_start: int | None = None,
    deterministic: bool | None = True,
    batch_invariant: bool | None = False,
    out: _Tensor | None = None,
    workspace: _Tensor | None = None,
    stream: _Stream | None = None,
    dtype: _DType | None = None,
) -> _Tensor: ...
def route(
    router_logits: _Tensor,
    topk: int,
    method: _Method | None = "softmax_topk",
    routing_scale: float | None = None,
    knobs: tuple | None = None,
    ids_dtype: Literal["int32", "int64"] | None = "int32",
    out_weights: _Tensor | None = None,
    out_ids: _Tensor | None = None,
    out_packed: _Tensor | None = None,
    out_counts: _Tensor | None = None,
    stream: _Stream | None = None,
) -> tuple[_Tensor, _Tensor]: ...
def route_align(
    router_logits: _Tensor,
    topk: int,
    method: _Method | None = "softmax_topk",
    routing_scale: float | None = None,
    knobs: tuple | None = None,
    num_experts: int | None = None,
    expert_map: _Tensor | None = None,
    expert_start: int | None = None,
    ids_dtype: Literal["int32", "int64"] | None = "int32",
    out_weights: _Tensor | None = None,
    out_ids: _Tensor | None = None,
    out_expert_offsets: _Tensor | None = None,
    out_sorted_token_ids: _Tensor | None = None,
    out_row_of_slot: _Tensor | None = None,
    workspace: _Tensor | None = None,
    stream: _Stream | None = None,
) -> tuple[_Tensor, _Tensor, _Tensor, _Tensor, _Tensor]: ...
def align(
    topk_ids: _Tensor,
    num_experts: int,
    expert_map: _Tensor | None = None,
    expert_start: int | None = None,
    out_expert_offsets: _Tensor | None = None,
    out_sorted_token_ids: _Tensor | None = None,
    out_row_of_slot: _Tensor | None = None,
    workspace: _Tensor | None = None,
    stream: _Stream | None = None,
) -> tuple[_Tensor, _Tensor, _Tensor]: ...
def align_block_size(
    topk_ids: _Tensor,
    block_size: int,
    num_experts: int,
    expert_map: _Tensor | None = None,
    expert_start: int | None = None,
    pad: bool | None = True,
    out_sorted_token_ids: _Tensor | None = None,
    out_expert_ids: _Tensor | None = None,
    out_num_tokens_post_padded: _Tensor | None = None,
    workspace: _Tensor | None = None,
    stream: _Stream | None = None,
) -> tuple[_Tensor, _Tensor, _Tensor]: ...
def count_tokens_per_expert(
    topk_ids: _Tensor,
    num_experts: int,
    expert_map: _Tensor | None = None,
    expert_start: int | None = None,
    out: _Tensor | None = None,
    workspace: _Tensor | None = None,
    stream: _Stream | None = None,
) -> _Tensor: ...
def gate_up(
    hidden_states: _Tensor,
    w13: _Tensor,
    expert_offsets: _Tensor,
    sorted_token_ids: _Tensor,
    topk: int,
    topk_weights: _Tensor | None = None,
    w13_bias: _Tensor | None = None,
    activation: _Activation | None = "silu",
    activation_alpha: float | None = None,
    activation_limit: float | None = None,
    clamp: _Clamp | None = "after",
    gated: bool | None = True,
    w13_order: _Order | None = "gate_up",
    out: _Tensor | None = None,
    workspace: _Tensor | None = None,
    stream: _Stream | None = None,
    dtype: _DType | None = None,
) -> _Tensor: ...
def down(
    intermediate: _Tensor,
    w2: _Tensor,
    expert_offsets: _Tensor,
    sorted_token_ids: _Tensor,
    topk: int,
    topk_weights: _Tensor | None = None,
    w2_bias: _Tensor | None = None,
    out: _Tensor | None = None,
    workspace: _Tensor | None = None,
    stream: _Stream | None = None,
    dtype: _DType | None = None,
) -> _Tensor: ...
def combine(
    rows: _Tensor,
    row_of_slot: _Tensor,
    routed_scaling_factor: float | None = None,
    shared_output: _Tensor | None = None,
    out: _Tensor | None = None,
    stream: _Stream | None = None,
    dtype: _DType | None = None,
) -> _Tensor: ...

@final
class Experts:
    def __new__(
        cls,
        w13: _Tensor,
        w2: _Tensor,
        quant: None = None,
        w13_scale: None = None,
        w2_scale: None = None,
        w13_zero_point: None = None,
        w2_zero_point: None = None,
        intermediate_scale: None = None,
        w13_bias: _Tensor | None = None,
        w2_bias: _Tensor | None = None,
        activation: _Activation | None = "silu",
        activation_alpha: float | None = None,
        activation_limit: float | None = None,
        clamp: _Clamp | None = "after",
        gated: bool | None = True,
        w13_order: _Order | None = "gate_up",
        apply_router_weight_on_input: bool | None = False,
        routed_scaling_factor: float | None = None,
        no_combine: _NoCombine | None = False,
        expert_map: _Tensor | None = None,
        expert_start: int | None = None,
        deterministic: bool | None = True,
        batch_invariant: bool | None = False,
        dtype: _DType | None = None,
        max_tokens: int | None = None,
    ) -> Experts: ...
    def __call__(
        self,
        hidden_states: _Tensor,
        topk_weights: _Tensor,
        topk_ids: _Tensor,
        out: _Tensor | None = None,
        workspace: _Tensor | None = None,
        shared_output: _Tensor | None = None,
        stream: _Stream | None = None,
    ) -> _Tensor: ...
    def run(
        self,
        hidden_states: _Tensor,
        topk_weights: _Tensor,
        topk_ids: _Tensor,
        out: _Tensor | None = None,
        workspace: _Tensor | None = None,
        shared_output: _Tensor | None = None,
        stream: _Stream | None = None,
        /,
    ) -> _Tensor: ...
    def rebind(
        self,
        w13: _Tensor,
        w2: _Tensor,
        w13_bias: _Tensor | None = None,
        w2_bias: _Tensor | None = None,
    ) -> None: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...

def plan(
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    topk: int,
    dtype: _DType | None = "bfloat16",
    device: Literal["cpu", "cuda"] | None = "cuda",
    num_sms: int | None = 0,
    gated: bool | None = True,
    no_combine: _NoCombine | None = False,
    routed: bool | None = False,
    router_experts: int | None = 0,
    vector_bytes: int | None = 16,
    workspace_limit: int | None = 0,
    deterministic: bool | None = True,
) -> dict[str, Any]: ...
def workspace_size(
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    topk: int,
    dtype: _DType | None = "bfloat16",
    device: Literal["cpu", "cuda"] | None = "cuda",
    num_sms: int | None = 0,
    gated: bool | None = True,
    no_combine: _NoCombine | None = False,
    routed: bool | None = False,
    router_experts: int | None = 0,
    vector_bytes: int | None = 16,
    workspace_limit: int | None = 0,
    deterministic: bool | None = True,
) -> int: ...
def load(device: int | None = 0) -> None: ...
def info() -> dict[str, Any]: ...
def device_count() -> int: ...
def _routing_methods() -> dict[str, tuple[int, int, int, int, int, int]]:
    """{method: (score, key, bias, groups, ids, renormalize)}, numbers of moe_kernels.h."""

def _read_environment() -> None:
    """FUSEDMOE_NUM_THREADS, FUSEDMOE_CPU_ISA and FUSEDMOE_CHECK, for calls that run without the
    GIL."""

def _xla_handlers() -> list[tuple[str, str, Any]]:
    """[(function, platform, capsule)] for jax.ffi.register_ffi_target."""

@final
class _Abstract:
    """A tensor without memory. fused_experts, fused_moe and route of such tensors check and plan
    the call and return (operands, [(shape, dtype)], workspace bytes, attributes) of it."""

    def __new__(
        cls, array: Any, shape: tuple[int, ...], dtype: str, device: int, /
    ) -> _Abstract: ...

def _cpu_read_bandwidth() -> float:
    """Bytes per second that all threads read from memory, measured now."""

# For demo, check and bench, without a framework. They allocate and synchronise: never part of a
# call of the layer.
@final
class _DeviceBuffer:
    """`nbytes` bytes of a GPU's memory, freed with the object. `offset` is in bytes."""

    @property
    def ptr(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def device(self) -> int: ...
    def copy_from(self, source: _Tensor, offset: int | None = 0) -> None:
        """Copies a compact CPU tensor to the buffer and waits for it."""
    def copy_to(self, destination: _Tensor, offset: int | None = 0) -> None:
        """Fills a compact CPU tensor from the buffer and waits for it."""
    def view(self, shape: tuple[int, ...], dtype: str, offset: int | None = 0) -> _DeviceView: ...

@final
class _DeviceView:
    """A compact tensor in a _DeviceBuffer; any function here and any DLPack consumer takes it."""

    @property
    def ptr(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    def __dlpack__(
        self,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: Any = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def _restrict_plans(
    portable: bool, tile_rows: int, apart: bool = False, high: int = 0, /
) -> None: ...
def _fix_plans(gate_up: int, down: int, /) -> None: ...
def _device_alloc(nbytes: int, device: int | None = 0) -> _DeviceBuffer: ...
def _device_stream(device: int | None = 0) -> int: ...
def _device_synchronize(device: int | None = 0) -> None: ...
def _device_graph_begin(stream: int, device: int | None = 0) -> None: ...
def _device_graph_end(stream: int, device: int | None = 0) -> Any: ...
def _device_graph_launch(graph: Any, stream: int, device: int | None = 0) -> None: ...
def _device_graph_elapsed(
    graph: Any, stream: int, replays: int, device: int | None = 0
) -> list[float]:
    """Milliseconds of each replay, by an event on either side."""

def _device_probe_hopper(device: int | None = 0) -> float:
    """Largest absolute error of the tensor map, TMA and wgmma probe kernel."""
