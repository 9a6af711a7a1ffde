"""OpenAI's API over HTTP: completions, chat, models; health, metrics, and a page to chat with."""

import asyncio
import hmac
import json
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from suture.core.errors import UserError
from suture.generate.prompts import Prompt
from suture.generate.text import TextStream
from suture.serve.bodies import BadCall, Body, ChatBody, CompletionBody, read_body
from suture.serve.engine import QueueFull
from suture.serve.grammar import MakeGrammar
from suture.serve.metrics import Metrics
from suture.serve.replies import DONE, REASONS, ChatReply, Choice, Reply, error, event
from suture.serve.worker import READY, Answers, Ended, Piece, Unavailable, Worker

PAGE = Path(__file__).with_name("page.html")
PAGE_MAY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'self'"
)
RETRY = {429: "1", 503: "5"}  # seconds to wait


@dataclass(frozen=True)
class Limits:
    body: int = 1 << 20  # bytes
    prompt: int | None = None  # tokens of one prompt; the model's own bound holds beside it
    max_tokens: int | None = None  # of one answer
    queue_seconds: float = 60.0  # until a request has a row


@dataclass(frozen=True)
class ServedModel:
    """What is known of the model once it is loaded."""

    tokenizer: object
    longest: int | None  # tokens of prompt and answer
    before: int  # of them that the model puts before a prompt
    vocab: int
    embedded: int  # ids that the table of embeddings has
    grammar: MakeGrammar | None


