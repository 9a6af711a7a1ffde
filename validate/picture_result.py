"""What level 5 finds of a model that makes pictures."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pair:
    """One picture by both: PNG files as base64, and how alike they are. `psnr`: None where no pixel differs."""

    prompt: str
    edges: str | None
    reference: str
    candidate: str
    psnr: float | None
    ssim: float
    shown: tuple[bool, bool]  # whether each shows what was asked for


@dataclass(frozen=True)
class PictureResult:
    reference: str
    candidate: str
    size: tuple[int, int]
    steps: int
    guidance: float
    limits: dict[str, float]
    latent_errors: list[float] = field(
        default_factory=list
    )  # after each step: the difference's root mean square over the reference's
    pairs: list[Pair] = field(default_factory=list)

    @property
    def worst(self) -> str:
        """The least decibels of any picture."""
        found = [pair.psnr for pair in self.pairs if pair.psnr is not None]
        return f"{min(found):.1f}" if found else "∞"

    @property
    def least_similar(self) -> float:
        return min(pair.ssim for pair in self.pairs)

    @property
    def passed(self) -> bool:
        return all(
            (pair.psnr is None or pair.psnr >= self.limits["psnr"]) and pair.ssim >= self.limits["ssim"] for pair in self.pairs
        )
