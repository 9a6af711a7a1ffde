"""Qwen3: LLaMA's shape, query and key normalised."""

from transformers import Qwen3ForCausalLM

from suture.models import rotary_decoder
from suture.models.rotary_decoder import WindowedLayers

ARCHITECTURES = ("Qwen3ForCausalLM",)
PREFIX = "model."


class Qwen3(WindowedLayers, Qwen3ForCausalLM):
    pass


def build(config: dict, where: object) -> Qwen3:
    return rotary_decoder.build(Qwen3, config, where)
