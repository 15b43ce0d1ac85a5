"""An OpenEnv server, built with its package: guess a number on loopback. Run with the number of a listening socket."""

import socket
import sys
from uuid import uuid4

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Observation, State


class Guessing(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        mcp = FastMCP("guessing")

        @mcp.tool
        def guess(number: int, politely: bool = True) -> str:
            """Guesses the number.

            Args:
                number: From 1 to 9.
                politely: Whether to say please.
            """
            if not 1 <= number <= 9:
                raise ValueError("from 1 to 9")
            self._found = number == self._number
            return "right" if self._found else "higher" if number < self._number else "lower"

        super().__init__(mcp)
        self._state = State(episode_id=str(uuid4()), step_count=0)
        self._number, self._found = 0, False

    def reset(self, seed=None, episode_id=None, number=None, **_):
        self._number = number or (seed or 0) % 9 + 1
        self._found = False
        self._state = State(episode_id=episode_id or str(uuid4()), step_count=0)
        return Observation(done=False, reward=0.0)

    def _step_impl(self, action, timeout_s=None, **_):
        return Observation(done=False, reward=0.0, metadata={"error": f"unknown action {action}"})

    async def step_async(self, action, timeout_s=None, **more):
        self._state.step_count += 1
        observation = await super().step_async(action, timeout_s=timeout_s, **more)
        if isinstance(action, CallToolAction):
            observation.reward, observation.done = (1.0, True) if self._found else (-0.1, False)
        return observation

    @property
    def state(self):
        return self._state


if __name__ == "__main__":
    app = create_fastapi_app(Guessing, CallToolAction, CallToolObservation, max_concurrent_envs=8)
    listening = socket.socket(fileno=int(sys.argv[1]))
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
