"""What products read while the graph reads text, added up a piece at a time: memory grows with their inputs, not the text."""

from dataclasses import dataclass, field

import torch

from suture.surgery.quantize.formats import Format

SAMPLES = 1024  # tokens kept as they are
NEIGHBOURS = 512  # inputs that are known by how they go together; what is kept of each is one row of so many


@dataclass
class Inputs:
    """Of x, float32 [tokens, in]. `products`: Σ xᵀx of one run of neighbouring inputs after the other, [≤ NEIGHBOURS, the
    same], where weights alone are rounded; `samples`: some of x, where x is rounded, too."""

    largest: torch.Tensor  # [in], of |x|
    total: torch.Tensor  # [in], of |x|
    products: list[torch.Tensor] = field(default_factory=list)
    samples: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0

    @classmethod
    def of(cls, features: int) -> "Inputs":
        return cls(torch.zeros(features), torch.zeros(features))

    def add(self, x: torch.Tensor, form: Format, share: float) -> None:
        """`share`: that of x in all that will be added."""
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        self.total += x.abs().sum(0)
        self.tokens += len(x)
        if form.balance is None:
            return
        if form.activations:
            self.samples.append(x[:: max(int(len(x) / (SAMPLES * share)), 1)])
        elif not self.products:
            self.products = [part.T @ part for part in x.split(NEIGHBOURS, dim=1)]
        else:
            for products, part in zip(self.products, x.split(NEIGHBOURS, dim=1)):
                products.addmm_(part.T, part)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.tokens

    def error(self, difference: torch.Tensor) -> torch.Tensor:
        """Σ |x Eᵀ|² for E, [out, in], as far as neighbours tell."""
        parts = zip(self.products, difference.split(NEIGHBOURS, dim=1))
        return sum(((part @ products) * part).sum(dtype=torch.float64) for products, part in parts)
