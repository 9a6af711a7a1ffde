"""One layer of a graph as a picture (SVG): a box for each node, in the order of computation from top to bottom.

Placed by a Sugiyama layout, in which an arrow over several rows has a place of its own in each: it runs around boxes.
"""

import re
from dataclasses import dataclass, field
from html import escape

import onnx_graphsurgeon as gs
from fast_sugiyama import from_edges

from suture.surgery.graph import Graph

COLUMN, NARROW, ROW, WIDTH, HEIGHT, MARGIN, HEAD, LEGEND, LEAST_WIDTH = 128, 24, 46, 116, 28, 24, 48, 34, 560  # pixels
MOST_NODES = 400  # a picture of more says nothing
SHAPES_AND_TABLES = ("Shape", "Size", "Squeeze", "Unsqueeze", "Concat", "Gather", "Constant", "Range")
KINDS = {  # what a node does: its colour, and ops that say so
    "attention": ("#c8443c", ("Attention", "TRT_Attention", "Softmax", "GroupQueryAttention", "MultiHeadAttention")),
    "cache": ("#8a5ab5", ("TensorScatter", "ScatterND", "ScatterElements")),
    "norm": ("#2f8f83", ("RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization", "ReduceMean", "Pow", "Sqrt",
                         "Reciprocal", "SkipSimplifiedLayerNormalization")),
    "linear": ("#3b6fb6", ("Gemm", "MatMul", "MatMulNBits", "DequantizeLinear")),
    "rotary": ("#c98a1b", ("RotaryEmbedding", "Neg", "Cos", "Sin")),
    "activation": ("#5d8a2a", ("Swish", "Gelu", "Sigmoid", "Erf", "Tanh", "Relu")),
    "other": ("#8b929c", ()),
}  # fmt: skip


@dataclass
class Box:
    label: str
    kind: str | None  # None: where something enters or leaves the layer


@dataclass
class Diagram:
    """Boxes and arrows between them, by index."""

    boxes: list[Box] = field(default_factory=list)
    arrows: list[tuple[int, int]] = field(default_factory=list)

    def add(self, label: str, kind: str | None) -> int:
        self.boxes.append(Box(label, kind))
        return len(self.boxes) - 1


def draw_layer(graph: Graph, layer: int, title: str) -> str | None:
    """The picture of a layer, or None where names do not say which nodes are its own, or they are too many."""
    nodes = _closed(graph, [node for node in graph.gs.nodes if layer_of(node.name) == layer])
    if not 3 <= len(nodes) <= MOST_NODES:
        return None
    diagram = _diagram(graph, nodes)
    return _svg(diagram, f"{title}: {len(nodes)} nodes") if diagram.arrows else None


def layer_of(name: str) -> int | None:
    """The layer that a node's name says: layers.3/attention, transformer.h.3.attn/MatMul, /model/layers.3/self_attn/Add."""
    found = re.search(r"(?:^|[./])(?:layers?|h|blocks?|block)[._](\d+)(?=[./])", name)
    return int(found[1]) if found else None


def _closed(graph: Graph, nodes: list[gs.Node]) -> list[gs.Node]:
    """With nodes that have no layer in their names, but lie between nodes that do (a Split, say)."""
    inside = {id(node) for node in nodes}
    between = [
        node
        for node in graph.gs.nodes
        if layer_of(node.name) is None
        and any(id(above) in inside for tensor in node.inputs for above in tensor.inputs)
        and any(id(below) in inside for tensor in node.outputs for below in tensor.outputs)
    ]
    return nodes + between


def _diagram(graph: Graph, nodes: list[gs.Node]) -> Diagram:
    diagram = Diagram()
    inside = {id(node): diagram.add(_label(node), _kind(node)) for node in nodes}
    stubs: dict[str, int] = {}
    caches = {cache.past: f"past {cache.role}" for cache in graph.signature.caches}
    caches |= {cache.present: f"present {cache.role}" for cache in graph.signature.caches}
    for node in nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) or tensor.is_empty():
                continue
            above = tensor.inputs[0] if tensor.inputs else None
            if above is not None and id(above) in inside:
                diagram.arrows.append((inside[id(above)], inside[id(node)]))
            elif above is None or above.op not in SHAPES_AND_TABLES:
                if tensor.name not in stubs:
                    stubs[tensor.name] = diagram.add(caches.get(tensor.name) or _origin(tensor, above), None)
                diagram.arrows.append((stubs[tensor.name], inside[id(node)]))
        for tensor in node.outputs:
            below = next((reader for reader in tensor.outputs if id(reader) not in inside), None)
            if tensor.name in caches:
                diagram.arrows.append((inside[id(node)], diagram.add(caches[tensor.name], None)))
            elif below is not None and below.op not in SHAPES_AND_TABLES:
                diagram.arrows.append((inside[id(node)], diagram.add("next layer", None)))
    return diagram


