"""CoDeF: the hash grid is tiny-cuda-nn's, both forms go through surgery, and no bitwise operator or hash that is small is left."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from families import CAPABILITIES, build, export_and_operate, levels
from PIL import Image

from suture.core.errors import UserError
from suture.core.frames import CANONICAL, DEFORMATION
from suture.core.network.parse import describe
from suture.core.parts import find_parts
from suture.core.weights import weights_root
from suture.generate.__main__ import main as generate
from suture.models import random_weights
from suture.models.architectures import architecture, load_model, open_checkpoint
from suture.models.drawn_video import DrawnVideo
from suture.models.families.codef import Config, Encoding, FullyFused, HashGrid, Perceptron, annealed
from suture.models.named import checkpoint_folder, preset_path, read_config
from suture.runtime.frames import FrameModel, read_sizes
from suture.validate.frames import decibels, frames_level
from suture.validate.pipeline import find_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = {"n_levels": 3, "n_features_per_level": 2, "log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 2.5}
TINY = {
    "architectures": ["ImplicitVideoSystem"], "model_type": "codef", "frames": 6, "height": 8, "width": 12, "points": 16,
    "deform_hash": True, "vid_hash": True, "encoding_deform3d": GRID, "network_deform": {"n_neurons": 16, "n_hidden_layers": 2},
    "encoding": GRID, "network": {"n_neurons": 16, "n_hidden_layers": 1}, "annealed": True, "annealed_step": 100, "step": 80,
    "deform_W": 16, "vid_W": 16, "N_vocab_w": 8,
}  # fmt: skip
FORMS = {"hash": TINY, "frequencies": TINY | {"deform_hash": False, "vid_hash": False}}


def kernel(x: np.ndarray, params: np.ndarray, grid: Encoding) -> np.ndarray:
    """What tiny-cuda-nn's kernel computes, in its types, point by point and corner by corner."""
    primes, dims = [np.uint32(1), np.uint32(2654435761), np.uint32(805459861)], x.shape[1]
    found, first = [], 0
    for level in range(grid.n_levels):
        scale = np.float32(np.exp2(np.float32(level) * np.log2(np.float32(grid.per_level_scale)))) * np.float32(
            grid.base_resolution
        ) - np.float32(1)
        resolution = int(np.ceil(scale)) + 1
        size = min(-(-(resolution**dims) // 8) * 8, 1 << grid.log2_hashmap_size)
        table = params[first * grid.n_features_per_level :].reshape(-1, grid.n_features_per_level)[:size]
        first += size
        rows = np.zeros([len(x), grid.n_features_per_level], np.float32)
        for row, point in enumerate(x):
            place = (point * scale + np.float32(0.5)).astype(np.float32)
            low = np.floor(place)
            for corner in range(1 << dims):
                weight, index, hashed, stride = np.float32(1), np.uint32(0), np.uint32(0), 1
                with np.errstate(over="ignore"):
                    for dim in range(dims):
                        up = corner >> dim & 1
                        part = place[dim] - low[dim]
                        weight *= part if up else 1 - part
                        at = np.int64(low[dim] + up).astype(np.uint32)
                        hashed ^= at * primes[dim]
                        if stride <= size:
                            index += at * np.uint32(stride)
                            stride *= resolution
                rows[row] += weight * table[int(hashed if size < stride else index) % size]
        found.append(rows)
    return np.concatenate(found, 1)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_hash_grid_is_tiny_cuda_nns(dims):
    """Inside the grid, and beyond it, where uint32 wraps."""
    config = Encoding.model_validate(GRID)
    grid = HashGrid(dims, config)
    torch.manual_seed(0)
    torch.nn.init.normal_(grid.params)
    sizes = [entries for _, _, entries, _ in grid.levels]
    assert sizes[0] < 256
    assert sizes[-1] == 256
    x = torch.cat([torch.rand(40, dims), torch.randn(24, dims)])
    with torch.inference_mode():
        np.testing.assert_allclose(grid(x), kernel(x.numpy(), grid.params.numpy(), config), atol=2e-5)


def test_the_network_takes_ones_where_its_inputs_end():
    network = FullyFused(5, 3, Perceptron(n_neurons=16, n_hidden_layers=2))
    torch.manual_seed(0)
    torch.nn.init.normal_(network.params)
    assert [tuple(shape) for shape in network.shapes] == [(16, 16), (16, 16), (16, 16)]
    first, second, last = network.params.detach().reshape(3, 16, 16)
    x = torch.randn(7, 5)
    filled = torch.cat([x, torch.ones(7, 11)], 1)
    torch.testing.assert_close(network(x).detach(), ((filled @ first.T).relu() @ second.T).relu() @ last[:3].T)


def test_annealing_shows_level_after_level():
    config = Config.model_validate(TINY | {"annealed_begin_step": 50})
    assert annealed(4, config, None) is None
    assert annealed(4, config, 40).tolist() == [0, 0, 0, 0]
    half = annealed(4, config, 50 + 62)  # 2.48 levels
    assert half[:2].tolist() == [1, 1]
    assert 0 < half[2] < 1
    assert half[3] == 0
    assert annealed(4, config, 150) is None


def test_the_preset_has_the_published_dimensions():
    model = architecture(read_config(preset_path("codef")), Path("config.json"))
    deformation, canonical = model.warping_field_0.Deform_Hash3d, model.implicit_video_0
    for field, most in ((deformation, 1 << 19), (canonical, 1 << 19)):
        assert len(field.encoder.levels) == 16
        assert max(entries for _, _, entries, _ in field.encoder.levels) == most
    counted = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    assert counted == {
        "warping_field_0.Deform_Hash3d.encoder.params": 12_196_240,
        "warping_field_0.Deform_Hash3d.decoder.params": 64 * 48 + 7 * 64 * 64 + 16 * 64,
        "implicit_video_0.encoder.params": 6_698_992,
        "implicit_video_0.decoder.params": 64 * 48 + 64 * 64 + 16 * 64,
    }


def test_the_frequencies_form_has_the_published_names():
    model = architecture(
        json.loads(json.dumps(TINY | {"deform_hash": False, "vid_hash": False, "deform_W": 128, "vid_W": 256})), Path("c")
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["w_0.weight"] == (8, 8)
    assert shapes["warping_field_0.warping_field_xyz_encoding_1.0.weight"] == (128, 34 + 8)
    assert shapes["warping_field_0.warping_field_xyz_encoding_5.0.weight"] == (128, 128 + 34 + 8)
    assert shapes["warping_field_0.output.0.weight"] == (2, 128)
    assert shapes["implicit_video_0.xyz_encoding_5.0.weight"] == (256, 256 + 34)
    assert shapes["implicit_video_0.xyz_encoding_8.0.bias"] == (256,)
    assert shapes["implicit_video_0.rgb.0.weight"] == (3, 256)
    assert len(shapes) == 1 + 2 * (6 + 1) + 2 * (8 + 1 + 1)


def test_a_config_that_is_none_is_refused():
    for wrong, named in (
        ({"encoding": None}, "encoding"),
        ({"frames": "6"}, "frames"),
        ({"encoding": GRID | {"n_levels": 65}}, "n_levels"),
    ):
        with pytest.raises(UserError, match=named):
            architecture(TINY | wrong, Path("config.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoint, export and surgery of each form and type, once."""
    folder, there = tmp_path_factory.mktemp("codef"), {}

    def operated(form: str, dtype: str) -> Path:
        if (form, dtype) not in there:
            checkpoint, out = folder / form / "checkpoint", folder / form / dtype
            random_weights.write(FORMS[form], checkpoint, "float32", seed=0)
            export_and_operate(checkpoint, out, dtype)
            there[form, dtype] = out
        return there[form, dtype]

    return operated


@pytest.mark.every
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_each_part_means_the_same_after_each_step(form, dtype, made):
    out = made(form, dtype)
    found = levels(out)
    assert [level["status"] for level in found] == ["passed"] * 6
    graphs = {
        part.name: onnx.load(part.folder / "surgery" / "model.trt.onnx", load_external_data=False) for part in find_parts(out)
    }
    for name, graph in graphs.items():
        ops = Counter(node.op_type for node in graph.graph.node)
        assert not [op for op in ops if op.startswith("Bitwise")]
        assert ops["GridSample"] == (3 if (form, name) == ("hash", CANONICAL) else 0)  # each of its levels
    ends = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graphs[DEFORMATION].graph.input, *graphs[DEFORMATION].graph.output)
    }
    assert ends == {"grid": onnx.TensorProto.FLOAT, "frames": onnx.TensorProto.INT64, "points": onnx.TensorProto.FLOAT}


TRAINED = checkpoint_folder("tiny-codef")
LEAST = 26  # decibels of a frame and what was drawn


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tiny-codef")
    export_and_operate(TRAINED, out, "float16")
    return out


@pytest.mark.slow
def test_levels_1_to_3_of_tiny_codef(trained):
    assert [level["status"] for level in levels(trained)] == ["passed"] * 6


def in_pytorch() -> FrameModel:
    model = load_model(open_checkpoint(TRAINED), torch.float32)
    runs = [called(part) for part in model.parts()]
    sizes = read_sizes(TRAINED)
    return FrameModel(*runs, sizes.points)


def called(part):
    def run(inputs):
        with torch.inference_mode():
            return dict(zip(part.outputs, [part.module(*(torch.from_numpy(inputs[name]) for name in part.inputs)).numpy()]))

    return run


def test_tiny_codef_has_learned_the_video():
    """A frame, the canonical picture, which is the first frame, and another one carried along: what was drawn of each."""
    model, video = in_pytorch(), DrawnVideo(96, 128, 24)
    assert decibels(model.frame(9, 96, 128), video.frame(9).astype(np.float32) / 255) > 35
    assert decibels(model.canonical(96, 128), video.frame(0).astype(np.float32) / 255) > 35
    inside = np.s_[16:-16, 16:-16]  # what the canonical picture shows of frame 4
    turned = 255 - video.frame(0)
    carried, drawn = model.carried(turned, 4, 96, 128)[inside], (255 - video.frame(4))[inside].astype(np.float32) / 255
    assert decibels(carried, drawn) > 34
    assert decibels(turned[inside].astype(np.float32) / 255, drawn) < decibels(carried, drawn) - 5  # it has moved
    small = model.frame(9, 24, 32)
    assert small.shape == (24, 32, 3)
    assert decibels(small, video.frame(9)[2::4, 2::4].astype(np.float32) / 255) > 18  # other pixels, the same video


@pytest.mark.slow
def test_tiny_codef_shows_the_video(trained, tmp_path, capsys):
    """Frames, the canonical picture, and an edited one that is carried along."""
    video = DrawnVideo(96, 128, 24)
    numbers = "0", "7-8", "23"
    for asked in numbers:
        assert generate([str(trained), "--frame", asked, "--picture", str(tmp_path / f"f{asked}.png"), "--runtime", "cpu"]) == 0
    written = {0: "f0.png", 7: "f7-8-0007.png", 8: "f7-8-0008.png", 23: "f23.png"}
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(written.values())
    for number, name in written.items():
        assert psnr(Image.open(tmp_path / name), video.frame(number)) > LEAST
    canonical, edited = tmp_path / "canonical.png", tmp_path / "edited.png"
    assert generate([str(trained), "--frame", "canonical", "--picture", str(canonical), "--runtime", "cpu"]) == 0
    turned = 255 - np.asarray(Image.open(canonical))
    Image.fromarray(turned).save(edited)
    asked = ["--frame", "7", "--edited", str(edited), "--picture", str(tmp_path / "turned.png"), "--runtime", "cpu"]
    assert generate([str(trained), *asked]) == 0
    inside = np.s_[12:-12, 12:-12]  # what the canonical picture shows of the frame
    found, drawn = np.asarray(Image.open(tmp_path / "turned.png"))[inside], 255 - video.frame(7)[inside]
    assert psnr(found, drawn) > LEAST - 4
    assert psnr(found, turned[inside]) < psnr(found, drawn) - 3  # it has moved
    capsys.readouterr()
    with pytest.raises(UserError, match="has 24 frames"):
        generate([str(trained), "--frame", "24", "--picture", str(tmp_path / "f.png")])
    with pytest.raises(UserError, match="read here and would be replaced"):
        generate([str(trained), "--frame", "1", "--edited", str(edited), "--picture", str(edited)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--frame", "3"], "needs --picture"),
        (["--frame", "3-1", "--picture", "f.png"], "is no frame"),
        (["--frame", "1", "--picture", "f.jpg"], "name a .png file"),
        (["--frame", "1", "--picture", "f.png", "--steps", "5"], "--steps does not go with --frame"),
        (["--frame", "canonical", "--picture", "f.png", "--edited", "e.png"], "--edited says nothing"),
        (["--edited", "e.png", "--prompt", "a"], "--edited needs --frame"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        generate(["out", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_engines_are_built_without_a_plugin(trained, record_property):
    for part in find_parts(trained):
        lowered = part.folder / "surgery" / "model.trt.onnx"
        kinds = {layer.type for layer in describe(lowered.read_bytes(), lowered, weights_root(lowered)).layers}
        assert not [kind for kind in kinds if kind.startswith("PLUGIN")]
        engine = build(lowered.parent, "--compute-capability", *CAPABILITIES.split())
        record_property(f"{part.name} kernels", engine["profiles"][0]["kernels"])
        assert engine["compute_capabilities"] == CAPABILITIES.split()


def without_xor(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "BitwiseXor":
            node.op_type = "BitwiseOr"


def without_floor(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Floor":
            node.op_type = "Round"


FAULTS = {"without_xor": (without_xor, CANONICAL), "without_floor": (without_floor, DEFORMATION)}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_level_5_compares_frames(fault, trained):
    pipeline = find_pipeline(trained, None)
    if fault is None:
        level = frames_level(pipeline, 0)
        assert (level.number, level.status) == (5, "passed")
        assert level.frames.worst > 60
        assert level.frames.shown.startswith("data:image/png;base64,")
        return
    damage, part = FAULTS[fault]
    path = next(each.folder for each in find_parts(trained) if each.name == part) / "surgery" / "model.onnx"
    kept = path.read_bytes()
    model = onnx.load(path, load_external_data=False)
    damage(model)
    onnx.save(model, path)
    try:
        level = frames_level(pipeline, 0)
        assert level.status == "different"
    finally:
        path.write_bytes(kept)


def psnr(found, drawn) -> float:
    return decibels(np.asarray(found, np.float32) / 255, np.asarray(drawn, np.float32) / 255)
