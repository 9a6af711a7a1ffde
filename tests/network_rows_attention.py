"""Rows of rotary embedding, caches and attention."""

# ruff: noqa: E501 (a graph is a line)

from network_rows import FLOATS, Dies, Differs, Refused, Row

QKV = "T[B,4,S,16] q, T[B,2,L,16] k, T[B,2,L,16] v"
ATTEND = "=> (T[B,4,S,16] y)"
ROPE = "(T[B,2,S,8] x, T[P,{0}] cos, T[P,{0}] sin, int64[B,S] position_ids) => (T[B,2,S,8] y)"


def _trt_attention(extra: str, attributes: str, given: str, portable: str) -> Row:
    """TRT_Attention over unscaled queries next to the Attention of scale 1 that it stands for."""
    attributes = f"<{attributes}>" if attributes else ""
    return Row(
        f"({QKV}{extra}) {ATTEND} {{ y = trt.TRT_Attention{attributes}(q, k, v{given}) }}",
        "float float16",
        reference=f"({QKV}{extra}) {ATTEND} {{ y = Attention<scale = 1.0{portable} }}",
    )


TRT_ATTENTION = [
    _trt_attention("", "", "", ">(q, k, v)"),
    _trt_attention(", T[B,1,S,L] mask", "", ", mask", ">(q, k, v, mask)"),
    _trt_attention(", bool[B,1,S,L] mask", "", ", mask", ">(q, k, v, mask)"),
    _trt_attention(", bool[B,1,S,L] mask", "TRT_decomposable = 1", ", mask", ">(q, k, v, mask)"),
    _trt_attention("", 'causal_kind = "upper_left"', "", ", is_causal = 1>(q, k, v)"),
    _trt_attention(
        ", int64[B] lengths", 'causal_kind = "lower_right"', ", , , lengths",
        ", is_causal = 1>(q, k, v, , , , lengths)",
    ),
    _trt_attention(", int64[B] lengths", "", ", , , lengths", ">(q, k, v, , , , lengths)"),
]  # fmt: skip

ATTENTION = [
    # rotary embedding
    Row(ROPE.format(4) + " { y = RotaryEmbedding(x, cos, sin, position_ids) }", FLOATS),
    Row(ROPE.format(4) + " { y = RotaryEmbedding<interleaved = 1>(x, cos, sin, position_ids) }", "float float16"),
    Row(ROPE.format(2) + " { y = RotaryEmbedding<rotary_embedding_dim = 4>(x, cos, sin, position_ids) }", "float float16"),
    Row("(T[B,2,S,8] x, T[B,S,4] cos, T[B,S,4] sin) => (T[B,2,S,8] y) { y = RotaryEmbedding(x, cos, sin) }", FLOATS),
    Row(
        "(T[B,S,16] x, T[P,4] cos, T[P,4] sin, int64[B,S] position_ids) => (T[B,S,16] y) { y = RotaryEmbedding<num_heads = 2>(x, cos, sin, position_ids) }"
    ),
    # cache
    Row(
        "(T[B,2,7,8] past, T[B,2,S,8] k, int64[B] write_indices) => (T[B,2,7,8] present) { present = TensorScatter<axis = -2>(past, k, write_indices) }",
        FLOATS,
    ),
    Row(
        "(T[B,2,L,8] past, T[B,2,S,8] k, int64[B] write_indices) => (T[B,2,L,8] present) { present = TensorScatter<axis = -2>(past, k, write_indices) }",
        expected=Refused("static sequence length"),
    ),
    Row(
        '(T[B,2,L,8] past, T[B,2,S,8] k, int64[B] write_indices) => (T[B,2,L,8] present) { present = TensorScatter<axis = -2, mode = "circular">(past, k, write_indices) }',
        expected=Refused("Only linear mode"),
    ),
    # attention
    Row(f"({QKV}) {ATTEND} {{ y = Attention(q, k, v) }}", FLOATS),
    Row(f"({QKV}) {ATTEND} {{ y = Attention<scale = 0.5>(q, k, v) }}", "float float16"),
    Row(f"({QKV}, bool[B,1,S,L] mask) {ATTEND} {{ y = Attention(q, k, v, mask) }}", "float float16"),
    Row(f"({QKV}, T[B,1,S,L] mask) {ATTEND} {{ y = Attention(q, k, v, mask) }}", "float float16"),
    Row(f"({QKV}, T[4,S,L] mask) {ATTEND} {{ y = Attention(q, k, v, mask) }}"),
    Row(f"({QKV}, T[S,L] mask) {ATTEND} {{ y = Attention(q, k, v, mask) }}"),
    Row(f"({QKV}) {ATTEND} {{ y = Attention<is_causal = 1>(q, k, v) }}", "float"),
    Row(
        f"({QKV}, bool[B,1,S,L] mask) {ATTEND} {{ y = Attention<is_causal = 1>(q, k, v, mask) }}",
        expected=Refused("mask cannot be used"),
    ),
    Row(
        f"({QKV}, int64[B] lengths) {ATTEND} {{ y = Attention<is_causal = 1>(q, k, v, , , , lengths) }}",
        expected=Differs("nonpad_kv_seqlen is dropped"),
    ),
    Row(f"({QKV}) {ATTEND} {{ y = Attention<softcap = 5.0>(q, k, v) }}", expected=Refused("softcap")),
    Row(
        "(T[B,S,64] q, T[B,L,32] k, T[B,L,32] v) => (T[B,S,64] y) { y = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v) }",
        "float float16",
    ),
    Row("(T[B,4,S,16] x) => (T[B,4,S,16] y) { y = Attention(x, x, x) }"),
    Row("(T x) => (T y) { y = Attention(x, x, x) }", expected=Dies("SIGSEGV")),
    # TensorRT's own attention: onnxruntime computes the portable form with its scale and alignment
    *TRT_ATTENTION,
]
