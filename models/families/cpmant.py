"""CPM-Ant: 32 learned tokens of a task before the text, a bias by distance and segment instead of positions. CPM-Ant-10B.

Written out (modeling_cpmant.py of transformers, whose module takes the whole text again at each step of its cache). The
task's tokens are tokens here, too: they begin every row, and have ids beyond the vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from suture.models.cpm import CpmConfig, CpmEncoder, PositionBias, places_of
from suture.models.dimensions import Dimensions

ARCHITECTURES = ("CpmAntForCausalLM",)
PREFIX = "cpmant."
TASK, TEXT = 0, 2  # segments
GENERATION = 2  # of the learned tasks, the one that transformers gives to every text


class CpmAntModel(nn.Module):
    """Only holds the parameters that the checkpoint names cpmant.*"""

    def __init__(self, config: CpmConfig, segments: int, tasks: int, task_length: int):
        super().__init__()
        self.encoder = CpmEncoder(config)
        self.segment_embedding = nn.Embedding(segments, config.hidden)
        self.input_embedding = nn.Embedding(config.vocab + tasks * task_length, config.hidden)
        self.position_bias = PositionBias(config, segments * segments)


class CPMAnt(nn.Module):
    """A decoder with its KV cache as arguments and results. Builds on any device, "meta" too."""

    def __init__(self, config: CpmConfig, segments: int, tasks: int, task_length: int):
        super().__init__()
        self.config, self.segments, self.task_length = config, segments, task_length
        self.cpmant = CpmAntModel(config, segments, tasks, task_length)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)

    @property
    def dimensions(self) -> Dimensions:
        first = self.config.vocab + GENERATION * self.task_length
        return replace(self.config.dimensions, prefix=tuple(range(first, first + self.task_length)))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One step, as suture.models.families.qwen.Qwen.forward, but that its tokens see each other. A row's first tokens are
        `dimensions.prefix`."""
        places = places_of(attention_mask)
        segment, of_slots = self._segment(position_ids), self._segment(places)
        same = segment[:, :, None] == of_slots[:, None, :]
        relation = segment[:, :, None] * self.segments + of_slots[:, None, :]
        bias = self.cpmant.position_bias(position_ids, places, same, relation)
        x = self.cpmant.input_embedding(input_ids) + self.cpmant.segment_embedding(segment)
        x, presents = self.cpmant.encoder(x, attention_mask, bias, past)
        return self.lm_head(x), presents

    def _segment(self, places: Tensor) -> Tensor:
        return torch.where(places < self.task_length, TASK, TEXT)


def build(config: dict, where: object) -> CPMAnt:
    segments, tasks, length = (config.get(key, 32) for key in ("segment_types", "prompt_types", "prompt_length"))
    return CPMAnt(CpmConfig.read(config, where), segments, tasks, length)
