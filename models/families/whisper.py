"""Whisper: an encoder of log-mel spectrograms and a decoder that attends to itself and, by cross-attention, to the encoder.

The encoder's graph ends in the keys and values of every cross-attention, made once for a piece of audio; the decoder
takes them as caches that no step changes. Both are transformers' own modules.
"""

from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from suture.core.signature import FEATURES, past_name, present_name
from suture.models import stepped
from suture.models.dimensions import Dimensions
from suture.models.parts import DECODER, GRAPH, Part, Port

ARCHITECTURES = ("WhisperForConditionalGeneration",)
PREFIX = "model."
REQUIRED = ("decoder_layers", "decoder_attention_heads", "num_mel_bins", "max_source_positions", "max_target_positions")
FRAMES_A_SLOT = 2  # the encoder's second convolution halves the frames


class Whisper(nn.Module):
    """The decoder as a step, and the encoder beside it, where there is one."""

    def __init__(self, config, encoder: nn.Module | None, decoder: nn.Module):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        if encoder is not None:
            self.model.encoder = encoder
        self.model.decoder = decoder

    @property
    def dimensions(self) -> Dimensions:
        config = self.config
        heads = config.decoder_attention_heads
        return Dimensions(
            layers=config.decoder_layers,
            heads=heads,
            kv_heads=heads,
            head_dim=config.d_model // heads,
            hidden=config.d_model,
            vocab=config.vocab_size,
            positions=config.max_target_positions,
            encoder_slots=config.max_source_positions,
        )

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One step, as suture.models.families.qwen.Qwen.forward. `past`: the caches of self-attention [B,H,P,D], then those of
        cross-attention [B,H,encoder_slots,D], which WhisperEncoder makes; only the former are returned."""
        own, cross = past[: len(past) // 2], past[len(past) // 2 :]  # as many as layers are traced
        caches = [DynamicCache(list(zip(each[0::2], each[1::2]))) for each in (own, cross)]
        hidden = self.model.decoder(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=EncoderDecoderCache(*caches),
            encoder_hidden_states=cross[0],  # only says that there is an encoder: its caches are full
            use_cache=True,
        ).last_hidden_state
        logits = nn.functional.linear(hidden, self.model.decoder.embed_tokens.weight)
        return logits, [tensor for layer in caches[0].layers for tensor in (layer.keys, layer.values)]

    def parts(self) -> tuple[Part, Part]:
        """The encoder, once for a piece of audio, then the decoder, step by step; over the same parameters."""
        encoder = WhisperEncoder(self.config, self.model.encoder, self.model.decoder).eval()
        decoder = Whisper(self.config, None, self.model.decoder).eval()
        of = self.dimensions
        places = [(layer, f"encoder.{role}") for layer in range(of.layers) for role in ("key", "value")]
        caches = {present_name(*place): Port(("batch", of.kv_heads, of.encoder_slots, of.head_dim)) for place in places}
        return (
            Part("encoder", GRAPH, encoder, {FEATURES: Port(("batch", *encoder.features))}, caches),
            Part("decoder", DECODER, decoder, reads={past_name(*each): f"encoder/{present_name(*each)}" for each in places}),
        )


class WhisperEncoder(nn.Module):
    """A log-mel spectrogram to the keys and values of the decoder's cross-attention."""

    def __init__(self, config, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.encoder = encoder
        self.model.decoder = nn.Module()
        self.model.decoder.layers = nn.ModuleList(_only(layer, "encoder_attn", "k_proj", "v_proj") for layer in decoder.layers)

    @property
    def features(self) -> tuple[int, int]:
        """Mel bins and frames of the input."""
        return self.config.num_mel_bins, FRAMES_A_SLOT * self.config.max_source_positions

    def forward(self, input_features: Tensor) -> list[Tensor]:
        """[B, mel bins, frames] to key and value [B,H,encoder_slots,D] of layer 0, of layer 1, ..."""
        hidden = self.model.encoder(input_features).last_hidden_state
        heads = self.config.decoder_attention_heads
        caches = []
        for layer in self.model.decoder.layers:
            for project in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj):
                caches.append(project(hidden).unflatten(2, (heads, -1)).transpose(1, 2))
        return caches


def _only(layer: nn.Module, attention: str, *projections: str) -> nn.Module:
    """A module with nothing but these projections of the layer, under the names that they have there."""
    kept = nn.Module()
    kept.add_module(attention, nn.Module())
    for name in projections:
        kept.get_submodule(attention).add_module(name, layer.get_submodule(f"{attention}.{name}"))
    return kept


def build(config: dict, where: object) -> Whisper:
    model = stepped.build(WhisperForConditionalGeneration, config, where, keys=REQUIRED)
    return Whisper(model.config, model.model.encoder, model.model.decoder)
