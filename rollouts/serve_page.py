"""The web page of `gato serve`: a few files of this package, each at an address, and no others.

What the page may do is fixed by its policy: run these scripts, show pictures it was given, and ask
this server. Nothing from elsewhere is loaded or told, and text never becomes markup.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import APIRouter

FOLDER = "page"
INDEX = "index.html"
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""By ending; what else lies in the folder is not served."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_files() -> dict[str, tuple[str, bytes]]:
    """Return the page's files by name, each with its type."""
    found = {}
    for file in files("gato.rollouts").joinpath(FOLDER).iterdir():
        kind = TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            found[file.name] = kind, file.read_bytes()
    return found


def router() -> APIRouter:
    """Return the page's routes: it at ``/``, its other files below ``/page/``."""
    from fastapi import APIRouter

    held = page_files()
    routes = APIRouter()
    routes.add_route("/", _answer(*held[INDEX]), ["GET"])
    routes.add_route("/favicon.ico", _answer(*held["icon.svg"]), ["GET"])
    for name, (kind, content) in held.items():
        if name != INDEX:
            routes.add_route(f"/{FOLDER}/{name}", _answer(kind, content), ["GET"])
    return routes


def _answer(kind: str, content: bytes) -> Any:
    async def answer(request: Any) -> Any:
        from starlette.responses import Response

        return Response(content, headers={**HEADERS, "Content-Type": kind})

    return answer