def _origin(tensor: gs.Tensor, above: gs.Node | None) -> str:
    if above is None:
        return tensor.name
    if layer_of(above.name) is not None:
        return "layer before"
    return above.op.lower() if re.search(r"\d", tensor.name) else tensor.name


def _label(node: gs.Node) -> str:
    """The op, and the shape of its weight."""
    weights = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant) and len(tensor.shape) == 2]
    large = [tensor for tensor in weights if tensor.shape[0] * tensor.shape[1] >= 1024]
    return f"{node.op} {'×'.join(map(str, large[0].shape))}" if large else node.op


def _kind(node: gs.Node) -> str:
    if node.op == "MatMul" and not any(isinstance(tensor, gs.Constant) or _from_weight(tensor) for tensor in node.inputs):
        return "attention"
    if node.op == "Concat" and any(tensor.name.startswith("past") for tensor in node.inputs):
        return "cache"
    return next((kind for kind, (_, ops) in KINDS.items() if node.op in ops), "other")


def _from_weight(tensor: gs.Tensor) -> bool:
    """Whether it is a transposed weight."""
    return bool(tensor.inputs) and tensor.inputs[0].op == "Transpose" and isinstance(tensor.inputs[0].inputs[0], gs.Constant)


def _svg(diagram: Diagram, title: str) -> str:
    places, paths = _layout(diagram)
    width = max(max(x for x, _ in places.values()) + WIDTH / 2 + MARGIN, LEAST_WIDTH)
    height = max(y for _, y in places.values()) + HEIGHT / 2 + MARGIN + LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#ffffff"/>',
        f'<text x="{MARGIN}" y="28" font-size="15" font-weight="600" fill="#222831">{escape(title)}</text>',
    ]
    parts += [_curve([places[each] for each in path]) for path in paths]
    parts += [_box(box, *places[index]) for index, box in enumerate(diagram.boxes) if index in places]
    parts += _legend(diagram, height)
    return "\n".join([*parts, "</svg>\n"])


def _layout(diagram: Diagram) -> tuple[dict[int, tuple[float, float]], list[list[int]]]:
    """Where the boxes' middles lie, in pixels, and each arrow's way from box to box by the places that it passes."""
    layouts = from_edges(dict.fromkeys(diagram.arrows), vertex_spacing=COLUMN, dummy_vertices=True, dummy_size=NARROW,
                         ranking_type="minimize", crossing_minimization="barycenter")  # fmt: skip
    places, paths, shift = {}, [], MARGIN + WIDTH / 2
    for positions, width, height, edges in layouts:  # one for each connected part, side by side
        places |= {each: (shift + x, HEAD + HEIGHT / 2 + (height - y) / COLUMN * ROW) for each, (x, y) in positions}
        shift += width + COLUMN
        onward = {start: end for start, end in edges if start >= len(diagram.boxes)}
        for start, end in edges:
            if start < len(diagram.boxes):
                paths.append([start, end])
                while paths[-1][-1] in onward:
                    paths[-1].append(onward[paths[-1][-1]])
    return places, paths


def _curve(points: list[tuple[float, float]]) -> str:
    (x, y), *rest = points
    path = [f"M{x:.1f},{y + HEIGHT / 2:.1f}"]
    y += HEIGHT / 2
    for index, (next_x, next_y) in enumerate(rest):
        end = next_y - (HEIGHT / 2 if index == len(rest) - 1 else 0)
        middle = (y + end) / 2
        path.append(f"C{x:.1f},{middle:.1f} {next_x:.1f},{middle:.1f} {next_x:.1f},{end:.1f}")
        x, y = next_x, end
    return f'<path d="{" ".join(path)}" fill="none" stroke="#b4bac3" stroke-width="1.3"/>'


def _box(box: Box, x: float, y: float) -> str:
    fill, stroke, text = (KINDS[box.kind][0], KINDS[box.kind][0], "#ffffff") if box.kind else ("#ffffff", "#b4bac3", "#4b5563")
    radius = 5 if box.kind else HEIGHT / 2
    squeeze = f' textLength="{WIDTH - 10}" lengthAdjust="spacingAndGlyphs"' if len(box.label) > 18 else ""
    return (
        f'<rect x="{x - WIDTH / 2:.1f}" y="{y - HEIGHT / 2:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="{radius}" fill="{fill}" '
        f'stroke="{stroke}"/><text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" fill="{text}"{squeeze}>'
        f"{escape(box.label)}</text>"
    )


def _legend(diagram: Diagram, height: float) -> list[str]:
    kinds = [kind for kind in KINDS if any(box.kind == kind for box in diagram.boxes)]
    parts = []
    for index, kind in enumerate(kinds):
        x = MARGIN + index * 84
        parts.append(f'<rect x="{x}" y="{height - 30:.0f}" width="10" height="10" rx="2" fill="{KINDS[kind][0]}"/>')
        parts.append(f'<text x="{x + 14}" y="{height - 21:.0f}" fill="#4b5563">{kind}</text>')
    return parts
