"""OpenAI's API over the engines of some models: /v1/chat/completions, /v1/completions, /v1/models.

Beside it /health, /metrics for Prometheus, and the web page at /.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from minimind.errors import UserError
from minimind.server import schemas
from minimind.server.answers import Answers, Served, unavailable
from minimind.server.errors import ApiError, http_error, invalid_request
from minimind.server.guard import Guard
from minimind.server.metrics import Metrics
from minimind.server.prompts import chat_prompt, text_prompt
from minimind.server.responses import Chat, Completion, EventStream, Shape
from minimind.server.scheduler import Scheduler
from minimind.server.static import PAGE, add_page
from minimind.server.text import AnswerText
from minimind.tokenizer import Tokenizer

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/")
CLIENT_LEFT = 499  # nginx's status for it, seen in metrics only


class Service:
    """What the routes share.

    Args:
        models: the first is the plain one, which requests without a name get.
        queue: answers that may wait at each model.
        on_failure: called when an engine breaks.
    """

    def __init__(
        self, models: Sequence[Served], tokenizer: Tokenizer, queue: int, on_failure: Callable[[], None]
    ) -> None:
        self.models = {model.name: model for model in models}
        self.tokenizer = tokenizer
        engines = {model.name: model.engine for model in models}
        self.scheduler = Scheduler(engines, queue, on_failure)
        self.metrics = Metrics(self.scheduler)

    def model(self, name: str) -> Served:
        """Raises: ApiError for one that is not served."""
        if name not in self.models:
            there = ", ".join(self.models)
            message = f"there is no model {name[:200]!r} here; there are: {there}"
            raise ApiError(404, message, "model", "model_not_found")
        return self.models[name]

    async def chat(self, asked: schemas.ChatRequest, request: Request) -> Response:
        model = self.model(asked.model)
        if model.stage == "pretrain":
            raise ApiError(
                400, "this model only continues texts: use /v1/completions, or serve --model_mode 1", "model"
            )
        ids = await chat_prompt(self.tokenizer, asked.messages, model.engine, model.reasons)
        prompts = [ids] * asked.n
        shape = Chat(model.name, self.tokenizer, len(ids))
        answers = self.submit(model, asked, prompts, asked.answer_limit, asked.logprobs_asked, model.reasons)
        return await self.respond(answers, len(prompts), shape, asked, request)

    async def complete(self, asked: schemas.CompletionRequest, request: Request) -> Response:
        model = self.model(asked.model)
        ids = [await text_prompt(self.tokenizer, text, model.engine) for text in asked.prompts]
        prompts = [own for own in ids for _ in range(asked.n)]
        texts = [text for text in asked.prompts for _ in range(asked.n)]
        shape = Completion(model.name, self.tokenizer, sum(map(len, ids)), texts)
        answers = self.submit(model, asked, prompts, asked.max_tokens, asked.logprobs)
        return await self.respond(answers, len(prompts), shape, asked, request)

    def submit(
        self,
        model: Served,
        asked: schemas.Request,
        prompts: Sequence[Sequence[int]],
        limit: int | None,
        top_logprobs: int | None,
        reasons: bool = False,
    ) -> Answers:
        """Put the answers in line. An answer ends where the context does, whatever limit was asked for."""
        longest = model.engine.max_length
        options = [asked.sampling(number, limit or longest) for number in range(len(prompts))]
        texts = [AnswerText(self.tokenizer, asked.stops, reasons) for _ in prompts]
        return Answers(self.scheduler, self.metrics, model, prompts, options, texts, top_logprobs)

    async def respond(
        self, answers: Answers, count: int, shape: Shape, asked: schemas.Request, request: Request
    ) -> Response:
        if asked.stream:
            return EventStream(answers, count, shape, asked.stream_options.include_usage)
        whole, gone = asyncio.create_task(answers.whole()), asyncio.create_task(disconnected(request))
        try:
            await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                return Response(status_code=CLIENT_LEFT)
            return JSONResponse(shape.whole(whole.result(), answers.completion_tokens))
        finally:
            for task in (whole, gone):
                task.cancel()
            answers.close()


async def disconnected(request: Request) -> None:
    """Returns when the client has left. Only for a request whose body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(
    service: Service,
    api_key: str | None = None,
    page: Path = PAGE,
    on_ready: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application for uvicorn.

    Args:
        api_key: what clients must send; None: nothing.
        page: folder of the web page.
        on_ready: called when requests can be answered.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        on_ready()
        yield
        await service.scheduler.close()

    app = FastAPI(title="MiniMind", lifespan=lifespan, docs_url=None, redoc_url=None)
    add_errors(app)
    add_routes(app, service)
    add_page(app, page)
    app.add_middleware(Guard, api_key=api_key, metrics=service.metrics, counted=PATHS)
    return app


def add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> Response:
        return ApiError(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return invalid_request(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> Response:
        return http_error(error.status_code, str(error.detail), error.headers).response()

    @app.exception_handler(500)
    async def bug(_: Request, error: Exception) -> Response:
        return ApiError(500, "a mistake in the server; its log has it").response()


def add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        if service.scheduler.failed:
            raise unavailable(service.scheduler)
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(model) for model in service.models.values()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return describe(service.model(name))

    @app.post("/v1/chat/completions")
    async def chat(asked: schemas.ChatRequest, request: Request) -> Response:
        return await service.chat(asked, request)

    @app.post("/v1/completions")
    async def complete(asked: schemas.CompletionRequest, request: Request) -> Response:
        return await service.complete(asked, request)


def describe(model: Served) -> dict[str, Any]:
    """A model in the shape of OpenAI's list, with a field of our own."""
    own = {
        "stage": model.stage,
        "adapter": model.adapter,
        "max_length": model.engine.max_length,
        "reasoning": model.reasons,
    }
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "minimind",
        "minimind": own,
    }
