"""A server that keeps the contract of `minimind.server.app` and gives the answers that a test writes.

`python -m tests.server.stub` serves the chat page with an answer of every kind, for looking at it.
"""

from __future__ import annotations

import json
import mimetypes
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

from minimind.paths import PACKAGE

PAGE = PACKAGE / "server/page"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)


def model(name: str, stage: str, adapter: str | None = None, reasoning: bool = False) -> dict[str, Any]:
    facts = {"stage": stage, "adapter": adapter, "max_length": 2048, "reasoning": reasoning}
    return {"id": name, "object": "model", "created": 0, "owned_by": "minimind", "minimind": facts}


MODELS = [
    model("minimind", "full_sft"),
    model("minimind:lora_medical", "full_sft", "lora_medical"),
    model("minimind:lora_identity", "full_sft", "lora_identity"),
]


@dataclass
class Answer:
    """What the stub says to one request.

    Attributes:
        content, thinking: the pieces of the answer and of its reasoning, which comes first.
        pause: seconds before each piece.
        hold: the stream waits for this before its last piece, so that a test can look at what is there.
        finish: the reason in the last chunk; None: the stream breaks off before it.
        raw: bytes to send in place of all that.
        prompt: tokens that the prompt is said to have taken.
        status, error, code, headers: answer with an error of this status and message.
    """

    content: list[str] = field(default_factory=lambda: ["你好", "，我是", " MiniMind。"])
    thinking: list[str] = field(default_factory=list)
    pause: float = 0.0
    hold: Event | None = None
    finish: str | None = "stop"
    raw: bytes | None = None
    status: int = 200
    prompt: int = 24
    error: str = ""
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def chunks(self, continues: bool = False) -> Iterator[dict[str, Any]]:
        """Args: continues: a text, by /v1/completions."""
        pieces = [{"reasoning_content": text} for text in self.thinking]
        pieces += [{"content": text} for text in self.content]
        if not continues:
            yield delta({"role": "assistant", "content": ""})
        for index, piece in enumerate(pieces):
            time.sleep(self.pause)
            if self.hold and index == len(pieces) - 1:
                self.hold.wait(30)
            yield text_chunk(piece["content"]) if continues else delta(piece)
        if self.finish:
            yield delta({}, self.finish)
            total = self.prompt + len(pieces)
            usage = {"prompt_tokens": self.prompt, "completion_tokens": len(pieces), "total_tokens": total}
            yield {**delta({}), "choices": [], "usage": usage}


def delta(change: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": change, "finish_reason": finish}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "minimind"}
    return {**head, "choices": [choice]}


def text_chunk(text: str) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": None}
    return {**delta({}), "object": "text_completion", "choices": [choice]}


class Stub:
    """The server, in threads of this process. Tests set `answers`; the last one is given again and again."""

    def __init__(self, port: int = 0) -> None:
        self.answers = [Answer()]
        self.models = MODELS
        self.key: str | None = None
        self.requests: list[dict[str, Any]] = []  # bodies of /v1/chat/completions and /v1/completions
        self.left = Event()  # set when a client goes away before the end of an answer
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("", (Handler,), {"stub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def next_answer(self) -> Answer:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    stub: Stub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/v1/models":
            if self.allowed():
                self.send_json(200, {"object": "list", "data": self.stub.models})
            return
        name = "index.html" if path == "/" else path.removeprefix("/page/")
        if "/" in name or not (PAGE / name).is_file():
            return self.send_error_json(404, "not found")
        body = (PAGE / name).read_bytes()
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        policy = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff"}
        self.send(
            200, body, {"Content-Type": f"{kind}; charset=utf-8", "Cache-Control": "no-cache", **policy}
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed():
            return
        self.stub.requests.append(json.loads(body))
        answer = self.stub.next_answer()
        if answer.status != 200:
            return self.send_error_json(answer.status, answer.error, answer.code, answer.headers)
        try:
            self.stream(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.stub.left.set()

    def stream(self, answer: Answer) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()  # HTTP/1.0: the end of the connection is the end of the body
        if answer.raw is not None:
            self.wfile.write(answer.raw)
            return
        for chunk in answer.chunks(self.path == "/v1/completions"):
            self.wfile.write(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())
        if answer.finish:
            self.wfile.write(b"data: [DONE]\n\n")

    def allowed(self) -> bool:
        if self.stub.key is None or self.headers["Authorization"] == f"Bearer {self.stub.key}":
            return True
        self.send_error_json(401, "an API key is needed")
        return False

    def send_error_json(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        error = {"message": message, "type": "error", "param": None, "code": code}
        self.send_json(status, {"error": error}, headers)

    def send_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    """Serve the page until Ctrl-C, with an answer of every kind in turn."""
    stub = Stub(port=8765)
    thoughts = list("先想一想，再验算一遍。" * 8)
    table = "| 一 | 二 |\n|---|---|\n| 1 | 2 |"
    text = list(f"你好！这里有**粗体**、`代码`和一张表：\n\n{table}\n\n```python\nx = 1\n```\n")
    kinds = [
        Answer(text, pause=0.03),
        Answer(text, thoughts, pause=0.05),
        Answer(text, pause=0.03, finish=None),
        Answer(text, pause=0.03, finish="length"),
        Answer(status=429, error="queue full", headers={"Retry-After": "5"}),
        Answer(status=500, error="out of memory"),
    ]
    stub.answers = kinds * 1000
    print(f"{stub.url}  (Ctrl-C ends it)")
    with suppress(KeyboardInterrupt):
        stub.thread.join()
    stub.close()


if __name__ == "__main__":
    main()
