"""LLaMA and LLaMA-2, DeciCoder: rotary positions, RMSNorm, SwiGLU, as many key heads as the config says."""

from transformers import LlamaForCausalLM

from suture.models import rotary_decoder
from suture.models.stepped import Stepped

ARCHITECTURES = (
    "LlamaForCausalLM",
    "LLaMAForCausalLM",  # as the first conversions wrote it
    "AquilaForCausalLM",
    "AquilaModel",  # as Aquila-7B's config.json has it
    "DeciCoderForCausalLM",  # its own code only chooses among ways to run attention
)
PREFIX = "model."


class Llama(Stepped, LlamaForCausalLM):
    pass


def build(config: dict, where: object) -> Stepped:
    return rotary_decoder.build(Llama, config, where)
