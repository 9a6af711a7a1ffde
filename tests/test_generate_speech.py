"""Whisper: an audio file in, text out, token by token as transformers' own generate() has it."""

import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from suture.core.errors import UserError
from suture.export.options import ExportOptions
from suture.export.stage import export
from suture.generate.command import Generator
from suture.generate.options import parse
from suture.generate.speech import read_audio
from suture.surgery.__main__ import main as surgery
from tests.speech import END, write
from tests.stored_traces import tracing_stored

ROOT = Path(__file__).parents[1]
RATE = 16000
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    """1.7 seconds in stereo at 44.1 kHz: two windows, the second not full."""
    time = np.arange(int(44100 * 1.7)) / 44100
    noise = 0.05 * np.random.default_rng(0).standard_normal(len(time))
    tone = 0.4 * np.sin(2 * np.pi * (300 + 200 * np.sin(2 * np.pi * 3 * time)) * time) + noise
    path = tmp_path_factory.mktemp("audio") / "speech.wav"
    soundfile.write(path, np.stack([tone, tone / 2], axis=1), 44100, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def out(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pipeline")
    with tracing_stored("speech", "float32"):
        export(out, ExportOptions(checkpoint=checkpoint), pipeline=True)
    surgery([str(out / "decoder" / "export" / "model.onnx"), "--out", str(out / "decoder" / "surgery")])
    return out


def expected(checkpoint: Path, audio: Path, language: str | None, task: str) -> list[list[int]]:
    """By transformers, window after window."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
    extract, samples = WhisperFeatureExtractor(80, chunk_length=1), read_audio(audio, RATE)
    written = []
    for start in range(0, len(samples), RATE):
        window = extract(samples[start : start + RATE], sampling_rate=RATE, return_tensors="pt")["input_features"]
        tokens = model.generate(window, language=language, task=task, do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
        written.append([token for token in tokens if token < END])
    return written


@pytest.mark.parametrize("graph", ["", "decoder/export/model.onnx"], ids=["static", "growing"])
@pytest.mark.parametrize(
    ("language", "task"), [("en", "transcribe"), ("de", "transcribe"), ("de", "translate"), (None, "transcribe")]
)
@pytest.mark.sample("en-transcribe-static", "de-translate-growing", "None-transcribe-growing")
def test_tokens_are_those_of_transformers(checkpoint, out, audio, capsys, graph, language, task):
    asked = [str(out / graph), "--audio", str(audio), "--max-tokens", str(NEW_TOKENS), "--runtime", "cpu"]
    asked += ["--language", language] * (language is not None) + ["--translate"] * (task == "translate")
    Generator(parse(asked)).listen(audio)
    windows = expected(checkpoint, audio, language, task)
    printed = capsys.readouterr()
    assert len(windows) == 2
    assert windows[0] != windows[1]
    tokenizer = Generator(parse(asked)).tokenizer
    assert printed.out == "".join(tokenizer.decode(window) + "\n" for window in windows)


@pytest.mark.parametrize("graph", ["", "decoder/export/model.onnx"], ids=["static", "growing"])
def test_the_encoder_counts(out, audio, monkeypatch, graph):
    """Its time until the first token, and its caches in what every step reads."""
    speaker = Generator(
        parse([str(out / graph), "--audio", str(audio), "--max-tokens", "5", "--language", "en", "--runtime", "cpu"])
    )
    encode = speaker.speech.encoder.__call__
    monkeypatch.setattr(type(speaker.speech.encoder), "__call__", lambda self, features: time.sleep(0.5) or encode(features))
    speaker.listen(audio)
    speed = speaker.speed
    assert len(speed.first) == 2
    assert all(0.5 < seconds < 5 for seconds in speed.first)
    layers, heads, size, slots, prompt = 2, 4, 16, 50, 4
    row = 2 * layers * heads * size * 4
    held = sum(prompt + step for step in range(1, 5))
    assert speed.steps == 8
    assert speed.decode_bytes == 8 * (speed.weight_bytes + slots * row) + 2 * held * row


def test_a_speech_model_is_given_audio(out, audio):
    with pytest.raises(UserError, match=r"is a speech model; give --audio FILE\.wav"):
        Generator(parse([str(out), "--prompt", "a"]))
    with pytest.raises(UserError, match="--language: fr is not known; give one of de, en"):
        Generator(parse([str(out), "--audio", str(audio), "--language", "fr"])).listen(audio)


def test_audio_is_mixed_and_resampled(tmp_path):
    time = np.arange(48000) / 48000
    left = np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)], axis=1), 48000, subtype="FLOAT")
    samples = read_audio(tmp_path / "a.wav", RATE)
    assert samples.dtype == np.float32
    assert len(samples) == RATE
    middle = slice(1000, -1000)
    np.testing.assert_allclose(samples[middle], np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)[middle] / 2, atol=1e-3)


def test_a_file_without_audio(tmp_path):
    (tmp_path / "a.wav").write_text("no sound at all")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    for name, says in (("a.wav", "holds no audio that can be read"), ("none.wav", "no such file"), ("empty.wav", "is empty")):
        with pytest.raises(UserError, match=f"{name}: {says}; name a") as raised:
            read_audio(tmp_path / name, RATE)
        assert "\n" not in str(raised.value)
