"""Pictures: the loop is diffusers', level 5 sees a damaged network, and tiny-sd's pictures show what was asked for."""

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline
from onnx import TensorProto
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from transformers import CLIPTokenizer

from suture.core.errors import UserError
from suture.models.drawn_pictures import distinct_scene, shows
from suture.models.named import checkpoint_folder
from suture.models.pictures import PictureModel, Wanted
from suture.validate.level import Level
from suture.validate.pictures import compare_pictures, in_pytorch
from suture.validate.report import make_report, render
from suture.validate.summary import summarise

GOLDEN = Path(__file__).with_name("golden") / "tiny-sd.png"
SIDE, STEPS = 64, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pictures.checkpoint(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def model(folder) -> PictureModel:
    return PictureModel(folder, in_pytorch(folder, TensorProto.FLOAT))


def edges(number: int, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.sample("4.0")
def test_the_loop_is_diffusers(folder, model, guidance):
    """Its own pipeline over the same networks, prompts and noise, two pictures at once."""
    wanted = [Wanted("a red circle", "a blue square", edges(0), seed=3), Wanted("a cross", "", edges(1), seed=4)]
    *_, last = model.denoise(wanted, 16, 24, 3, guidance)
    found = {name: network.eval() for name, network in pictures.networks().items()}
    pipeline = StableDiffusionControlNetPipeline(
        **found,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [each.prompt for each in wanted],
        negative_prompt=[each.negative for each in wanted],
        image=[Image.fromarray(each.control) for each in wanted],
        height=16,
        width=24,
        num_inference_steps=3,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(each.seed) for each in wanted],
        output_type="latent",
    ).images
    np.testing.assert_allclose(last.latents, theirs.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_level_5_passes_what_is_the_same_and_sees_a_damaged_network(folder, model):
    same = compare_pictures(model, model, TensorProto.FLOAT, 0, lambda said: None)
    assert same.passed
    assert same.latent_errors == [0.0] * same.steps
    assert [pair.psnr for pair in same.pairs] == [None] * 4

    def damaged(inputs: dict) -> dict:
        return {"out_sample": 1.2 * model.networks["unet"](inputs)["out_sample"]}

    other = PictureModel(folder, {**model.networks, "unet": damaged})
    found = compare_pictures(model, other, TensorProto.FLOAT, 0, lambda said: None)
    assert not found.passed
    assert 0 < found.latent_errors[0] < found.latent_errors[-1]
    report = make_report("pictures", [Level(5, "Pictures", "different", pictures=found)], {}, 0.0)
    page, summary = render(report), summarise(report)
    assert page.count('src="data:image/png;base64,') == 3 * len(found.pairs)
    assert "structural similarity" in summary
    assert Image.open(io.BytesIO(base64.b64decode(found.pairs[0].candidate))).size == (model.usual, model.usual)


def test_a_network_without_numbers_is_different(folder, model):
    def broken(inputs: dict) -> dict:
        return {"out_sample": np.full_like(inputs["sample"], np.nan)}

    found = compare_pictures(
        model, PictureModel(folder, {**model.networks, "unet": broken}), TensorProto.FLOAT, 0, lambda said: None
    )
    assert not found.passed
    assert np.isfinite(found.latent_errors).all()
    json.dumps(found.latent_errors, allow_nan=False)


@pytest.mark.parametrize("size", [(15, 16), (16, 6), (0, 16)])
def test_sides_that_cannot_be_halved_are_refused(model, size):
    with pytest.raises(UserError, match="not a multiple of 4"):
        model.check_size(*size, "--size")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"_class_name": "os"}, "which diffusers has not"),
        ({"_class_name": "UNet2DConditionModel"}, "which diffusers has not"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "steep"}, "is refused by diffusers"),
    ],
)
def test_a_scheduler_that_there_is_not(folder, tmp_path, content, said):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        PictureModel(copy, {})


def test_what_a_text_is_too_long_for_is_counted(model):
    assert model.left_out("a red circle") == 0
    assert model.left_out("a " * 30) == 32 - 24
    assert model.tokens(["a " * 30, ""]).shape == (2, 24)


def test_tiny_sds_pictures_show_what_was_asked_for():
    """And are those of before: its golden pictures, made by this loop in PyTorch."""
    folder = checkpoint_folder("tiny-sd")
    model = PictureModel(folder, in_pytorch(folder, TensorProto.FLOAT16))
    scenes = [distinct_scene(np.random.default_rng(seed), SIDE, SIDE) for seed in range(4)]
    wanted = [Wanted(each.caption(), control=each.edges(SIDE, SIDE), seed=seed) for seed, each in enumerate(scenes)]
    *_, last = model.denoise(wanted, SIDE, SIDE, STEPS, 3.0)
    made = model.decode(last.latents)
    assert all(map(shows, made, scenes))
    assert not any(map(shows, made[::-1], scenes))
    golden = np.split(np.asarray(Image.open(GOLDEN)), 4, axis=1)
    assert all(peak_signal_noise_ratio(old, new) > 40 or np.array_equal(old, new) for old, new in zip(golden, made))
