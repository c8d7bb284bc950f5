"""What the kernels of a device save and allocate, where that differs from the trace's own (CPU).

A plan for CUDA is traced on a machine that may have none, so every fact stands here by itself:
which attention runs and what it keeps, what dropout keeps, what a kernel takes while it runs.
Sources are files of pytorch 2.13 unless said otherwise; each fact has a test.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Variable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from loralab.planning.devices import Device

Attention = Literal["cudnn", "flash", "efficient", "math"]

aten = torch.ops.aten
MIB = 2**20
HALF = (torch.float16, torch.bfloat16)
FLASH_MAX_HEAD = 256
CUDNN_MAX_HEAD = 128


class Rules(TorchFunctionMode):
    """The kernels that the tracing machine chooses by itself: right for a plan for a CPU."""

    def workspace_bytes(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
        """What the kernel takes and gives back before it returns."""
        count = CPU_WORKSPACES.get(func)
        return 0 if count is None else count(*args)

    def choose_optimiser(self, optimiser: torch.optim.Optimizer) -> None:
        """Set what torch would choose for parameters on the device."""

    @no_type_check
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class CudaRules(Rules):
    """CUDA's choices, made for tensors that lie elsewhere."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._capability = device.capability

    def workspace_bytes(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
        count = CUDA_WORKSPACES.get(func)
        return 0 if count is None else count(*args)

    def choose_optimiser(self, optimiser: torch.optim.Optimizer) -> None:
        # torch/optim/optimizer.py, _default_to_fused_or_foreach: foreach, where nothing is said
        for group in optimiser.param_groups:
            if group.get("foreach") is None and not group.get("fused"):
                group["foreach"] = True

    @no_type_check
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func in _DROPOUTS:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[Tensor] | None = None,
    ) -> None:
        """`Tensor.backward`, with these rules in force for what runs inside it.

        Recomputed forwards must keep what the first ones kept. A function that a mode has caught
        runs without the mode, and so would they; the engine itself cannot be caught.
        """
        with self:
            Variable._execution_engine.run_backward(
                (loss,),
                (torch.ones_like(loss) if gradient is None else gradient,),
                create_graph if retain_graph is None else retain_graph,
                create_graph,
                tuple(inputs or ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float | int = 0.0,
        is_causal: bool = False,
        scale: float | int | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        backend = choose_attention(
            query, key, value, attn_mask, enable_gqa=enable_gqa, capability=self._capability
        )
        if backend == "math":
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask,
                    dropout_p,
                    is_causal,
                    scale=scale,
                    enable_gqa=enable_gqa,
                )
        bias = None if attn_mask is None else _as_bias(attn_mask, query)
        if backend == "efficient":
            keeps = (torch.is_grad_enabled() and query.requires_grad) or key.requires_grad
            if bias is not None:
                bias = _aligned(bias).expand(*query.shape[:-1], key.shape[-2])
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
            )[0]
        # cuDNN keeps the same as flash: output and fp32 log-sum-exp.
        width = query.shape[-1]
        query, key, value = (_padded(t) for t in (query, key, value))
        scale = scale if scale is not None else 1 / math.sqrt(width)
        output = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return output[..., :width]


def choose_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    enable_gqa: bool,
    capability: int,
) -> Attention:
    """The kernel `scaled_dot_product_attention` runs on CUDA.

    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: flash and cuDNN take halves without a
    mask; memory-efficient attention takes no grouped heads and needs aligned heads; math takes
    all, and keeps rows x heads x tokens x tokens.
    """
    width = query.shape[-1]
    same_width = width == key.shape[-1] == value.shape[-1]
    is_half = query.dtype in HALF
    if query.dim() != 4 or (query.dtype not in HALF and query.dtype != torch.float32):
        return "math"
    if is_half and same_width and mask is None and capability >= 8 and width <= FLASH_MAX_HEAD:
        prefers_cudnn = capability in (9, 10) and width <= CUDNN_MAX_HEAD and width % 8 == 0
        return "cudnn" if prefers_cudnn else "flash"
    alignment = 8 if is_half else 4
    is_grouped = enable_gqa and query.shape[1] != key.shape[1]
    if is_grouped or width % alignment or value.shape[-1] % alignment or width != key.shape[-1]:
        return "math"
    return "efficient"


_DROPOUTS = {F.dropout, torch.dropout}


def _dropout(
    input: Tensor, p: float | int = 0.5, train: bool = True, inplace: bool = False, **kwargs: Any
) -> Tensor:
    """CUDA's fused dropout keeps one byte a number; the CPU's keeps a mask of the input's dtype.

    aten/src/ATen/native/Dropout.cpp, is_fused_kernel_acceptable.
    """
    training = kwargs.get("training", train)
    if not training or not 0 < p < 1 or inplace:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _as_bias(mask: Tensor, query: Tensor) -> Tensor:
    """A boolean mask as numbers to add, in the query's dtype: a new tensor at each layer."""
    if mask.dtype != torch.bool:
        return mask
    minus_infinity = torch.full((), -math.inf, dtype=query.dtype)
    return torch.where(mask, 0.0, minus_infinity)


def _aligned(bias: Tensor) -> Tensor:
    """A bias whose rows are padded to 16 numbers, as the kernel reads them."""
    last = bias.shape[-1]
    if last % 16 == 0:
        return bias
    return F.pad(bias, [0, 16 - last % 16])[..., :last]


def _padded(tensor: Tensor) -> Tensor:
    """A head padded to 8 numbers, as flash attention takes it."""
    last = tensor.shape[-1]
    return tensor if last % 8 == 0 else F.pad(tensor, [0, 8 - last % 8])


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> int:
    """fp32 sums of the query's gradient, and the row sums (flash_api.cpp, mha_bwd)."""
    rows, heads, tokens, width = query.shape
    tokens = _up(tokens, 128)
    sums = rows * heads * tokens * (_up(width, 32) + 1) * 4
    expanded = 2 * rows * heads * key.shape[2] * width if heads != key.shape[1] else 0
    return sums + expanded * key.element_size()


def _efficient_backward(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> int:
    """Row sums of output times gradient; in fp32 the product itself (attention_backward.cu)."""
    rows, heads, tokens, width = query.shape
    row_sums = rows * heads * tokens * 4
    if query.dtype in HALF:
        return row_sums + (rows * heads * tokens * width * 4 if width > 64 else 0)
    return row_sums + rows * heads * tokens * width * 4


def _embedding_backward(grad: Tensor, indices: Tensor, *_: Any) -> int:
    """Sorted indices and their order (Embedding.cu), about six times the indices."""
    return 6 * indices.numel() * 8


def _log_sum_exp(input: Tensor, *_: Any) -> int:
    """The exponentials of all numbers less their maximum (ReduceOps.cpp, on every device)."""
    return input.numel() * input.element_size()


CUDA_WORKSPACES: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.logsumexp.default: _log_sum_exp,
}

CPU_WORKSPACES: dict[Any, Callable[..., int]] = {aten.logsumexp.default: _log_sum_exp}


def cublas_workspace_bytes(capability: int) -> int:
    """What cuBLAS holds for each thread: the forward's and autograd's.

    aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB from compute capability 9 on, else
    :4096:2:16:8, that is 8 MiB and 128 KiB.
    """
    each = 32 * MIB if capability >= 9 else 8 * MIB + 128 * 1024
    return 2 * each


def rules_for(device: Device) -> Rules:
    """The rules of the device that is planned for."""
    return CudaRules(device) if device.type == "cuda" else Rules()
