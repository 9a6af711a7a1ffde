"""python -m generate --picture: one picture, a file of prompts, and what is unusable in one line."""

import json
from pathlib import Path

import numpy as np
import onnx
import pictures
import pytest
from onnx import TensorProto, helper
from PIL import Image

from suture.core.errors import UserError
from suture.core.parts import PARTS, STAGE
from suture.core.stage import Stage
from suture.generate import pictures as drawing
from suture.generate.__main__ import main
from suture.models.architectures import meta_model, open_checkpoint
from suture.models.parts import parts_of
from suture.models.pictures import Network
from suture.validate.pictures import in_pytorch

GRAPH = helper.make_graph(
    [helper.make_node("Identity", ["x"], ["y"])], "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A folder as export leaves it, whose graphs stand for PyTorch's modules: `networks` puts these in their place."""
    folder = pictures.checkpoint(tmp_path_factory.mktemp("sd"))
    out = tmp_path_factory.mktemp("out")
    checkpoint = open_checkpoint(folder)
    listed = [{"name": part.name, "kind": part.kind, "inputs": {}, "outputs": {}} for part in parts_of(meta_model(checkpoint))]
    for part in listed:
        stage = Stage("export", out / part["name"] / "export", checkpoint.files, {"checkpoint": str(folder)}, ["model.onnx"])
        with stage.writing() as partial:
            onnx.save(helper.make_model(GRAPH), partial / "model.onnx")
            stage.extra["part"] = part
    index = Stage(STAGE, out, checkpoint.files[:1], {"checkpoint": str(folder)}, [PARTS])
    with index.writing() as partial:
        (partial / PARTS).write_text(json.dumps({"parts": listed}))
    return out


@pytest.fixture(scope="module")
def modules(out) -> dict[str, Network]:
    folder = json.loads((out / "unet" / "export" / "manifest.json").read_text())["options"]["checkpoint"]
    return in_pytorch(Path(folder), TensorProto.FLOAT)


@pytest.fixture(autouse=True)
def networks(out, modules, monkeypatch):
    monkeypatch.setattr(drawing, "in_onnxruntime", lambda path, fast: modules[path.parents[1].name])


@pytest.fixture
def edges(tmp_path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (16, 24), dtype=np.uint8) * 255).save(tmp_path / "edges.png")
    return tmp_path / "edges.png"


def draw(out: Path, *arguments: object) -> int:
    return main([str(out), "--steps", "2", *map(str, arguments)])


def test_a_picture_follows_from_its_seed_prompt_and_edges(out, edges, tmp_path):
    def made(name: str, *more: object) -> np.ndarray:
        assert draw(out, "--prompt", "a red circle", "--control", edges, "--picture", tmp_path / name, *more) == 0
        return np.asarray(Image.open(tmp_path / name))

    first = made("a.png")
    assert first.shape == (16, 24, 3)
    assert np.array_equal(first, made("a.png"))
    assert not np.array_equal(first, made("b.png", "--seed", 1))
    assert not np.array_equal(first, made("c.png", "--negative", "a blue square"))
    assert not np.array_equal(first, made("d.png", "--guidance", 1))


@pytest.mark.slow
def test_a_file_of_prompts_makes_the_pictures_that_each_would_alone(out, edges, tmp_path):
    lines = [{"prompt": "a red circle", "control": "edges.png"}, {"prompt": "a cross", "seed": 5, "picture": "own.png"},
             {"prompt": "a blue square", "negative": "red"}]  # fmt: skip
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ("--prompts", tmp_path / "all.jsonl", "--control", edges, "--picture", tmp_path / "p.png", "--batch", 2)
    assert draw(out, *asked) == 0
    for line, name, seed in zip(lines, ("p-1", "own", "p-3"), (0, 5, 2)):
        more = ("--negative", line["negative"]) if "negative" in line else ()
        assert (
            draw(
                out, "--prompt", line["prompt"], "--control", edges, "--seed", seed, "--picture", tmp_path / "alone.png", *more
            )
            == 0
        )
        alone, both = (np.asarray(Image.open(tmp_path / f"{each}.png")).astype(int) for each in ("alone", name))
        assert abs(alone - both).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--picture", "{}/p.png"], "needs a picture"),
        (["--control", "{}/edges.png", "--picture", "{}/p.jpg"], "is not a .png file"),
        (["--control", "{}/edges.png", "--picture", "{}/none/p.png"], "is not a .png file"),
        (["--control", "{}/edges.png", "--picture", "{}/edges.png"], "is read here and would be replaced"),
        (["--control", "{}/text.png", "--picture", "{}/p.png"], "is not a picture that can be read"),
        (["--control", "{}/edges.png", "--picture", "{}/p.png", "--size", "32x32"], "is of 16x24"),
        (["--control", "{}/odd.png", "--picture", "{}/p.png"], "not a multiple of 4"),
    ],
)
def test_what_is_unusable_is_one_line_and_writes_nothing(out, edges, tmp_path, arguments, said):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (18, 16)).save(tmp_path / "odd.png")
    before = edges.read_bytes()
    with pytest.raises(UserError, match=said) as error:
        draw(out, "--prompt", "a cross", *(each.format(tmp_path) for each in arguments))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "p.png").exists()
    assert edges.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a", "--steps", "3"], "--steps needs --picture"),
        (["--prompt", "a", "--picture", "p.png", "--top-k", "3"], "--top-k is of text"),
        (["--prompt", "a", "--picture", "p.png", "--size", "8"], "is not a size"),
        (["--prompt", "a", "--picture", "p.png", "--guidance", "1", "--negative", "b"], "says nothing at --guidance 1"),
        (["--picture", "p.png"], "needs --prompt"),
        (["--prompt", "a", "--picture", "p.png", "--runtime", "engine"], "in onnxruntime on the CPU"),
    ],
)
def test_options_that_do_not_go_together(out, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        main([str(out), *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_text_is_not_asked_of_a_picture_model(out):
    with pytest.raises(UserError, match="add --picture"):
        main([str(out), "--prompt", "a"])
