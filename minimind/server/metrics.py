"""What Prometheus may ask for at /metrics. Nothing in it comes from what users write."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from minimind.server.scheduler import Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters and clocks of one server; `of` has those of each model."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "minimind_requests", "Requests by path and status", ("path", "status"), registry=self.registry
        )

        def make(kind: type[MetricWrapperBase], name: str, text: str, **more) -> Callable:
            return kind(f"minimind_{name}", text, ("model",), registry=self.registry, **more).labels

        families = {
            "prompt_tokens": make(Counter, "prompt_tokens", "Tokens of prompts"),
            "answer_tokens": make(Counter, "answer_tokens", "Tokens drawn"),
            "cancelled": make(Counter, "answers_cancelled", "Answers whose client left before their end"),
            "first_token": make(
                Histogram, "time_to_first_token_seconds", "From request to first token", buckets=SECONDS
            ),
            "answer": make(
                Histogram, "answer_seconds", "From request to the end of an answer", buckets=SECONDS
            ),
        }
        running = make(Gauge, "answers_running", "Answers that share steps now")
        waiting = make(Gauge, "answers_waiting", "Answers in line for a row")
        self.of = {model: ModelMetrics(model, families) for model in scheduler.engines}
        for model, engine in scheduler.engines.items():
            running(model).set_function(lambda engine=engine: len(engine.running))
            waiting(model).set_function(lambda model=model: scheduler.waiting(model))


class ModelMetrics:
    """One model's, looked up once."""

    def __init__(self, model: str, families: dict[str, Callable]) -> None:
        self.prompt_tokens: Counter = families["prompt_tokens"](model)
        self.answer_tokens: Counter = families["answer_tokens"](model)
        self.cancelled: Counter = families["cancelled"](model)
        self.first_token: Histogram = families["first_token"](model)
        self.answer: Histogram = families["answer"](model)
