"""What is damaged of pictures, and of what models that read or make them consist of: each a function of the file's path, or of the folder."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from PIL import Image

from tests.abuse.damages import IN_ITS_PLACE, Damage, at, cut, instead, keys, written
from tests.abuse.good_pictures import DRAWING, IMPORTS, MASKING
from tests.abuse.kind_10_values import JSONS, PAGE, POINTER


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes = b"", kind: int = 2, depth: int = 8, *further: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + b"".join(further)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


ROWS = (b"\0" + bytes(72)) * 16  # of 24 pixels
TIFF = b"II*\0\x08\0\0\0\0\0"
PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 16\n(/etc/passwd) (r) file\nshowpage\n"  # which Pillow gives to Ghostscript
PICTURES: dict[str, Damage] = {
    "empty": written(b""), "noise": written(bytes(range(256)) * 8), "text": written(b"hello\n"), "a page": written(PAGE),
    "a pointer of Git LFS": written(POINTER), "cut": cut(0.5), "cut in its head": cut(0.02),
    "a head alone": written(png(24, 16)[:33]),
    "no rows": written(png(24, 16)), "rows that end": written(png(24, 16, ROWS[:200])), "no width": written(png(0, 16, ROWS)),
    "2**31 wide": written(png(1 << 31, 16, ROWS)), "an unknown kind": written(png(24, 16, ROWS, kind=9)),
    "an unknown depth": written(png(24, 16, ROWS, depth=7)), "a broken sum": written(png(24, 16, ROWS)[:-20] + bytes(20)),
    "no palette": written(png(24, 16, ROWS, 3)),
    "rows that are no zlib": written(png(24, 16, ROWS).replace(zlib.compress(ROWS), b"\xff" * 8)),
    "a long text": lambda path: path.write_bytes(png(24, 16, ROWS, 2, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))))),
    "an animation of 2**32 frames": written(png(24, 16, ROWS, 2, 8, chunk(b"acTL", b"\xff" * 8))[:60]),
    "JPEG's first bytes": written(b"\xff\xd8\xff\xe0" + bytes(40)), "a program for Ghostscript": written(PROGRAM),
    "TIFF": written(TIFF), "GIF": written(b"GIF89a" + bytes(60)), "PSD": written(b"8BPS" + bytes(60)),
    "ICO": written(b"\0\0\1\0\1\0" + bytes(60)),
    "a graph": written(b"\x08\x0a" * 50), "a pickle": written(b"\x80\x02}q\0."),
    "bitmap": lambda path: Image.new("RGB", (24, 16)).save(path, "BMP"),
}  # fmt: skip
LARGE: dict[str, Damage] = {  # made when they are wanted: to compress them takes a while
    "68 million pixels": lambda path: path.write_bytes(png(8200, 8200, bytes(8200))),
    "10**9 pixels": lambda path: path.write_bytes(png(32_000, 32_000, bytes(10**6))),
    "a bomb of one colour": lambda path: path.write_bytes(png(60_000, 60_000, bytes(10**8), 0, 1)),
    "one row of 10**8 pixels": lambda path: path.write_bytes(png(10**8, 1, bytes(10**6))),
    **{name: instead(make) for name, make in IN_ITS_PLACE.items()},
}
NO_JSONS = {name: content for name, content in JSONS.items() if name != "key twice"}


def of_graph(texts: dict[str, str], part: str, **changed: str) -> Damage:
    """A graph in the part's place, where words of its text are others."""

    def damage(work: Path) -> None:
        text = texts[part]
        for old, new in changed.values():
            assert old in text
            text = text.replace(old, new)
        folder = work / ("drawn" if texts is DRAWING else "masked") / part / "export"
        onnx.save(onnx.parser.parse_model(f"{IMPORTS} {text}"), folder / "model.onnx")

    return damage


def other(texts: dict[str, str], part: str, old: str, new: str) -> Damage:
    return of_graph(texts, part, changed=(old, new))


