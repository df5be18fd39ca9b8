"""Linear layers whose weights were put once into the order that the CPU's matrix kernels read (oneDNN's blocks).

A plain product with a few rows in bfloat16 brings its weights into that order on every call, a pass over all of them
beside the one that multiplies. For sampling on the CPU only: packed weights have no gradients and are not saved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok.counters import count
from vtok.layers.attention import Attention


class PackedLinear(nn.Module):
    """x weight^T + bias for x [.., in], of a weight [out, in] in bfloat16 or float32 on the CPU.

    rows: of the product that the order is chosen for; others work too.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rows: int) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        count("linear.packed")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packable(weight: Tensor) -> bool:
    """Whether this build and processor have packed products of the weight's dtype."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype is torch.float32 or (
        weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_linears(module: nn.Module, *, rows: int = 2) -> int:
    """Pack every nn.Linear inside `module`, in place; returns how many. rows: of a typical product (2: one image with
    guidance). Raises ValueError where the processor cannot."""
    found = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    found = [(parent, name, child) for parent, name, child in found if type(child) is nn.Linear]
    for _, _, linear in found:
        if not packable(linear.weight):
            kind = f"{linear.weight.dtype} on {linear.weight.device.type}"
            raise ValueError(f"packed=true: no packed products for {kind} here; choose packed=false, or another dtype")
    for parent, name, linear in found:
        folds = isinstance(parent, Attention) and name == "qkv"
        bias = parent.joint_bias() if folds else linear.bias
        setattr(parent, name, PackedLinear(linear.weight, bias, rows=rows))
        if folds:  # q and v have theirs inside now
            parent.q_bias = parent.v_bias = None
    return len(found)
