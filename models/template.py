"""A checkpoint's chat template, rendered in a child process with limits of time, memory and length: it is a program that
others wrote, and may loop or grow."""

import json
import select
import subprocess
import sys
from pathlib import Path

from suture.core.errors import UserError
from suture.models.template_child import LONGEST, SECONDS

CHILD = Path(__file__).with_name("template_child.py")
STARTING = 60  # seconds until the child is there, on a machine that is busy
REMEDY = "leave out --chat, or put another template in its tokenizer_config.json"


class Template:
    """`text`: Jinja, from the checkpoint `folder`; `tokens`: the special tokens that it may name."""

    def __init__(self, text: str, tokens: dict[str, str], folder: Path):
        self.text, self.tokens, self.folder = text, tokens, folder
        self._child: subprocess.Popen | None = None

    def render(self, messages: list[dict[str, str]]) -> str:
        """The conversation as text, up to where the assistant begins. Raises ValueError for what the template itself says
        about it, UserError where it does not render within its limits."""
        if self._child is None:
            command = [sys.executable, "-I", str(CHILD)]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self._answer(STARTING)
        asked = {"template": self.text, "messages": messages, "tokens": self.tokens}
        try:
            self._child.stdin.write(json.dumps(asked).encode() + b"\n")
            self._child.stdin.flush()
            answer = self._answer(SECONDS)
        except BrokenPipeError:
            answer = {"broken": "it ended its process"}
        if "said" in answer:
            raise ValueError(f"the chat template says: {answer['said']}")
        if "broken" in answer:
            self.close()
            raise UserError(self.folder, f"its chat template cannot be rendered ({answer['broken']})", REMEDY)
        return answer["text"]

    def _answer(self, seconds: float) -> dict[str, str]:
        ready, _, _ = select.select([self._child.stdout], [], [], seconds)
        line = self._child.stdout.readline(8 * LONGEST) if ready else b""
        return json.loads(line) if line.endswith(b"\n") else {"broken": f"takes more than {seconds} seconds"}

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def __del__(self):
        self.close()
