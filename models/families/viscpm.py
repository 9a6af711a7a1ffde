"""VisCPM-Chat: BEiT-3's multiway tower, 64 learned queries that go through it beside a picture, and CPM-Bee over embeddings.

Source: VisCPM/models/{vlu_cpmbee,beit3}.py of OpenBMB/VisCPM, and torchscale's encoder, multihead_attention, feedforward_network and
multiway_network. A multiway module has two sets of weights, A for a picture's tokens and B for the queries. Here the two go through the
layers side by side and only attention joins them, so that no product is cut in two and put together again:

    [q|k|v] = [A(norm_A(x)), B(norm_B(y))]    x, y += out_A(ln_A(...)), out_B(ln_B(...))    x, y += ffn_A(norm_A(x)), ffn_B(norm_B(y))

Tensors have the published names, but that CPM-Bee's (llm.) are called as transformers calls them (cpmbee.). Not read: the tower's text
embedding, mask token and mim_head, which nothing of it uses. CPM-Bee divides what it embeds by sqrt(hidden), and a picture's features take
the place of what it has divided: they are given out times sqrt(hidden), which is 64 for the published width, and exact.
"""

import math
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from suture.core.errors import UserError
from suture.core.pictures import DECODER as LANGUAGE
from suture.core.pictures import FEATURES, PIXELS, VISION
from suture.core.typed import Strict, check
from suture.models.checkpoint import Checkpoint
from suture.models.config import required
from suture.models.cpm import CpmConfig
from suture.models.families.cpmbee import DAMPING, CPMBee
from suture.models.parts import DECODER, GRAPH, Part, Port

ARCHITECTURES = ("VLU_CPMBee",)
PREFIX = ""
FIRST = 2  # row of the first position, as fairseq counts
TEXT_POSITIONS = 1024
PUBLISHED, KNOWN = "llm.", "cpmbee."

Size = Annotated[int, Field(ge=1, le=1 << 14)]


class TowerConfig(Strict):
    hidden_size: Size
    intermediate_size: Annotated[int, Field(ge=1, le=1 << 17)]
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)]
    num_attention_heads: Size
    image_size: Size
    patch_size: Size


class Multiway(nn.Module):
    """Two of a kind: A for the picture's tokens, B for the queries."""

    def __init__(self, made: type[nn.Module], *sizes: int):
        super().__init__()
        self.A, self.B = made(*sizes), made(*sizes)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.A(pair[0]), self.B(pair[1])


class BeitAttention(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (Multiway(nn.Linear, width, width) for _ in range(4))
        self.inner_attn_ln = Multiway(nn.LayerNorm, width)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B,P,C] and [B,Q,C], each token over all of both."""
        together = (torch.cat(each(pair), 1) for each in (self.q_proj, self.k_proj, self.v_proj))
        split = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in together)
        seen = scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        count = pair[0].shape[1]
        return self.out_proj(self.inner_attn_ln((seen[:, :count], seen[:, count:])))


class BeitFeedForward(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.ffn_layernorm = nn.LayerNorm(inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(gelu(self.fc1(x))))


class BeitLayer(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.self_attn = BeitAttention(config)
        self.self_attn_layer_norm, self.final_layer_norm = (Multiway(nn.LayerNorm, config.hidden_size) for _ in range(2))
        self.ffn = Multiway(BeitFeedForward, config.hidden_size, config.intermediate_size)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        pair = _sums(pair, self.self_attn(self.self_attn_layer_norm(pair)))
        return _sums(pair, self.ffn(self.final_layer_norm(pair)))


class BeitPositions(nn.Module):
    """Only holds the parameters that the checkpoint names embed_positions.*"""

    def __init__(self, patches: int, width: int):
        super().__init__()
        self.A, self.B = nn.Embedding(patches + 1 + FIRST, width), nn.Embedding(TEXT_POSITIONS, width)


class Encoder(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.layers = nn.ModuleList(BeitLayer(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = Multiway(nn.LayerNorm, config.hidden_size)
        self.embed_positions = BeitPositions((config.image_size // config.patch_size) ** 2, config.hidden_size)

    def forward(self, seen: Tensor, queries: Tensor) -> Tensor:
        """Patches [B,P,C] and queries [B,Q,C] to what the queries have found [B,Q,C]."""
        place = self.embed_positions
        pair = (
            seen + place.A.weight[FIRST : FIRST + seen.shape[1]],
            queries + place.B.weight[FIRST : FIRST + queries.shape[1]],
        )
        for layer in self.layers:
            pair = layer(pair)
        return self.layer_norm.B(pair[1])


class VisionEmbedding(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(pixels.shape[0], -1, -1), self.proj(pixels).flatten(2).transpose(1, 2)], 1)


class Beit3(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.vision_embed, self.encoder = VisionEmbedding(config), Encoder(config)


class BeitTower(nn.Module):
    """Only holds the parameters that the checkpoint names vpm.*"""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.beit3 = Beit3(config)


class BeitVision(nn.Module):
    def __init__(self, vpm: BeitTower, query: nn.Parameter, mapping: nn.Module):
        super().__init__()
        self.vpm, self.query, self.mapping = vpm, query, mapping

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B,3,side,side], normalised, to [B,queries,hidden]."""
        beit3 = self.vpm.beit3
        queries = self.query.expand(pixel_values.shape[0], -1, -1)
        found = self.mapping(beit3.encoder(beit3.vision_embed(pixel_values), queries))
        return found * math.sqrt(found.shape[-1])


