"""GPT-2: learned positions, LayerNorm, GELU, projections stored as [in, out]. gpt2-medium, camel-5b."""

from transformers import GPT2LMHeadModel

from suture.models import stepped
from suture.models.stepped import Stepped

ARCHITECTURES = ("GPT2LMHeadModel",)
PREFIX = "transformer."


class GPT2(Stepped, GPT2LMHeadModel):
    learned_positions = True


def build(config: dict, where: object) -> GPT2:
    return stepped.build(GPT2, config, where, keys=("max_position_embeddings",))
