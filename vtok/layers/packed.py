"""Linear layers whose weights were put once into the order that the CPU's matrix kernels read (oneDNN's blocks).

A plain product of a few rows reads its weights in an order that does not suit it, and in bfloat16 brings them into that
order on every call. Two rows of a small model, one image with guidance, take a third of the time when packed. A layer
whose result stays float32 beside a trunk in bfloat16 has its weights in float16 (`HalfLinear`), half the bytes; that
alone is for CUDA too. For sampling only: such weights have no gradients and are not saved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok.counters import count
from vtok.layers.attention import Attention
from vtok.layers.linear import Linear
from vtok.layers.linear import linear as product
from vtok.precision import summed_in_float32

PLAIN = (nn.Linear, Linear)  # layers whose weights may be stored otherwise; other subclasses read them themselves


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# the same for compiled code, which would read the weight's strides, and it has none
_LIBRARY = torch.library.Library("vtok", "DEF")
_LIBRARY.define("packed_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("packed_product", _packed_product, "CompositeExplicitAutograd")
torch.library.register_fake("vtok::packed_product", lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))


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
        product = torch.ops.vtok.packed_product if torch.compiler.is_compiling() else _packed_product
        return product(x, self.weight, self.bias)


class HalfLinear(nn.Module):
    """x weight^T + bias, float32 [.., out] of x float32 [.., in], with a weight [out, in] kept in float16 on the CPU.

    FBGEMM's product: it reads 16 bits a weight, and multiplies and sums in float32, so that neither x nor the result is
    rounded, and a weight to 11 bits (one beyond 65,504 becomes that). It is bound by the rate of float32 products from
    some 16 rows on. oneDNN's product of bfloat16 would round the result to 8 bits too.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        given = None if bias is None else bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float().contiguous(), given)
        # FBGEMM holds the numbers where no tensor shows them; this one says how many there are
        self.weight, self.bias = torch.empty(weight.shape, dtype=torch.float16, device="meta"), given

    def forward(self, x: Tensor) -> Tensor:
        count("linear.half")
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class HalfLinearOnCuda(HalfLinear):
    """The same on CUDA, of x that comes from a trunk in bfloat16: float16 holds its 8 bits (up to 65,504), products of
    float16 are exact in float32, and tensor cores sum them in it. As fast as the trunk's own products, where float32
    has a fifteenth of their rate on an H200."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        most = torch.finfo(torch.float16).max
        self.register_buffer("weight", weight.detach().clamp(-most, most).half(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        count("linear.half")
        product = summed_in_float32(x.flatten(0, -2).half(), self.weight.T).unflatten(0, x.shape[:-1])
        return product if self.bias is None else product + self.bias


def halve_linears(module: nn.Module) -> int:
    """Make `HalfLinearOnCuda` of the linear layers that their owner lists in `halves`, in place; returns how many."""
    found = [
        (parent, name, linear) for parent, name, linear in linears(module) if name in getattr(parent, "halves", ())
    ]
    for parent, name, linear in found:
        setattr(parent, name, HalfLinearOnCuda(linear.weight, linear.bias))
    return len(found)


def float32_linear(linear: nn.Linear | PackedLinear | HalfLinear, x: Tensor) -> Tensor:
    """The layer in float32 whatever its weights' and x's dtype, outside autocast."""
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(linear, HalfLinear) or (
            isinstance(linear, PackedLinear) and linear.weight.dtype is torch.float32
        ):
            return linear(x.float())
        bias = None if linear.bias is None else linear.bias.float()
        return product(x.float(), linear.weight.float(), bias)


def packable(weight: Tensor) -> bool:
    """Whether this build and processor have packed products of the weight's dtype."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype is torch.float32 or (
        weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def can_halve() -> bool:
    """Whether this build has FBGEMM's products of float32 with float16."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def linears(module: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(owner, name, layer) of every linear layer inside, but for those that their owner lists in `unpacked`: it reads
    their weights otherwise than by a product with all of them."""
    found = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    return [f for f in found if type(f[2]) in PLAIN and f[1] not in getattr(f[0], "unpacked", ())]


def can_pack(module: nn.Module) -> bool:
    """Whether there is something to pack, and everything can be."""
    found = linears(module)
    return bool(found) and all(packable(linear.weight) for _, _, linear in found)


def pack_linears(module: nn.Module, *, rows: int = 2, halved: bool = False) -> int:
    """Pack every linear layer inside `module`, in place; returns how many. rows: of a typical product (2: one image
    with guidance). halved: layers that their owner lists in `halves` become `HalfLinear`. Raises ValueError where the
    processor cannot."""
    found = linears(module)
    for _, _, linear in found:
        if not packable(linear.weight):
            kind = f"{linear.weight.dtype} on {linear.weight.device.type}"
            raise ValueError(f"packed=true: no packed products for {kind} here; choose packed=false, or another dtype")
    total = len(found)
    while found:  # one layer's weights at a time exist twice
        parent, name, linear = found.pop()
        folds = isinstance(parent, Attention) and name == "qkv"
        bias = parent.joint_bias() if folds else linear.bias
        half = halved and name in getattr(parent, "halves", ())
        packed = HalfLinear(linear.weight, bias) if half else PackedLinear(linear.weight, bias, rows=rows)
        setattr(parent, name, packed)
        if folds:  # q and v have theirs inside now
            parent.q_bias = parent.v_bias = None
    return total
