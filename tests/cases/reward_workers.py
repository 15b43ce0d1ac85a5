"""The processes in which this one runs rewards, tools and agents."""

import psutil
from copies import NAME

from rewards.isolation import chat_template


def reward_workers() -> list[psutil.Process]:
    """A process is gone as soon as its parent has read its end. The one that renders chat templates stays as long as
    this process, and is none of them."""
    made = chat_template._pool.cache_info().currsize
    rendering = {worker._process.pid for worker in chat_template._pool()._workers} if made else set()
    children = [c for c in psutil.Process().children(recursive=True) if c.pid not in rendering]
    return [c for c in children if c.name() == NAME or "rewards.isolation.child" in " ".join(c.cmdline())]
