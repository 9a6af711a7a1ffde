"""Renders chat templates in a process of its own, which may be killed: suture.models.template starts it, and nothing imports it.

A line of JSON comes in, {"template": Jinja, "messages": [...], "tokens": {name: text}}, and one goes out: {"text": ...},
{"said": what the template's raise_exception says} or {"broken": why it cannot be rendered}. The sandbox is the one of
transformers (chat_template_utils.py): no attribute of Python's that begins with "_", no changes to what is passed in.
"""

import json
import resource
import sys
from datetime import datetime

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 << 20  # bytes of address space
SECONDS = 5  # of processor time for a template
LONGEST = 4 << 20  # characters of what it renders to


class Generation(Extension):
    """{% generation %} marks, for training, what the assistant says."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} cannot be stored")
        super().__setitem__(name, value)


class Dict:
    def __call__(self, *items, **named):
        return dict(*items, **named)


class Said(jinja2.TemplateError):
    pass


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout.buffer.write(b"{}\n")  # ready: from here on its time counts
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
        resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS + 1, used + SECONDS + 2))
        sys.stdout.buffer.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


def answer(asked: dict) -> dict[str, str]:
    try:
        return {"text": render(asked["template"], asked["messages"], asked["tokens"])}
    except (Said, jinja2.exceptions.SecurityError) as error:
        return {"said": str(error)}
    except MemoryError:
        return {"broken": f"needs more than {MEMORY >> 20} MB of memory"}
    except Exception as error:  # a template can make anything of its own go wrong
        return {"broken": f"{type(error).__name__}: {error}"[:300]}


def render(template: str, messages: list[dict], tokens: dict[str, str]) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **how: json.dumps(value, ensure_ascii=ensure_ascii, **how)
    environment.globals |= {"raise_exception": _say, "strftime_now": _now, "dict": Dict(), "namespace": Namespace}
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True} | tokens
    pieces, length = [], 0
    for piece in environment.from_string(template).generate(given):
        pieces.append(piece)
        length += len(piece)
        if length > LONGEST:
            raise ValueError(f"it renders to more than {LONGEST:,} characters")
    return "".join(pieces)


def _say(message: object) -> None:
    raise Said(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


if __name__ == "__main__":
    main()
