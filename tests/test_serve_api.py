"""suture serve: OpenAI's own client against it, its errors, limits and metrics."""

import json
import re
import threading

import openai
import pytest
from serving import LETTERS, Lettered, greedy, served, wait

from suture.serve.app import Limits

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def server():
    with served(rows=3) as running:
        yield running


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_completions(client):
    done = client.completions.create(model="small", prompt=PROMPT, max_tokens=12, temperature=0)
    (choice,) = done.choices
    assert choice.text == greedy(PROMPT, 12)
    assert choice.finish_reason == "length"
    assert done.usage.prompt_tokens == len(PROMPT)
    assert done.usage.completion_tokens == 12
    assert done.usage.total_tokens == len(PROMPT) + 12
    assert done.id.startswith("cmpl-")
    again = client.completions.create(model="small", prompt=PROMPT, max_tokens=12, temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens == len(PROMPT) - 1
    assert again.choices[0].text == choice.text


def test_completions_of_several_prompts_and_of_tokens(client):
    prompts = [PROMPT, "another one", PROMPT[:5]]
    done = client.completions.create(model="small", prompt=prompts, max_tokens=5, temperature=0)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert [choice.text for choice in done.choices] == [greedy(prompt, 5) for prompt in prompts]
    ids = client.completions.create(
        model="small", prompt=[Lettered().encode(each) for each in prompts], max_tokens=5, temperature=0
    )
    assert [choice.text for choice in ids.choices] == [choice.text for choice in done.choices]
    drawn = client.completions.create(model="small", prompt=[PROMPT, PROMPT], max_tokens=20, seed=1)
    assert drawn.choices[0].text != drawn.choices[1].text


def test_a_stream_has_the_same_text(client):
    parts = list(client.completions.create(model="small", prompt=PROMPT, max_tokens=12, temperature=0, stream=True,
                                           stream_options={"include_usage": True}))  # fmt: skip
    assert "".join(part.choices[0].text for part in parts if part.choices) == greedy(PROMPT, 12)
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert len({part.id for part in parts}) == 1
    assert parts[-1].choices == []
    assert parts[-1].usage.completion_tokens == 12
    assert all(part.usage is None for part in parts[:-1])


def test_chat(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    prompt = "system: Be brief.\nuser: hello\n"
    done = client.chat.completions.create(model="small", messages=messages, max_completion_tokens=9, temperature=0)
    assert done.choices[0].message.content == greedy(prompt, 9).partition(LETTERS[-1])[0]
    assert done.choices[0].message.role == "assistant"
    parts = list(client.chat.completions.create(model="small", messages=messages, max_tokens=9, temperature=0, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == done.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == done.choices[0].finish_reason
    whole = client.chat.completions.create(model="small", messages=messages, temperature=0)
    assert whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage.total_tokens <= 97


def test_what_ends_an_answer(client):
    text = greedy(PROMPT, 20)
    done = client.completions.create(model="small", prompt=PROMPT, max_tokens=20, temperature=0, stop=["never", text[4:6]])
    assert done.choices[0].text == text[: text.index(text[4:6])]
    assert done.choices[0].finish_reason == "stop"
    token = LETTERS.index(text[3])
    done = client.completions.create(
        model="small", prompt=PROMPT, max_tokens=20, temperature=0, extra_body={"stop_token_ids": [token]}
    )
    assert done.choices[0].text == text[: text.index(text[3])]


def test_sampling_a_request(client):
    def text(**options) -> str:
        return client.completions.create(model="small", prompt=PROMPT, max_tokens=20, **options).choices[0].text

    assert text(seed=5) == text(seed=5)
    assert len({text(seed=seed) for seed in range(4)}) > 1
    assert text(seed=5, extra_body={"top_k": 1}) == text(temperature=0) == greedy(PROMPT, 20)
    assert text(temperature=0, logit_bias={LETTERS.index("q"): 100}) == "q" * 20
    assert len(set(text(temperature=0, frequency_penalty=2.0, presence_penalty=2.0))) > len(set(text(temperature=0)))


def test_logprobs(client):
    done = client.completions.create(model="small", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2)
    told = done.choices[0].logprobs
    assert "".join(told.tokens) == done.choices[0].text
    assert told.text_offset == [0, 1, 2, 3]
    assert all(len(each) == 2 and max(each.values()) == value for each, value in zip(told.top_logprobs, told.token_logprobs))
    message = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(
        model="small", messages=message, max_tokens=3, temperature=0, logprobs=True, top_logprobs=3
    )
    entries = chat.choices[0].logprobs.content
    assert len(entries) == chat.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token for entry in entries)
    assert entries[0].bytes == list(entries[0].token.encode())


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.model_dump()["max_model_len"]) == ("small", 96)
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="other"):
        client.models.retrieve("other")


GOOD = {"model": "small", "prompt": "a"}
CHAT = {"model": "small", "messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("completions", {**GOOD, "n": 2}, 400, "n is not supported"),
        ("completions", {**GOOD, "n": True}, 400, "n is not supported"),
        ("completions", {**GOOD, "echo": True}, 400, "echo"),
        ("completions", {**GOOD, "surprise": 1}, 400, "surprise is not known here"),
        ("completions", {**GOOD, "temperature": "1"}, 400, "temperature"),
        ("completions", {**GOOD, "temperature": 3}, 400, "temperature"),
        ("completions", {**GOOD, "top_p": 0}, 400, "top_p"),
        ("completions", {**GOOD, "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {**GOOD, "max_tokens": 1.5}, 400, "max_tokens"),
        ("completions", {**GOOD, "max_tokens": 1000}, 400, "room for 96"),
        ("completions", {**GOOD, "prompt": ""}, 400, "the prompt is empty"),
        ("completions", {**GOOD, "prompt": "a" * 97}, 400, "97 tokens, and 96 is the most"),
        ("completions", {**GOOD, "prompt": [64]}, 400, "64 is no token"),
        ("completions", {**GOOD, "prompt": [-1]}, 400, "prompt"),
        ("completions", {**GOOD, "prompt": {"a": 1}}, 400, "prompt"),
        ("completions", {**GOOD, "prompt": []}, 400, "prompt"),
        ("completions", {**GOOD, "prompt": ["a"] * 65}, 400, "prompt"),
        ("completions", {**GOOD, "prompt": "\ud800"}, 400, "lone surrogate"),
        ("completions", {**GOOD, "stop": ""}, 400, "stop"),
        ("completions", {**GOOD, "stop": ["a"] * 5}, 400, "stop"),
        ("completions", {**GOOD, "logit_bias": {"x": 1}}, 400, "'x' is not a token"),
        ("completions", {**GOOD, "logit_bias": {"64": 1}}, 400, "'64' is not a token"),
        ("completions", {**GOOD, "logprobs": 6}, 400, "logprobs"),
        ("completions", {**GOOD, "model": "other"}, 404, "other"),
        ("completions", {"prompt": "a"}, 400, "model"),
        ("chat/completions", {**CHAT, "messages": []}, 400, "messages"),
        ("chat/completions", {**CHAT, "messages": [{"role": "tool", "content": "a"}]}, 400, "role"),
        ("chat/completions", {**CHAT, "messages": [{"role": "assistant", "content": "a"}]}, 400, "the user has to be last"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs goes with logprobs"),
        ("chat/completions", {**CHAT, "max_tokens": 1, "max_completion_tokens": 1}, 400, "not both"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, 400, "llguidance"),
        ("chat/completions", {**CHAT, "response_format": {"type": "xml"}}, 400, "response_format"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_with_its_name(server, path, body, status, says):
    found, answer = server.ask(f"/v1/{path}", body)
    error = json.loads(answer)["error"]
    assert (found, error.keys()) == (status, {"message", "type", "param", "code"})
    assert says in error["message"]
    assert "\n" not in error["message"]


def test_what_changes_nothing_is_taken(client, server):
    status, _ = server.ask("/v1/chat/completions", {**CHAT, "max_tokens": 2, "user": "me", "metadata": {}, "n": 1, "tools": [],
                                                    "store": False, "tool_choice": "none", "response_format": {"type": "text"}})  # fmt: skip
    assert status == 200


def test_no_path_and_no_method_are_errors_of_the_same_form(server):
    for path, body, status in (("/v1/nothing", None, 404), ("/v1/completions", None, 405)):
        found, answer = server.ask(path, body)
        assert (found, json.loads(answer)["error"]["type"]) == (
            status,
            "not_found_error" if status == 404 else "invalid_request_error",
        )


def test_a_key_is_asked_for():
    with served(api_key="secret") as server:
        assert server.get("/health")[0] == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert server.ask("/v1/models", headers=headers)[0] == 401
        assert server.ask("/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


def test_limits():
    limits = Limits(body=200, prompt=10, max_tokens=5)
    with served(limits=limits) as server:
        assert server.ask("/v1/completions", {**GOOD, "prompt": "a" * 500})[0] == 413
        assert server.ask("/v1/completions", {**GOOD, "prompt": "a" * 11})[0] == 400
        status, answer = server.ask("/v1/completions", {**GOOD, "max_tokens": 6})
        assert (status, "5 is the most" in json.loads(answer)["error"]["message"]) == (400, True)
        status, answer = server.ask("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": ""}]})
        assert (status, json.loads(answer)["usage"]["completion_tokens"] <= 5) == (200, True)


def test_a_full_queue_and_time_in_it():
    """One row, a place in the queue, and answers that take long."""
    with served(rows=1, queue=1, pace=0.05, limits=Limits(queue_seconds=1.5)) as server:
        long, statuses = {**GOOD, "max_tokens": 90}, []

        def ask() -> None:
            statuses.append(server.ask("/v1/completions", long))

        threads = [threading.Thread(target=ask)]
        threads[0].start()
        wait(lambda: server.worker.scheduler.rows.used)
        threads.append(threading.Thread(target=ask))
        threads[1].start()
        wait(lambda: server.worker.scheduler.waiting)
        status, answer = server.ask("/v1/completions", long)
        assert (status, json.loads(answer)["error"]["code"]) == (429, "queue_full")
        with pytest.raises(openai.RateLimitError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0).completions.create(**long)
        for thread in threads:
            thread.join()
        assert sorted(status for status, _ in statuses) == [200, 503]
        assert "no row has become free in 1.5 seconds" in str(statuses)
        page = server.get("/metrics")[1].decode()
        assert 'suture:request_refused_total{model_name="small",status="429"} 2.0' in page


def test_a_client_that_leaves_frees_its_row():
    with served(rows=1, pace=0.02) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x")
        stream = client.completions.create(model="small", prompt="a", max_tokens=90, stream=True)
        next(iter(stream))
        stream.close()
        wait(lambda: not server.worker.scheduler.rows.used, 10)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3, max_retries=0).completions.create(model="small", prompt="a", max_tokens=90)
        wait(lambda: not server.worker.scheduler.rows.used, 10)
        wait(lambda: sum(line.get("gone", False) for line in server.lines()) == 2)
        assert 'request_success_total{finished_reason="cancelled",model_name="small"} 2.0' in server.get("/metrics")[1].decode()
        assert server.worker.idle


def test_health_while_draining():
    with served(rows=1, pace=0.02) as server:
        client, parts = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0), []
        stream = iter(client.completions.create(model="small", prompt="a", max_tokens=40, temperature=0, stream=True))
        parts.append(next(stream))
        server.worker.drain()
        assert server.get("/health") == (503, b'{"status":"draining"}')
        status, answer = server.ask("/v1/completions", GOOD)
        assert (status, json.loads(answer)["error"]["message"]) == (503, "the server is draining")
        parts.extend(stream)
        assert "".join(part.choices[0].text for part in parts) == greedy("a", 40)


def test_a_fault_of_the_scheduler_ends_all_answers():
    with served(pace=0.02) as server:
        stream = server.worker.scheduler
        stream.decoder.decode = lambda *arguments: 1 / 0
        status, answer = server.ask("/v1/completions", GOOD)
        assert (status, "the answer was failed" in json.loads(answer)["error"]["message"]) == (500, True)
        wait(lambda: isinstance(server.worker.fault, ZeroDivisionError))


def test_metrics_and_log(server, client):
    done = client.completions.create(
        model="small", prompt="counted once", max_tokens=3, temperature=0, extra_headers={"X-Request-Id": "mine-1"}
    )
    page = server.get("/metrics")[1].decode()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
                 "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_bucket",
                 "inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_bucket", "request_queue_time_seconds_bucket"):  # fmt: skip
        assert re.search(rf'^suture:{name}{{.*model_name="small".*}} \d', page, re.MULTILINE), name
    line = next(line for line in server.lines() if line["request_id"] == "mine-1")
    assert line["status"] == 200
    assert line["finish"] == ["length"]
    assert line["completion_tokens"] == done.usage.completion_tokens == 3
    assert not any("counted once" in text for text in map(str, server.lines()))  # nobody's prompt is in a log
