"""CoDeF: a video as one canonical picture and, for each frame, where in it a pixel lies.

    deformation   points of a frame and the frame's number  →  points of the canonical picture
    canonical     points of the canonical picture           →  colours

Each is a small network over an encoding: a grid of learned features at several resolutions, hashed where a table is smaller than
the grid, as tiny-cuda-nn computes and stores it (HashGrid, FullyFusedMLP), or sines and cosines (`deform_hash`, `vid_hash` false).
A point is (y, x), from 0 to 1 in a frame. Points are float32 whatever the weights' type: a float16 number near 1 is a half of a
pixel in a thousand, and of the finest grid several cells.
"""

import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from suture.core.errors import UserError
from suture.core.frames import AT_ONCE, CANONICAL, COLOURS, DEFORMATION, FRAMES, GRID, POINTS
from suture.core.typed import Strict, check
from suture.models.parts import GRAPH, Part, Port

ARCHITECTURES = ("ImplicitVideoSystem",)
PREFIX = ""
PRIMES = (1, 2654435761, 805459861)  # of the hash, one a dimension
ALIGNED = 16  # a product's sides are multiples of it; inputs are filled up with ones, outputs left out
UINT32 = (1 << 32) - 1
Small = Annotated[int, Field(ge=1, le=64)]
Size = Annotated[int, Field(ge=1, le=4096)]


class Encoding(Strict):
    n_levels: Small
    n_features_per_level: Annotated[int, Field(ge=1, le=8)]
    log2_hashmap_size: Annotated[int, Field(ge=4, le=24)]
    base_resolution: Size
    per_level_scale: Annotated[float, Field(ge=1, le=4)]


class Perceptron(Strict):
    n_neurons: Size
    n_hidden_layers: Small


class Config(Strict):
    """configs/hash.json of the published code, and those of its options that say what the networks are."""

    frames: Annotated[int, Field(ge=1, le=1_000_000)]  # of the video
    height: Size | None = None  # of its pictures, in pixels
    width: Size | None = None
    points: Annotated[int, Field(ge=1, le=1 << 20)] = (
        AT_ONCE  # of a row that the graphs take: a fixed number, as engines like it
    )
    deform_hash: bool
    vid_hash: bool
    encoding_deform3d: Encoding | None = None
    network_deform: Perceptron | None = None
    encoding: Encoding | None = None
    network: Perceptron | None = None
    annealed: bool = False
    annealed_begin_step: Annotated[int, Field(ge=0)] = 0
    annealed_step: Annotated[int, Field(ge=1)] = 5000
    step: Annotated[int, Field(ge=0)] | None = None  # up to which it was trained; None: to the end of annealing
    deform_D: Small = 6
    deform_W: Size = 128
    vid_D: Small = 8
    vid_W: Size = 256
    N_vocab_w: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    N_w: Size = 8
    N_xyz_w: Small = 8
    sigmoid_offset: float = 0.0


