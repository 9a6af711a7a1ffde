"""Rows of what vision graphs are made of, and of loops."""

# ruff: noqa: E501 (a graph is a line)

import numpy as np
from network_rows import Differs, Refused, Row

IMAGE = "(T[2,4,7,6] x) => (T[2,M,M,M] y) {{ y = {}(x) }}"
WEIGHED = "(T[2,4,7,6] x, T[{}] w, T[{}] b) => (T[2,M,M,M] y) {{ y = {}(x, w, b) }}"
RESIZED = "(T[1,2,5,4] x) => (T[1,2,M,M] y) <float[4] s = {{1, 1, {}}}> {{ y = Resize<{}>(x, , s) }}"
GRID = "(T[1,2,5,4] x, T[1,3,2,2] g) => (T[1,2,3,2] y) {{ y = GridSample<{}>(x, g) }}"
LSTM = "(T[5,2,3] x, T[{0},{1},3] w, T[{0},{1},4] r) => (T[5,{0},2,4] y) {{ y = {2}(x, w, r) }}"
UP, DOWN = "2.0, 1.5", "0.6, 0.5"


# what vision graphs are made of
VISION = [
    # windows
    Row(WEIGHED.format("6,4,3,3", 6, "Conv<pads = [1, 0, 2, 1]>"), "float float16 bfloat16"),
    Row(WEIGHED.format("6,2,3,2", 6, "Conv<group = 2, dilations = [2, 1], strides = [1, 2]>"), "float float16"),
    Row(WEIGHED.format("4,1,3,3", 4, "Conv<group = 4, pads = [1, 1, 1, 1]>")),
    *(Row(WEIGHED.format("6,4,3,2", 6, f'Conv<auto_pad = "{side}", strides = [2, 2]>')) for side in ("SAME_UPPER", "SAME_LOWER")),
    Row("(T[2,3,5,4,6] x, T[2,3,2,3,2] w) => (T[2,2,4,2,5] y) { y = Conv(x, w) }"),
    Row("(T[2,3,5] x) => (T[2,2,4] y) <T[2,3,2] w = {1, 2, 3, 4, 5, 6, -1, -2, -3, -4, -5, -6}> { y = Conv(x, w) }", "float float16"),
    Row(WEIGHED.format("4,3,2,2", 3, "ConvTranspose<strides = [2, 2]>"), "float float16"),
    Row(WEIGHED.format("4,3,3,4", 3, "ConvTranspose<strides = [2, 3], pads = [1, 0, 1, 2], output_padding = [1, 0]>")),
    Row(
        WEIGHED.format("4,3,3,4", 3, "ConvTranspose<strides = [2, 3], pads = [1, 0, 0, 2], output_padding = [1, 0]>"),
        expected=Differs("fills an output padding that pads do not take off again with zeros, without the bias"),
    ),
    Row(WEIGHED.format("4,2,3,3", 4, "ConvTranspose<group = 2, dilations = [2, 1]>")),
    Row(WEIGHED.format("4,3,3,3", 3, 'ConvTranspose<auto_pad = "SAME_UPPER", strides = [2, 2]>')),
    Row("(T[2,3,5] x, T[3,2,4] w) => (T[2,2,10] y) { y = ConvTranspose<strides = [2], pads = [1, 1]>(x, w) }"),
    *(Row(IMAGE.format(f"{kind}Pool<kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 1]>"), "float float16") for kind in ("Max", "Average")),
    Row(IMAGE.format("AveragePool<kernel_shape = [3, 2], pads = [1, 0, 1, 1], count_include_pad = 1>"), "float float16"),
    Row(IMAGE.format("AveragePool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>")),
    Row(IMAGE.format("MaxPool<kernel_shape = [3, 4], strides = [3, 3], ceil_mode = 1>")),
    Row(IMAGE.format("MaxPool<kernel_shape = [3, 2], strides = [3, 3], ceil_mode = 1>"), expected=Differs("keeps a window beyond the input")),
    Row(IMAGE.format('MaxPool<kernel_shape = [3, 2], strides = [2, 2], auto_pad = "SAME_LOWER">')),
    Row("(T[2,4,7] x) => (T[2,4,5] y) { y = AveragePool<kernel_shape = [3]>(x) }"),
    Row("(T[2,2,4,5,6] x) => (T[2,2,3,4,5] y) { y = MaxPool<kernel_shape = [2, 2, 2]>(x) }"),
    Row(IMAGE.format("GlobalAveragePool"), "float float16"),
    Row(IMAGE.format("GlobalMaxPool")),
    Row(IMAGE.format("LRN<size = 3, alpha = 0.1, beta = 0.6, bias = 1.5>")),
    Row(
        "(T[2,4,7,6] x) => (T[2,4,7,6] y) <T[4] s = {1, 2, 3, 4}, T[4] b = {0.5, 0, -1, 2}, T[4] m = {0, 1, 2, 3}, T[4] v = {1, 2, 0.5, 3}> { y = BatchNormalization<epsilon = 0.01>(x, s, b, m, v) }",
        "float float16",
    ),
    Row(IMAGE.format("DepthToSpace<blocksize = 2>")),
    Row("(T[2,4,6,4] x) => (T[2,16,3,2] y) { y = SpaceToDepth<blocksize = 2>(x) }"),
    # between elements
    *(
        Row(RESIZED.format(size, f'mode = "{mode}", coordinate_transformation_mode = "{places}"'))
        for size in (UP, DOWN)
        for mode in ("nearest", "linear", "cubic")
        for places in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    ),
    *(
        Row(RESIZED.format(size, f'mode = "nearest", nearest_mode = "{rounding}"'))
        for size in (UP, DOWN)
        for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    ),
    Row(RESIZED.format(DOWN, 'mode = "cubic", cubic_coeff_a = -0.5, exclude_outside = 1')),
    Row('(T[1,2,5,4] x) => (T[1,2,9,3] y) <int64[4] s = {1, 2, 9, 3}> { y = Resize<mode = "linear">(x, , , s) }', "float float16"),
    Row('(T[N,2,H,W] x) => (T[N,2,M,M] y) <float[4] s = {1, 1, 2, 2}> { y = Resize(x, , s) }'),
    Row(RESIZED.format(DOWN, 'mode = "linear", antialias = 1'), expected=Refused("Antialiasing")),
    *(
        Row(GRID.format(f'mode = "{mode}", padding_mode = "{outside}", align_corners = {corners}'))
        for mode in ("linear", "nearest", "cubic")
        for outside in ("zeros", "border", "reflection")
        for corners in (0, 1)
    ),
    Row(GRID.format('mode = "linear"'), "float16"),
    Row("(T[1,2,5,4,3] x, T[1,2,3,2,3] g) => (T[1,2,2,3,2] y) { y = GridSample(x, g) }"),
    # boxes and sequences
    Row(
        "(T[1,6,4] boxes, T[1,2,6] scores) => (int64[M,3] y) <int64 k = {3}, float iou = {0.4}, float least = {0.1}> { y = NonMaxSuppression(boxes, scores, k, iou, least) }",
        feeds={
            "boxes": np.array([[[0, 0, 1, 1], [0, 0.1, 1, 1.1], [0, 5, 1, 6], [0, 5.1, 1, 6], [9, 9, 8, 8], [3, 3, 4, 4]]], np.float32),
            "scores": np.array([[[0.9, 0.8, 0.7, 0.95, 0.05, 0.3], [0.2, 0.4, 0.4, 0.1, 0.6, 0.5]]], np.float32),
        },
    ),
    Row("(T[5,3,2] x, int64[3] n) => (T[5,3,2] y) { y = ReverseSequence(x, n) }", feeds={"n": np.array([5, 2, 1])}),
    Row("(T[3,5,2] x, int64[3] n) => (T[3,5,2] y) { y = ReverseSequence<batch_axis = 0, time_axis = 1>(x, n) }", feeds={"n": np.array([4, 1, 3])}),
    Row("(int64[N] index) => (float[5,N] y) <int64 d = {5}, float[2] v = {2, 3}> { y = OneHot<axis = 0>(index, d, v) }"),
]  # fmt: skip


