"""What LLaMA and the models of its shape share: tables of rotary positions, and windows counted in a row's own tokens."""

from torch import Tensor

from suture.core.errors import UserError
from suture.models import stepped
from suture.models.layers import visible
from suture.models.stepped import Stepped

ROTARY = ("default", "linear", "llama3", "yarn")  # the others choose their tables by the length of the input


class Windowed(Stepped):
    """transformers counts a window in slots of the cache, those of padding among them: beside a longer row a token would see
    fewer of its own. A row gets here what it gets alone."""

    def mask(self, attention_mask: Tensor, steps: int) -> Tensor | dict[str, Tensor]:
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


def build(model_class: type[Stepped], config: dict, where: object) -> Stepped:
    model = stepped.build(model_class, config, where, keys=("intermediate_size",))
    kind = (model.config.rope_parameters or {}).get("rope_type")
    if kind not in ROTARY:
        raise UserError(where, f"rotary positions of type {kind} are not supported", f"supported: {', '.join(ROTARY)}")
    if model.dimensions.head_dim % 2:
        raise UserError(where, f"rotary positions need an even head_dim, not {model.dimensions.head_dim}", "use an even number")
    model.model.rotary_emb = stepped.remake_tables(model, model.model.rotary_emb, where)
    return model