class VisCPM(CPMBee):
    """CPM-Bee's own step, beside it all that pictures go through."""

    def __init__(self, config: CpmConfig, relations: int, distance_scale: float, tower: TowerConfig, queries: int):
        super().__init__(config, relations, distance_scale)
        self.relations, self.tower = relations, tower
        self.vpm = BeitTower(tower)
        self.query = nn.Parameter(torch.empty(queries, tower.hidden_size))
        self.mapping = nn.Sequential(
            nn.Linear(tower.hidden_size, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.hidden)
        )

    def parts(self) -> tuple[Part, Part]:
        with torch.device("meta"):
            decoder = CPMBee(self.config, self.relations, self.distance_scale)
        decoder.cpmbee = self.cpmbee
        vision, side = BeitVision(self.vpm, self.query, self.mapping), self.tower.image_size
        return (
            Part(
                VISION,
                GRAPH,
                vision.eval(),
                {PIXELS: Port(("batch", 3, side, side))},
                {FEATURES: Port(("batch", self.query.shape[0], self.config.hidden))},
            ),
            Part(LANGUAGE, DECODER, decoder.eval(), takes_embeddings=True),
        )


def build(config: dict, where: object) -> VisCPM:
    remedy = "use the config.json that came with the weights"
    inner = required(config, "vision_config", where)
    if not isinstance(inner, dict):
        raise UserError(where, "its vision_config is no object", remedy)
    check(inner, TowerConfig, f"{where}, vision_config", remedy)
    tower = TowerConfig(**inner)
    queries = required(config, "query_num", where)
    if tower.hidden_size % tower.num_attention_heads or tower.image_size % tower.patch_size:
        raise UserError(f"{where}, vision_config", "has no whole heads, or no whole patches", remedy)
    if not isinstance(queries, int) or not 1 <= queries <= TEXT_POSITIONS - FIRST:
        raise UserError(where, f"'query_num' is {queries!r}, and the tower has {TEXT_POSITIONS - FIRST} places", remedy)
    relations = required(config, "position_bias_num_segment_buckets", where)
    bee = CpmConfig.read(config, where, scaled=True, damping=DAMPING)
    return VisCPM(bee, relations, config.get("distance_scale", 16), tower, queries)


def with_known_names(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with the names that CPM-Bee's tensors have here."""
    tensors = {
        KNOWN + name.removeprefix(PUBLISHED) if name.startswith(PUBLISHED) else name: entry
        for name, entry in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def _sums(pair: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0] + others[0], pair[1] + others[1]
