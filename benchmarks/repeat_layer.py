"""python -m benchmarks.repeat_layer MODEL.onnx OUT.onnx NODES: tiny-qwen's graph with its third layer repeated.

The copies stand one after another, have caches of their own, and share the layer's weights in the file.
"""

import re
import shutil
import sys
from pathlib import Path

import onnx

LAYER = 2  # the one that is repeated: it and the next are built alike


def repeat(model: onnx.ModelProto, nodes: int) -> onnx.ModelProto:
    graph = model.graph
    layers = _layers(graph)
    body = [node for node, layer in zip(graph.node, layers) if layer == LAYER]
    after = [node for node, layer in zip(graph.node, layers) if layer == LAYER + 1]
    made = [{name for node, layer in zip(graph.node, layers) if layer == number for name in node.output}
            for number in (LAYER - 1, LAYER)]  # fmt: skip
    entering = _entering(body, made[0])
    leaving = dict(zip(entering, _entering(after, made[1])))  # the tensor that stands in `entering`'s place one layer on
    weights = {tensor.name: tensor for tensor in graph.initializer}
    own = {name for node in body for name in node.input if name in weights and f".{LAYER}." in name}
    pasts = {name for node in body for name in node.input if name.startswith("past_key_values.")}
    values = {value.name for value in (*graph.input, *graph.output)}
    shapes = [value for value in graph.value_info if value.name in {name for node in body for name in node.output}]
    last = leaving  # of the newest copy
    first_free = 1 + max(layer for layer in layers if layer is not None)
    copies = max(0, nodes - len(graph.node)) // len(body)
    added = []
    for layer in range(first_free, first_free + copies):
        names = {old: last[old] for old in entering}
        for node in body:
            names |= {name: _renamed(name, layer, name in values) for name in node.output}
        names |= {name: _renamed(name, layer, True) for name in own | pasts}
        for node in body:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for field in (copy.input, copy.output):
                field[:] = [names.get(name, name) for name in field]
            copy.name = f"{node.name}_{layer}"
            for entry in copy.metadata_props:
                entry.value = entry.value.replace(f".h.{LAYER}", f".h.{layer}")
            added.append(copy)
        for name in own:
            graph.initializer.add().CopyFrom(weights[name])
            graph.initializer[-1].name = names[name]
        for field in (graph.input, graph.output):
            for value in [value for value in field if f".{LAYER}." in value.name]:
                field.add().CopyFrom(value)
                field[-1].name = _renamed(value.name, layer, True)
        for value in shapes:
            graph.value_info.add().CopyFrom(value)
            graph.value_info[-1].name = names[value.name]
        last = {old: names[leaving[old]] for old in entering}
    ordered = [*graph.node]
    place = max(index for index, layer in enumerate(layers) if layer == LAYER) + 1
    for node in ordered[place:]:
        node.input[:] = [_of(last, leaving, name) for name in node.input]
    del graph.node[:]
    graph.node.extend([*ordered[:place], *added, *ordered[place:]])
    return model


def _of(last: dict[str, str], leaving: dict[str, str], name: str) -> str:
    return next((last[old] for old, new in leaving.items() if new == name), name)


def _entering(nodes: list[onnx.NodeProto], made: set[str]) -> list[str]:
    """What the nodes read of the layer before, in the order of reading."""
    return list(dict.fromkeys(name for node in nodes for name in node.input if name in made))


def _layers(graph: onnx.GraphProto) -> list[int | None]:
    """Each node's layer, by its module, or, where the exporter made it without one, by the layer that it reads from."""
    made_in: dict[str, int | None] = {}
    layers = []
    for node in graph.node:
        layer = _layer(node)
        if layer is None:
            layer = max((made_in[name] for name in node.input if made_in.get(name) is not None), default=None)
        made_in |= dict.fromkeys(node.output, layer)
        layers.append(layer)
    return layers


def _layer(node: onnx.NodeProto) -> int | None:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
    found = re.search(r"\.h\.(\d+)", scopes)
    return int(found[1]) if found else None


def _renamed(name: str, layer: int, by_number: bool) -> str:
    return name.replace(f".{LAYER}.", f".{layer}.") if by_number else f"{name}_of_layer_{layer}"


if __name__ == "__main__":
    source, out, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    onnx.save(repeat(onnx.load(source, load_external_data=False), count), out)
    for weights in source.parent.glob("*.safetensors"):
        if not (out.parent / weights.name).exists():
            shutil.copyfile(weights, out.parent / weights.name)
