"""ONNX-to-TensorRT graph surgery: see, change and trust every step.

Importing this package imports nothing heavy.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the stages lie beside this folder, not in it, so that `import suture.surgery` needs no install there.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pipeline.py").is_file() and (_CHECKOUT / "surgery" / "__main__.py").is_file():
    __path__.append(str(_CHECKOUT))
