"""Level 5 of a model that makes pictures: the whole denoising loop, PyTorch in float32 against the portable graphs.

Both begin with the same noise and are asked for the same: scenes that are drawn, with their captions and, for a ControlNet, their
edges. What the loop feeds back into itself it also amplifies, so latents are compared after each step, and pictures by the two
measures that pictures are compared by.
"""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto
from PIL import Image

from suture.core.errors import UserError
from suture.core.network.evaluate import NotEvaluated
from suture.core.network.parse import NoTensorRT
from suture.core.parts import PartFolder
from suture.core.weights import load_graph, weight_files, weights_root
from suture.models.architectures import open_checkpoint
from suture.models.drawn_pictures import Scene, distinct_scene, shows
from suture.models.parts import Part, parts_of
from suture.models.pictures import CALLED, PictureModel, Wanted
from suture.runtime.networks import Arrays, Network, in_onnxruntime
from suture.validate.compare import DIFFERENT, PASSED
from suture.validate.level import Level, failed, not_run
from suture.validate.picture_result import Pair, PictureResult
from suture.validate.pipeline import NOT_HERE, PartFiles, Pipeline
from suture.validate.reference import load_reference

TITLE = "Pictures over the whole loop"
PICTURES, STEPS, GUIDANCE = 4, 20, 3.0
FEW_STEPS, SMALL = 4, 16  # of a large model, and the sides of its latents
LARGE = 200_000_000  # bytes of weights
LEAST = {  # decibels and structural similarity by the type that the graphs compute in
    TensorProto.FLOAT: (50.0, 0.99),
    TensorProto.FLOAT16: (30.0, 0.95),
    TensorProto.BFLOAT16: (20.0, 0.8),
}


def is_picture_model(parts: tuple[PartFolder, ...]) -> bool:
    return {"text_encoder", "unet", "vae_decoder"} <= {part.name for part in parts}


def picture_level(pipeline: Pipeline, seed: int, tell: Callable[[str], None]) -> Level:
    """Raises nothing: what cannot be run says why."""
    try:
        if pipeline.checkpoint is None:
            return not_run(5, NOT_HERE, TITLE)
        missing = next((files.part.name for files in pipeline.parts if files.portable is None), None)
        if missing:
            return not_run(5, f"surgery has not been run on {missing}/export/model.onnx", TITLE)
        dtype = _dtype(pipeline.parts)
        if not (pipeline.checkpoint / "tokenizer").is_dir():
            return not_run(5, "the checkpoint has no tokenizer, and so no prompts", TITLE)
        graphs = {files.part.name: in_onnxruntime(files.portable) for files in pipeline.parts if files.part.name in CALLED}
        candidate = PictureModel(pipeline.checkpoint, graphs)
        tell("level 5: loading the checkpoint")
        reference = PictureModel(pipeline.checkpoint, in_pytorch(pipeline.checkpoint, dtype))
        large = sum(file.stat().st_size for files in pipeline.parts for file in _weights(files)) > LARGE
        found = compare_pictures(reference, candidate, dtype, seed, tell, large)
        return Level(5, TITLE, PASSED if found.passed else DIFFERENT, pictures=found)
    except (NoTensorRT, NotEvaluated) as error:
        return not_run(5, str(error), TITLE)
    except UserError as error:
        return failed(5, error, TITLE)


def compare_pictures(
    reference: PictureModel, candidate: PictureModel, dtype: int, seed: int, tell: Callable[[str], None], large: bool = False
) -> PictureResult:
    """Of drawn scenes, one picture each; of a large model one picture in few steps and small."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # here: it takes seconds, and one level needs it

    side = SMALL * reference.factor if large else reference.usual
    steps, count = (FEW_STEPS, 1) if large else (STEPS, PICTURES)
    psnr, ssim = LEAST[dtype]
    result = PictureResult("PyTorch in float32", "portable graphs", (side, side), steps, GUIDANCE, {"psnr": psnr, "ssim": ssim})
    scenes = [distinct_scene(np.random.default_rng([seed, number]), side, side) for number in range(count)]
    wanted = [
        Wanted(scene.caption(), control=scene.edges(side, side) if reference.controlled else None, seed=seed + number)
        for number, scene in enumerate(scenes)
    ]
    loops = [model.denoise(wanted, side, side, steps, GUIDANCE) for model in (reference, candidate)]
    for ours, theirs in zip(*loops):
        tell(f"level 5: denoising step {ours.step + 1} of {steps}")
        result.latent_errors.append(_error(ours.latents, theirs.latents))
        last = ours.latents, theirs.latents
    for want, scene, ours, theirs in zip(wanted, scenes, reference.decode(last[0]), candidate.decode(last[1])):
        same = np.array_equal(ours, theirs)
        result.pairs.append(
            Pair(
                want.prompt,
                None if want.control is None else png(want.control),
                png(ours),
                png(theirs),
                None if same else round(float(peak_signal_noise_ratio(ours, theirs)), 2),
                round(float(structural_similarity(ours, theirs, channel_axis=2)), 5),
                (shows(ours, scene), shows(theirs, scene)),
            )
        )
    return result


def in_pytorch(checkpoint: Path, dtype: int) -> dict[str, Network]:
    """The checkpoint's own modules in float32, their weights rounded to the onnx.TensorProto type `dtype`."""
    return {part.name: _called(part) for part in parts_of(load_reference(open_checkpoint(checkpoint), dtype))}


def _called(part: Part) -> Network:
    @torch.inference_mode()
    def run(inputs: Arrays) -> Arrays:
        found = part.module(*(torch.from_numpy(inputs[name]) for name in part.inputs))
        return {name: value.numpy() for name, value in zip(part.outputs, [found] if isinstance(found, torch.Tensor) else found)}

    return run


def scenes_shown(model: PictureModel, scenes: list[Scene], steps: int, guidance: float, batch: int = 10) -> int:
    """How many of the scenes, of the model's usual size, its pictures show."""
    shown, side = 0, model.usual
    for start in range(0, len(scenes), batch):
        some = scenes[start : start + batch]
        wanted = [Wanted(scene.caption(), control=scene.edges(side, side), seed=start + n) for n, scene in enumerate(some)]
        *_, last = model.denoise(wanted, side, side, steps, guidance)
        shown += sum(map(shows, model.decode(last.latents), some))
    return shown


def png(pixels: np.ndarray) -> str:
    """Base64 of the PNG file of uint8 [H,W,3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _error(reference: np.ndarray, candidate: np.ndarray) -> float:
    if not np.isfinite(candidate).all():
        return float(np.finfo(np.float32).max)
    return float(np.sqrt(np.mean((candidate - reference) ** 2) / np.mean(reference**2)))


def _dtype(parts: tuple[PartFiles, ...]) -> int:
    unet = next(files for files in parts if files.part.name == "unet")
    return load_graph(unet.portable).graph.output[0].type.tensor_type.elem_type


def _weights(files: PartFiles) -> list[Path]:
    return weight_files(load_graph(files.portable), weights_root(files.portable))
