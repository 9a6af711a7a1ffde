"""Hostile and faulty calls to the server, and the server as a process: loading, draining, faults."""

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from serving import served, wait
from test_generate import CASES

from suture.core.errors import UserError
from suture.serve.__main__ import main as serve_main
from tests.abuse.http import BODIES, CALLS, GOOD
from tests.golden.make_text import NEW_TOKENS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server():
    with served(rows=2, queue=8) as running:
        yield running


@pytest.fixture(scope="module")
def expected(server) -> bytes:
    return json.loads(server.ask("/v1/completions", GOOD)[1])["choices"]


@pytest.fixture(autouse=True)
def as_before(request):
    """After each call the server does what it did, and has kept nothing of it."""
    yield
    if "server" not in request.fixturenames:
        return
    server, expected = request.getfixturevalue("server"), request.getfixturevalue("expected")
    asked: list[tuple[int, bytes]] = []
    wait(
        lambda: asked.append(server.ask("/v1/completions", GOOD)) or asked[-1][0] != 429
    )  # calls that have left free their places
    status, answer = asked[-1]
    assert (status, json.loads(answer).get("choices")) == (200, expected), answer
    wait(lambda: server.worker.idle and not server.worker.scheduler.busy)
    assert not any("fault" in line for line in server.lines())


@pytest.mark.parametrize("name", BODIES)
def test_a_body(server, expected, name):
    status, answer = server.ask("/v1/completions", BODIES[name])
    error = json.loads(answer)["error"]
    assert status in (400, 404, 413)
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1000
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize("name", CALLS)
def test_a_call(server, expected, name):
    """Any answer but one of success to what is not a good call, or none; and at once."""
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        found = b""
        try:
            connection.sendall(CALLS[name])
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                found += part
        except OSError:
            pass  # it hung up
    assert b"Traceback" not in found
    good = name in (
        "a line in the request's id",
        "a key of other letters",
        "many headers",
        "less length than body",
        "an upgrade",
    )
    assert good or not found.startswith(b"HTTP/1.1 200")


def test_many_that_leave_before_they_are_answered(server, expected):
    place = urlsplit(server.url)
    content = json.dumps(GOOD | {"max_tokens": 90}).encode()
    for _ in range(40):
        with socket.create_connection((place.hostname, place.port)) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)


# --- the process -----------------------------------------------------------------------------------------------------------


def start(*arguments: object) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "suture", "serve", *map(str, arguments)]
    process = subprocess.Popen([*command, "--port", "0"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    assert line.startswith("serve: http://127.0.0.1:"), line + process.stderr.read()
    return process, line.split()[1].rstrip(",")


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_it_loads_serves_drains_and_ends(tiny_out, tiny_portable):
    """As a command, with what a pipeline wrote: the golden text; SIGTERM while an answer streams, which then ends whole."""
    process, url = start(tiny_out, "--runtime", "cpu", "--rows", 2)
    try:
        seen = {status(f"{url}/health")}
        wait(lambda: seen.add(status(f"{url}/health")) or 200 in seen, 120)
        assert seen == {503, 200}
        assert "0.0105 GB of caches (8,192 bytes a token)" in process.stderr.readline()
        asked = {"model": "tiny-qwen", "prompt": CASES[0]["prompt"], "max_tokens": NEW_TOKENS, "temperature": 0}
        call = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked | {"stream": True}).encode())
        with urllib.request.urlopen(call, timeout=60) as stream:
            first = stream.readline()
            process.send_signal(signal.SIGTERM)
            lines = [first, *stream]
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == CASES[0]["text"]
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()


def test_what_cannot_be_served_is_one_line(tmp_path, tiny_out, tiny_portable):
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    place = taken.getsockname()[1]
    for arguments, says in (
        ([tmp_path], "has neither surgery/model.onnx nor export/model.onnx"),
        ([tiny_out, "--rows", "0"], "--rows"),
        ([tiny_out, "--port", str(place)], f"127.0.0.1:{place}: cannot be listened at"),
    ):
        done = subprocess.run([sys.executable, "-m", "serve", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert says in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_model_that_cannot_be_loaded_ends_the_server(tiny_out, tiny_portable, tmp_path):
    (tmp_path / "surgery").mkdir()
    (tmp_path / "surgery" / "model.onnx").write_bytes(b"no graph")
    done = subprocess.run(
        [sys.executable, "-m", "serve", tmp_path / "surgery" / "model.onnx", "--checkpoint", ROOT / "models" / "tiny-qwen", "--port", "0"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "model.onnx" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_model_repository_for_triton(tmp_path):
    """tests/servers.py runs it on the real server."""
    line = [str(tmp_path / "my model"), "--port", "8123", "--write-triton", str(tmp_path / "repository")]
    assert serve_main(line) == 0
    folder = tmp_path / "repository" / "my_model"
    config = (folder / "config.pbtxt").read_text()
    assert 'string_value: "http://127.0.0.1:8123"' in config
    assert 'string_value: "my model"' in config
    assert (folder / "1" / "model.py").read_text() == (ROOT / "serve" / "triton_model.py").read_text()
    with pytest.raises(UserError, match="is there already"):
        serve_main(line)


def test_adapters_are_small():
    for name in ("triton_model", "ray_app"):
        assert len((ROOT / "serve" / f"{name}.py").read_text().splitlines()) <= 60
