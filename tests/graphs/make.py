"""Makes the graphs of this folder anew: every family and exporter, two layers, without weights.

    python tests/graphs/make.py [NAME ...]        NAME: FAMILY-EXPORTER-OPSET-DTYPE, or a folder of ../shared/dialects

Those already here stay as they are unless they are named: exporters change, and each form that they ever wrote is to
be understood.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).parent))
import weightless

DIALECTS = Path(__file__).parents[2].parent / "shared" / "dialects"
EXPORTS = (
    "bloom-dynamo-18-float32", "bloom-torchscript-17-float32", "gemma-dynamo-18-float32", "gemma3-dynamo-18-float32",
    "gpt2-torchscript-14-float32", "gpt2_mask-dynamo-18-float32", "gptbigcode-dynamo-18-float32",
    "gptbigcode-torchscript-17-float32", "gptj-torchscript-17-float32", "gptneox-dynamo-23-float16", "gptneox-torchscript-17-float32",
    "llama-dynamo-24-float16", "llama-torchscript-14-float16", "llama-torchscript-17-float32",
    "mpt-torchscript-17-float32", "opt-dynamo-18-float32",
    "opt-torchscript-17-float32", "phi3-dynamo-18-float32", "phi3-torchscript-17-float32", "qwen2_bare-dynamo-18-float32",
    "qwen2_mask-torchscript-17-float32", "qwen3-dynamo-23-float32", "qwen3-torchscript-20-float32",
    "sam_vision-dynamo-18-float32", "sam_vision-torchscript-17-float32", "whisper-dynamo-18-float32",
    "whisper-torchscript-17-float32", "whisper_encoder-dynamo-18-float32",
)  # fmt: skip
EAGER = ("bloom", "mpt", "gptj")  # transformers has no other attention for them


def make(name: str) -> None:
    if (DIALECTS / name / "model.onnx").exists():
        weightless.save(onnx.load(DIALECTS / name / "model.onnx"), name)
        return
    family, exporter, opset, dtype = name.rsplit("-", 3)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.onnx"
        eager = ["eager"] if family in EAGER else []
        script = Path(__file__).with_name("export.py")
        subprocess.run([sys.executable, script, family, exporter, opset, dtype, out, *eager], check=True)
        weightless.save(onnx.load(out), name)


def main() -> None:
    dialects = [path.name for path in sorted(DIALECTS.glob("*")) if "ort_genai" not in path.name]
    for name in sys.argv[1:] or [name for name in (*dialects, *EXPORTS) if name not in weightless.names()]:
        make(name)
        print(name, (weightless.FOLDER / f"{name}.onnx.gz").stat().st_size)


if __name__ == "__main__":
    main()
