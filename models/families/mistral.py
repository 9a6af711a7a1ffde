"""Mistral: LLaMA's shape, every layer with the config's sliding window."""

from transformers import MistralForCausalLM

from suture.models import rotary_decoder
from suture.models.rotary_decoder import Windowed

ARCHITECTURES = ("MistralForCausalLM",)
PREFIX = "model."


class Mistral(Windowed, MistralForCausalLM):
    pass


def build(config: dict, where: object) -> Mistral:
    return rotary_decoder.build(Mistral, config, where)