OTHER_DRAWING = {
    "text of another name": other(DRAWING, "text_encoder", "last_hidden_state", "hidden"),
    "text takes another name": other(DRAWING, "text_encoder", "input_ids", "ids"),
    "text of two axes": other(DRAWING, "text_encoder", "last_hidden_state = Unsqueeze(f, axis)",
    "last_hidden_state = Squeeze(f)"),
    "noise of another name": other(DRAWING, "unet", "out_sample", "noise"),
    "noise of another shape": other(DRAWING, "unet", "a = Add(sample, mean)",
    "b = Concat<axis = 1>(sample, sample) a = Add(b, mean)"),
    "noise of one axis": other(DRAWING, "unet", "out_sample = Sub(a, mid_block_res_sample)",
    "out_sample = ReduceMax<keepdims = 0>(a)"),
    "takes what nobody gives": other(DRAWING, "unet", "encoder_hidden_states", "embeddings"),
    "channels that nobody gives": other(DRAWING, "unet", "float[n, 4, h, w] sample,", "float[n, 9, h, w] sample,"),
    "a picture of another size": other(DRAWING, "vae_decoder", "{1.0, 1.0, 2.0, 2.0}", "{1.0, 1.0, 3.0, 2.0}"),
    "a picture of one channel": other(DRAWING, "vae_decoder", "<int64[1] first = {0}, int64[1] end = {3}",
    "<int64[1] first = {0}, int64[1] end = {1}"),
    "a picture of another name": other(DRAWING, "vae_decoder", "=> (float[n, 3, H, W] sample)",
    "=> (float[n, 3, H, W] picture)"),
}  # fmt: skip
OTHER_DRAWING["a picture of another name"] = of_graph(
    DRAWING,
    "vae_decoder",
    first=("[n, 3, H, W] sample)", "[n, 3, H, W] picture)"),
    second=("sample = Resize", "picture = Resize"),
)
OTHER_MASKING = {
    "features of another name": other(MASKING, "image_encoder", "image_embeddings", "features"),
    "features of one axis": other(MASKING, "image_encoder", "image_embeddings = Relu(pixel_values)",
                                  "a = Relu(pixel_values) image_embeddings = ReduceMax<keepdims = 0>(a)"),
    "takes another name": other(MASKING, "image_encoder", "pixel_values", "pixels"),
    "masks of another name": other(MASKING, "mask_decoder", "pred_masks", "masks"),
    "scores of another name": other(MASKING, "mask_decoder", "iou_scores", "scores"),
    "one score": other(MASKING, "mask_decoder", "iou_scores = ReduceMean<keepdims = 0>(image_embeddings, axes)",
                       "iou_scores = ReduceMean<keepdims = 0>(image_embeddings)"),
    "points of another name": other(MASKING, "mask_decoder", "input_points", "points"),
    "points of another rank": other(MASKING, "mask_decoder", "float[n, p, 2] input_points", "float[n, p, q, 2] input_points"),
    "labels of floats": other(MASKING, "mask_decoder", "int64[n, p] input_labels", "float[n, p] input_labels"),
}  # fmt: skip
SCHEDULERS = {
    "no name": keys(_class_name=None), "a name that is none": keys(_class_name="Nobody"),
    "a number for a name": keys(_class_name=5),
    "another class of diffusers": keys(_class_name="SchedulerMixin"), "a module's name": keys(_class_name="scheduling_ddim"),
    "a name with dots": keys(_class_name="os.system"), "a private name": keys(_class_name="__class__"),
    "10**12 time steps": keys(num_train_timesteps=10**12), "no time steps": keys(num_train_timesteps=0),
    "negative time steps": keys(num_train_timesteps=-5), "text for time steps": keys(num_train_timesteps="1000"),
    "fewer time steps than asked for": keys(num_train_timesteps=1, timestep_spacing="leading"),
    "text for beta": keys(beta_start="0.1"), "beta beyond": keys(beta_end=7.0), "no schedule": keys(beta_schedule="nobody's"),
    "no prediction": keys(prediction_type="nobody's"), "no spacing": keys(timestep_spacing="nobody's"),
    "an offset beyond": keys(steps_offset=10**9), "betas of text": keys(trained_betas=["a"]),
    "no betas": keys(trained_betas=[]),
    "few betas": keys(trained_betas=[0.1]),
}  # fmt: skip
PREPROCESSORS = {
    "another size": keys(size={"longest_edge": 17}), "size beyond": keys(size={"longest_edge": 10**9}),
    "size of text": keys(size="16"),
    "size of nothing": keys(size={}), "another padding": keys(pad_size={"height": 16, "width": 8}),
    "padding list": keys(pad_size=[16, 16]),
    "one mean": keys(image_mean=[0.5]), "mean of text": keys(image_mean=["a", "b", "c"]),
    "deviation 0": keys(image_std=[0, 1, 1]),
    "deviation number": keys(image_std=0.2), "factor of text": keys(rescale_factor="x"),
    "factor beyond": keys(rescale_factor=1e300),
    "resample beyond": keys(resample=99), "resample of text": keys(resample="bilinear"),
    "text for a boolean": keys(do_resize="false"),
    "not padded": keys(do_pad=False, size={"longest_edge": 9}),
}  # fmt: skip
NETWORKS = {  # of the UNet's config.json
    "widths of text": keys(block_out_channels=["a"]), "no widths": keys(block_out_channels=[]),
    "widths beyond": keys(block_out_channels=[10**9, 32]),
    "negative widths": keys(block_out_channels=[-16, 32]), "more widths than blocks": keys(block_out_channels=[16, 32, 64]),
    "no layers": keys(layers_per_block=0), "10**9 layers": keys(layers_per_block=10**9),
    "layers list": keys(layers_per_block=[1, "a"]),
    "unknown blocks": keys(down_block_types=["Nobody", "DownBlock2D"]), "blocks number": keys(down_block_types=5),
    "no groups": keys(norm_num_groups=0), "groups that do not divide": keys(norm_num_groups=7),
    "text for channels": keys(in_channels="4"),
    "other channels": keys(in_channels=9), "other width": keys(cross_attention_dim=64),
    "width list": keys(cross_attention_dim=[32, 64]),
    "unknown activation": keys(act_fn="nobody's"), "sample of text": keys(sample_size="8"),
    "unknown embedding": keys(addition_embed_type="text_time"),
    "10**12 classes": keys(num_class_embeds=10**12), "unknown time": keys(time_embedding_type="nobody's"),
    "a size that is NaN": written(b'{"in_channels": NaN}'),
    "another network's": lambda path: path.write_bytes((path.parents[1] / "vae/config.json").read_bytes()),
}  # fmt: skip
INDEXES = {
    "no class": keys(_class_name=None), "class number": keys(_class_name=5), "class list": keys(_class_name=["a"]),
    "unknown class": keys(_class_name="Nobody"), "a class of Python": keys(_class_name="os.system"),
    "another pipeline": keys(_class_name="FluxPipeline"),
    "a class of the pipeline's networks": keys(_class_name="UNet2DConditionModel"),
}  # fmt: skip
MASK_CONFIGS = {
    "vision list": keys(vision_config=[1]), "vision text": keys(vision_config="a"), "no vision": keys(vision_config=None),
    "10**9 layers": keys(vision_config={"num_hidden_layers": 10**9}),
    "width of text": keys(vision_config={"hidden_size": "16"}),
    "patch 0": keys(vision_config={"hidden_size": 16, "patch_size": 0}),
    "image 10**9": keys(vision_config={"hidden_size": 16, "image_size": 10**9}),
    "window beyond": keys(vision_config={"hidden_size": 16, "window_size": 10**9}),
    "heads that do not divide": keys(vision_config={"hidden_size": 16, "num_attention_heads": 3}),
    "no heads": keys(mask_decoder_config={"hidden_size": 16, "num_attention_heads": 0}),
    "masks 10**9": keys(mask_decoder_config={"num_multimask_outputs": 10**9}),
    "prompt list": keys(prompt_encoder_config=[]), "architectures": keys(architectures=["Nobody"]),
    "type list": keys(model_type=["sam"]),
    "other width": keys(mask_decoder_config={"hidden_size": 32}),
    "negative image": keys(vision_config={"hidden_size": 16, "image_size": -16}),
}  # fmt: skip
LINKED = {  # in the checkpoint of a model that draws: what is a link, and where it leads
    f"{name} {what}": (name, target)
    for name in ("model_index.json", "unet", "unet/config.json", "text_encoder/model.safetensors", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "tokenizer")
    for what,
    target in {"out": "../secret", "to the system": "/etc/passwd", "to nothing": "nowhere", "to itself": "itself"}.items()
}  # fmt: skip


