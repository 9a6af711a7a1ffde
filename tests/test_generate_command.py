"""python -m generate: prompts, conversations and files of prompts, and unusable ones in one line."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from test_generate import CASES, PROMPTS, ROOT, TOKENIZER, answers_alone

from suture.core.errors import UserError
from suture.core.named import check_results
from suture.generate.__main__ import main
from suture.generate.batch import LENGTH, Sequence
from suture.generate.command import Generator
from suture.generate.options import parse
from suture.generate.prompts import said
from suture.generate.text import TextStream
from tests.golden.make_text import NEW_TOKENS


def test_weights_of_a_step_are_all_but_the_embeddings(tiny_out, tiny_portable):
    tensors = load_file(tiny_portable / "model.safetensors")
    whole, row = sum(tensor.nbytes for tensor in tensors.values()), 256 * 4
    found = generator(tiny_out, "--prompt", "a").speed.weight_bytes
    assert found == pytest.approx(whole - tensors["transformer.wte.weight"].nbytes + row, rel=1e-3)


def generator(out: Path, *arguments: object) -> Generator:
    return Generator(parse([str(out), "--runtime", "cpu", *map(str, arguments)]))


def test_one_prompt_is_shown_as_it_comes(tiny_out, tiny_portable, capsys):
    asked = generator(tiny_out, "--prompt", CASES[1]["prompt"], "--max-tokens", NEW_TOKENS)
    assert asked.what.endswith("surgery/model.onnx in onnxruntime on the CPU")
    asked.one(said(CASES[1]["prompt"], "--prompt", chat=False, system=None))
    printed = capsys.readouterr()
    assert printed.out == CASES[1]["text"] + "\n"
    assert printed.err == f"generate: cut after {NEW_TOKENS} tokens (--max-tokens)\n"


def test_a_conversation_feeds_only_what_is_new(tiny_out, tiny_portable, capsys):
    """Its answers are those to the whole conversation, read at once."""
    talk = generator(tiny_out, "--chat", "--max-tokens", 6)
    talk.converse(["first\n", "\n", "second\n"])
    messages, fed = [], 0
    shown = capsys.readouterr().out
    for said_now in ("first", "second"):
        messages.append({"role": "user", "content": said_now})
        ids = TOKENIZER.chat(messages)
        anew = Sequence(0, ids, 6, talk.stop_ids, TextStream(TOKENIZER.decode))
        answer = answers_alone(talk.opened.model, anew, {})
        assert shown.startswith(anew.text.text + "\n")
        shown = shown[len(anew.text.text) + 1 :]
        messages.append({"role": "assistant", "content": anew.text.text})
        fed += len(ids)
        assert len(answer) <= 6
    assert not shown
    assert talk.speed.read + talk.speed.reused == fed
    assert talk.speed.reused >= len(TOKENIZER.chat(messages[:1]))


def test_a_conversation_that_no_longer_fits_loses_its_oldest_turns(tiny_out, tiny_portable, capsys):
    talk = generator(tiny_out, "--chat", "--max-tokens", 4)
    long = "x y " * 90
    turn = len(TOKENIZER.encode(long))
    assert 640 / 4 < turn < 640 / 3 - 30
    talk.converse([long, long, long, "z " * 700, long, "short"])
    printed = capsys.readouterr()
    assert printed.err.count("turns left out at its beginning: 1") == 1  # for the fourth that fits
    assert printed.err.count("generate: this turn: the prompt has") == 1  # which loses nothing of what was said
    assert len(talk.speed.first) == 5
    assert talk.speed.reused > 6 * turn  # 1, 2 and, after the system's words only, of 3 turns; then 3 of "short"


def test_a_file_of_prompts_gives_json_lines_in_its_order(tiny_out, tiny_portable, tmp_path):
    asked = [{"prompt": case["prompt"], "name": f"case {index}"} for index, case in enumerate(CASES)]
    asked += [{"messages": [{"role": "user", "content": "hello"}]}]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)) + "\n\n")
    command = [sys.executable, "-m", "suture.generate", tiny_out, "--prompts", tmp_path / "asked.jsonl", "--batch", "2",
               "--max-tokens", str(NEW_TOKENS), "--out", tmp_path / "said.jsonl", "--runtime", "cpu"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    results = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [result["text"] for result in results[:5]] == [case["text"] for case in CASES]
    assert [result.get("name") for result in results] == [*(f"case {index}" for index in range(5)), None]
    assert results[0] == {**asked[0], "text": CASES[0]["text"], "finish": LENGTH, "prompt_tokens": len(PROMPTS[0]),
                          "tokens": NEW_TOKENS}  # fmt: skip
    assert results[5]["prompt_tokens"] == len(TOKENIZER.chat(asked[5]["messages"]))
    assert re.search(r"tokens written in 6 answers; \d+ decoding steps in .* tokens/s, .* ms a step, .* GB/s", done.stderr)
    assert "first token after" in done.stderr
    assert not (tmp_path / "said.jsonl.partial").exists()


def test_a_conversation_through_pipes(tiny_out, tiny_portable):
    """Bytes that are not UTF-8 come in, and the reader leaves before the end: no traceback."""
    command = [sys.executable, "-m", "suture.generate", tiny_out, "--chat", "--max-tokens", "4", "--runtime", "cpu"]
    running = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdin.write(b"caf\xe9\n")
    running.stdin.flush()
    assert running.stdout.readline()
    running.stdout.close()
    running.stdin.write(b"again\n")
    running.stdin.close()
    errors = running.stderr.read().decode()
    assert running.wait(60) == 0, errors
    assert all(line.startswith("generate: ") for line in errors.splitlines()), errors


@pytest.mark.parametrize(
    ("lines", "arguments", "says"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}\n', [], "line 2: has neither prompt nor messages"),
        ('{"prompt": "a"}\nnonsense\n', [], "line 2: is not JSON"),
        ("\n\n", [], "has no prompts"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', [], "line 1: the roles assistant are not a conversation"),
        (json.dumps({"prompt": "word " * 900}), [], r"line 1: the prompt has \d+ tokens, and the model takes 640; shorten it"),
        ('{"prompt": ""}', [], "line 1: the prompt is empty"),
        ('{"prompt": "a\\ud800"}', [], "line 1: holds a lone surrogate"),
        ('{"prompt": "a"}', ["--runtime", "engine"], "no engine has been built"),
    ],
)
def test_unusable_prompts_are_one_line(tiny_out, tiny_portable, tmp_path, monkeypatch, lines, arguments, says):
    (tmp_path / "asked.jsonl").write_text(lines)
    arguments = ["generate", tiny_out, "--prompts", tmp_path / "asked.jsonl", *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(UserError, match=says) as raised:
        main()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["OUT"], "give --prompt TEXT, --prompts FILE, --chat or --audio FILE.wav"),
        (["OUT", "--prompt", "a", "--language", "en"], "--language and --translate need --audio"),
        (["OUT", "--audio", "a", "--chat"], "do not go together"),
        (["OUT", "--prompt", "a", "--prompts", "b"], "not allowed with"),
        (["OUT", "--prompt", "a", "--system", "b"], "--system needs --chat"),
        (["OUT", "--prompt", "a", "--top-p", "1.5"], "must be at most 1"),
        (["OUT", "--prompt", "a", "--temperature", "nan"], "must be at least 0"),
        (["OUT", "--prompt", "a", "--top-k", "0"], "must be at least 1"),
        (["OUT", "--prompts", "a", "--out", "nowhere/b"], "no such folder"),
    ],
)
def test_wrong_arguments_are_one_line_at_once(arguments, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
    printed = capsys.readouterr().err
    assert says in printed
    assert printed.count("\n") == 1


def test_nothing_to_run(tmp_path, tiny_export):
    with pytest.raises(UserError, match=r"has neither surgery/model.onnx nor export/model.onnx"):
        generator(tmp_path, "--prompt", "a")
    with pytest.raises(UserError, match="nowhere: is not a folder; name the checkpoint"):
        generator(tiny_export / "model.onnx", "--prompt", "a", "--checkpoint", tmp_path / "nowhere")
    with pytest.raises(UserError, match="onnxruntime has no CUDA provider here"):
        Generator(parse([str(tiny_export / "model.onnx"), "--prompt", "a", "--runtime", "cuda"]))


def test_a_text_model_hears_nothing(tiny_out, tiny_portable):
    with pytest.raises(UserError, match="is not a speech model; give --prompt TEXT"):
        generator(tiny_out, "--audio", "some.wav")


def test_sampling_from_a_cut_distribution_implies_temperature_1():
    assert parse(["OUT", "--prompt", "a"]).temperature == 0
    assert parse(["OUT", "--prompt", "a", "--top-p", "0.9"]).temperature == 1
    assert parse(["OUT", "--prompt", "a", "--top-k", "3", "--temperature", "0.5"]).temperature == 0.5


@pytest.mark.parametrize(
    "path",
    [
        "prompts.txt",
        "link.txt",
        "surgery/model.onnx",
        "surgery/report.json",
        "surgery/manifest.json",
        "checkpoint/vocab.json",
        ".",
    ],
)
def test_results_replace_nothing_that_is_read_or_that_a_stage_wrote(path, tmp_path):
    for name in ("prompts.txt", "surgery/model.onnx", "surgery/report.json", "checkpoint/vocab.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("kept")
    (tmp_path / "link.txt").symlink_to("prompts.txt")
    (tmp_path / "surgery" / "manifest.json").write_text('{"stage": "surgery", "outputs": {"model.onnx": 4, "report.json": 4}}')
    read = [tmp_path / "prompts.txt", tmp_path / "surgery" / "model.onnx", tmp_path / "checkpoint" / "vocab.json", None]
    with pytest.raises(UserError, match="name another file with --out"):
        check_results({"--out": tmp_path / path}, read)
    check_results({"--out": tmp_path / "surgery" / "said.jsonl"}, read)
    (tmp_path / "said.jsonl").write_text('{"text": "said", "finish": "stop", "prompt_tokens": 1, "tokens": 1}\n')
    check_results({"--out": tmp_path / "said.jsonl"}, read)


def test_prompts_are_not_replaced_by_their_answers(tiny_out, tiny_portable, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(UserError, match="is read here and would be replaced"):
        generator(tiny_out, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "p.txt")
    assert (tmp_path / "p.txt").read_text() == "a\n"
