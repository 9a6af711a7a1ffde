"""Command lines: each value that is none, each option given twice or without effect, is one line that names it."""

import runpy
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SURGERY, BUILD, VALIDATE = ["surgery", "m.onnx", "--out", "o"], ["build", "m.onnx", "--out", "o"], ["validate", "o"]
GENERATE, PIPELINE = ["generate", "o", "--prompt", "a"], ["pipeline", "--model", "tiny-qwen", "--out", "o"]
CAPACITY, MADE = (
    ["suture.surgery.capacity", "o", "--out", "p"],
    ["suture.models.random_checkpoint", "--preset", "qwen-7b", "--out", "o"],
)
RANKS = ["suture.surgery.ranks", "a.onnx", "--out", "o"]
JOIN = ["suture.surgery.join", "a.onnx", "b.onnx", "--out", "o"]
VALUES = {  # by command and option: what it refuses
    (*SURGERY, "--capacity"): ["0", "-1", "1.5", str(2**63), "nan", "", "many", "9" * 5000],
    (*SURGERY, "--past"): ["(", "*", "[", "a{99999999999}"],
    (*SURGERY, "--name"): ["tokens", "=x", "tokens="],
    (*SURGERY, "--group-size"): ["0", "33", "x"],
    (*CAPACITY, "--capacity"): ["0", "-5", str(2**63), "x"],
    (*RANKS, "--tensor-parallel"): ["0", "1", "65", "-2", str(2**63), "nan", "x"],
    (*RANKS, "--stages"): ["0", "1", "x"],
    (*JOIN, "--connect"): ["h", "=h", "h="],
    (*JOIN, "--rename"): ["h", "=h", "h="],
    (*BUILD, "--max-batch"): ["0", "-1", str(10**12), "2.0", "nan"],
    (*BUILD, "--max-prompt"): ["0", str(10**12), "x"],
    (*BUILD, "--max-past"): ["0", str(2**63), "x"],
    (*BUILD, "--compute-capability"): ["89", "sm_89", "8.9.1", "nan", "-8.9"],
    (*VALIDATE, "--tolerance"): ["nan", "inf", "-inf", "-1", "0", "1e30", "2", "x"],
    (*VALIDATE, "--seed"): ["-1", "1.5", "nan", str(2**64), "x"],
    (*GENERATE, "--temperature"): ["nan", "inf", "-1", "1e-300", "1e300", "x"],
    (*GENERATE, "--top-p"): ["0", "nan", "inf", "1.1", "-0.1", "1e-300"],
    (*GENERATE, "--top-k"): ["0", "-1", "1.5", str(2**63)],
    (*GENERATE, "--repetition-penalty"): ["0", "nan", "inf", "1e-300", "-1"],
    (*GENERATE, "--seed"): ["-1", "nan", str(2**64)],
    (*GENERATE, "--max-tokens"): ["0", "-1", str(2**63), "x"],
    ("generate", "o", "--prompts", "f", "--batch"): ["0", "-1", str(10**12), "x"],
    (*MADE, "--layers"): ["0", "-1", str(10**9), "x"],
    (*MADE, "--seed"): ["-1", "nan", str(2**64)],
    (*PIPELINE, "--tolerance"): ["nan", "inf"],
    (*PIPELINE, "--max-batch"): [str(10**12)],
    (*PIPELINE, "--capacity"): [str(2**63), "0"],
}
WITHOUT_EFFECT = [
    (SURGERY, "--cache growing --capacity 64", "--capacity"),
    (SURGERY, "--cache growing --attention lengths", "--attention"),
    (SURGERY, "--calibration text", "--calibration"),
    (SURGERY, "--quantize int8 --calibration text", "--calibration"),
    (SURGERY, "--quantize int4 --tokenizer folder", "--tokenizer"),
    (SURGERY, "--group-size 64", "--group-size"),
    (SURGERY, "--lm-head int4", "--lm-head"),
    (SURGERY, "--exclude x", "--exclude"),
    (SURGERY, "--name tokens=a --name tokens=b", "--name"),
    (SURGERY, "--capacity 8 --capacity 16", "--capacity is given twice"),
    (PIPELINE, "--cache growing --capacity 64", "--capacity"),
    (PIPELINE, "--max-past 64", "--max-past"),
    (PIPELINE, "--calibration text", "--calibration"),
    (RANKS, "--stages 2 --pass own.py", "--pass"),
    (RANKS, "--stages 2 --tensor-parallel 2", "--tensor-parallel"),
    (VALIDATE, "--out p", "--out"),
    (VALIDATE, "--inputs x.npz", "--inputs"),
    (VALIDATE, "--reference x.onnx", "--reference"),
    (VALIDATE, "--bundle --import x.npz", "--import"),
    (VALIDATE, "--bundle --force", "--force"),
    (VALIDATE, "--network --text t", "--text"),
    (VALIDATE, "--network --bundle", "--bundle"),
    (VALIDATE, "--network --inputs x --seed 0", "--seed"),
    (VALIDATE, "b.onnx --text t", "--text"),
    (VALIDATE, "b.onnx --import r", "--import"),
    (VALIDATE, "b.onnx --force", "--force"),
    (VALIDATE, "b.onnx c.onnx", "give one folder or two graphs"),
    (VALIDATE, "--seed 1 --seed 2", "--seed is given twice"),
    (GENERATE, "--seed 3", "--seed"),
    (GENERATE, "--temperature 0 --top-k 3", "--top-k"),
    (GENERATE, "--batch 2", "--batch"),
    (GENERATE, "--language en", "--language"),
    (GENERATE, "--system s", "--system"),
    (MADE, "--empty --seed 0", "--seed"),
    (["export", "--model", "tiny-qwen", "--out", "o"], "--dtype float16 --dtype float32", "--dtype is given twice"),
]


def refusal(monkeypatch, capsys, command: list[str]) -> str:
    """The one line that a command ends with at once, and status 2."""
    module, *arguments = command
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    start = partial(runpy.run_path, str(ROOT / "pipeline.py")) if module == "pipeline" else partial(runpy.run_module, module)
    with pytest.raises(SystemExit) as ended:
        start(run_name="__main__")
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert len(printed.err) < 500
    return printed.err


@pytest.mark.parametrize(
    ("command", "value"),
    [(command, value) for command, values in VALUES.items() for value in values],
    ids=lambda given: given[:20] if isinstance(given, str) else f"{given[0]} {given[-1]}",
)
def test_a_value_that_is_none_is_one_line(command, value, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    *words, option = command
    assert option in refusal(monkeypatch, capsys, [*words, f"{option}={value}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "more", "says"), WITHOUT_EFFECT, ids=lambda given: given[0] if isinstance(given, list) else given
)
def test_an_option_without_effect_is_one_line(command, more, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(monkeypatch, capsys, [*command, *more.split()])
    assert not list(tmp_path.iterdir())
