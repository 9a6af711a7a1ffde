"""Vision-language models of transformers' own classes: towers, positions and parts against transformers, through levels 1 to 3."""

import json
from pathlib import Path

import image_text
import numpy as np
import pytest
import torch
from image_text_levels import check_levels
from PIL import Image
from transformers import AutoModelForImageTextToText

from suture.core.errors import UserError
from suture.export.options import ExportOptions
from suture.export.stage import export
from suture.models.architectures import load_model, open_checkpoint
from suture.models.image_text import set_picture_size
from suture.models.parts import parts_of
from suture.models.qwen_tower import _patches
from suture.runtime.looking import Looker
from suture.runtime.seen import FIRST, Placed, Seen

NAMES = tuple(image_text.CONFIGS)
SIZE = 40, 24  # of Qwen's, in pixels: windows that the grid does not fill
FUSED = {  # LLaVA's is in test_tiny_vlm.py
    "qwen2_5_vl": {
        "vision": {"Attention": 3, "RMSNormalization": 7, "RotaryEmbedding": 6, "Swish": 3, "Gelu": 1},
        "decoder": {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4, "Swish": 2, "TensorScatter": 4},
    },
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("checkpoint") / name
            image_text.write_checkpoint(name, made[name])
        return made[name]

    return checkpoint


def theirs(folder: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def ours(folder: Path) -> torch.nn.Module:
    model = load_model(open_checkpoint(folder), torch.float32)
    if model.tower.factor(model.config) is not None:
        set_picture_size(model, SIZE, "SIZE")
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_becomes_what_transformers_makes_of_it(name, checkpoints):
    model, reference = ours(checkpoints(name)), theirs(checkpoints(name))
    vision = parts_of(model)[0]
    shape = vision.inputs["pixel_values"].shape
    pixels = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(1))
    asked = []
    if model.tower.instructed:
        asked = [torch.randint(3, 90, (2, 6)), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])]
    with torch.no_grad():
        found = vision.module(pixels, *asked)
        if model.tower.factor(model.config) is None:
            more = dict(zip(("qformer_input_ids", "qformer_attention_mask"), asked))
            expected = reference.get_image_features(pixel_values=pixels, return_dict=True, **more).pooler_output
        else:
            config = reference.config.vision_config
            grid = torch.tensor([[1, SIZE[0] // config.patch_size, SIZE[1] // config.patch_size]] * 2)
            packed = _patches(pixels, config).flatten(0, 1)
            expected = reference.get_image_features(pixel_values=packed, image_grid_thw=grid).pooler_output
    expected = expected if isinstance(expected, torch.Tensor) else torch.stack(list(expected))
    assert found.shape[1:] == vision.outputs["image_features"].shape[1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_whole_model_is_transformers(checkpoints):
    """A prompt with a picture in it: mrope's positions, embeddings of both kinds, logits."""
    folder = checkpoints("qwen2_5_vl")
    model, reference = ours(folder), theirs(folder)
    vision, embed, decoder = parts_of(model)
    pixels = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    config = reference.config.vision_config
    grid = torch.tensor([[1, SIZE[0] // config.patch_size, SIZE[1] // config.patch_size]])
    with torch.no_grad():
        features = vision.module(pixels)[0]
        ids = torch.tensor([[5, 91, *[90] * len(features), 92, 7, 8]])
        kinds = (ids == 90).int()
        expected = reference(
            input_ids=ids, pixel_values=_patches(pixels, config)[0], image_grid_thw=grid, mm_token_type_ids=kinds
        ).logits
        seen = Seen(lambda ids: embed.module(torch.from_numpy(ids)).numpy())
        picture = seen.add(features.numpy(), (5, 3))
        assert picture[0] == FIRST
        given = np.array([[5, 91, *picture, 92, 7, 8]])
        positions = Placed(seen, 1)(given, np.array([given.shape[1]]), np.array([0]), slice(None))
        past = [torch.zeros(1, 2, 0, 16) for _ in range(4)]
        mask = torch.ones(given.shape, dtype=torch.int64)
        found, _ = decoder.module(torch.from_numpy(seen(given)), torch.from_numpy(positions), mask, past)
    assert (positions == reference.model.get_rope_index(ids, kinds, grid)[0].numpy()).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_positions_go_on_where_a_row_left_off():
    seen = Seen(lambda ids: np.zeros((*ids.shape, 2), np.float32))
    picture = seen.add(np.ones((6, 2), np.float32), (2, 3))
    placed = Placed(seen, 2)
    whole = placed(np.array([[1, *picture, 2]] * 2), np.array([8, 2]), np.zeros(2, np.int64), slice(None))
    assert whole[:, 0].tolist() == [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]
    again = placed(np.array([[*picture[1:], 2, 3]]), np.array([7]), np.array([2]), slice(1, 2))
    assert again[:, 0].tolist() == [[1, 1, 1, 1, 1, 4, 5], [1, 1, 2, 2, 2, 4, 5], [2, 3, 1, 2, 3, 4, 5]]
    values = seen(np.array([[1, *picture]]))
    assert values[0, :, 0].tolist() == [0, 1, 1, 1, 1, 1, 1]


def test_a_packed_picture_is_unpacked(tmp_path):
    """What Qwen2-VL's image processor packs is what the tower's graph packs of the pixels."""
    config = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    looker = Looker(tmp_path, lambda inputs: {}, SIZE)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8))
    pixels = looker.pixels(picture)
    packed = looker.processor(images=picture, do_resize=False, return_tensors="np")["pixel_values"]
    config = type("Config", (), {"patch_size": 4, "spatial_merge_size": 2})
    np.testing.assert_array_equal(_patches(torch.from_numpy(pixels), config)[0].numpy(), np.asarray(packed, np.float32))


@pytest.mark.parametrize("name", [pytest.param(each, marks=pytest.mark.slow) for each in FUSED])
@pytest.mark.exports
def test_every_part_through_levels_1_to_3(name, checkpoints, tmp_path):
    size = SIZE if "qwen" in name else None
    export(tmp_path, ExportOptions(checkpoint=checkpoints(name), dtype="float32", picture=size))
    check_levels(tmp_path, FUSED[name])


def test_a_size_that_is_not_whole_patches_is_refused(checkpoints, tmp_path):
    with pytest.raises(UserError, match="--picture-size 30x24: is no size of whole patches: 8 pixels each way"):
        export(tmp_path, ExportOptions(checkpoint=checkpoints("qwen2_5_vl"), picture=(30, 24)))
    with pytest.raises(UserError, match="its tower takes 32x32 pixels, and no other"):
        export(tmp_path, ExportOptions(checkpoint=checkpoints("llava"), picture=(30, 24)))
