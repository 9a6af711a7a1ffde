"""Clip(x, -inf, inf) → x."""

import numpy as np

from suture.surgery.graph import need


def run(graph):
    return graph.match(skip, graph.nodes("Clip"))


def skip(graph, clip):
    bounds = [graph.scalar(tensor) for tensor in clip.inputs[1:3]]
    need(None not in bounds, "a bound is computed")  # a near miss: the report says so
    if np.isfinite(bounds).any():
        return False
    graph.redirect(clip.outputs[0], clip.inputs[0])
    return True
