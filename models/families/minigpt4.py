"""MiniGPT-4: EVA's ViT-g, BLIP-2's Q-Former, one linear layer, and Vicuna or Llama 2, as transformers' BLIP-2 with a LLaMA inside.

Source: minigpt4/models/{mini_gpt4,eva_vit,base_model}.py of Vision-CAIR/MiniGPT-4. It was published in pieces: eva_vit_g.pth (whose last
block of 40 MiniGPT-4 leaves out), blip2_pretrained_flant5xxl.pth (queries, Q-Former, ln_vision), a file that has the linear layer alone
(llama_proj), and the decoder in its own folder: suture.models.lavis says where each goes. config.json is transformers' for BLIP-2, but
for its model_type. MiniGPT-4 cuts a prompt at <ImageHere>, which is no token: image_token_index is one that texts have not.
"""

from transformers import PreTrainedModel

from suture.models import image_text
from suture.models.lavis import read_pieces, with_known_names

ARCHITECTURES = ("MiniGPT4",)
PREFIX = ""
EPSILON = 1e-5  # of ln_vision: torch's own; transformers' BLIP-2 takes the tower's
__all__ = ["build", "read_pieces", "with_known_names"]


def build(config: dict, where: object) -> PreTrainedModel:
    model = image_text.build({**config, "model_type": "blip-2"}, where)
    model.vision_model.post_layernorm.eps = EPSILON
    return model
