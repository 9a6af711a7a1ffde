"""My checkpoint to an engine, from Python: PYTHONPATH=. python examples/checkpoint_to_engine.py CHECKPOINT OUT

CHECKPOINT: a Hugging Face folder. The command `suture run` does the same, validates each step and writes a report.
"""

import sys
from pathlib import Path

import suture


def main(checkpoint: str, out: Path, dtype: str = "float16", capability: str = "8.9") -> Path:
    exported = suture.export_checkpoint(checkpoint, out / "export", dtype=dtype)
    operated = suture.operate(exported, capacity=256)
    return suture.build_engine(operated.lowered, out / "build", root=operated.root, compute_capability=(capability,))


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2])))
