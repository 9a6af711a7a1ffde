"""Pictures from a latent diffusion model, whatever computes its networks: PyTorch, onnxruntime, TensorRT's network.

Tokenizer and scheduler are transformers' and diffusers', from the checkpoint's own files. Everything between networks is float32 in
numpy; a network takes and gives arrays by name, as its part of the model does (suture.models.families.stable_diffusion and
stable_diffusion_xl, which reads the prompt by two text encoders).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from suture.core.errors import UserError
from suture.core.folders import inside
from suture.core.refusals import refusals
from suture.core.typed import Strict, read_typed
from suture.models.architectures import open_checkpoint
from suture.models.checkpoint import CONFIG
from suture.models.config import required
from suture.models.diffusers_folder import MODEL_INDEX, read_model_index
from suture.models.library_tokenizer import check_files

Arrays = dict[str, np.ndarray]
Network = Callable[[Arrays], Arrays]
REMEDY = "use the file that came with the weights"
NAMES = TEXT, UNET, DECODER = "text_encoder", "unet", "vae_decoder"
CONTROL, SECOND_TEXT = "controlnet", "text_encoder_2"
CALLED = (*NAMES, SECOND_TEXT, CONTROL)  # all parts that the loop calls, of those that a model has
ENDS = {  # what each takes and gives; SDXL's text encoders give others
    "text_encoder": ("input_ids", "last_hidden_state"), "unet": ("sample", "out_sample"), "vae_decoder": ("latent_sample", "sample"),
}  # fmt: skip
SCHEDULER = "scheduler/scheduler_config.json"

Small = Annotated[float, Field(ge=0, le=1)]


class SchedulerConfig(Strict):
    """What the schedule's tables follow from, which are as long as this says."""

    class_name: Annotated[str, Field(alias="_class_name")]
    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] | None = None
    beta_start: Small | None = None
    beta_end: Small | None = None
    trained_betas: Annotated[list[Small], Field(max_length=100_000)] | None = None
    steps_offset: Annotated[int, Field(ge=0, le=1000)] | None = None
    solver_order: Annotated[int, Field(ge=1, le=10)] | None = None
    beta_schedule: str | None = None
    prediction_type: str | None = None
    timestep_spacing: str | None = None


@dataclass(frozen=True)
class Wanted:
    """A picture that is asked for. `control`: uint8 [H,W,3], what a ControlNet is shown."""

    prompt: str
    negative: str = ""
    control: np.ndarray | None = None
    seed: int = 0


@dataclass(frozen=True)
class Denoised:
    """Latents, float32 [N,C,h,w], after one of the schedule's steps."""

    step: int
    timestep: int
    latents: np.ndarray