def single(make: Callable[[dict], object]) -> Damage:
    def damage(work: Path) -> None:
        weights = torch.load(work / "single.ckpt", weights_only=True)["state_dict"]
        torch.save(make(weights), work / "single.ckpt")

    return damage


def without(*prefixes: str) -> Callable[[dict], dict]:
    return lambda weights: {name: value for name, value in weights.items() if not name.startswith(prefixes)}


SINGLE = {
    "no UNet": single(without("model.diffusion_model.")), "no autoencoder": single(without("first_stage_model.")),
    "no text": single(without("cond_stage_model.")),
    "one weight": single(lambda weights: {"model.diffusion_model.a": torch.zeros(1)}),
    "no weights": single(lambda weights: {}), "a list": single(lambda weights: list(weights.values())),
    "numbers for weights": single(lambda weights: dict.fromkeys(weights, 1.0)),
    "names that are numbers": single(lambda weights: dict(enumerate(weights.values()))),
    "weights of one axis": single(lambda weights: {name: value.reshape(-1) for name, value in weights.items()}),
    "empty weights": single(lambda weights: {name: value[:0] for name, value in weights.items()}),
    "weights that repeat": single(lambda weights: {name: torch.zeros(1).expand(value.shape) for name,
    value in weights.items()}),
    "the wrong model": single(lambda weights: {"transformer.wte.weight": torch.zeros(4, 4)}),
    "cut": at("single.ckpt", cut(0.5)), "empty": at("single.ckpt", written(b"")), "a page": at("single.ckpt", written(PAGE)),
    "a pointer": at("single.ckpt", written(POINTER)),
    "a call": at("single.ckpt", written(b"\x80\x02cos\nsystem\n(S'true'\ntR.")),
    **{f"like {name}": at("sd/unet/config.json", damage) for name, damage in NETWORKS.items() if name in (
        "widths of text", "no widths", "widths beyond", "no layers", "10**9 layers", "layers list", "text for channels",
        "a size that is NaN")},
    **{f"like {name}": at("sd/vae/config.json", written(content)) for name,
    content in JSONS.items() if name in ("empty", "list", "deep", "no UTF-8")},
}  # fmt: skip
