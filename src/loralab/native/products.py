"""Products with frozen 16-bit weights, in fp32 where the processor has no instructions for them.

There torch multiplies bf16 matrices twenty to a hundred times slower than fp32 ones
(benchmarks/LOG.md). The weights stay as they are; one at a time is widened for its product, which
costs a twentieth of it at some hundred rows. The rule looks at the processor and is not measured,
so that a resumed run needs no record of it.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from loralab.placement import device_kind


def are_widened(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products with weights of that dtype are computed in fp32."""
    return device_kind(device) == "cpu" and not _has_instructions(dtype)


def linear(
    x: Float[Tensor, "rows in"],
    weights: Sequence[Float[Tensor, "_ in"]],
    biases: Sequence[Float[Tensor, "_"] | None],
) -> list[Float[Tensor, "rows _"]]:
    """`W x + b` of each layer, in the dtype of `x`."""
    layers = zip(weights, biases, strict=True)
    if not are_widened(x.dtype, x.device):
        return [F.linear(x, weight, bias) for weight, bias in layers]
    wide = x.float()
    return [
        F.linear(wide, weight.float(), None if bias is None else bias.float()).to(x.dtype)
        for weight, bias in layers
    ]


def linear_backward(
    gradients: Sequence[Float[Tensor, "rows _"]],
    weights: Sequence[Float[Tensor, "_ in"]],
    beside: Float[Tensor, "rows in"] | None,
) -> Float[Tensor, "rows in"]:
    """The gradient of the layers' input, plus `beside`, whose memory it may take."""
    total, dtype = beside, weights[0].dtype
    widened = are_widened(dtype, weights[0].device)
    if widened and total is not None:
        total = total.float()
    for g, weight in zip(gradients, weights, strict=True):
        if widened:
            g, weight = g.float(), weight.float()
        total = g @ weight if total is None else total.addmm_(g, weight)
    assert total is not None, "there is a layer at least"
    return total.to(dtype)


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or bool(supported[dtype]())
