"""What serve's command line takes. Imports nothing heavy."""

import argparse
from pathlib import Path

from suture.core.arguments import count, port, real, rows, whole
from suture.core.command import CommandParser

KEY = "SUTURE_API_KEY"


def parse(arguments: list[str] | None = None, prog: str = "serve") -> argparse.Namespace:
    parser = CommandParser(prog=prog, description="Serve text from a pipeline's folder by OpenAI's API over HTTP.")
    parser.add_argument("out", metavar="OUT", type=Path, help="a pipeline's folder, or one of its graphs")
    parser.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="to listen at (default: %(default)s, this machine alone)"
    )
    parser.add_argument("--port", metavar="N", type=port, default=8000, help="(default: %(default)s; 0: any that is free)")
    parser.add_argument("--name", metavar="NAME", help="what the model is called (default: the folder's name)")
    parser.add_argument("--api-key", metavar="KEY", help=f"what callers of /v1 have to give (or in the environment: {KEY})")
    parser.add_argument("--write-triton", metavar="DIR", type=Path,
                        help="write a model repository for Triton there, whose model asks this server, and end")  # fmt: skip

    batch = parser.add_argument_group("the batch")
    batch.add_argument("--rows", metavar="N", type=rows, default=8, help="requests side by side (default: %(default)s)")
    batch.add_argument("--chunk", metavar="N", type=count, default=128,
                       help="tokens of a prompt between two decoding steps (default: %(default)s)")  # fmt: skip
    batch.add_argument("--lookup", metavar="N", type=whole(0, 64), default=0,
                       help="tokens that prompt lookup guesses a step; changes no answer (default: none)")  # fmt: skip

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--queue",
        metavar="N",
        type=whole(0, 1_000_000),
        default=64,
        help="requests that wait for a row (default: %(default)s); others get 429",
    )
    limits.add_argument(
        "--queue-seconds",
        metavar="S",
        type=real(0.01, 86_400),
        default=60.0,
        help="that one waits; then it gets 503 (default: 60)",
    )
    limits.add_argument("--max-body", metavar="BYTES", type=count, default=1 << 20, help="of a call (default: %(default)s)")
    limits.add_argument("--max-prompt", metavar="N", type=count, help="tokens of a prompt (default: what the model takes)")
    limits.add_argument(
        "--max-tokens", metavar="N", type=count, help="tokens of an answer (default: what the model has room for)"
    )
    limits.add_argument(
        "--drain-seconds",
        metavar="S",
        type=real(0, 86_400),
        default=60.0,
        help="that answers have to end after SIGTERM (default: 60)",
    )

    running = parser.add_argument_group("where and how it runs")
    running.add_argument("--runtime", choices=["auto", "engine", "cuda", "cpu"], default="auto",
                         help="auto: the engine, else onnxruntime on CUDA, else on the CPU, whichever can run here")  # fmt: skip
    running.add_argument("--checkpoint", metavar="DIR", type=Path, help="whose tokenizer is used (default: the exported one)")
    return parser.parse_args(arguments)
