"""OPT: learned positions two rows into their table, LayerNorm before or after, ReLU. Galactica: GELU, no biases in some sizes."""

from transformers import OPTForCausalLM

from suture.models import stepped
from suture.models.stepped import Stepped

ARCHITECTURES = ("OPTForCausalLM",)
PREFIX = "model."


class OPT(Stepped, OPTForCausalLM):
    learned_positions = True


def build(config: dict, where: object) -> OPT:
    return stepped.build(OPT, config, where, keys=("ffn_dim", "max_position_embeddings"))
