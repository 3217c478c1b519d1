"""A real server in a thread of the tests, with a small random model."""

from __future__ import annotations

import codecs
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
from chat.models import random_model

from minimind.chat.engine import Engine
from minimind.chat.inference import InferenceModel
from minimind.config import ModelConfig
from minimind.server.answers import Served
from minimind.server.app import Service, create_app
from minimind.server.cli import bind
from minimind.server.connection import Server
from minimind.server.static import PAGE
from minimind.tokenizer import Tokenizer

ASK = [{"role": "user", "content": "你好"}]
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
CONFIG = ModelConfig(hidden_size=64, num_hidden_layers=2)
TOKENIZER = Tokenizer.load()


def served(
    name: str = "minimind", stage: str = "full_sft", rows: int = 4, max_length: int = 256, seed: int = 0
):
    engine = Engine(InferenceModel(random_model(CONFIG, seed), "fp32"), rows, max_length)
    adapter = name.partition(":")[2] or None
    return Served(name, stage, adapter, 0, engine)


class Live:
    """The addresses of a running server, and clients for it."""

    def __init__(self, port: int, service: Service, key: str | None) -> None:
        self.port, self.service = port, service
        self.url = f"http://127.0.0.1:{port}"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0, timeout=60
        )

    def metric(self, name: str, model: str = "minimind") -> float:
        return self.service.metrics.registry.get_sample_value(f"minimind_{name}", {"model": model}) or 0.0

    def eventually(self, name: str, value: float) -> bool:
        """Whether a metric takes a value, within some time."""
        return eventually(lambda: self.metric(name) == value)

    def chat(self, messages=ASK, **more):
        """By OpenAI's client."""
        fixed = {"model": "minimind", "messages": messages, "max_tokens": 24, "seed": 5}
        return self.openai.chat.completions.create(**fixed | more)


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def chat_ids(messages) -> list[int]:
    return TOKENIZER.encode_chat(messages, add_generation_prompt=True)[0]


def shown(tokens: Iterable[int]) -> str:
    """The text of an answer's whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(b"".join(TOKENIZER.token_bytes[token] for token in tokens))


@contextmanager
def running(
    models: Sequence[Served] | None = None,
    queue: int = 64,
    key: str | None = None,
    page: Path = PAGE,
    on_failure: Callable[[], None] = lambda: None,
) -> Iterator[Live]:
    ready = threading.Event()
    service = Service(models or [served()], TOKENIZER, queue, on_failure)
    app = create_app(service, key, page, on_ready=ready.set)
    server = Server(app, 5, service.scheduler.give_up)
    with bind("127.0.0.1", 0, key) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert ready.wait(30)
            live = Live(listener.getsockname()[1], service, key)
            with live.http, live.openai:
                yield live
        finally:
            server.should_exit = True
            thread.join()
