"""Starts the servers of others on loopback with Suture behind them, and compares their text with generate's: make servers.

    python -m tests.servers triton ray [--work DIR]

Each gets an environment of its own in DIR, of hundreds of megabytes, which is made where it is not there. Ends with 1 where a text
differs or a client that leaves keeps its row.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.golden.make_text import CHECKPOINT, GOLDEN, NEW_TOKENS

ROOT = Path(__file__).parents[1]
PINNED = {"triton": ["nvidia-pytriton==0.7.0"], "ray": ["ray[serve]==2.60.0"]}
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))[:4]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("servers", nargs="*", default=["triton", "ray"], choices=[*PINNED])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "suture-servers")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True)
    out = options.work / "tiny-qwen"
    stages = {
        "export": ["--checkpoint", CHECKPOINT, "--dtype", "float32"],
        "surgery": [out / "export" / "model.onnx", "--no-verify"],
    }
    for stage, given in stages.items():
        command = [sys.executable, "-m", stage, *given, "--out", out / stage]
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    wrong = [name for name in options.servers if not {"triton": triton, "ray": ray}[name](options.work, out)]
    return int(bool(wrong))


def triton(work: Path, out: Path) -> bool:
    """On the server that nvidia-pytriton brings, whose python backend wants numpy 1."""
    packages = environment(work, "triton")
    bundled, backends = packages / "pytriton" / "tritonserver", work / "backends"
    if not backends.is_dir():
        shutil.copytree(bundled / "backends", backends)
        stub = f"{sys.version_info.major}.{sys.version_info.minor}/triton_python_backend_stub"
        shutil.copy(bundled / "python_backend_stubs" / stub, backends / "python")
        for name in ("numpy", "numpy.libs"):
            (backends / "python" / name).symlink_to(packages / name)
    shutil.rmtree(work / "repository", ignore_errors=True)
    port, http = free_port(), free_port()
    suture = [sys.executable, "-m", "suture", "serve", out, "--runtime", "cpu", "--port", port]
    subprocess.run([*map(str, suture), "--write-triton", str(work / "repository")], cwd=ROOT, check=True)
    libraries = ":".join([str(packages / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")])
    command = [bundled / "bin" / "tritonserver", f"--model-repository={work / 'repository'}", f"--backend-directory={backends}",
               f"--http-port={http}", "--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false"]  # fmt: skip
    with (
        running(suture, f"http://127.0.0.1:{port}/health"),
        running(command, f"http://127.0.0.1:{http}/v2/health/ready", {"LD_LIBRARY_PATH": libraries}),
    ):

        def ask(prompt: str) -> str:
            sampling = json.dumps({"max_tokens": NEW_TOKENS, "temperature": 0})
            body = {"text_input": prompt, "stream": True, "sampling_parameters": sampling}
            lines = posted(f"http://127.0.0.1:{http}/v2/models/tiny-qwen/generate_stream", body)
            return "".join(json.loads(line[6:])["text_output"] for line in lines if line.startswith(b"data: {"))

        return compared("triton", ask)


def ray(work: Path, out: Path) -> bool:
    packages, port = environment(work, "ray"), free_port()
    python = packages.parents[2] / "bin" / "python"
    (packages / "suture.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    code = f"""
import signal, ray
from ray import serve
from suture.serve.ray_app import build
ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
serve.start(http_options={{"host": "127.0.0.1", "port": {port}}})
serve.run(build({{"out": {str(out)!r}, "rows": 4, "runtime": "cpu", "name": "tiny-qwen"}}))
signal.signal(signal.SIGTERM, lambda *_: (serve.shutdown(), ray.shutdown(), exit(0)))
signal.pause()
"""
    with running(
        [python, "-c", code], f"http://127.0.0.1:{port}/health", {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    ):

        def ask(prompt: str) -> str:
            body = {"model": "tiny-qwen", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
            lines = posted(f"http://127.0.0.1:{port}/v1/completions", body)
            return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith(b"data: {"))

        return compared("ray", ask)


def compared(name: str, ask) -> bool:
    started, right = time.monotonic(), 0
    for case in CASES:
        found = ask(case["prompt"])
        right += found == case["text"]
        if found != case["text"]:
            print(f"{name}: {found!r} is not {case['text']!r}")
    print(
        f"{name}: {right} of {len(CASES)} texts are generate's, {(time.monotonic() - started) / len(CASES):.2f} s each",
        flush=True,
    )
    return right == len(CASES)


def environment(work: Path, name: str) -> Path:
    """The folder of packages of an environment with what PINNED says."""
    folder = work / f"env-{name}"
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if not (folder / "installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", *PINNED[name]], check=True)
        (folder / "installed").touch()
    return packages


@contextmanager
def running(command: list, ready: str, variables: dict[str, str] | None = None, seconds: float = 300) -> Iterator[None]:
    """A process from where it is ready until it is not needed."""
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **(variables or {})}, start_new_session=True
    )
    try:
        ends = time.monotonic() + seconds
        while not answers(ready):
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"{command[0]} does not come up: {process.poll()}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def posted(url: str, body: dict) -> list[bytes]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return list(answer)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
