"""What OpenAI's completions take, checked: a value of another type, or a field that would change the answer and is not supported, is
refused with its name. Fields that change nothing are ignored. Beside OpenAI's there are vLLM's names for sampling.
"""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from suture.core.errors import UserError
from suture.core.reader import parse_json
from suture.serve.request import Sampling

IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store",
    "user",
}  # fmt: skip
NEUTRAL = {  # what may be said, since it says nothing
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": (None, ""), "tools": (None, []), "tool_choice": (None, "none", "auto"),
    "functions": (None, []), "function_call": (None, "none", "auto"), "modalities": (None, ["text"]), "audio": (None,),
}  # fmt: skip
PROMPTS, STOPS, BIASES = 64, 4, 1024

Id = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class BadCall(Exception):
    """What is wrong with a request: an HTTP status, a sentence, the field it is about, and a code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


class CheckedBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(CheckedBody):
    include_usage: bool = False
    include_obfuscation: bool = False  # which only adds padding, and is not added here


class JsonSchema(CheckedBody):
    name: str = "answer"
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(CheckedBody):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else {"type": "object"}

    @model_validator(mode="after")
    def _has_its_schema(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema")
        return self


class Body(CheckedBody):
    """What both kinds of completion take."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=BIASES)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=STOPS)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None

    @property
    def likeliest(self) -> int | None:
        """The tokens whose log-probabilities are told beside the chosen one; None: not even that one's."""
        raise NotImplementedError

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, vocab: int) -> Sampling:
        """Raises BadCall for a bias on what is no token."""
        biases = []
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab):
                raise BadCall(400, f"{token[:20]!r} is not a token's id below {vocab}", "logit_bias")
            biases.append((int(token), bias))
        return Sampling(
            temperature=1.0 if self.temperature is None else max(self.temperature, 1e-3) if self.temperature else 0.0,
            top_k=max(self.top_k or 0, 0), top_p=self.top_p or 1.0, min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0, presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0, logit_bias=tuple(biases), logprobs=self.likeliest,
            seed=secrets.randbits(63) if self.seed is None else self.seed % (1 << 64),
        )  # fmt: skip


class CompletionBody(Body):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=PROMPTS)]
        | Annotated[list[Id], Field(min_length=1)]
        | Annotated[list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1, max_length=PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        alone = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if alone else self.prompt


class TextPart(CheckedBody):
    type: Literal["text"]
    text: str


class Message(CheckedBody):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def said(self) -> dict[str, str]:
        """For a chat template, which knows the developer as the system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Body):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _say_one_thing(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        return self

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def read_body(kind: type[Body], content: bytes) -> Body:
    """Raises BadCall."""
    try:
        given = parse_json(content, "the body")
    except UserError as error:
        raise BadCall(400, str(error).partition(";")[0]) from None
    for name, neutral in NEUTRAL.items():
        if name in given and not any(
            given[name] is each or (given[name] == each and type(given[name]) is type(each)) for each in neutral
        ):
            raise BadCall(400, f"{name} is not supported", name, "unsupported_parameter")
    given = {name: value for name, value in given.items() if name not in NEUTRAL and name not in IGNORED}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> BadCall:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "constrained", "function-"))]
    name = place[0][:60] if place else None
    if first["type"] == "extra_forbidden":
        where = ".".join(place)[:100]
        return BadCall(400, f"{where} is not known here, and might change the answer; leave it out", name, "unknown_parameter")
    return BadCall(400, f"{'.'.join(place)[:100]}: {first['msg']}" if place else first["msg"], name)
