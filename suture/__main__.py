"""The `suture` command: suture COMMAND ...; each command is a module with `main(arguments, prog)` and takes --help itself."""

import importlib
import sys
from collections.abc import Callable

from suture import __version__
from suture.core.command import CommandParser, run

COMMANDS = {  # name: module, what it does
    "run": ("suture.pipeline", "a checkpoint to a TensorRT engine, every step checked"),
    "export": ("suture.export.__main__", "a checkpoint to ONNX with the KV cache as inputs and outputs"),
    "surgery": ("suture.surgery.__main__", "an ONNX file to the portable and the lowered graph"),
    "build": ("suture.build.__main__", "the lowered graph to a TensorRT engine"),
    "validate": ("suture.validate.__main__", "each step's result against the one before"),
    "generate": ("suture.generate.__main__", "text from a pipeline's folder"),
    "serve": ("suture.serve.__main__", "a pipeline's folder behind OpenAI's API over HTTP"),
    "check": ("suture.validate.check_command", "what TensorRT's parser drops, misreads or refuses of any ONNX file"),
    "compare": ("suture.validate.compare_command", "two graphs down to the first difference, or two reports"),
    "convert": ("suture.models.convert", "a published pickle (.pth, .bin, .ckpt) to safetensors"),
}
RESULT_ON_STDOUT = ("generate",)  # done when nobody reads it any more


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        run(name, lambda: _command(name)(arguments, f"suture {name}"), result_on_stdout=name in RESULT_ON_STDOUT)
    run("suture", lambda: _about(name), result_on_stdout=True)


def _about(name: str) -> None:
    listed = "\n".join(f"  {name:10} {what}" for name, (_, what) in COMMANDS.items())
    if name in ("-h", "--help"):
        print(f"usage: suture COMMAND ...\n\n{listed}\n\nsuture COMMAND --help says what each takes.")
    elif name == "--version":
        print(f"suture {__version__}")
    else:
        CommandParser(prog="suture").error(f"no command {name}; choose from {', '.join(COMMANDS)}")


def _command(name: str) -> Callable[[list[str], str], int]:
    return importlib.import_module(COMMANDS[name][0]).main


if __name__ == "__main__":
    main()
