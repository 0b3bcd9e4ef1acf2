"""The page at `/` of the HTTP port: static files, without data. Its scripts ask the same routes as other clients."""

from __future__ import annotations

import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_INDEX = "index.html"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Browsers ask each time, and get 304 for what they have: the scripts of two releases never mix.
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """`/`, and `/page/NAME` for its styles and scripts."""
    files = resources.files(__name__).joinpath("static").iterdir()
    return [_route(file.name, file.read_bytes()) for file in files]


def _route(name: str, content: bytes) -> Route:
    path = "/" if name == _INDEX else f"/page/{name}"
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}
    kind = _TYPES[name[name.rindex(".") :]]

    async def answer(request: Request) -> Response:
        known = {known.strip().removeprefix("W/") for known in request.headers.get("if-none-match", "").split(",")}
        if tag in known:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    return Route(path, answer)
