"""One level of validation: which comparison it is, and what it found."""

from dataclasses import dataclass, field

from suture.core.proof import verdict
from suture.validate.compare import FAILED, NOT_RUN, Comparison
from suture.validate.picture_result import PictureResult
from suture.validate.tokens import TokenResult

TITLES = {
    1: "PyTorch ↔ exported graph",
    **verdict.TITLES,
    4: "Portable graph ↔ engine",
    5: "Tokens on real text",
}
SHADOW_COPY_NOTE = "In onnxruntime, bfloat16 graphs ran as float32 shadow copies with the same weights: its CPU has no bfloat16"


DRAWN = 0.01  # by how much less of what was drawn a candidate may find, in the mean


@dataclass
class MaskResult:
    """Means over the pictures of intersections over union, from 0 to 1."""

    reference: str
    candidate: str
    pictures: int
    limit: float
    alike: float  # of both models' masks
    least_alike: float
    of_reference: float  # of the reference's masks and what was drawn
    of_candidate: float
    shown: str  # a PNG picture as a data URI: a row for each of the first pictures, as drawn, the reference's mask, the candidate's

    @property
    def passed(self) -> bool:
        return self.alike >= self.limit and self.of_candidate >= self.of_reference - DRAWN


@dataclass
class FrameResult:
    """Decibels (peak signal-to-noise ratio) between two models' frames."""

    reference: str
    candidate: str
    frames: list[int]  # their numbers
    limit: float
    psnr: list[float]  # of each frame
    canonical: float  # of the canonical picture
    edited: list[float]  # of each frame of an edited canonical picture
    shown: str  # a PNG picture as a data URI: a row for each of the first frames: the reference's, the candidate's, both of the edited

    @property
    def worst(self) -> float:
        return min(*self.psnr, self.canonical, *self.edited)

    @property
    def passed(self) -> bool:
        return self.worst >= self.limit


@dataclass(frozen=True)
class Answered:
    """One question about a picture, and both answers."""

    question: str
    right: str
    reference: str
    candidate: str
    picture: str | None  # a PNG picture as a data URI, of the first ones


@dataclass
class AnswerResult:
    """Of the reference's own answers, token by token: how far the candidate's probabilities are off, in nats in the mean, and of how many
    it would have chosen the same token."""

    reference: str
    candidate: str
    kl_limit: float
    agreement_limit: float
    mean_kl: float
    agreement: float
    answers: list[Answered]
    reference_right: int = 0
    candidate_right: int = 0
    alike: int = 0

    def __post_init__(self) -> None:
        self.reference_right = sum(each.reference == each.right for each in self.answers)
        self.candidate_right = sum(each.candidate == each.right for each in self.answers)
        self.alike = sum(each.reference == each.candidate for each in self.answers)

    @property
    def passed(self) -> bool:
        return self.mean_kl <= self.kl_limit and self.agreement >= self.agreement_limit


@dataclass
class DriveResult:
    """What two models make of the same frames: the largest distances in metres, and what both find."""

    reference: str
    candidate: str
    frames: int
    metres: float  # that they may be apart
    alike: float  # the least intersection over union of the cells that both say will be covered
    objects: int = 0  # tracks of either, over all frames
    same: int = 0  # of both, and of one class
    box: float = 0.0
    trajectory: float = 0.0
    plan: float = 0.0
    covered: int = 0  # cells of either, over all frames and steps
    covered_same: int = 0
    shown: str = (
        ""  # a PNG picture as a data URI: of each of the first frames a row: pictures, the reference's view, the candidate's
    )

    @property
    def farthest(self) -> float:
        return max(self.box, self.trajectory, self.plan)

    @property
    def covered_alike(self) -> float:
        return self.covered_same / self.covered if self.covered else 1.0

    @property
    def passed(self) -> bool:
        return self.same == self.objects and self.farthest <= self.metres and self.covered_alike >= self.alike


@dataclass(frozen=True)
class BrokenStage:
    """What a stage wrote, or should have written, and nothing can be made of: each level that needs it has failed."""

    reason: str


@dataclass
class Level:
    number: int | None  # None: two graphs compared outside a pipeline
    title: str
    status: str
    reason: str | None = None
    comparison: Comparison | None = None
    tokens: TokenResult | None = None
    pictures: PictureResult | None = None
    masks: MaskResult | None = None
    answers: AnswerResult | None = None
    frames: FrameResult | None = None
    drive: DriveResult | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> str:
        """The largest error of a comparison, the least alike of pictures, masks or frames, the farthest of a drive; "" where there is none."""
        if self.pictures:
            return f"{self.pictures.worst} dB, {self.pictures.least_similar:.3f} alike"
        if self.masks:
            return f"IoU {self.masks.alike:.4f} of {self.masks.limit:g}"
        if self.answers:
            return f"{self.answers.alike} of {len(self.answers.answers)} answers alike"
        if self.frames:
            return f"{self.frames.worst:.1f} dB of {self.frames.limit:g}"
        if self.drive:
            return f"{self.drive.farthest:.2g} m of {self.drive.metres:g}"
        worst = self.comparison.worst if self.comparison else None
        if worst is None:
            return ""
        return worst.problem or f"{worst.error:.1e} of {self.comparison.tolerance:.0e}"


def not_run(number: int, reason: str, title: str | None = None) -> Level:
    """For what this machine cannot do, and for what no stage was asked for."""
    return Level(number, title or TITLES[number], NOT_RUN, reason)


def failed(number: int, reason: object, title: str | None = None) -> Level:
    """For what a stage wrote, or should have written, and nothing can be made of."""
    return Level(number, title or TITLES[number], FAILED, str(reason))
