"""What is not valid in an ONNX file and has one meaning all the same: checks let it pass, and surgery writes it as it is meant.

a model that imports no version of the standard's operators  →  the newest of its IR version, where each of its operators is
                                                                 the same at all versions that it can be of
two Constants that write one tensor                          →  the last one, which onnxruntime takes
two initializers of one name and the same values             →  one of them
"""

from collections.abc import Iterable, Sequence

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from suture.core.subgraphs import all_nodes
from suture.core.traits import OPSET, STANDARD

OLDEST = 9  # opset; nobody writes older ones any more
# Since opset 9 these take more types, or have gained attributes and inputs whose defaults are what was meant before.
TYPES_ONLY = frozenset(
    """Abs Acos Acosh Add ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool Bernoulli Cast CastLike Ceil Compress Concat
    Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Det Div Elu Equal Erf Exp
    Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater
    GreaterOrEqual HardSigmoid HardSwish Identity If InstanceNormalization IsInf IsNaN LRN LSTM LeakyRelu Less LessOrEqual Log Loop
    LpNormalization LpPool MatMul Max MaxPool MaxRoiPool MaxUnpool Mean MeanVarianceNormalization Min Mish Mod Mul Multinomial Neg
    NegativeLogLikelihoodLoss NonMaxSuppression NonZero OneHot OptionalGetElement OptionalHasElement PRelu Pow QLinearMatMul
    QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Relu Reshape Round Scan
    ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh Size SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth
    SplitToSequence Sqrt Sub Sum Tan Tanh ThresholdedRelu Tile Transpose Where""".split()  # noqa: SIM905
)


def implied_opset(model: ModelProto) -> int | None:
    """The standard's version that a model without one is of; None where there may be several that mean different things."""
    newest = _newest(model)
    return newest if newest >= OLDEST and changed_operator(model) is None else None


def changed_operator(model: ModelProto) -> NodeProto | None:
    """The first node of the standard's whose meaning depends on the version."""
    newest = _newest(model)
    nodes = (node for node in all_nodes(model.graph) if node.domain in STANDARD)
    return next((node for node in nodes if not _unchanged(node.op_type, newest)), None)


def _newest(model: ModelProto) -> int:
    known = [row[2] for row in helper.VERSION_TABLE if row[1] <= model.ir_version]
    return min(max(known, default=0), OPSET)


def overwritten(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """The Constants whose tensor a later Constant writes again."""
    last: dict[str, NodeProto] = {}
    found = []
    for node in nodes:
        if node.op_type == "Constant" and len(node.output) == 1:
            if node.output[0] in last:
                found.append(last[node.output[0]])
            last[node.output[0]] = node
    return found


def repeated(tensors: Sequence[TensorProto]) -> set[int]:
    """The places of tensors of which one with the same name and values stands before. Raises nothing where values differ:
    those are not alike."""
    first: dict[str, TensorProto] = {}
    return {
        index for index, tensor in enumerate(tensors) if tensor.name and first.setdefault(tensor.name, tensor) is not tensor
        and first[tensor.name] == tensor
    }  # fmt: skip


def since(op: str, version: int) -> int | None:
    """The opset that the operator's meaning at this version is of; None for one that the standard does not have then."""
    try:
        return onnx.defs.get_schema(op, version, "").since_version
    except onnx.defs.SchemaError:
        return None


def _unchanged(op: str, newest: int) -> bool:
    versions = {since(op, version) for version in range(OLDEST, newest + 1)} - {None}
    return (op in TYPES_ONLY and bool(versions)) or len(versions) == 1
