"""python -m tests.abuse.cost: time and memory that the worst files cost to read, at a share of the largest that are taken."""

import json
import os
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from onnx import helper

from suture.core.errors import UserError
from suture.core.onnx_checks import MOST_NODES
from suture.core.reader import JSON_LIMIT, read_json
from suture.core.safetensors_header import HEADER_LIMIT, read_header
from suture.core.weights import load_graph
from suture.models.template import Template

SIZE = 16 << 20  # bytes of each file
NODES = 20_000
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def lists(path: Path) -> None:
    path.write_bytes(b'{"a":[' + b"[]," * (SIZE // 3) + b"[]]}")


def header(path: Path) -> None:
    """Tensors of no bytes, as many as there can be."""
    entry, names = '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}', range(SIZE // 60)
    text = ("{" + ",".join(f'"{i}{entry}' for i in names) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def nodes(path: Path) -> None:
    values = [helper.make_tensor_value_info(name, 1, [1]) for name in ("0", "y")]
    chain = [helper.make_node("Relu", [str(i)], [str(i + 1)]) for i in range(NODES - 1)]
    chain.append(helper.make_node("Relu", [str(NODES - 1)], ["y"]))
    graph = helper.make_graph(chain, "g", values[:1], values[1:])
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString())


def loops(path: Path) -> None:
    path.write_text(ENDLESS)


COSTS: dict[str, tuple[Callable, Callable, int | None]] = {
    "JSON of empty lists": (lists, read_json, JSON_LIMIT),
    "safetensors header": (header, read_header, HEADER_LIMIT),
    "ONNX graph of small nodes": (nodes, load_graph, MOST_NODES),
    "template without end": (loops, lambda path: Template(path.read_text(), {}, path.parent).render([]), None),
}


def measured(read: Callable[[Path], object], path: Path) -> tuple[float, int]:
    """Seconds, and bytes of memory beyond what importing takes; of a child, since memory once taken counts for ever."""
    ours, theirs = os.pipe()
    if os.fork() == 0:
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            read(path)
        except UserError:
            pass
        finally:
            found = [
                max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) - before
            ]
            os.write(theirs, json.dumps([time.monotonic() - started, 1024 * found[0]]).encode())
            os._exit(0)
    os.wait()
    seconds, memory = json.loads(os.read(ours, 100))
    return seconds, memory


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for what, (make, read, limit) in COSTS.items():
            path = Path(folder) / "file"
            make(path)
            seconds, memory = measured(read, path)
            size = path.stat().st_size
            count = NODES if read is load_graph else size
            print(f"{what}: {size / 1e6:,.1f} MB take {seconds:.1f} s and {memory / 1e6:,.0f} MB")
            if limit:
                print(
                    f"    at the limit, {limit:,}: {seconds * limit / count:,.0f} s and {memory * limit / count / 1e9:,.1f} GB"
                )


if __name__ == "__main__":
    main()
