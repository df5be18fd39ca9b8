"""The rotation trick: gradients of a quantised vector turn and stretch with it instead of being copied.

Fifty et al., arXiv 2410.06424, section 4. The code q is written as (|q| / |z|) R z, where R turns z's direction onto
q's; R and the ratio count as constants, so the gradient with respect to z is (|q| / |z|) R^T times that of q.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rotated(z: Tensor, codes: Tensor) -> Tensor:
    """Vectors of z's shape [.., C] that are bitwise `codes` [.., C], with the gradient above. float32."""
    length = z.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6)
    ratio = codes.detach().norm(dim=-1, keepdim=True) / length
    u, q = z.detach() / length, F.normalize(codes.detach(), dim=-1)
    middle = F.normalize(u + q, dim=-1)
    along = (z * middle).sum(-1, keepdim=True) * middle
    turned = ratio * (z - 2 * along + 2 * (z * u).sum(-1, keepdim=True) * q)
    return codes.detach() + (turned - turned.detach())
