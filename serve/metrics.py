"""What /metrics tells, under the names that vLLM's dashboards read, with a prefix of our own."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from suture.serve.worker import Answer, Worker

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKENS = tuple(1 << power for power in range(18))


class Metrics:
    def __init__(self, model: str, worker: Worker):
        self.registry, self.model, self.worker = CollectorRegistry(), model, worker
        self.running = self._gauge("num_requests_running", "Requests that have a row", lambda s: len(s.rows.used))
        self.waiting = self._gauge("num_requests_waiting", "Requests in the queue", lambda s: len(s.waiting))
        self.cache = self._gauge(
            "kv_cache_usage_perc", "Share of rows that a request has", lambda s: len(s.rows.used) / len(s.rows.rows)
        )
        self.prompt = self._made(Counter, "prompt_tokens", "Tokens of prompts")
        self.written = self._made(Counter, "generation_tokens", "Tokens of answers")
        self.queries = self._made(Counter, "prefix_cache_queries", "Tokens of prompts that the cache was asked for")
        self.hits = self._made(Counter, "prefix_cache_hits", "Tokens of prompts that the cache held")
        self.ended = Counter(
            "suture:request_success", "Answers by their end", ["model_name", "finished_reason"], registry=self.registry
        )
        self.refused = Counter(
            "suture:request_refused", "Calls by the status that they got", ["model_name", "status"], registry=self.registry
        )
        self.first = self._made(Histogram, "time_to_first_token_seconds", "From call to first token", SECONDS)
        self.between = self._made(Histogram, "inter_token_latency_seconds", "Mean time between an answer's tokens", SECONDS)
        self.whole = self._made(Histogram, "e2e_request_latency_seconds", "From call to end", SECONDS)
        self.queued = self._made(Histogram, "request_queue_time_seconds", "From call to row", SECONDS)
        self.asked = self._made(Histogram, "request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self.given = self._made(Histogram, "request_generation_tokens", "Tokens of an answer", TOKENS)

    def page(self) -> bytes:
        return generate_latest(self.registry)

    def answered(self, answers: Sequence[Answer], now: float) -> None:
        """Each of them has ended, or has been given up."""
        for answer in answers:
            request = answer.request
            self.ended.labels(self.model, request.finish or "cancelled").inc()
            self.prompt.inc(len(request.prompt))
            self.queries.inc(len(request.prompt))
            self.hits.inc(request.reused)
            self.written.inc(answer.tokens)
            self.asked.observe(len(request.prompt))
            self.given.observe(answer.tokens)
            self.whole.observe(now - answer.asked)
            if request.began is not None:
                self.queued.observe(max(request.began - answer.asked, 0))
            if answer.first is not None:
                self.first.observe(answer.first - answer.asked)
            if answer.tokens > 1:
                self.between.observe((now - answer.first) / (answer.tokens - 1))

    def turned_away(self, status: int) -> None:
        self.refused.labels(self.model, str(status)).inc()

    def _made(self, kind, name: str, what: str, buckets: Sequence[float] = ()):
        more = {"buckets": buckets} if buckets else {}
        return kind(f"suture:{name}", what, ["model_name"], registry=self.registry, **more).labels(self.model)

    def _gauge(self, name: str, what: str, value) -> Gauge:
        gauge = self._made(Gauge, name, what)
        gauge.set_function(lambda: value(self.worker.scheduler) if self.worker.scheduler else 0)
        return gauge
