"""SAM: the parts are transformers' SamModel, published files are read, tiny-sam finds shapes, and a damaged graph does not."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from families import export_and_operate
from PIL import Image
from safetensors.torch import load_file
from transformers import SamConfig, SamModel

from suture.core.errors import UserError
from suture.core.masks import DECODER, ENCODER, INSIDE
from suture.core.parts import find_parts
from suture.generate.__main__ import main as generate
from suture.models import segment_anything
from suture.models.architectures import architecture, load_model, meta_model, open_checkpoint
from suture.models.drawn_pictures import random_scene
from suture.models.named import checkpoint_folder
from suture.models.pickles import convert
from suture.runtime.segment import MaskPrompt, Segmenter, open_processor, overlap
from suture.validate.graph_part import in_network, in_onnxruntime
from suture.validate.masks import LIMITS, compare_masks, masks_level
from suture.validate.pipeline import find_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = checkpoint_folder("tiny-sam")
SIDE = 128
LEAST = 0.9  # intersection over union with what was drawn
HELDOUT = 77  # a seed that tiny-sam was not trained on


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-sam")
    export_and_operate(TINY, folder, "float32")
    return folder


@pytest.fixture(scope="module")
def scenes() -> list:
    random = np.random.default_rng(HELDOUT)
    return [random_scene(random, SIDE, SIDE, 1 + at % 3) for at in range(12)]


def found(segmenter: Segmenter, scenes: list) -> float:
    """The mean intersection over union of the first shape of each scene, of which the middle is given."""
    each = []
    for scene in scenes:
        shape, picture = scene.shapes[0], Image.fromarray(scene.picture(SIDE, SIDE))
        best = segmenter(picture, MaskPrompt(((shape.x, shape.y),), (INSIDE,))).best
        each.append(overlap(best, scene.masks(SIDE, SIDE)[0]))
    return float(np.mean(each))


def of_graphs(out: Path, run=in_onnxruntime, name: str = "model.onnx", **damaged: Path) -> Segmenter:
    folders = {part.name: part.folder / "surgery" for part in find_parts(out)}
    runs = (
        run(damaged.get(part, folders[part] / name), *["graph"] * (run is in_onnxruntime)).run for part in (ENCODER, DECODER)
    )
    return Segmenter(open_processor(TINY, SIDE), *runs)


def test_the_parts_compute_what_sam_model_does():
    model = load_model(open_checkpoint(TINY), torch.float32)
    whole = SamModel(SamConfig(**json.loads((TINY / "config.json").read_text()))).eval()
    weights = load_file(TINY / "model.safetensors")
    weights["prompt_encoder.shared_embedding.positional_embedding"] = weights["shared_image_embedding.positional_embedding"]
    whole.load_state_dict(weights)
    encoder, decoder = (part.module for part in model.parts())
    torch.manual_seed(0)
    pixels, points, box = torch.randn(2, 3, SIDE, SIDE), torch.rand(2, 2, 2) * SIDE, torch.tensor([[10.0, 20, 60, 70]] * 2)
    with torch.inference_mode():
        features = encoder(pixels)
        labels = torch.tensor([[1, 0]] * 2)
        expected = whole(pixel_values=pixels, input_points=points[:, None], input_labels=labels[:, None])
        ended = torch.cat([points, torch.zeros(2, 1, 2)], 1), torch.tensor([[1, 0, -1]] * 2)
        boxed = torch.cat([points, box.reshape(2, 2, 2)], 1), torch.tensor([[1, 0, 2, 3]] * 2)
        both = whole(pixel_values=pixels, input_points=points[:, None], input_labels=labels[:, None], input_boxes=box[:, None])
        for reference, given in ((expected, ended), (both, boxed)):
            masks, scores = decoder(features, *given)
            torch.testing.assert_close(masks, reference.pred_masks[:, 0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(scores, reference.iou_scores[:, 0], rtol=1e-5, atol=1e-5)


def test_a_config_that_is_none_is_refused():
    config = json.loads((TINY / "config.json").read_text())
    with pytest.raises(UserError, match="vision_config"):
        architecture(config | {"vision_config": 3}, Path("config.json"))
    with pytest.raises(UserError, match="num_hidden_layers"):
        architecture(config | {"vision_config": {"num_hidden_layers": 10**9}}, Path("config.json"))


@pytest.mark.slow
def test_graphs_and_network_find_what_was_drawn(out, scenes):
    assert found(of_graphs(out), scenes) >= LEAST
    assert found(of_graphs(out, in_network, "model.trt.onnx"), scenes) >= LEAST


def without_bias(model: onnx.ModelProto) -> None:
    """Attention without its decomposed relative positions."""
    for node in model.graph.node:
        if node.op_type == "Attention" and len(node.input) > 3:
            node.input[3] = ""


def without_scale(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Attention" and attribute.name == "scale":
                attribute.f = 1.0


def exchanged(model: onnx.ModelProto) -> None:
    """Keys for values."""
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.input[1], node.input[2] = node.input[2], node.input[1]


def without_gelu(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Gelu":
            node.op_type = "Identity"
            del node.attribute[:]


def turned_patches(model: onnx.ModelProto) -> None:
    """The first transposed convolution's patches with rows and columns exchanged."""
    node = next(node for node in model.graph.node if node.op_type == "ConvTranspose")
    turned = onnx.helper.make_node("Transpose", [node.input[1]], ["turned"], perm=[0, 1, 3, 2])
    node.input[1] = "turned"
    model.graph.node.insert(0, turned)


