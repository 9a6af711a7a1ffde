"""Layers that work element by element: ELEMENTWISE, UNARY, ACTIVATION, SELECT, CAST, IDENTITY, PARAMETRIC_RELU.

Each takes the layer and its inputs and returns its output. 16-bit floats are computed in float32 and rounded once,
which for one operation is what 16-bit arithmetic gives.
"""

import torch
from torch.nn import functional

from suture.core.network.description import Layer
from suture.core.network.dtypes import TORCH, to_e2m1, widen

BINARY = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "POW": torch.pow,
    "FLOOR_DIV": torch.floor_divide,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}
UNARY = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "TAN": torch.tan,
    "SINH": torch.sinh,
    "COSH": torch.cosh,
    "ASIN": torch.asin,
    "ACOS": torch.acos,
    "ATAN": torch.atan,
    "ASINH": torch.asinh,
    "ACOSH": torch.acosh,
    "ATANH": torch.atanh,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ERF": torch.erf,
    "NOT": torch.logical_not,
    "SIGN": torch.sign,
    "ROUND": torch.round,  # half to even, as TensorRT
    "ISINF": torch.isinf,
    "ISNAN": torch.isnan,
}
# alpha and beta as NvInfer.h defines them for ActivationType
ACTIVATIONS = {
    "RELU": lambda x, alpha, beta: functional.relu(x),
    "SIGMOID": lambda x, alpha, beta: torch.sigmoid(x),
    "TANH": lambda x, alpha, beta: torch.tanh(x),
    "LEAKY_RELU": lambda x, alpha, beta: torch.where(x >= 0, x, alpha * x),
    "ELU": lambda x, alpha, beta: torch.where(x >= 0, x, alpha * torch.expm1(x)),
    "SELU": lambda x, alpha, beta: beta * torch.where(x > 0, x, alpha * torch.expm1(x)),
    "SOFTSIGN": lambda x, alpha, beta: functional.softsign(x),
    "SOFTPLUS": lambda x, alpha, beta: alpha * torch.logaddexp(beta * x, torch.zeros_like(x)),
    "CLIP": lambda x, alpha, beta: torch.clamp(x, alpha, beta),
    "HARD_SIGMOID": lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1),
    "SCALED_TANH": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
    "THRESHOLDED_RELU": lambda x, alpha, beta: torch.where(x > alpha, x, 0.0),
    "GELU_ERF": lambda x, alpha, beta: functional.gelu(x),
    "GELU_TANH": lambda x, alpha, beta: functional.gelu(x, approximate="tanh"),
}


def elementwise(layer: Layer, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    operation = layer.attributes["op"]
    if operation == "DIV":  # of integers: towards zero, as in C
        result = torch.div(widen(a), widen(b), rounding_mode=None if a.is_floating_point() else "trunc")
    else:
        result = BINARY[operation](widen(a), widen(b))
    return result if result.dtype == torch.bool else result.to(a.dtype)


def unary(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    result = UNARY[layer.attributes["op"]](widen(x))
    return result if result.dtype == torch.bool else result.to(x.dtype)


def activation(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    attributes = layer.attributes
    return ACTIVATIONS[attributes["type"]](widen(x), attributes["alpha"], attributes["beta"]).to(x.dtype)


def parametric_relu(layer: Layer, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, widen(x), widen(slope) * widen(x)).to(x.dtype)


def select(layer: Layer, condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, a, b)


def cast(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """To INT4 as to other integers: the lowest bits stay."""
    target = layer.attributes["to_type"]
    if target == "FP4":
        return to_e2m1(widen(x).clamp(-6, 6)).to(TORCH[target])
    if target == "INT4":
        return ((x.to(torch.int32) + 8) % 16 - 8).to(TORCH[target])
    return x.to(TORCH[target])


def identity(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return x
