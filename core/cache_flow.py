"""Which inputs of a graph are caches, by what the graph does with them: new slots join what came in, attention reads the
result, and it goes out again. What an input is called says nothing of that."""

from collections.abc import Iterable, Iterator

import onnx

JOINS: dict[str, tuple[int, ...] | None] = {
    "Concat": None,
    "TensorScatter": (0,),
    "ScatterND": (0,),
    "ScatterElements": (0,),
}  # of which inputs: None, any
MOVES = ("Transpose", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Gather", "Split", "Slice", "QuantizeLinear",
         "DequantizeLinear")  # fmt: skip
WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulNBits", "MatMulInteger", "FusedMatMul")
# By domain and name, attention that keeps its cache itself: by input, the output that it becomes.
ATTENTION = {
    ("", "Attention"): {4: 1, 5: 2},
    ("com.microsoft", "Attention"): {4: 1},
    ("com.microsoft", "GroupQueryAttention"): {3: 1, 4: 2},
    ("com.microsoft", "MultiHeadAttention"): {6: 1, 7: 2},
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): {5: 1, 6: 2},
    ("com.microsoft", "DecoderMaskedSelfAttention"): {4: 1},
    ("com.microsoft", "SparseAttention"): {3: 1, 4: 2},
}
READS = ("Softmax", "Attention", "TRT_Attention", "Einsum", *(name for _, name in ATTENTION))


class Flow:
    """A graph's nodes by what they read."""

    def __init__(self, graph: onnx.GraphProto):
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.weights = {tensor.name for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        for node in graph.node:
            if node.op_type == "Constant":
                self.weights.add(node.output[0])
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)

    def moved(self, names: Iterable[str]) -> list[str]:
        """These tensors, and what only moves their numbers, or casts them, makes of them."""
        found = list(dict.fromkeys(names))
        for name in found:  # which grows
            for node in self.readers.get(name, ()):
                if node.op_type in MOVES and node.input[0] == name:
                    found += [output for output in node.output if output and output not in found]
        return found

    def joined(self, names: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """What new slots and these tensors become together, and whether attention did it."""
        for name in names:
            for node in self.readers.get(name, ()):
                places = [index for index, each in enumerate(node.input) if each == name]
                grown = ATTENTION.get((node.domain if node.domain != "ai.onnx" else "", node.op_type), {})
                for place in places:
                    if place in grown and grown[place] < len(node.output):
                        yield node.output[grown[place]], True
                    elif node.op_type in JOINS and place in (JOINS[node.op_type] or (place,)):
                        yield node.output[0], False

    def attends(self, name: str) -> bool:
        """Whether attention reads the tensor, rather than a product with weights, or nothing."""
        found, seen = [name], {name}
        for each in found:
            for node in self.readers.get(each, ()):
                if node.op_type in READS:
                    return True
                if node.op_type in WEIGHTED:
                    if not any(operand in self.weights for operand in node.input[1:]) and node.input[0] not in self.weights:
                        return True  # a product of two activations
                    continue
                new = [output for output in node.output if output and output not in seen]
                seen.update(new)
                found += new
        return False


def grown(graph: onnx.GraphProto) -> dict[str, str]:
    """By cache input the output that it becomes, each as it is, transposed, cast, split or put together."""
    flow, taken, pairs = Flow(graph), set(), {}
    for value in graph.input:
        if value.name in flow.weights or len(value.type.tensor_type.shape.dim) < 3:
            continue
        for present, attended in flow.joined(flow.moved([value.name])):
            ends = [each for each in flow.moved([present]) if each in flow.outputs]
            if not ends:  # keys and values, put together again
                together = [name for name, _ in flow.joined(flow.moved([present]))]
                ends = [each for each in flow.moved(together) if each in flow.outputs]
            ends = [each for each in ends if each not in taken]
            if ends and (attended or flow.attends(present)):
                pairs[value.name] = ends[0]
                taken.add(ends[0])
                break
    return pairs
