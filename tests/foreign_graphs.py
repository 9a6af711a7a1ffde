"""Graphs that others wrote, or that others' exporters did, and what surgery is to make of each: written down before the code.

`fused`: operators of the portable graph. `static`: whether its caches become static. `refused`: a part of the one line that
says why not. `kept`: what stays, and why. Graphs without caches keep their inputs and outputs as they are.
"""

import gzip
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from tests.graphs import stand_ins

GRAPHS = Path(__file__).parent / "graphs"
PUBLIC = Path(__file__).parents[2] / "shared" / "public"  # others' files, which are not ours to copy


@dataclass(frozen=True)
class Row:
    fused: dict[str, int] = field(default_factory=dict)
    static: bool | None = None  # None: it has no caches that surgery knows
    refused: str | None = None
    kept: str = ""
    branch: str | None = None
    parsed: bool = True  # whether TensorRT's parser takes it
    built: bool = True  # whether it builds an engine for the shapes that build takes where nobody gives any
    run: bool = True  # whether onnxruntime runs it on made-up inputs, so that TensorRT's network can be held against it


LLAMA = {"Attention": 2, "RMSNormalization": 5, "Swish": 2, "RotaryEmbedding": 4}
STATIC = LLAMA | {"TensorScatter": 4}
OWN = {
    "attention_3d_encoder": Row({"Attention": 1}),
    "causal_no_cache_op23": Row({"Attention": 1}),
    "clip_text_op18": Row({"Attention": 2, "LayerNormalization": 5, "Swish": 2}),
    "dim_names_mask_gemma2": Row(
        {"Attention": 2, "RMSNormalization": 9, "Gelu": 2, "RotaryEmbedding": 4, "TensorScatter": 4}, True
    ),  # its caps are the attention's own
    "dim_names_presents": Row(STATIC, True),
    "fixed_batch1": Row(STATIC, True),
    "merged_if": Row(refused="--branch then, else or past"),
    "one_token_llama31": Row(STATIC, True),
    "softcap": Row({"Attention": 1, "TensorScatter": 2}, True),
    "unnamed_dims": Row(STATIC, True),
    "bevformer_d18": Row({"LayerNormalization": 5}),
    "clip_text_f16_d18": Row({"Attention": 2, "LayerNormalization": 5, "Swish": 2}),
    "codef_d18": Row(),  # its bitwise operators become arithmetic
    "flux_d18": Row({"Attention": 2, "RotaryEmbedding": 4, "RMSNormalization": 6}),
    "instruct_qformer_d18": Row({"Attention": 3, "LayerNormalization": 8, "Gelu": 4}),
    "sam_vision_ts17": Row({"Attention": 2, "LayerNormalization": 6, "Gelu": 2}),
    "sd15_tblock_f16_d18": Row({"Attention": 2, "LayerNormalization": 3 + 1, "Gelu": 1}),
    "sd15_unet_d18": Row({"Attention": 8, "LayerNormalization": 12 + 21, "Gelu": 4, "Swish": 19}),
    "siglip_d18": Row({"Attention": 3, "LayerNormalization": 6, "Gelu": 3}),
    "vae_decoder_d18": Row({"Attention": 1, "LayerNormalization": 14, "Swish": 13}),
}
MADE = {  # by tests/graphs/stand_ins.py
    "optimised_bert": Row({"Attention": 2, "LayerNormalization": 5, "Gelu": 2}),
    "stacked_gpt2": Row({"Attention": 2, "LayerNormalization": 5, "Gelu": 2}, kept="the stacked cache grows"),
    "paged_decoder": Row(kept="PagedAttention", parsed=False),
}
GPT2_LAYER = {"Attention": 1, "LayerNormalization": 2, "Gelu": 1}
OTHERS = {
    "attention_past_causal": Row(GPT2_LAYER, kept="the stacked cache grows"),
    "attention_past_not_causal": Row(GPT2_LAYER, kept="the stacked cache grows"),
    "bad_duplicate_node_names": Row(),
    "bad_no_import_domains": Row(),
    "bert_tiny_optimum": Row({"Attention": 2, "LayerNormalization": 5, "Gelu": 2}),
    "bert_toy_ort_optimized": Row({"Attention": 5, "LayerNormalization": 12, "Gelu": 6}),
    "distilbert_attention_opset12": Row(refused="Reshape reshape_x"),
    "gemma3_vision_attention": Row({"Attention": 1, "LayerNormalization": 2}),
    "genai_synthetic_paged": Row(kept="a paged cache"),
    "genai_tiny_gpt2_stacked_past": Row({"Attention": 5, "LayerNormalization": 11, "Gelu": 5}, kept="the stacked cache grows"),
    "genai_tiny_qwen35_fp16": Row({"Attention": 2, "LayerNormalization": 5, "TensorScatter": 4}, True),
    "gpt2_12_layers_opset11_stacked_past": Row(
        {"Attention": 12, "LayerNormalization": 25, "Gelu": 12}, kept="the stacked cache grows"
    ),
    "gpt2_beamsearch": Row(refused="com.microsoft.BeamSearch"),
    "gpt2_past_one_layer": Row(GPT2_LAYER, kept="the stacked cache grows"),
    "initializer_is_output": Row(),
    "loop": Row(kept="Loop"),
    "op_attention_4d": Row({"Attention": 1}),
    "op_attention_cache": Row({"Attention": 1}),
    "op_attention_is_causal": Row({"Attention": 1}),
    "op_attention_softcap": Row({"Attention": 1}),
    "phi35_vision_attention": Row({"Attention": 1, "LayerNormalization": 2}),
    "polygraphy_attention_head": Row(
        kept="its batch and sequence are the other way round: batch of keys is the heads'", run=False, built=False
    ),
    "qdq_conv": Row(),
    "residual_block": Row(),
    "whisper_decoder_attention_with_past": Row({"Attention": 2, "LayerNormalization": 3, "Gelu": 1}),
    "whisper_encoder_self_attention_fp16": Row({"Attention": 1, "LayerNormalization": 2, "Gelu": 1}),
}


def load(name: str) -> onnx.ModelProto:
    """A graph of OWN or MADE, with weights that are the same each time where it is stored without."""
    if name in MADE:
        return stand_ins.GRAPHS[name]()
    plain = GRAPHS / "cases" / f"{name}.onnx"
    data = plain.read_bytes() if plain.is_file() else gzip.decompress((GRAPHS / "foreign" / f"{name}.onnx.gz").read_bytes())
    model = onnx.load_model_from_string(data)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            shape, dtype = list(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            rng = np.random.default_rng(zlib.crc32(tensor.name.encode()))
            scale = 1 / np.sqrt(np.prod(shape[1:]) if len(shape) == 4 else shape[0])
            tensor.CopyFrom(numpy_helper.from_array((rng.standard_normal(shape) * scale).astype(dtype), tensor.name))
    return model
