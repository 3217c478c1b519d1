"""The files of the web page, with the headers that let it do no more than it needs."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

from minimind.paths import PACKAGE

PAGE = PACKAGE / "server" / "page"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # after an upgrade no file may be older than the others
}


class PageFiles(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI, folder: Path) -> None:
    """Serve `folder` at /page, and also at /, where its index.html is the page itself.

    At / by a route of one level: a mount would also take the API's paths, wherever the method is wrong.
    """
    files = PageFiles(directory=folder, html=True)
    app.mount("/page", files)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    @app.api_route("/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request, name: str = "index.html") -> Response:
        return await files.get_response(name, request.scope)
