"""What a run took: tokens that were really put out, seconds, and bytes that decoding had to read."""

from dataclasses import dataclass, field
from statistics import mean


@dataclass
class Speed:
    weight_bytes: int = 0  # that a decoding step reads
    read: int = 0  # tokens of prompts that were fed
    reused: int = 0  # tokens of prompts that the cache held already
    prompt_seconds: float = 0.0
    written: int = 0  # tokens chosen, the last of each answer included
    decoded: int = 0  # those among them that a decoding step gave: all but the first of each answer
    chunks: int = 0  # steps that read prompts
    steps: int = 0  # that decode
    rows: int = 0  # of all decoding steps together, whether they had a sequence or not
    guessed: int = 0  # tokens that prompt lookup added to steps
    accepted: int = 0  # of these, that turned out right
    decode_seconds: float = 0.0
    decode_bytes: int = 0  # every weight once a step, the caches' valid slots, and all that cross-attention reads
    first: list[float] = field(default_factory=list)  # seconds to an answer's first token, from the encoder or the prompt on

    def lines(self) -> list[str]:
        """The summary: one line on prompts, one on decoding where there was any."""
        prompt = f"{self.read} prompt tokens in {self.prompt_seconds:.2f} s"
        if self.prompt_seconds:
            prompt += f" ({_figure(self.read / self.prompt_seconds)} tokens/s)"
        if self.reused:
            prompt += f", {self.reused} more in the cache already"
        if self.first:
            prompt += f"; first token after {1000 * mean(self.first):,.0f} ms" + ", on average" * (len(self.first) > 1)
        lines = [prompt]
        if self.decode_seconds:
            rate, bandwidth = self.decoded / self.decode_seconds, self.decode_bytes / self.decode_seconds / 1e9
            answers = f" in {len(self.first)} answers" if len(self.first) > 1 else ""
            lines.append(
                f"{self.written} tokens written{answers}; {self.steps} decoding steps in {self.decode_seconds:.2f} s: "
                f"{_figure(rate)} tokens/s, {_figure(1000 * self.decode_seconds / self.steps)} ms a step, {_figure(bandwidth)} GB/s"
            )
        else:
            lines.append(f"{self.written} tokens written")
        return lines


def _figure(value: float) -> str:
    """Three figures that count, or all before the point."""
    digits = next((digits for digits, least in enumerate((100, 10, 1)) if value >= least), 3)
    return f"{value:,.{digits}f}" if value >= 0.1 else f"{value:.2g}"
