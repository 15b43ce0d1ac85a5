"""Where the agents of a run reach the policy: a server on loopback, with an address for each episode."""

from __future__ import annotations

import secrets
import threading
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import Response

from grpo.endpoint.api_error import ApiError
from grpo.endpoint.app import BEARER, error_body, questions
from grpo.endpoint.connections import settings
from grpo.endpoint.door import Door
from grpo.endpoint.episode import Episode
from rewards.listening import listen


class Endpoint:
    """Answers at `url(episode)`, with the `key` alone. Close it at the end of the run."""

    def __init__(self) -> None:
        self.key, self.episodes = secrets.token_hex(16), dict[str, Episode]()
        self._door = door = Door(error_body, BEARER, [self.key])
        application = door.application(questions(self._of, door, "/episodes/{episode}"), lambda: {"status": "ok"})
        application.add_exception_handler(ApiError, self._refused)
        self._socket, self._address = listen("127.0.0.1", 0)
        self._server = uvicorn.Server(settings(application, lifespan="off", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="agents", daemon=True
        )
        self._thread.start()

    def open(self, episode: Episode) -> str:
        """Returns the `base_url` at which this episode is asked from now on."""
        name = secrets.token_hex(8)
        self.episodes[name] = episode
        return f"http://{self._address}/episodes/{name}/v1"

    def forget(self) -> None:
        """Answer no episode any more."""
        self.episodes = {}

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()

    def _of(self, request: Request) -> Episode:
        name = request.path_params["episode"]
        episode = self.episodes.get(name)
        if episode is None:
            raise ApiError(f"the episode {name!r:.60} is not there, or has ended", 404, code="episode_not_found")
        if request.method == "POST":
            episode.requests += 1
        return episode

    async def _refused(self, request: Request, error: Any) -> Response:
        if episode := self.episodes.get(request.path_params.get("episode", "")):
            episode.refusal = str(error)
        return self._door.refusal(error)
