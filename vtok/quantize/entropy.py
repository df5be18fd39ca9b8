"""The entropy terms that keep large codebooks in use (Yu et al., arXiv 2310.05737, equation 5; Yu et al., 2110.04627).

A vector's soft assignment to the codes should be sharp, its mean over the vectors flat:
loss = sample_weight * mean entropy - batch_weight * entropy of the mean. Natural logarithms throughout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# inside the logarithm of the mean assignment, as in every published implementation. At 2^18 codes it is larger than a
# uniform share (3.8e-6) and so lowers the largest value, log 2^18 = 12.48, to 11.19.
EPS = 1e-5


def mean_entropy(shares: Tensor) -> Tensor:
    """Entropy of the mean assignment `shares` [V], summing to 1: a scalar."""
    return -(shares * torch.log(shares + EPS)).sum()


def bit_entropy(log_odds: Tensor) -> Tensor:
    """Entropy [..] of independent bits that are 1 with probability sigmoid(log_odds [.., n]): the sum over n."""
    return -(torch.sigmoid(log_odds) * F.logsigmoid(log_odds) + torch.sigmoid(-log_odds) * F.logsigmoid(-log_odds)).sum(
        -1
    )


def mean_of_products(log_odds: Tensor) -> Tensor:
    """Mean over N vectors of the distribution over 2^n codes that independent bits have; shares [2^n], bit 0 lowest.

    log_odds [N, n]. The N x 2^n table of all products is never made: the bits are cut in halves, and the mean of the
    products of the halves' tables is one matrix product, [2^(n/2), N] times [N, 2^(n/2)]. It is exact.
    """
    count, bits = log_odds.shape
    low, high = (_products(part) for part in log_odds.split([bits // 2, bits - bits // 2], dim=1))
    return (high.T @ low).flatten() / count


def _products(log_odds: Tensor) -> Tensor:
    """Probability of every one of 2^n codes, [N, 2^n], bit 0 lowest."""
    ones, zeros = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
    shares = log_odds.new_ones(len(log_odds), 1)
    for i in range(log_odds.shape[1]):
        shares = torch.cat([shares * zeros[:, i : i + 1], shares * ones[:, i : i + 1]], 1)
    return shares
