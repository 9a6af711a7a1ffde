"""ONNX-to-TensorRT graph surgery: see, change and trust every step.

operate             a model to the portable and the lowered one
check               what TensorRT's parser makes of a model, against onnxruntime
compare             two graphs with KV caches, step by step
export_checkpoint   a checkpoint to ONNX
build_engine        a lowered graph to a TensorRT engine
open_model          what a pipeline has made, to step and to generate with
UserError           what all of them raise for input that they cannot use

docs/api.md has examples. Importing this package imports nothing heavy, changes no variable of the environment and patches
nothing.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the stages lie beside this folder, not in it, so that `import suture.surgery` needs no install there.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pipeline.py").is_file() and (_CHECKOUT / "surgery" / "__main__.py").is_file():
    __path__.append(str(_CHECKOUT))

# Below __path__, by which they are found.
from suture.api import build_engine, check, compare, export_checkpoint, open_model, operate  # noqa: E402
from suture.core.errors import UserError  # noqa: E402

__all__ = ["UserError", "build_engine", "check", "compare", "export_checkpoint", "open_model", "operate"]
