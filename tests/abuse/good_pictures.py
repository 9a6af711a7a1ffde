"""The good inputs of the stages that read or write pictures: checkpoints of a model that draws and of one that makes masks, and folders
as export leaves them whose graphs stand for theirs: small, and with the same inputs and outputs."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pictures
import torch
from PIL import Image

from suture.models.named import checkpoint_folder
from suture.models.random_weights import write

SIDE = 16  # of the pictures that masks are made of
IMPORTS = '<ir_version: 10, opset_import: ["": 18]>'
DRAWING = {
    "text_encoder": """text (int64[n, 24] input_ids) => (float[n, 24, 1] last_hidden_state)
        <int64[1] axis = {2}> { f = Cast<to = 1>(input_ids) last_hidden_state = Unsqueeze(f, axis) }""",
    "controlnet": """control (float[n, 4, h, w] sample, float[n, 3, H, W] controlnet_cond) => (float[n, 4, h, w] mid_block_res_sample)
        { mean = ReduceMean<keepdims = 0>(controlnet_cond) mid_block_res_sample = Mul(sample, mean) }""",
    "unet": """unet (float[n, 4, h, w] sample, float[n, 4, h, w] mid_block_res_sample, float[n, 24, 1] encoder_hidden_states)
        => (float[n, 4, h, w] out_sample)
        { mean = ReduceMean<keepdims = 0>(encoder_hidden_states) a = Add(sample, mean) out_sample = Sub(a, mid_block_res_sample) }""",
    "vae_decoder": """vae (float[n, 4, h, w] latent_sample) => (float[n, 3, H, W] sample)
        <int64[1] first = {0}, int64[1] end = {3}, int64[1] axis = {1}, float[4] scales = {1.0, 1.0, 2.0, 2.0}>
        { cut = Slice(latent_sample, first, end, axis) sample = Resize(cut, , scales) }""",
}
MASKING = {
    "image_encoder": f"""encoder (float[n, 3, {SIDE}, {SIDE}] pixel_values) => (float[n, 3, {SIDE}, {SIDE}] image_embeddings)
        {{ image_embeddings = Relu(pixel_values) }}""",
    "mask_decoder": f"""masks (float[n, 3, {SIDE}, {SIDE}] image_embeddings, float[n, p, 2] input_points, int64[n, p] input_labels)
        => (float[n, 3, {SIDE}, {SIDE}] pred_masks, float[n, 3] iou_scores)
        <int64[2] axes = {{2, 3}}>
        {{ labels = Cast<to = 1>(input_labels) mean = ReduceMean<keepdims = 0>(labels) far = ReduceMean<keepdims = 0>(input_points)
          both = Add(mean, far) pred_masks = Sub(image_embeddings, both) iou_scores = ReduceMean<keepdims = 0>(image_embeddings, axes) }}""",
}
SAM = {
    "architectures": ["SamModel"], "model_type": "sam",
    "vision_config": {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE,
                      "patch_size": 8, "window_size": 2, "global_attn_indexes": [0], "mlp_dim": 16, "num_pos_feats": 8},
    "prompt_encoder_config": {"hidden_size": 16, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
}  # fmt: skip


def make(folder: Path) -> None:
    pictures.checkpoint(folder / "sd")
    written(folder / "drawn", DRAWING)
    write(SAM, folder / "sam", "float32", seed=0)
    preprocessor = json.loads((checkpoint_folder("tiny-sam") / "preprocessor_config.json").read_text())
    sized = {"size": {"longest_edge": SIDE}, "pad_size": {"height": SIDE, "width": SIDE}}
    (folder / "sam" / "preprocessor_config.json").write_text(json.dumps(preprocessor | sized))
    written(folder / "masked", MASKING)
    drawn = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(drawn).save(folder / "given.png")
    shutil.copyfile(folder / "given.png", folder / "secret.png")
    (folder / "prompts.jsonl").write_text('{"prompt": "a circle"}\n')
    found = pictures.networks()
    found["vae"].eval()
    torch.save({"state_dict": pictures.original(found)}, folder / "single.ckpt")
    (folder / "out").mkdir()  # where pictures go


def written(folder: Path, graphs: dict[str, str]) -> None:
    """What export leaves of a model of these parts."""
    parts = [{"name": name, "kind": "graph", "inputs": {}, "outputs": {}} for name in graphs]
    for part in parts:
        out = folder / part["name"] / "export"
        out.mkdir(parents=True)
        onnx.save(onnx.parser.parse_model(f"{IMPORTS} {graphs[part['name']]}"), out / "model.onnx")
        described(out, "export", "model.onnx", part=part)
    (folder / "parts.json").write_text(json.dumps({"parts": parts}))
    described(folder, "export.parts", "parts.json")


def described(folder: Path, stage: str, name: str, **more: object) -> None:
    outputs = {name: (folder / name).stat().st_size}
    said = {"stage": stage, "outputs": outputs, "options": {}, "seconds": 1.0, "peak_memory_bytes": 1, **more}
    (folder / "manifest.json").write_text(json.dumps(said))
