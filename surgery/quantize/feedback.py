"""Rounding in which later weights make up for what earlier ones lost: least |x (W - Ŵ)|² on text, not least |W - Ŵ|².

    q_k = round((w_k + Σ_{j<k} U_jk (w_j - ŵ_j)) / scale_k)        Σ xᵀx + λ = U D Uᵀ, U upper with ones on its diagonal

GPTQ (Frantar et al. 2022, arXiv 2210.17323), as its equal LDLQ writes it (Chee et al. 2023, arXiv 2307.13304): that takes
one Cholesky factor and no inverse. Only neighbouring inputs are set off against each other (inputs.py).
"""

import torch

from suture.surgery.quantize.formats import Values
from suture.surgery.quantize.inputs import Inputs
from suture.surgery.quantize.rounding import round_to

DAMPING = 0.01  # λ, of the mean of Σ x²: as GPTQ's
CHUNK = 64  # inputs whose errors are passed on one by one, before those after them get the sum


class Feedback:
    """What products that read x / s, [tokens, in], are rounded with."""

    def __init__(self, inputs: Inputs, scales: torch.Tensor):
        """scales: s, float32 [in]."""
        self.importance = torch.cat([products.diagonal() for products in inputs.products]) / scales.square()
        self.factors, first = [], 0
        for products in inputs.products:
            near = scales[first : first + len(products)]
            self.factors.append(_factor(products / near / near[:, None]))
            first += len(products)

    def rounded(self, rows: torch.Tensor, scales: torch.Tensor, values: Values) -> torch.Tensor:
        """Weights [out, in] as q, float32 [out, in], given their scales [out, in / block]."""
        weights = rows.T.contiguous()
        steps = scales.T.repeat_interleave(rows.shape[1] // scales.shape[1], dim=0)
        q, first = torch.empty_like(weights), 0
        for factor in self.factors:
            near = slice(first, first + len(factor))
            _round_neighbours(weights[near], steps[near], values, factor, q[near])
            first += len(factor)
        return q.T


def _factor(products: torch.Tensor) -> torch.Tensor:
    """U of U D Uᵀ = products + λ. Turned round, it is the lower factor that Cholesky gives, its columns divided."""
    mean = products.diagonal().mean()
    products.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    lower, failed = torch.linalg.cholesky_ex(products.double().flip(0, 1))
    assert not failed, "x holds a number that is none"
    upper = lower.flip(0, 1)
    return (upper / upper.diagonal()).float()


def _round_neighbours(
    weights: torch.Tensor, steps: torch.Tensor, values: Values, factor: torch.Tensor, q: torch.Tensor
) -> None:
    """Fills q from weights and steps, all [inputs, out]."""
    missed = torch.empty_like(weights)  # w - ŵ
    for start in range(0, len(weights), CHUNK):
        chunk = slice(start, start + CHUNK)
        wanted = weights[chunk] + factor[:start, chunk].T @ missed[:start]
        for near, row in enumerate(wanted):
            place = start + near
            q[place] = round_to(row / steps[place], values)
            missed[place] = weights[place] - q[place] * steps[place]
            wanted[near + 1 :].addr_(factor[place, place + 1 : start + len(wanted)], missed[place])
