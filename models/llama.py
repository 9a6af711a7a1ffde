"""LLaMA and the models of its shape: rotary positions, RMSNorm, SwiGLU, as many key heads as the config says.

LLaMA, LLaMA-2, Aquila (the same computation under a name of its own), Mistral, DeciCoder; Qwen1.5, Qwen2 and
Qwen2.5, which add biases to query, key and value, and Qwen3, which normalises query and key.
"""

from torch import Tensor
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from suture.core.errors import UserError
from suture.models import stepped
from suture.models.layers import visible
from suture.models.stepped import Stepped

PREFIX = "model."


class Llama(Stepped, LlamaForCausalLM):
    pass


class Mistral(Stepped, MistralForCausalLM):
    """transformers counts a window in slots of the cache, those of padding among them: beside a longer row a token would see
    fewer of its own. A row gets here what it gets alone."""

    def mask(self, attention_mask: Tensor, steps: int) -> Tensor:
        window = self.config.sliding_window
        return attention_mask if window is None else visible(attention_mask, steps, window)


class WindowedLayers(Stepped):
    """The same where the config says of each layer whether it has the window."""

    def mask(self, attention_mask: Tensor, steps: int) -> Tensor | dict[str, Tensor]:
        window = self.config.sliding_window
        if window is None:
            return attention_mask
        windows = {"full_attention": None, "sliding_attention": window}
        return {kind: visible(attention_mask, steps, n) for kind, n in windows.items() if kind in self.config.layer_types}


class Qwen2(WindowedLayers, Qwen2ForCausalLM):
    pass


class Qwen3(WindowedLayers, Qwen3ForCausalLM):
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
    model = stepped.build(named or BY_TYPE[config["model_type"]], config, where, keys=("intermediate_size",))
    kind = (model.config.rope_parameters or {}).get("rope_type")
    if kind not in ROTARY:
        raise UserError(where, f"rotary positions of type {kind} are not supported", f"supported: {', '.join(ROTARY)}")
    if model.dimensions.head_dim % 2:
        raise UserError(
            where, f"rotary positions of {model.dimensions.head_dim} values a head are no pairs", "use an even number"
        )
    model.model.rotary_emb = stepped.remake_tables(model, model.model.rotary_emb, where)
    return model
