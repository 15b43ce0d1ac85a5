"""Following a run that is still training: its newest checkpoint replaces the policy that is served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from grpo.endpoint.served import Served
from grpo.source.policy_source import PolicySource, find_policy
from rollout.engine import Engine

LOOK_S = 5.0


class Follower:
    """Looks every `LOOK_S` seconds. A checkpoint that cannot be loaded is reported once and counted, and the policy
    from before stays.

    `load` makes an engine of a source, whose version is the source's step.
    """

    def __init__(
        self, run: str, step: int | None, load: Callable[[PolicySource], Engine], say: Callable[[str], None]
    ) -> None:
        if not (Path(run) / "environment.json").is_file():
            raise ValueError(f"--follow: {run} is no run folder, and nothing else gets newer; leave --follow out")
        self.run, self.step, self.load, self.say = run, step, load, say
        self._failed: str | None = None

    async def keep_up(self, served: Served) -> None:
        """Looks again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self.look, served)

    def look(self, served: Served) -> bool:
        """Looks once. Returns whether there was a newer policy, which then is served."""
        folder = None
        try:
            source = find_policy(self.run, read=False)
            folder = source.folder
            if source.step == self.step or folder == self._failed:
                return False
            source = find_policy(self.run)  # its tensors, now
            engine = self.load(source)
        except Exception as error:
            self._failed = folder
            served.batcher.counts.not_loaded += 1
            self.say(f"{folder or self.run} cannot be served, the policy from before stays: {error}")
            return False
        self.step, served.meaning = source.step, source.meaning
        served.batcher.replace(engine)
        self.say(f"policy version {engine.version} is served from now on: {source.folder} ({source.meaning})")
        return True