class PictureModel:
    """The model of a checkpoint, computed by `networks`, by name. Without the ControlNet's the UNet takes no residuals."""

    def __init__(self, checkpoint: Path, networks: Mapping[str, Network]):
        self.networks, self.checkpoint = networks, checkpoint
        configs = open_checkpoint(checkpoint).config.get("networks")
        if not configs:
            raise UserError(checkpoint, "is no checkpoint of a model that makes pictures", f"name one with {MODEL_INDEX}")
        self.unet, self.vae = configs["unet"], configs["vae"]
        self.lengths = {
            name: required(configs[name], "max_position_embeddings", checkpoint / name / CONFIG)
            for name in (TEXT, SECOND_TEXT)
            if name in configs
        }
        self.length = min(self.lengths.values())
        self.channels = required(self.unet, "in_channels", checkpoint / "unet" / CONFIG)
        halvings = {
            name: len(required(configs[name], "block_out_channels", checkpoint / name / CONFIG)) - 1 for name in ("unet", "vae")
        }
        self.factor = 2 ** halvings["vae"]
        self.multiple = self.factor * 2 ** halvings["unet"]  # of which a picture's sides are multiples
        self.usual = self.factor * (self.unet.get("sample_size") or 64)  # pixels a side
        self.tokenizers = {name: _tokenizer(checkpoint, name.replace(TEXT, "tokenizer")) for name in self.lengths}
        self.tokenizer = self.tokenizers[TEXT]
        self.zeros = bool(read_model_index(checkpoint).get("force_zeros_for_empty_prompt", True))  # SDXL's alone
        self.schedule = _scheduler(checkpoint)

    @property
    def controlled(self) -> bool:
        return CONTROL in self.networks

    def check_size(self, height: int, width: int, where: object) -> None:
        """Raises UserError for sides that the UNet cannot halve as often as it does."""
        if height < 1 or width < 1 or height % self.multiple or width % self.multiple:
            wrong = f"{height}x{width} pixels, of which a side is not a multiple of {self.multiple}"
            raise UserError(where, wrong, f"give one that is, such as {self.usual}x{self.usual}")

    def tokens(self, texts: list[str], encoder: str = TEXT) -> np.ndarray:
        """int64 [N,T], padded; what is beyond the text encoder's length is left out."""
        length = self.lengths[encoder]
        with self._tokenizing():
            made = self.tokenizers[encoder](
                texts, padding="max_length", max_length=length, truncation=True, return_tensors="np"
            )
            return made.input_ids.astype(np.int64)

    def left_out(self, text: str) -> int:
        """How many of a text's tokens the text encoder has no room for."""
        with self._tokenizing():
            return max(0, len(self.tokenizer(text, verbose=False).input_ids) - self.length)

    def denoise(self, wanted: list[Wanted], height: int, width: int, steps: int, guidance: float) -> Iterator[Denoised]:
        """The latents step by step, of pictures of `height` by `width` pixels. With `guidance` above 1 each step computes both what
        is asked for and the negative prompt, and moves beyond the one away from the other."""
        import torch  # here: --help needs none of it

        guided = guidance > 1
        given = self._told(wanted, height, width, guided)
        hint = self._hint(wanted, height, width, guided)
        random = [torch.Generator().manual_seed(each.seed) for each in wanted]
        shape = (self.channels, height // self.factor, width // self.factor)
        schedule = self.scheduled(steps)
        latents = torch.stack([torch.randn(shape, generator=each) for each in random]) * schedule.init_noise_sigma
        takes_random = "generator" in inspect.signature(schedule.step).parameters
        for number, time in enumerate(schedule.timesteps):
            rows = torch.cat([latents] * (2 if guided else 1))
            with self._scheduling():
                noisy = schedule.scale_model_input(rows, time).numpy().astype(np.float32)
            now = given | {"sample": noisy, "timestep": np.full(len(noisy), _whole(time), np.int64)}
            residuals = {} if hint is None else self.networks[CONTROL](now | {"controlnet_cond": hint})
            noise = torch.from_numpy(self._computed(UNET, now | residuals, noisy.shape).astype(np.float32))
            if guided:
                away, towards = noise.chunk(2)
                noise = away + guidance * (towards - away)
            extra = {"generator": random[0] if len(random) == 1 else random} if takes_random else {}
            with self._scheduling():
                latents = schedule.step(noise, time, latents, **extra).prev_sample
            yield Denoised(number, _whole(time), latents.numpy())

    def scheduled(self, steps: int) -> Any:
        """A new schedule of so many steps. Raises UserError where diffusers cannot take these steps as the checkpoint's file has it:
        one of no pixels takes them first."""
        import torch

        with self._scheduling():
            tried, schedule = (type(self.schedule).from_config(self.schedule.config) for _ in range(2))
            tried.set_timesteps(steps)
            schedule.set_timesteps(steps)
            for time in tried.timesteps:
                latents = tried.scale_model_input(torch.zeros(1, self.channels, 1, 1), time)
                tried.step(latents, time, latents)
        return schedule

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """uint8 [N,H,W,3], one at a time, since at full size the decoder takes the most memory of all networks."""
        scaled = latents / self.vae.get("scaling_factor", 0.18215) + (self.vae.get("shift_factor") or 0)
        sides = tuple(side * self.factor for side in latents.shape[2:])
        made = [self._computed(DECODER, {"latent_sample": each[None].astype(np.float32)}, (1, 3, *sides))[0] for each in scaled]
        pixels = np.stack(made).astype(np.float32).transpose(0, 2, 3, 1)
        return np.rint((np.nan_to_num(pixels).clip(-1, 1) + 1) * 127.5).astype(np.uint8)

    def _computed(self, name: str, inputs: Arrays, shape: tuple[int | None, ...]) -> np.ndarray:
        return self._of_shape(name, self.networks[name](inputs), ENDS[name][1], shape)

    def _of_shape(self, name: str, given: Arrays, output: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """What the network gives as `output`. Raises UserError where that is not of this shape, of which None may be any."""
        found = given.get(output)
        if found is None or len(found.shape) != len(shape) or any(a not in (b, None) for a, b in zip(shape, found.shape)):
            wrong = f"gives no {output} of the shape {[size or 'any' for size in shape]}"
            raise UserError(f"the {name} beside {self.checkpoint}", wrong, "export the checkpoint again")
        return found

    def _tokenizing(self):
        return refusals(self.checkpoint / "tokenizer", "cannot be used for this text", REMEDY)

    def _scheduling(self):
        """Around what diffusers computes as the file says."""
        return refusals(self.checkpoint / SCHEDULER, "is refused by diffusers", REMEDY)

    def _told(self, wanted: list[Wanted], height: int, width: int, guided: bool) -> Arrays:
        """What the UNet reads of the prompts at every step; of SDXL also of the size, of which nothing was cut off, and nothing
        where there is no negative prompt."""
        texts = [each.negative for each in wanted] * guided + [each.prompt for each in wanted]
        hidden = "hidden_states" if SECOND_TEXT in self.lengths else "last_hidden_state"
        found = {name: self.networks[name]({"input_ids": self.tokens(texts, name)}) for name in self.lengths}
        of_each = [self._of_shape(name, found[name], hidden, (len(texts), self.lengths[name], None)) for name in found]
        if SECOND_TEXT not in found:
            return {"encoder_hidden_states": of_each[0]}
        context = np.concatenate([each.astype(np.float32) for each in of_each], -1)
        whole = self._of_shape(SECOND_TEXT, found[SECOND_TEXT], "text_embeds", (len(texts), None)).astype(np.float32)
        blank = [row for row, text in enumerate(texts[: len(wanted) * guided]) if not text and self.zeros]
        context[blank], whole[blank] = 0, 0
        sizes = np.array([[height, width, 0, 0, height, width]] * len(texts))
        return {"encoder_hidden_states": context, "text_embeds": whole, "time_ids": sizes}

    def _hint(self, wanted: list[Wanted], height: int, width: int, guided: bool) -> np.ndarray | None:
        if not self.controlled:
            return None
        blank = np.zeros([height, width, 3], np.uint8)
        shown = np.stack([blank if each.control is None else each.control for each in wanted] * (2 if guided else 1))
        return shown.transpose(0, 3, 1, 2).astype(np.float32) / 255


def _whole(time: Any) -> int:
    if float(time) != int(time):
        raise UserError("the scheduler", f"gives the time step {float(time)}, and the graphs take whole ones", "use another")
    return int(time)


def _tokenizer(checkpoint: Path, name: str):
    from transformers import CLIPTokenizer

    folder = checkpoint / name
    if not folder.is_dir():
        raise UserError(checkpoint, f"has no folder {name}", "download all of the model's folder")
    inside(checkpoint, name)
    check_files(folder)
    with refusals(folder, "is not a tokenizer that transformers can read", REMEDY):
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _scheduler(checkpoint: Path):
    """diffusers' class of the name that scheduler_config.json gives; nothing of the checkpoint runs."""
    import diffusers

    file = inside(checkpoint, SCHEDULER)
    config = read_typed(file, SchedulerConfig, REMEDY)
    known = getattr(diffusers.schedulers, config["_class_name"], None)
    if not (inspect.isclass(known) and issubclass(known, diffusers.SchedulerMixin)):
        raise UserError(file, f"names the scheduler {config['_class_name'][:60]!r}, which diffusers has not", REMEDY)
    with refusals(file, "is refused by diffusers", REMEDY):
        return known.from_config(config)