class HashGrid(nn.Module):
    """tiny-cuda-nn's HashGrid: of each level the features of the cell's corners around a point, interpolated linearly."""

    deviation = 0.1  # of random weights

    def __init__(self, dims: int, config: Encoding):
        super().__init__()
        self.dims, self.features = dims, config.n_features_per_level
        self.levels: list[tuple[float, int, int, int]] = []  # scale, resolution, entries, and where they begin
        first = 0
        for level in range(config.n_levels):
            growth = np.float32(np.exp2(np.float32(level) * np.log2(np.float32(config.per_level_scale))))
            scale = float(growth * np.float32(config.base_resolution) - np.float32(1))
            resolution = math.ceil(scale) + 1
            entries = min(-(-(resolution**dims) // 8) * 8, 1 << config.log2_hashmap_size)
            self.levels.append((scale, resolution, entries, first))
            first += entries
        self.params = nn.Parameter(torch.empty(first * self.features))
        self.width = config.n_levels * self.features

    def forward(self, x: Tensor) -> Tensor:
        """float32 [N, dims] to float32 [N, levels · features]."""
        table = self.params.reshape(-1, self.features)
        return torch.cat([self._level(x, table, *level) for level in self.levels], -1)

    def _level(self, x: Tensor, table: Tensor, scale: float, resolution: int, entries: int, first: int) -> Tensor:
        place = x * scale + 0.5
        cell = place.floor()
        corners = torch.tensor(
            [[corner >> dim & 1 for dim in range(self.dims)] for corner in range(1 << self.dims)], device=x.device
        )
        part = (1 - corners.float() - (place - cell)[:, None]).abs()  # [N, corners, dims]: of each corner, along each axis
        weight = part[..., 0]
        for dim in range(1, self.dims):
            weight = weight * part[..., dim]
        index = self._index((cell.long()[:, None] + corners).unbind(-1), resolution, entries)
        return (F.embedding(index + first, table).float() * weight[..., None]).sum(1)

    def _index(self, corner: tuple[Tensor, ...], resolution: int, entries: int) -> Tensor:
        """Of a corner at int64 coordinates, its entry: row by row where all fit, else by the hash. The kernel computes in uint32."""
        if resolution**self.dims <= entries:
            place = sum(coordinate * resolution**dim for dim, coordinate in enumerate(corner))
            return (place & UINT32) % entries
        place = corner[0] & UINT32
        for coordinate, prime in zip(corner[1:], PRIMES[1:]):
            place = place ^ (coordinate * prime & UINT32)
        return place & (entries - 1)


class FullyFused(nn.Module):
    """tiny-cuda-nn's FullyFusedMLP: ReLU between layers, no biases but what inputs filled up with ones make, one flat parameter."""

    def __init__(self, inputs: int, outputs: int, config: Perceptron):
        super().__init__()
        width, self.inputs, self.outputs = config.n_neurons, inputs, outputs
        rows = [width] * config.n_hidden_layers + [_aligned(outputs)]
        self.shapes = list(zip(rows, [_aligned(inputs), *rows]))
        self.params = nn.Parameter(torch.empty(sum(row * column for row, column in self.shapes)))
        self.deviation = width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        weights = self.params.split([row * column for row, column in self.shapes])
        weights = [weight.reshape(shape) for weight, shape in zip(weights, self.shapes)]
        x = F.linear(x, weights[0][:, : self.inputs], weights[0][:, self.inputs :].sum(1))
        for weight in weights[1:]:
            x = F.linear(x.relu(), weight)
        return x[:, : self.outputs]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class Hashed(nn.Module):
    """A HashGrid and a network over the points and their encoding."""

    def __init__(self, dims: int, outputs: int, encoding: Encoding, network: Perceptron):
        super().__init__()
        self.encoder = HashGrid(dims, encoding)
        self.decoder = FullyFused(dims + self.encoder.width, outputs, network)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """float32 [N, dims] to [N, outputs] in the weights' type. `seen` float32 [levels · features]: how much of each feature is seen."""
        encoded = self.encoder(x)
        encoded = encoded if seen is None else encoded * seen
        return self.decoder(torch.cat([x, encoded], -1).to(self.decoder.params.dtype))


class Layers(nn.Module):
    """Linear layers with ReLU; before one of SKIPS the inputs come in again. `named`: what the published files call them."""

    SKIPS = (4,)

    def __init__(self, named: str, inputs: int, depth: int, width: int):
        super().__init__()
        self.names = [f"{named}_{layer + 1}" for layer in range(depth)]
        for layer, name in enumerate(self.names):
            size = inputs if layer == 0 else width + inputs * (layer in self.SKIPS)
            self.add_module(name, nn.Sequential(nn.Linear(size, width), nn.ReLU()))

    def layers(self, given: Tensor) -> Tensor:
        x = given
        for layer, name in enumerate(self.names):
            x = self.get_submodule(name)(torch.cat([given, x], -1) if layer in self.SKIPS else x)
        return x


class TranslationField(Layers):
    def __init__(self, config: Config):
        super().__init__("warping_field_xyz_encoding", _octaves(config.N_xyz_w) + config.N_w, config.deform_D, config.deform_W)
        self.output = nn.Sequential(nn.Linear(config.deform_W, 2))

    def forward(self, x: Tensor) -> Tensor:
        """A frame's code and the waves of its points, [N, N_w + 2 + 4·N_xyz_w], to how far each is moved [N, 2]."""
        return self.output(self.layers(x))


class ImplicitVideo(Layers):
    OCTAVES = 8

    def __init__(self, config: Config):
        super().__init__("xyz_encoding", _octaves(self.OCTAVES), config.vid_D, config.vid_W)
        self.xyz_encoding_final = nn.Linear(config.vid_W, config.vid_W)
        self.rgb = nn.Sequential(nn.Linear(config.vid_W, 3))
        self.offset = config.sigmoid_offset

    def forward(self, points: Tensor) -> Tensor:
        x = waves(points, self.OCTAVES).to(self.xyz_encoding_final.weight.dtype)
        return self.rgb(self.xyz_encoding_final(self.layers(x))).sigmoid() - self.offset


class WarpingField(nn.Module):
    """Around the hashed form, whose published names say so."""

    def __init__(self, config: Config):
        super().__init__()
        self.Deform_Hash3d = Hashed(3, 2, config.encoding_deform3d, config.network_deform)


def _octaves(count: int) -> int:
    return 2 + 2 * 2 * count


def waves(x: Tensor, count: int, seen: Tensor | None = None) -> Tensor:
    """float32 [N, 2] to [N, 2 + 4·count]: the points, and sine and cosine of each of `count` octaves, as much of it as is `seen`."""
    bands = [x]
    for band in range(count):
        share = 1.0 if seen is None else seen[band]
        bands += [share * torch.sin(2.0**band * x), share * torch.cos(2.0**band * x)]
    return torch.cat(bands, -1)


def annealed(count: int, config: Config, step: int | None) -> Tensor | None:
    """How much is seen of each of `count` levels or octaves after so many steps of training, float32; None: all of each."""
    if not config.annealed or step is None:
        return None
    alpha = count * max(step - config.annealed_begin_step, 0) / config.annealed_step
    place = torch.arange(count, dtype=torch.float32, device="cpu")
    share = (1 - torch.cos(math.pi * (alpha - place).clamp(0.0, 1.0))) / 2
    return None if bool((share == 1).all()) else share


class Video(nn.Module):
    """All weights that the parts read, under the names that they were published by."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.step = config, config.step
        if not config.deform_hash:
            self.w_0 = nn.Embedding(config.N_vocab_w, config.N_w)
        self.warping_field_0 = WarpingField(config) if config.deform_hash else TranslationField(config)
        if config.vid_hash:
            self.implicit_video_0 = Hashed(2, 3, config.encoding, config.network)
        else:
            self.implicit_video_0 = ImplicitVideo(config)

    def parts(self) -> tuple[Part, Part]:
        row = ("batch", self.config.points)
        grid = {GRID: Port((*row, 2), exact=True), FRAMES: Port(("batch",), below=self.config.frames)}
        points = {POINTS: Port((*row, 2), exact=True)}
        return (
            Part(DEFORMATION, GRAPH, Deformation(self).eval(), grid, points),
            Part(
                CANONICAL,
                GRAPH,
                Canonical(self).eval(),
                points,
                {COLOURS: Port((*row, 3))},
                {POINTS: f"{DEFORMATION}/{POINTS}"},
            ),
        )


class Deformation(nn.Module):
    def __init__(self, video: Video):
        super().__init__()
        self.config, self.warping_field_0 = video.config, video.warping_field_0
        count = video.config.encoding_deform3d.n_levels if video.config.deform_hash else video.config.N_xyz_w
        self.seen = annealed(count, video.config, video.step)
        if not video.config.deform_hash:
            self.w_0 = video.w_0

    def forward(self, grid: Tensor, frames: Tensor) -> Tensor:
        """Points float32 [B, points, 2], a row of one frame, int64 [B], to points float32 [B, points, 2] of the canonical picture."""
        places, config = grid.flatten(0, 1), self.config
        if config.deform_hash:
            field = self.warping_field_0.Deform_Hash3d
            seen = None if self.seen is None else self.seen.repeat_interleave(field.encoder.features)
            time = (frames.float() / config.frames)[:, None, None].expand(-1, config.points, 1)
            moved = field(torch.cat([grid, time], -1).flatten(0, 1), seen).float() / 5
        else:
            code = self.w_0(frames)[:, None].expand(-1, config.points, -1).flatten(0, 1)
            given = waves(places, config.N_xyz_w, self.seen).to(code.dtype)
            moved = self.warping_field_0(torch.cat([code, given], -1)).float()
        return (places + moved).reshape(-1, config.points, 2)


class Canonical(nn.Module):
    def __init__(self, video: Video):
        super().__init__()
        self.implicit_video_0 = video.implicit_video_0
        self.hashed, self.count = video.config.vid_hash, video.config.points

    def forward(self, points: Tensor) -> Tensor:
        """Points float32 [B, points, 2] to colours [B, points, 3], which lie near 0 to 1.

        The grid covers points from -0.3 to 1.3; one beyond is taken for the edge's, where the published kernel reads whatever
        entry the hash names."""
        points = points.flatten(0, 1)
        if self.hashed:
            points = ((points + 0.3) / 1.6).clamp(0.0, 1.0)
        return self.implicit_video_0(points).reshape(-1, self.count, 3)


def build(config: dict, where: object) -> Video:
    check(config, Config, where, "use the config.json that came with the weights")
    parsed = Config.model_validate(config)
    for hashed, names in (("deform_hash", ("encoding_deform3d", "network_deform")), ("vid_hash", ("encoding", "network"))):
        missing = next((name for name in names if getattr(parsed, name) is None), None)
        if getattr(parsed, hashed) and missing:
            raise UserError(where, f"has {hashed}, but no '{missing}'", "use the config.json that came with the weights")
    if not parsed.deform_hash and parsed.frames > parsed.N_vocab_w:
        raise UserError(
            where,
            f"has {parsed.frames} frames, but codes of {parsed.N_vocab_w}",
            "use the config.json that came with the weights",
        )
    return Video(parsed)
