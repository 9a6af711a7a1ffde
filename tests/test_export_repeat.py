"""Layers traced twice and written often: the same graph as a whole trace."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exporting import CONFIG, LAYERS

from suture.export.repeat import LayersDiffer, repeat
from suture.export.shallow import without_middle
from suture.export.trace import SCOPES, TRACED_LAYERS, trace
from suture.models.architectures import architecture
from tests import stored_traces


@pytest.mark.slow  # test_export.py compares what the repeated layers compute
def test_repeated_layers_are_the_whole_trace(exported, tmp_path):
    repeated = onnx.load(exported, load_external_data=False)
    assert {entry.key: entry.value for entry in repeated.metadata_props}[TRACED_LAYERS] == "4"
    whole = trace(architecture(CONFIG, tmp_path), torch.float32, whole=True)
    assert whole.metadata_props[TRACED_LAYERS] == str(LAYERS)
    assert differences(plain_ir(whole), plain_proto(repeated)) == []
    node = next(node for node in whole.graph if node.op_type == "Sigmoid" and "h.1." in node.metadata_props[SCOPES])
    node.op_type = "Tanh"
    with pytest.raises(LayersDiffer, match=r"Tanh .* of layer 1 is not Sigmoid"):
        repeat(whole.graph, 7, "transformer.h")


def plain_proto(model: onnx.ModelProto) -> dict:
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.data_location == 0}
    nodes = [
        (n.op_type, {a.name: repr(onnx.helper.get_attribute_value(a)) for a in n.attribute}, list(n.input), list(n.output))
        for n in model.graph.node
    ]
    names = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    return {"inputs": names[0], "outputs": names[1], "nodes": nodes, "constants": constants}


def plain_ir(model: ir.Model) -> dict:
    graph = model.graph
    constants = {name: v.const_value.numpy() for name, v in graph.initializers.items() if v.const_value is not None}
    nodes = []
    for node in graph:
        attributes = {}
        for name, attribute in node.attributes.items():
            value = attribute.value
            attributes[name] = repr(list(value) if isinstance(value, tuple) else value)
        reads = ["" if value is None else value.name for value in node.inputs]
        nodes.append((node.op_type, attributes, reads, [value.name for value in node.outputs]))
    return {
        "inputs": [value.name for value in graph.inputs],
        "outputs": [value.name for value in graph.outputs],
        "nodes": nodes,
        "constants": constants,
    }


def differences(one: dict, other: dict) -> list[str]:
    """Where two graphs are not the same up to the names of what lies between inputs, weights and outputs."""
    found = [f"{key}: {one[key]} and {other[key]}" for key in ("inputs", "outputs") if one[key] != other[key]]
    found += [] if len(one["nodes"]) == len(other["nodes"]) else ["different numbers of nodes"]
    producers = [{name: (i, node) for i, node in enumerate(graph["nodes"]) for name in node[3]} for graph in (one, other)]
    partner: dict[int, int] = {}
    waiting = list(zip(one["outputs"], other["outputs"]))
    while waiting and not found:
        a, b = waiting.pop()
        (i, first), (j, second) = (made.get(name, (None, None)) for made, name in zip(producers, (a, b)))
        if first is None or second is None:
            constants = one["constants"].get(a), other["constants"].get(b)
            equal = a == b or (all(c is not None for c in constants) and np.array_equal(*constants))
            found += [] if equal and first is second else [f"{a} and {b}"]
        elif i in partner:
            found += [] if partner[i] == j else [f"{a} is made by another node than {b}"]
        else:
            partner[i] = j
            same = first[:2] == second[:2] and len(first[2]) == len(second[2]) and first[3].index(a) == second[3].index(b)
            found += [] if same else [f"{first} and {second}"]
            waiting += zip(first[2], second[2])
    if not found and (len(set(partner.values())) != len(partner) or len(partner) != len(one["nodes"])):
        found.append("nodes that nothing reaches, or that two nodes of the other stand for")
    return found


def test_the_comparison_of_graphs_sees_a_changed_edge(exported):
    model = onnx.load(exported, load_external_data=False)
    changed = onnx.load(exported, load_external_data=False)
    rotated = [node for node in changed.graph.node if node.op_type == "Neg"]
    rotated[-1].input[0] = rotated[-2].input[0]
    assert differences(plain_proto(model), plain_proto(model)) == []
    assert differences(plain_proto(model), plain_proto(changed)) != []


@pytest.mark.parametrize("layer", [1, 2, LAYERS - 2])
def test_layers_that_differ_are_traced_one_by_one(layer):
    model = architecture(CONFIG, Path("config.json"))
    assert without_middle(model, LAYERS) is not None
    model.transformer.h[layer].ln_2.epsilon = 1e-3
    assert without_middle(model, LAYERS) is None


def test_few_layers_are_traced_whole():
    assert without_middle(architecture(CONFIG | {"num_hidden_layers": 4}, Path("config.json")), 4) is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), stored_traces.STORED)
def test_stored_traces_are_what_the_tracer_makes(name, dtype, tmp_path):
    graphs = stored_traces.export(name, dtype, tmp_path)
    assert [*graphs] == stored_traces.STORED[name, dtype]
    for part, fresh in graphs.items():
        stored = stored_traces.stored(name, dtype, part)
        assert differences(plain_proto(fresh), plain_proto(stored)) == []
        assert stored.metadata_props == fresh.metadata_props
