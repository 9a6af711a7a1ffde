"""One fault at a time in how pictures are made, which those that judge pictures have to see."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def _same(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Fault:
    """What becomes of the text [2N,T,C], the edges [2N,3,S,S], a step's number, the ControlNet's residuals, the two predictions
    (without the text, and told it), the last latents [N,4,s,s], and the UNet, which may be changed in place."""

    text: Callable[[Tensor], Tensor] = _same
    edges: Callable[[Tensor], Tensor] = _same
    step: Callable[[Tensor], Tensor] = _same
    residual: Callable[[Tensor], Tensor] = _same
    predictions: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda without, told: (without, told)
    latents: Callable[[Tensor], Tensor] = _same
    unet: Callable[[nn.Module], None] = lambda unet: None


def _one_group(unet: nn.Module) -> None:
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 1


NONE = Fault()
FAULTS = {
    "no text": Fault(text=torch.zeros_like),
    "another caption": Fault(text=lambda text: text.roll(1, 0)),
    "no controls": Fault(residual=torch.zeros_like),
    "another picture's edges": Fault(edges=lambda edges: edges.roll(1, 0)),
    "one time step": Fault(step=lambda step: torch.full_like(step, 500)),
    "guidance the other way": Fault(predictions=lambda without, told: (told, without)),
    "channels in another order": Fault(latents=lambda latents: latents.roll(1, 1)),
    "one group": Fault(unet=_one_group),
}
