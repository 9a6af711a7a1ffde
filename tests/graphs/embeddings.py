"""Makes the graphs of embeddings/: decoders that take embeddings in place of token ids, two layers, without weights.

    python tests/graphs/embeddings.py [NAME ...]        NAME: FAMILY-EXPORTER-OPSET

qwen2 has one position a token, qwen25vl (the text model of Qwen2.5-VL) three: temporal, height and width.
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

sys.path.insert(0, str(Path(__file__).parent))
import weightless

NAMES = ("qwen2-dynamo-18", "qwen2-torchscript-17", "qwen25vl-dynamo-18", "qwen25vl-torchscript-17")
LAYERS, BATCH, SEQUENCE, PAST, HIDDEN = 2, 2, 3, 5, 64
CONFIG = {
    "vocab_size": 96, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SECTIONS = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


class Decoder(nn.Module):
    """Embeddings to logits and caches."""

    def __init__(self, model: nn.Module, head: nn.Module):
        super().__init__()
        self.model, self.head = model, head

    def forward(self, inputs_embeds, attention_mask, position_ids, *past):
        past = past[0] if isinstance(past[0], list | tuple) else past
        cache = DynamicCache(list(zip(past[0::2], past[1::2])))
        hidden = self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
                            past_key_values=cache, use_cache=True).last_hidden_state  # fmt: skip
        return self.head(hidden), *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def build(family: str) -> Decoder:
    """Random weights from a fixed seed; norms and biases are disturbed as well."""
    torch.manual_seed(0)
    if family == "qwen2":
        whole = Qwen2ForCausalLM(Qwen2Config(**CONFIG))
        model = Decoder(whole.model, whole.lm_head)
    else:
        config = Qwen2_5_VLTextConfig(**CONFIG, rope_parameters=SECTIONS)
        model = Decoder(Qwen2_5_VLTextModel(config), nn.Linear(HIDDEN, CONFIG["vocab_size"], bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def export(family: str, exporter: str, opset: int, out: Path) -> None:
    auto = torch.export.Dim.AUTO
    rows = (BATCH, SEQUENCE) if family == "qwen2" else (3, BATCH, SEQUENCE)
    axis = len(rows) - 2
    positions = torch.arange(PAST, PAST + SEQUENCE).expand(rows).clone()
    past = [torch.randn(BATCH, 2, PAST, HIDDEN // 4) for _ in range(2 * LAYERS)]
    inputs = (torch.randn(BATCH, SEQUENCE, HIDDEN), torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64), positions, *past)
    kinds = [f"{layer}.{role}" for layer in range(LAYERS) for role in ("key", "value")]
    names = ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{kind}" for kind in kinds)]
    outputs = ["logits", *(f"present.{kind}" for kind in kinds)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        if exporter == "dynamo":
            shapes = (
                {0: auto, 1: auto},
                {0: auto, 1: auto},
                {axis: auto, axis + 1: auto},
                tuple({0: auto, 2: auto} for _ in past),
            )
            torch.onnx.export(build(family), inputs, out, input_names=names, output_names=outputs, dynamic_shapes=shapes,
                              opset_version=opset, dynamo=True, verbose=False, external_data=False)  # fmt: skip
        else:
            axes = {"inputs_embeds": {0: "B", 1: "S"}, "attention_mask": {0: "B", 1: "T"}, "logits": {0: "B", 1: "S"}}
            axes |= {"position_ids": {axis: "B", axis + 1: "S"}}
            axes |= {name: {0: "B", 2: "P"} for name in names[3:]} | {name: {0: "B", 2: "T"} for name in outputs[1:]}
            torch.onnx.export(build(family), inputs, out, input_names=names, output_names=outputs, dynamic_axes=axes,
                              opset_version=opset, dynamo=False)  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    (weightless.FOLDER / "embeddings").mkdir(exist_ok=True)
    for name in sys.argv[1:] or NAMES:
        family, exporter, opset = name.split("-")
        with tempfile.TemporaryDirectory() as folder:
            export(family, exporter, int(opset), Path(folder) / "model.onnx")
            weightless.save(onnx.load(Path(folder) / "model.onnx"), f"embeddings/{name}")
        print(name, (weightless.FOLDER / "embeddings" / f"{name}.onnx.gz").stat().st_size)


if __name__ == "__main__":
    main()
