"""Qwen1.5, Qwen2 and Qwen2.5: LLaMA's shape with biases of query, key and value."""

from transformers import Qwen2ForCausalLM

from suture.models import rotary_decoder
from suture.models.rotary_decoder import WindowedLayers

ARCHITECTURES = ("Qwen2ForCausalLM",)
PREFIX = "model."


class Qwen2(WindowedLayers, Qwen2ForCausalLM):
    pass


def build(config: dict, where: object) -> Qwen2:
    return rotary_decoder.build(Qwen2, config, where)
