"""What goes wrong with a request, in the shape that OpenAI's clients know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse

LONGEST_MESSAGE = 500  # characters; a message may quote what the client sent
TAGS = ("a string", "a list")  # names of the forms of a field, which are no part of its place


class ApiError(Exception):
    """A request that is not answered, and why.

    Args:
        param: the field that is wrong.
        code: a word for programs, such as "context_length_exceeded".
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )
        if self.status >= 500:
            kind = "server_error"
        message = self.message.encode("utf-8", "replace").decode()  # half a surrogate has no UTF-8
        if len(message) > LONGEST_MESSAGE:
            message = message[:LONGEST_MESSAGE] + "…"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of the mistakes that pydantic found in a body.

    Args: errors: as `ValidationError.errors()` gives them, places beginning with "body".
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return ApiError(400, f"the body is not JSON: {reason} (character {first['loc'][-1]})")
    place = field_name(first["loc"][1:])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{place[:200]} is no field of such a request", place[:200])
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    if place:
        return ApiError(400, f"{place}: {message}", place)
    if first["type"] == "string_unicode":
        return ApiError(400, "the name of a field is half a character")
    if isinstance(first["input"], dict):  # about several fields, or one that is not supported
        return ApiError(400, message, first.get("ctx", {}).get("name"))
    return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")


def field_name(place: Sequence[str | int]) -> str:
    """("messages", 0, "content") → "messages[0].content"."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place if part not in TAGS)
    return "".join(parts).removeprefix(".").encode("utf-8", "replace").decode()


def http_error(status: int, detail: str, headers: Mapping[str, str] | None) -> ApiError:
    """Of the routes: no such path, no such method, a body that cannot be read."""
    phrases = {404: "there is nothing at this address; the API is under /v1", 405: "not with this method"}
    return ApiError(status, phrases.get(status, detail or HTTPStatus(status).phrase), headers=headers)