class Application:
    """`model` is called once the worker is ready."""

    def __init__(self, name: str, worker: Worker, model, limits: Limits, api_key: str | None = None, log=sys.stderr):
        self.name, self.worker, self.model, self.limits, self.api_key, self.log = name, worker, model, limits, api_key, log
        self.metrics, self.created = Metrics(name, worker), int(time.time())
        self.reader = ThreadPoolExecutor(1, "tokenizer")  # one: chat templates are rendered in one child process
        self.starlette = Starlette(routes=[
            Route("/", self.page), Route("/health", self.health), Route("/metrics", self.show_metrics),
            Route("/v1/models", self.guarded(self.models)), Route("/v1/models/{name:path}", self.guarded(self.one_model)),
            Route("/v1/completions", self.guarded(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
        ], exception_handlers={404: self.unknown, 405: self.unknown})  # fmt: skip

    async def page(self, request: HttpRequest) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_MAY})

    async def health(self, request: HttpRequest) -> Response:
        if self.worker.state == READY:
            return Response(status_code=200)
        return JSONResponse({"status": self.worker.state}, 503)

    async def show_metrics(self, request: HttpRequest) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    async def unknown(self, request: HttpRequest, failure) -> Response:
        says = "no such path" if failure.status_code == 404 else "this path takes another method"
        return JSONResponse(error(BadCall(failure.status_code, f"{request.url.path[:200]}: {says}")), failure.status_code)

    async def models(self, request: HttpRequest, told: dict) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, request: HttpRequest, told: dict) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._described())

    async def completions(self, request: HttpRequest, told: dict) -> Response:
        body = await self._body(request, CompletionBody)
        prompts = [await self._ids(prompt, "prompt") for prompt in body.prompts]
        return await self._answer(request, body, prompts, Reply(self.name, self._read), told)

    async def chat(self, request: HttpRequest, told: dict) -> Response:
        body = await self._body(request, ChatBody)
        ids = await self._ids([message.said for message in body.messages], "messages")
        return await self._answer(request, body, [ids], ChatReply(self.name, self._read), told)

    def guarded(self, handle):
        """A handler behind the API key, its errors in OpenAI's form, and a line in the log."""

        async def guard(request: HttpRequest) -> Response:
            given = request.headers.get("x-request-id", "")
            told = {"request_id": given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else secrets.token_hex(8)}
            started, response = time.monotonic(), None
            try:
                self._check_key(request)
                response = await handle(request, told)
            except BadCall as refused:
                response = self._refuse(refused)
            except Unavailable as why:
                response = self._refuse(BadCall(503, f"the server is {why}", code="unavailable"))
            except QueueFull:
                response = self._refuse(BadCall(429, "as many requests wait as may; try again later", code="queue_full"))
            except (ClientDisconnect, asyncio.CancelledError):
                told["gone"] = True
                response = Response(status_code=499)
            except Exception as fault:
                self._say({**told, "fault": f"{type(fault).__name__}: {fault}"[:500]})
                response = self._refuse(BadCall(500, "a fault of the server; its log says more"))
            finally:
                if response is not None and not isinstance(response, StreamingResponse):
                    self._close(request, told, response.status_code, started)
            response.headers["X-Request-Id"] = told["request_id"]
            if isinstance(response, StreamingResponse):
                response.body_iterator = self._closing(response.body_iterator, request, told, started)
            return response

        return guard

    def _check_key(self, request: HttpRequest) -> None:
        if self.api_key is None:
            return
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
            raise BadCall(401, "give the server's API key: Authorization: Bearer KEY", code="invalid_api_key")

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise BadCall(404, f"the model {name[:100]!r} is not here; this is {self.name!r}", "model", "model_not_found")

    async def _body(self, request: HttpRequest, kind: type[Body]) -> Body:
        if self.worker.state != READY:
            raise Unavailable(self.worker.state)
        content = b""
        async for part in request.stream():
            content += part
            if len(content) > self.limits.body:
                raise BadCall(413, f"the body has more than {self.limits.body:,} bytes")
        body = read_body(kind, content)
        self._check_name(body.model)
        return body

    async def _ids(self, prompt: str | list[int] | list[dict], param: str) -> list[int]:
        """The prompt's tokens. Raises BadCall where there are none, too many, or some that the model does not know."""
        model = self.model()
        if prompt and isinstance(prompt, list) and isinstance(prompt[0], int):
            ids = prompt
        else:
            asked = Prompt(param, prompt) if isinstance(prompt, str) else Prompt(param, messages=prompt)
            loop = asyncio.get_running_loop()
            try:
                ids = await loop.run_in_executor(self.reader, asked.ids, model.tokenizer, None)
            except UserError as wrong:
                raise BadCall(400, str(wrong).partition(";")[0], param) from None
        if beyond := [token for token in ids if token >= model.embedded]:
            raise BadCall(400, f"{beyond[0]} is no token of the model's {model.embedded}", param)
        limit = min((each for each in (self.limits.prompt, model.longest) if each is not None), default=None)
        if limit is not None and model.before + len(ids) > limit:
            raise BadCall(400, f"the prompt has {len(ids)} tokens, and {limit} is the most", param, "context_length_exceeded")
        return ids

    def _limit(self, body: Body, prompt: list[int]) -> int:
        """Tokens of the answer."""
        model, asked = self.model(), body.limit
        room = None if model.longest is None else model.longest - model.before - len(prompt) + 1
        most = min((each for each in (self.limits.max_tokens, room) if each is not None), default=1 << 20)
        if asked is None:
            return most
        if self.limits.max_tokens is not None and asked > self.limits.max_tokens:
            raise BadCall(400, f"max_tokens is {asked}, and {self.limits.max_tokens} is the most", "max_tokens")
        if asked > most:
            says = f"max_tokens is {asked}, and behind the prompt's {len(prompt)} tokens there is room for {most}"
            raise BadCall(400, says, "max_tokens", "context_length_exceeded")
        return asked

    def _read(self, token: int) -> str:
        return self.model().tokenizer.decode([token])

    async def _answer(self, request: HttpRequest, body: Body, prompts: list[list[int]], reply: Reply, told: dict) -> Response:
        model, answers = self.model(), Answers(self.worker)
        named = frozenset() if body.ignore_eos else frozenset(model.tokenizer.stop_ids(isinstance(body, ChatBody)))
        ends, sampling = named | frozenset(body.stop_token_ids or ()), body.sampling(model.vocab)
        schema = body.response_format.schema_of_answer if body.response_format else None
        for index, prompt in enumerate(prompts):
            text = TextStream(model.tokenizer.decode, body.stops)
            seeded = sampling if len(prompts) == 1 else replace(sampling, seed=(sampling.seed, index))
            answers.add(prompt, text, ends, self._limit(body, prompt), sampling=seeded, processors=self._processors(schema))
        self.worker.submit(answers.requests)
        told["answers"] = answers
        try:
            first = await self._unless_gone(request, self._first(answers))
            if body.stream:
                return StreamingResponse(self._stream(answers, first, body, reply), media_type="text/event-stream",
                                         headers={"Cache-Control": "no-store"})  # fmt: skip
            return await self._unless_gone(request, self._whole(answers, first, body, reply))
        except BaseException:
            answers.cancel()
            raise

    def _processors(self, schema: dict | None) -> list:
        if schema is None:
            return []
        if self.model().grammar is None:
            raise BadCall(400, "response_format needs llguidance, which is not installed here", "response_format")
        try:
            return [self.model().grammar(schema)]
        except ValueError as wrong:
            raise BadCall(400, f"the schema is not one that can be followed: {wrong}"[:300], "response_format") from None

    async def _first(self, answers: Answers) -> Piece | Ended:
        """The first event. Raises BadCall where no row has become free in time."""
        try:
            return await asyncio.wait_for(answers.events.get(), self.limits.queue_seconds)
        except TimeoutError:
            if any(request.began is not None for request in answers.requests):
                return await answers.events.get()
            raise BadCall(
                503, f"no row has become free in {self.limits.queue_seconds:g} seconds", code="queue_timeout"
            ) from None

    async def _unless_gone(self, request: HttpRequest, wanted: Awaitable):
        """What is wanted, unless the client leaves before: then ClientDisconnect."""
        task, gone = asyncio.ensure_future(wanted), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            task.cancel()
            gone.cancel()

    async def _events(self, answers: Answers, first: Piece | Ended) -> AsyncIterator[Piece | Ended]:
        """All of them. Raises BadCall where an answer fails."""
        left, happened = len(answers.answers), first
        while True:
            if isinstance(happened, Ended) and happened.why not in REASONS:
                fault = next(answers.faults(), None)
                raise BadCall(500, f"the answer failed: {fault}"[:300] if fault else f"the answer was {happened.why}")
            yield happened
            left -= isinstance(happened, Ended)
            if not left:
                return
            happened = await answers.events.get()

    async def _whole(self, answers: Answers, first: Piece | Ended, body: Body, reply: Reply) -> Response:
        choices = [Choice(answer.index) for answer in answers.answers]
        async for happened in self._events(answers, first):
            if isinstance(happened, Ended):
                choices[happened.index].finish = happened.why
            else:
                choices[happened.index].add(happened)
        return JSONResponse(reply.complete(choices, body.likeliest is not None, answers.usage))

    async def _stream(self, answers: Answers, first: Piece | Ended, body: Body, reply: Reply) -> AsyncIterator[bytes]:
        try:
            for answer in answers.answers:
                if opening := reply.opening(answer.index):
                    yield opening
            async for happened in self._events(answers, first):
                if isinstance(happened, Ended):
                    yield reply.end(happened.index, happened.why, body.usage)
                elif said := reply.piece(happened, body.likeliest is not None, body.usage):
                    yield said
            if body.usage:
                yield reply.usage(answers.usage)
            yield DONE
        except BadCall as refused:  # too late for a status
            yield event(error(refused))
        finally:
            answers.cancel()

    async def _closing(
        self, parts: AsyncIterator[bytes], request: HttpRequest, told: dict, started: float
    ) -> AsyncIterator[bytes]:
        try:
            async for part in parts:
                yield part
        except (GeneratorExit, asyncio.CancelledError):
            told["gone"] = True
            raise
        finally:
            await parts.aclose()
            self._close(request, told, 200, started)

    def _close(self, request: HttpRequest, told: dict, status: int, started: float) -> None:
        """Counts the call, and writes its line."""
        answers = told.pop("answers", None)
        line = {**told, "method": request.method, "path": request.url.path[:200], "status": status,
                "seconds": round(time.monotonic() - started, 4)}  # fmt: skip
        if answers is not None:
            self.metrics.answered(answers.answers, time.monotonic())
            usage = answers.usage
            line |= {"prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"],
                     "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                     "finish": [answer.request.finish for answer in answers.answers]}  # fmt: skip
        if status >= 400:
            self.metrics.turned_away(status)
        self._say(line)

    def _refuse(self, refused: BadCall) -> Response:
        headers = {"Retry-After": RETRY[refused.status]} if refused.status in RETRY else {}
        if refused.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error(refused), refused.status, headers)

    def _described(self) -> dict:
        longest = self.model().longest if self.worker.state == READY else None
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "suture", "max_model_len": longest}

    def _say(self, line: dict) -> None:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        print(json.dumps({"time": when, **line}), file=self.log, flush=True)


async def _left(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
