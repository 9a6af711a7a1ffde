"""Ziya-Visual: InstructBLIP's ViT-g and Q-Former, which reads the instruction, too, and LLaMA-13B of another vocabulary.

Published as Ziya-BLIP2-14B-Visual-v1 without its decoder, which is Ziya-LLaMA-13B-v1 (its page sets model.language_model to that), so the
two are read from two folders: suture.models.lavis says where each goes. The code that came with it ran from its repository; that its tensors
have the names of transformers' InstructBLIP is taken from what it was built on, and was not seen in the published file: names that
differ are refused by name, LAVIS's are read.
"""

from transformers import PreTrainedModel

from suture.models import image_text
from suture.models.lavis import read_pieces, with_known_names

ARCHITECTURES = ("ZiyaVisual",)
PREFIX = ""
__all__ = ["build", "read_pieces", "with_known_names"]


def build(config: dict, where: object) -> PreTrainedModel:
    return image_text.build({**config, "model_type": "instructblip"}, where)
