"""The scales s with which products of x / s and diag(s) W lose least by rounding, searched on text.

    awq           s = mean|x|^α or mean|x|^α / mean|W|^(1 - α)      least |x W - (x / s) Q(diag(s) W)|²
    smoothquant   s = max|x|^α / max|W|^(1 - α)                     least |x W - Q(x / s) Q(diag(s) W)|²

AWQ: Lin et al. 2023 (arXiv 2306.00978). SmoothQuant: Xiao et al. 2022 (arXiv 2211.10438), its α searched, too.
"""

import torch

from suture.surgery.graph import Graph
from suture.surgery.quantize.formats import Format
from suture.surgery.quantize.inputs import Inputs
from suture.surgery.quantize.linears import Linear
from suture.surgery.quantize.rounding import dequantised, quantise, round_to, scales_of
from suture.surgery.quantize.slabs import ROWS, slabs
from suture.surgery.quantize.writing import block_for

ALPHAS = torch.linspace(0, 1, 11)
OUTPUTS = 1024  # of a product, spread evenly: what the search looks at


def search(graph: Graph, linears: list[Linear], inputs: Inputs, form: Format, group_size: int) -> torch.Tensor:
    """float32 [in]: the candidate with which the outputs of the products, which read the same, are least wrong."""
    candidates = _candidates(graph, linears, inputs, form)
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    x = torch.cat(inputs.samples) if form.activations else None
    for linear in linears:
        block = block_for(linear, form, group_size)
        for _, rows in slabs(graph, linear.weight, linear.by_output, ROWS):
            rows = rows[:: max(linear.outputs // OUTPUTS, 1)].contiguous()
            exact = x @ rows.T if form.activations else None
            for index, scales in enumerate(candidates):
                rounded = dequantised(*quantise(rows * scales, form.values, block, linear.dtype)) / scales
                if form.activations:
                    step = scales_of((inputs.largest / scales).max(), form.values, linear.dtype)
                    ours = round_to(x / scales / step, form.values) * step * scales
                    errors[index] += (ours @ rounded.T - exact).square().sum(dtype=torch.float64)
                else:
                    errors[index] += inputs.error(rounded - rows)
    return candidates[int(errors.argmin())]


def _candidates(graph: Graph, linears: list[Linear], inputs: Inputs, form: Format) -> list[torch.Tensor]:
    """Scales [in] for each α, 1 at the first; spread evenly around 1."""
    awq = form.balance == "awq"
    weights, outputs = torch.zeros_like(inputs.largest), 0
    for linear in linears:
        for _, rows in slabs(graph, linear.weight, linear.by_output, ROWS):
            weights = weights + rows.abs().sum(0) if awq else torch.maximum(weights, rows.abs().amax(0))
            outputs += len(rows)
    activations = (inputs.mean if awq else inputs.largest).clamp(min=1e-5)
    weights = (weights / outputs if awq else weights).clamp(min=1e-5)
    found = [torch.ones_like(weights)]
    found += [activations**alpha / weights ** (1 - alpha) for alpha in ALPHAS]
    found += [activations**alpha for alpha in ALPHAS[1:]] if awq else []
    return [scales / (scales.max() * scales.min()).sqrt() for scales in found]