FAULTS = {  # the part, and whether masks of coloured pictures show it; whether two models' masks are alike always does
    "exchanged": (exchanged, ENCODER, True),
    "without_gelu": (without_gelu, ENCODER, True),
    "turned_patches": (turned_patches, DECODER, True),
    "without_bias": (without_bias, ENCODER, False),
    "without_scale": (without_scale, ENCODER, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_graph_finds_less(fault, out, scenes):
    damage, part, shows = FAULTS[fault]
    path = next(each.folder for each in find_parts(out) if each.name == part) / "surgery" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    damage(model)
    damaged = path.with_name("damaged.onnx")
    onnx.save(model, damaged)
    try:
        segmenter = of_graphs(out, **{part: damaged})
        assert (found(segmenter, scenes) < LEAST) == shows
        compared = compare_masks(of_graphs(out), segmenter, SIDE, LIMITS[onnx.TensorProto.FLOAT16], 0)
        assert not compared.passed
    finally:
        damaged.unlink()


@pytest.mark.slow
def test_level_5_compares_masks(out):
    pipeline = find_pipeline(out, None)
    level = masks_level(pipeline, 0)
    assert (level.number, level.status) == (5, "passed")
    assert level.masks.alike >= level.masks.limit
    assert level.masks.of_candidate >= LEAST
    assert level.masks.shown.startswith("data:image/png;base64,")


@pytest.mark.slow
def test_generate_writes_a_mask(out, scenes, tmp_path, capsys):
    scene = scenes[2]
    Image.fromarray(scene.picture(90, 160)).save(tmp_path / "picture.png")
    scene = random_scene(np.random.default_rng(5), 90, 160, 2)
    Image.fromarray(scene.picture(90, 160)).save(tmp_path / "picture.png")
    shape = scene.shapes[1]
    asked = ["--picture", str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png"), "--runtime", "cpu"]
    assert generate([str(out), *asked, "--point", f"{shape.x:.0f},{shape.y:.0f}"]) == 0
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    assert mask.shape == (90, 160)
    assert overlap(mask > 127, scene.masks(90, 160)[1]) > 0.8
    assert "expected intersection over union" in capsys.readouterr().err
    with pytest.raises(UserError, match="160×90"):
        generate([str(out), *asked, "--point", "160,4"])
    with pytest.raises(UserError, match="not a picture"):
        generate([str(out), *asked[2:], "--picture", str(TINY / "config.json"), "--point", "1,1"])
    with pytest.raises(UserError, match="is read here and would be replaced"):
        generate([str(out), *asked[:2], "--mask", asked[1], "--point", "1,1"])


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """tiny-sam's weights under the names of segment-anything's own files."""
    mlp = {"proj_in": "layers.0", "layers.0": "layers.1", "proj_out": "layers.2"}
    named = {}
    for name, tensor in load_file(TINY / "model.safetensors").items():
        if "hypernetworks" in name or "iou_prediction" in name:
            head, _, rest = name.partition("_mlps." if "hypernetworks" in name else "_head.")
            index, rest = (rest[:2], rest[2:]) if "hypernetworks" in name else ("", rest)
            layer, _, kind = rest.rpartition(".")
            name = f"{head}{'_mlps.' if index else '_head.'}{index}{mlp[layer]}.{kind}"
        for ours, theirs in (
            ("vision_encoder.layers.", "image_encoder.blocks."), ("vision_encoder.", "image_encoder."), (".projection.", ".proj."),
            ("neck.conv1", "neck.0"), ("neck.layer_norm1", "neck.1"), ("neck.conv2", "neck.2"), ("neck.layer_norm2", "neck.3"),
            ("upscale_conv1", "output_upscaling.0"), ("upscale_layer_norm", "output_upscaling.1"),
            ("upscale_conv2", "output_upscaling.3"), ("mask_embed.conv1", "mask_downscaling.0"),
            ("mask_embed.layer_norm1", "mask_downscaling.1"), ("mask_embed.conv2", "mask_downscaling.3"),
            ("mask_embed.layer_norm2", "mask_downscaling.4"), ("mask_embed.conv3", "mask_downscaling.6"),
            (".point_embed.", ".point_embeddings."), ("layer_norm", "norm"),
            ("shared_image_embedding.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        named[name] = tensor
    return named | {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}


def test_published_names_are_those_of_segment_anything(published):
    """Some of each kind, from the files that were published."""
    assert published.keys() >= {
        "image_encoder.pos_embed", "image_encoder.patch_embed.proj.bias", "image_encoder.blocks.0.norm1.weight",
        "image_encoder.blocks.0.attn.rel_pos_h", "image_encoder.blocks.0.attn.qkv.weight", "image_encoder.neck.3.bias",
        "prompt_encoder.point_embeddings.3.weight", "prompt_encoder.not_a_point_embed.weight",
        "prompt_encoder.mask_downscaling.6.weight", "mask_decoder.transformer.layers.1.norm4.weight",
        "mask_decoder.transformer.layers.0.cross_attn_token_to_image.q_proj.weight",
        "mask_decoder.transformer.norm_final_attn.weight", "mask_decoder.output_upscaling.1.weight",
        "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight", "mask_decoder.iou_prediction_head.layers.1.bias",
    }  # fmt: skip


def test_a_published_file_becomes_a_checkpoint(published, tmp_path):
    torch.save(published, tmp_path / "sam.pth")
    written, left_out = convert(tmp_path / "sam.pth", tmp_path / "out")
    assert ({path.name for path in written}, left_out) == ({"config.json", "model.safetensors"}, [])
    found, own = load_file(tmp_path / "out" / "model.safetensors"), load_file(TINY / "model.safetensors")
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    config, tiny = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", TINY))
    tiny["mask_decoder_config"]["num_attention_heads"] = 8  # which shapes do not say
    for name in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        assert {key: config[name][key] for key in config[name] if key in tiny[name]} == {
            key: value for key, value in tiny[name].items() if key in config[name]
        }
    assert meta_model(open_checkpoint(tmp_path / "out"))


def test_a_file_named_like_sams_but_none_is_refused(published, tmp_path):
    few = {name: tensor for name, tensor in published.items() if "patch_embed" not in name}
    torch.save(few, tmp_path / "sam.pth")
    with pytest.raises(UserError, match=r"patch_embed.proj.weight is missing"):
        convert(tmp_path / "sam.pth", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json"))
    assert not segment_anything.is_published({"weight": torch.zeros(1)})
