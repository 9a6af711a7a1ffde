"""LLaMA and the models of its shape: rotary positions, RMSNorm, SwiGLU, as many key heads as the config says.

LLaMA, LLaMA-2, Aquila (the same computation under a name of its own), Mistral, DeciCoder; Qwen1.5, Qwen2 and
Qwen2.5, which add biases to query, key and value, and Qwen3, which normalises query and key.
"""

from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from contracts.errors import UserError
from models import stepped
from models.stepped import Stepped

PREFIX = "model."


class Llama(Stepped, LlamaForCausalLM):
    pass


class Mistral(Stepped, MistralForCausalLM):
    pass


class Qwen2(Stepped, Qwen2ForCausalLM):
    pass


class Qwen3(Stepped, Qwen3ForCausalLM):
    pass


CLASSES = {
    "LlamaForCausalLM": Llama,
    "LLaMAForCausalLM": Llama,  # as the first conversions wrote it
    "AquilaForCausalLM": Llama,
    "AquilaModel": Llama,  # as Aquila-7B's config.json has it
    "DeciCoderForCausalLM": Llama,  # its own code only chooses among ways to run attention
    "MistralForCausalLM": Mistral,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
}
BY_TYPE = {"llama": Llama, "aquila": Llama, "mistral": Mistral, "qwen2": Qwen2, "qwen3": Qwen3}
ARCHITECTURES = tuple(CLASSES)
ROTARY = ("default", "linear", "llama3", "yarn")  # the others choose their tables by the length of the input


def build(config: dict, where: object) -> Stepped:
    named = next((CLASSES[name] for name in config.get("architectures") or [] if name in CLASSES), None)
    model = stepped.build(named or BY_TYPE[config["model_type"]], config, where, required=("intermediate_size",))
    kind = model.config.rope_parameters["rope_type"]
    if kind not in ROTARY:
        raise UserError(where, f"rotary positions of type {kind} are not supported", f"supported: {', '.join(ROTARY)}")
    model.model.rotary_emb = stepped.remake_tables(model, model.model.rotary_emb)
    return model
