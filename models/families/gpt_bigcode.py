"""GPTBigCode: GPT-2 with one key head for all query heads. StarCoder, WizardCoder-15B."""

from transformers import GPTBigCodeForCausalLM

from suture.models import stepped
from suture.models.stepped import Stepped

ARCHITECTURES = ("GPTBigCodeForCausalLM",)
PREFIX = "transformer."


class GPTBigCode(Stepped, GPTBigCodeForCausalLM):
    learned_positions = True


def build(config: dict, where: object) -> GPTBigCode:
    model = stepped.build(GPTBigCode, config, where, keys=("max_position_embeddings",))
    del model.transformer.bias  # a square table of causality that the forward does not read
    return model
