"""What goes into a traced part and comes out: examples for the tracer, and the names and axes of its graph.

Example sizes are all different, and neither 0 nor 1, which torch.export would fix.
"""

import inspect
import math
from dataclasses import dataclass
from itertools import count

import torch
from torch.export import Dim

from suture.core import axes
from suture.core.cpm_inputs import LAYOUT, MOST_SEGMENTS, PLACED, PLACES, RELATIONS, made_up
from suture.core.signature import LOGITS, MASK, NTK_ALPHA, POSITIONS, TOKENS, past_name, present_name
from suture.models.dimensions import Dimensions
from suture.models.parts import Part

BATCH, SEQUENCE, PAST, LONGER = 2, 3, 5, 11
TOTAL = "past_sequence + sequence"

Shape = list[int | str]


@dataclass(frozen=True)
class ExportInterface:
    """`examples` and `dynamic`: arguments of the module's forward, and which of their axes vary. `inputs` and `outputs`:
    the shape of each tensor by its name in the graph, in the forward's order."""

    examples: tuple
    dynamic: tuple
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]


def decoder_interface(dimensions: Dimensions, dtype: torch.dtype) -> ExportInterface:
    """Of a decoder's step with a growing cache (see suture.models.families.qwen.Qwen.forward)."""
    heads, size, encoder = dimensions.kv_heads, dimensions.head_dim, dimensions.encoder_slots
    side = "" if encoder is None else "decoder."
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64)
    rows = {0: Dim.AUTO, 1: Dim.AUTO}
    inputs = {TOKENS: ["batch", "sequence"], POSITIONS: ["batch", "sequence"], MASK: ["batch", TOTAL]}
    positions, placed = tokens.clone(), rows
    if dimensions.position_rows is not None:
        positions, placed = positions.repeat(dimensions.position_rows, 1, 1), {1: Dim.AUTO, 2: Dim.AUTO}
        inputs[POSITIONS] = [dimensions.position_rows, "batch", "sequence"]
    outputs = {LOGITS: ["batch", "sequence", dimensions.vocab]}
    caches, grows = [], []
    for layer, role in _places(dimensions.layers, side):
        width = dimensions.value_dim or size if role.endswith("value") else size
        caches.append(torch.zeros(BATCH, heads, PAST, width, dtype=dtype))
        grows.append({0: Dim.AUTO, 2: Dim.AUTO})
        inputs[past_name(layer, role)] = ["batch", heads, "past_sequence", width]
        outputs[present_name(layer, role)] = ["batch", heads, TOTAL, width]
    for place in _places(dimensions.layers, "encoder.") if encoder else []:
        caches.append(torch.zeros(BATCH, heads, encoder, size, dtype=dtype))
        grows.append({0: Dim.AUTO})
        inputs[past_name(*place)] = ["batch", heads, encoder, size]
    examples, dynamic = (tokens, positions, mask, caches), (rows, placed, rows, grows)
    if dimensions.ntk_trained_length is not None:
        inputs[NTK_ALPHA] = ["batch"]
        examples, dynamic = (*examples, torch.ones(BATCH)), (*dynamic, {0: Dim.AUTO})
    if dimensions.segmented:
        inputs |= {name: ["batch", PLACES] if name in PLACED else ["batch", MOST_SEGMENTS, MOST_SEGMENTS] for name in LAYOUT}
        made = made_up(LAYOUT, BATCH, LONGER)
        examples = (*examples, *(torch.from_numpy(made[name]) for name in LAYOUT))
        dynamic = (*dynamic, *({0: Dim.AUTO} if name == RELATIONS else rows for name in LAYOUT))
    return ExportInterface(examples, dynamic, inputs, outputs)


def graph_interface(part: Part, dtype: torch.dtype) -> ExportInterface:
    """Of a part that has neither cache nor steps. An axis of one name has one length in all inputs, and one whose name says how it
    follows from another has the length that follows."""
    ports = part.inputs.values()
    divisors = axes.divisors(size for port in ports for size in port.shape if isinstance(size, str))
    lengths: dict[str, int] = {}
    for name, divisor in divisors.items():
        divisor = math.lcm(divisor, part.multiples.get(name, 1))
        lengths[name] = next(each for each in count(BATCH * divisor, divisor) if each not in lengths.values())
    examples, dynamic = [], []
    for port in ports:
        shape = [size if isinstance(size, int) else axes.length(size, lengths) for size in port.shape]
        kind = torch.float32 if port.exact else dtype
        examples.append(torch.zeros(shape, dtype=kind if port.below is None else torch.int64))
        dynamic.append({axis: Dim.AUTO for axis, size in enumerate(port.shape) if isinstance(size, str)})
    parameters = list(inspect.signature(part.module.forward).parameters.values())
    if parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL:  # of which torch takes the axes together
        dynamic[len(parameters) - 1 :] = [tuple(dynamic[len(parameters) - 1 :])]
    inputs, outputs = ({name: list(port.shape) for name, port in ports.items()} for ports in (part.inputs, part.outputs))
    return ExportInterface(tuple(examples), tuple(dynamic), inputs, outputs)


def _places(layers: int, side: str) -> list[tuple[int, str]]:
    return [(layer, side + role) for layer in range(layers) for role in ("key", "value")]
