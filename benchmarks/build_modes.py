"""What each way to build costs, and what a cache's capacity costs at each step: two layers of Qwen-7B, no GPU needed.

    python benchmarks/build_modes.py --work DIR [--capacities 512 1024 2048 4096 8192]

Times and memory are the build process's own; bytes are those of the decode profile's kernels (build/kernels.json).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from suture.build.cost import kernels_a_layer, over_floor  # noqa: E402

LAYERS, CAPACITY = 2, 2048
MODES = {  # surgery's options, build's options
    "constants": ([], []),
    "constants, gate and up apart": (["--skip", "neighbouring_weights"], []),
    "weights as inputs": ([], ["--weights", "input"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time, memory and size of the ways to build, and the bytes of capacities.")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks/build_modes"), help="(%(default)s)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="of another model of Qwen's architecture")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=f"of {', '.join(MODES)}")
    parser.add_argument("--capability", default="8.9", help="the GPU to build for (%(default)s)")
    parser.add_argument("--capacities", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="(%(default)s)")
    options = parser.parse_args()
    work, target = options.work.resolve(), ["--compute-capability", options.capability]
    source = ["--config", options.config] if options.config else ["--preset", "qwen-7b"]
    made = ["--layers", LAYERS, "--dtype", "float16", "--out", work / "checkpoint"]
    run("models.random_checkpoint", *source, *made)
    run("export", "--checkpoint", work / "checkpoint", "--weights", "reference", "--out", work / "export")

    print(
        "| mode | build | peak memory | of it anonymous (RssAnon) | engine | kernels a layer, decoding | bytes over the floor |\n"
        "|---|---|---|---|---|---|---|"
    )
    for number, mode in enumerate(options.modes):
        operate, build = MODES[mode]
        surgery, engine = work / f"surgery-{number}", work / f"engine-{number}"
        run("surgery", work / "export" / "model.onnx", "--out", surgery, "--capacity", CAPACITY, *operate)
        run("build", surgery / "model.trt.onnx", "--out", engine, *target, *build)
        built = json.loads((engine / "engine.json").read_text())
        decode, seconds = built["profiles"][0], sum(built["seconds"].values())
        cells = [
            mode,
            f"{seconds:.1f} s",
            f"{built['peak_memory_bytes'] / 1e9:.2f} GB",
            f"{built['peak_anonymous_bytes'] / 1e9:.2f} GB",
            f"{built['engine_bytes'] / 1e6:,.1f} MB",
        ]
        print(f"| {' | '.join([*cells, kernels_a_layer(decode), f'{over_floor(decode):.3f}'])} |", flush=True)

    print("\n| capacity | weights | cache | the rest | a step in all |\n|---|---|---|---|---|")
    for capacity in options.capacities:
        surgery, engine = work / f"capacity-{capacity}", work / f"engine-of-{capacity}"
        run("surgery.capacity", work / "surgery-0", "--capacity", capacity, "--out", surgery)
        run("build", surgery / "model.trt.onnx", "--out", engine, *target, "--weights", "input")
        moved = json.loads((engine / "engine.json").read_text())["profiles"][0]["decode_bytes"]
        sizes = [moved["weights"], moved["cache"], moved["other"], sum(moved.values())]
        print(f"| {capacity} | {' | '.join(f'{size / 1e6:,.1f} MB' for size in sizes)} |", flush=True)


def run(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit((done.stderr.strip().splitlines() or [f"{module} failed"])[-1])


if __name__ == "__main__":
    main()