# loops: state, slices, stacked outputs, conditions
LOOPS = [
    Row(
        "(int64 n, T[N,4] x) => (T[N,4] y, T[M,N,4] all) <bool go = {1}> { y, all = Loop(n, go, x) <body = b (int64 i, bool c, T[N,4] p) => (bool d, T[N,4] q, T[N,4] s) { d = Identity(c) q = Add(p, p) s = Neg(p) }> }",
        feeds={"n": np.array(3)},
    ),
    Row(
        "(T[N,4] x) => (T[N,4] y) <bool go = {1}, int64 most = {9}, float limit = {20}> { y = Loop(most, go, x) <body = b (int64 i, bool c, T[N,4] p) => (bool d, T[N,4] q) { q = Add(p, p) m = ReduceMax<keepdims = 0>(q) d = Less(m, limit) }> }",
    ),
    Row(
        "(T[N,4] x, T[5,N,4] steps) => (T[N,4] y, T[5,N,4] all) { y, all = Scan(x, steps) <num_scan_inputs = 1, body = b (T[N,4] p, T[N,4] s) => (T[N,4] q, T[N,4] o) { q = Add(p, s) o = Mul(q, s) }> }",
    ),
    Row(
        "(int64 n, T[N,4] x) => (T[N,4] y) <bool go = {1}> { y = Loop(n, go, x) <body = b (int64 i, bool c, T[N,4] p) => (bool d, T[N,4] q) { d = Identity(c) q = Loop(n, c, p) <body = e (int64 j, bool f, T[N,4] r) => (bool g, T[N,4] t) { g = Identity(f) one = Constant<value_float = 1.0>() u = Add(r, one) t = Add(u, p) }> }> }",
        feeds={"n": np.array(3)},
    ),
    Row(LSTM.format(1, 16, "LSTM<hidden_size = 4>")),
    Row(LSTM.format(2, 16, 'LSTM<hidden_size = 4, direction = "bidirectional">')),
    Row(LSTM.format(1, 12, "GRU<hidden_size = 4, linear_before_reset = 1>")),
    Row(LSTM.format(1, 4, 'RNN<hidden_size = 4, direction = "reverse">')),
]
