"""Hostile and faulty calls to the server: what is sent, and the statuses that it may be answered with.

After each of them the server answers as before, and no row, place in the queue or thread is left behind.
"""

import json
import random

GOOD = {"model": "small", "prompt": "a", "max_tokens": 2, "temperature": 0}


def body(**changes: object) -> bytes:
    return json.dumps(GOOD | changes).encode()


def raw(text: str) -> bytes:
    """The good body with its prompt replaced by this text."""
    return body(prompt="@").replace(b'"@"', text.encode("utf-8", "surrogatepass"))


def posted(content: bytes, path: str = "/v1/completions", length: object = None, more: str = "") -> bytes:
    """A whole HTTP call."""
    size = len(content) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n{more}\r\n"
    return head.encode() + content


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: a\r\n\r\n"


BODIES = {  # as the body of a completion
    "nothing": b"", "a list": b"[]", "a number": b"1", "null": b"null", "a string": b'"a"', "half": body()[:-9], "twice": body() * 2,
    "deep lists": b"[" * 100_000, "deep objects": b'{"a":' * 50_000, "deep prompt": raw("[" * 200 + "]" * 200),
    "no UTF-8": body().replace(b'"a"', b'"\xff\xfe"'), "UTF-16": body().decode().encode("utf-16"), "a NUL": b"\0" + body(),
    "a key twice": body()[:-1] + b', "max_tokens": 1}', "NaN": raw('"a", "temperature": NaN'), "infinity": raw('"a", "top_p": Infinity'),
    "a number beyond floats": raw('"a", "top_p": 1e999'), "a number of 5000 digits": raw('"a", "seed": ' + "9" * 5000),
    "a negative seed beyond 64 bits": body(seed=-(2**63) - 1), "half a token": body(max_tokens=1.5), "true tokens": body(max_tokens=True),
    "tokens as text": body(max_tokens="2"), "no tokens": body(max_tokens=0), "2**63 tokens": body(max_tokens=2**63),
    "a negative temperature": body(temperature=-0.1), "a bias on no token": body(logit_bias={"-1": 1}),
    "a bias on an Arabic digit": body(logit_bias={"\u0661": 1}), "a bias of 1e9": body(logit_bias={"1": 1e9}),
    "many biases": body(logit_bias={str(i): 1 for i in range(5000)}), "biases in a list": body(logit_bias=[1]),
    "a prompt of objects": body(prompt=[{}]), "prompts of two kinds": body(prompt=["a", 1]), "a token as text": body(prompt=["a", [1]]),
    "true as a token": body(prompt=[True]), "a negative token": body(prompt=[-1]), "a token beyond": body(prompt=[2**40]),
    "an empty prompt among others": body(prompt=["a", ""]), "many prompts": body(prompt=["a"] * 10_000), "a prompt of null": body(prompt=None),
    "a lone surrogate": raw('"\\ud800"'), "a long prompt": body(prompt="a" * 900_000), "too long a body": body(prompt="a" * 2_000_000),
    "many stops": body(stop=["a"] * 1000), "a long stop": body(stop="a" * 100_000), "an empty stop": body(stop=[""]),
    "a stop of numbers": body(stop=[1]), "another model": body(model="../small"), "a model of a NUL": body(model="\0"),
    "a long model": body(model="m" * 100_000), "a model of null": body(model=None), "an unknown field": body(__class__="x"),
    "many unknown fields": body(**{f"f{i}": i for i in range(10_000)}), "a long field": body(**{"f" * 100_000: 1}),
    "n of a million": body(n=1_000_000), "best of many": body(best_of=50), "tools": body(tools=[{}]), "echo": body(echo=True),
    "a schema that refers to itself": body(response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}),
    "a schema of an address": body(response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1/"}}}),
    "a schema of text": body(response_format={"type": "json_schema", "json_schema": {"schema": "x"}}),
    "stream as text": body(stream="yes"), "options of a stream": body(stream_options={"include_usage": "x"}),
    "many logprobs": body(logprobs=10**6), "logprobs as text": body(logprobs="5"), "top k of -2": body(top_k=-2), "min p of 2": body(min_p=2),
    "penalty of 0": body(repetition_penalty=0), "penalty of 1e9": body(frequency_penalty=1e9),
    "stop tokens as text": body(stop_token_ids=["a"]),
}  # fmt: skip
CALLS = {  # whole calls
    "no HTTP": b"\0\1\2\3\r\n\r\n",
    "half a head": b"POST /v1/completions HTT",
    "no length": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n{}",
    "a negative length": posted(body(), length=-1),
    "a length as text": posted(body(), length="ten"),
    "more length than body": posted(body(), length=10_000),
    "less length than body": posted(body(), length=5),
    "two lengths": posted(body(), more="Content-Length: 3\r\n"),
    "length and chunks": posted(body(), more="Transfer-Encoding: chunked\r\n"),
    "endless chunks": CHUNKED + (b"10000\r\n" + b"a" * 65536 + b"\r\n") * 40,
    "a chunk of no size": CHUNKED + b"zz\r\n",
    "a long header": posted(body(), more=f"X-Long: {'a' * 200_000}\r\n"),
    "many headers": posted(body(), more="".join(f"X-{i}: a\r\n" for i in range(5000))),
    "a long path": posted(body(), path="/" + "a" * 100_000),
    "a path above": posted(body(), path="/v1/../../etc/passwd"),
    "a path of percents": posted(body(), path="/%00%ff%2e%2e"),
    "another method": b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "a line in the request's id": posted(body(), more='X-Request-Id: a"},{"b\r\n'),
    "a key of other letters": posted(body(), more="Authorization: Bearer \xe9\r\n"),
    "an upgrade": UPGRADE,
    "HTTP 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("1603010200010001fc0303"),
    "noise": random.Random(0).randbytes(5000),
}
