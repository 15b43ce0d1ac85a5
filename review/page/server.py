"""`quartet view`: the page of one or more runs on this machine, with Starlette and uvicorn.

It listens on loopback unless told otherwise. Whoever asks for data shows the token that is in the printed address, so
that another user of the machine, or a web page that guesses the port, sees nothing.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from review.page.page import ASSETS, check_packages, plotly, shell
from review.page.run_files import RunFiles, finite
from rewards.listening import listen

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Shown:
    """The page has these runs, and may ask this of them. Raises ValueError for a folder that holds no run."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.runs = [RunFiles(folder) for folder in folders]
        for run, name in zip(self.runs, unique_names([run.folder for run in self.runs]), strict=True):
            run.name = name

    def questions(self) -> dict[str, Callable[[dict[str, str]], Any]]:
        """Returns what answers a path, from the parameters of path and query."""

        def run(asked: dict[str, str]) -> RunFiles:
            return self.runs[_number(asked, "run", len(self.runs))]

        return {
            "runs": lambda _: [run.name for run in self.runs],
            "{run}/overview": lambda asked: run(asked).overview(_number(asked, "after")),
            "{run}/events": lambda asked: run(asked).events(),
            "{run}/step/{step}": lambda asked: run(asked).step(_number(asked, "step")),
            "{run}/group/{step}/{number}": lambda asked: run(asked).group(
                _number(asked, "step"), _number(asked, "number")
            ),
            "{run}/places": lambda asked: run(asked).places(asked.get("prompt", "")),
        }


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, with as many parts before it as tell the folders apart. A folder that is
    there twice is counted.

    >>> unique_names([Path("lr/small/seed-0"), Path("lr/large/seed-0"), Path("demo")])
    ['small/seed-0', 'large/seed-0', 'demo']
    """
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        names.append("/".join(own[-length:]))
    counts: Counter[str] = Counter()
    for place, name in enumerate(names):
        counts[name] += 1
        if counts[name] > 1:
            names[place] = f"{name} ({counts[name]})"
    return names


def app(shown: Shown, token: str) -> Any:
    """Returns the Starlette application. Raises ValueError without the packages of the extra `view`."""
    check_packages("starlette", "uvicorn", "plotly", "tokenizers")
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    def answer(make: Callable[[dict[str, str]], Any]) -> Callable[..., Any]:
        def handler(request: Any) -> Response:
            if not hmac.compare_digest(request.headers.get("x-token", "").encode(), token.encode()):
                fault = "the token is missing or wrong; open the address that the server has printed"
                return JSONResponse({"error": fault}, 403, HEADERS)
            try:
                content = make(dict(request.query_params) | dict(request.path_params))
            except (ValueError, IndexError, FileNotFoundError) as error:
                missing = isinstance(error, IndexError | FileNotFoundError)
                return JSONResponse({"error": str(error)}, 404 if missing else 400, HEADERS)
            except Exception as error:  # a record as no run writes it, or a fault of ours: the page shows it
                fault = f"the page has failed at this: {type(error).__name__}: {error}"
                return JSONResponse({"error": fault}, 500, HEADERS)
            body = json.dumps(finite(content), ensure_ascii=True, allow_nan=False)
            return Response(body, 200, HEADERS, "application/json")

        return handler

    def asset(request: Any) -> Response:
        name = request.path_params["name"]
        if name == "plotly.js":
            return Response(plotly(), 200, {"Cache-Control": "max-age=86400"}, "text/javascript")
        if name not in ASSETS:
            return Response("there is no such file", 404, HEADERS)
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        return Response((Path(__file__).parent / "assets" / name).read_text(encoding="utf-8"), 200, HEADERS, kind)

    return Starlette(
        routes=[
            Route("/", lambda _: HTMLResponse(shell(), 200, HEADERS)),
            Route("/assets/{name}", asset),
            *(Route(f"/api/{path}", answer(make)) for path, make in shown.questions().items()),
        ],
    )


def _number(asked: dict[str, str], name: str, below: int | None = None) -> int:
    value = asked.get(name, "0")
    if not value.lstrip("-").isdecimal() or len(value) > 12:
        raise ValueError(f"{name}={value!r} is no number")
    if below is not None and not 0 <= int(value) < below:
        raise IndexError(f"{name}={value}: there are {below}")
    return int(value)


def view(folders: Sequence[Path], host: str, port: int, say: Callable[[str], None] = print) -> None:
    """Serve until Ctrl-C. `port` 0 takes a free one. Raises OSError where the address cannot be listened on."""
    token = secrets.token_urlsafe(16)
    application = app(Shown(folders), token)
    import uvicorn

    listening, address = listen(host, port)
    say(f"open http://{address}/?token={token}   (Ctrl-C ends it)")
    with listening:
        options: dict[str, Any] = {"log_level": "critical", "lifespan": "off", "timeout_graceful_shutdown": 1}
        uvicorn.Server(uvicorn.Config(application, **options)).run(sockets=[listening])
