"""A decoder's graph takes embeddings in place of token ids: their lookup goes, which is a part of its own.

f(Gather(table, input_ids))   →   f(inputs_embeds)        [B,S,hidden]
Shape(input_ids)[axis]        →   Shape(inputs_embeds)[axis]
"""

import onnx_ir as ir

from suture.core.signature import EMBEDDINGS, TOKENS


def take_embeddings(model: ir.Model, table: str) -> None:
    """In place; `table` names the initializer. Raises ValueError where the tokens are read by something else."""
    graph = model.graph
    tokens = next(value for value in graph.inputs if value.name == TOKENS)
    weight = graph.initializers[table]
    given = ir.Value(name=EMBEDDINGS, type=ir.TensorType(weight.dtype), shape=ir.Shape([*tokens.shape, weight.shape[1]]))
    for node, index in list(tokens.uses()):
        if node.op_type == "Gather" and node.inputs[0] is weight and index == 1:
            ir.convenience.replace_all_uses_with(node.outputs[0], given)
            graph.remove(node, safe=True)
        elif node.op_type == "Shape":
            start = node.attributes.get_int("start", 0)
            node.attributes["end"] = ir.AttrInt64("end", min(node.attributes.get_int("end", 2), 2))
            if start < 0:
                raise ValueError(f"{node.name} counts the axes of {TOKENS} from behind")
            node.replace_input_with(0, given)
        else:
            raise ValueError(f"{TOKENS} are read by {node.op_type} {node.name}, not by a lookup in {table} alone")
    graph.inputs[list(graph.inputs).index(tokens)] = given
    if not weight.uses():
        del graph.initializers[table]
