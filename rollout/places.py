"""Where the workers of a pool may be: what each is given, and which clusters are safe to be in."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import torch

from policies import devices
from policies.policy import Policy


@dataclass(frozen=True)
class Places:
    """What the workers of a pool are given: each so many processors and so much of a GPU (0: they use none), spread
    over the machines. They are waited for during `timeout_s`.

    `colocate`: they use the learner's GPUs when it does not, and it those of them. None: where there are no others.
    """

    count: int
    threads: int
    gpus: float
    timeout_s: float
    colocate: bool | None = None

    def taken(self, policy: Policy) -> tuple[bool, int]:
        """Tells whether workers and learner take turns, and how many of this machine's GPUs are the learner's alone.

        Ray places the learners of Ray Train itself. It knows nothing of others, which have the first GPUs.
        """
        ray = sys.modules.get("ray")
        if policy.device.type == "cpu" or (ray and ray.is_initialized()) or os.environ.get("RAY_ADDRESS"):
            return bool(self.colocate), 0
        learners = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        others = torch.accelerator.device_count() > learners and devices.has_cuda(policy.device)  # that can be hidden
        turns = self.colocate if self.colocate is not None else not others
        return turns, 0 if turns else learners

    def __str__(self) -> str:
        return f"{self.count} x {self.threads} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")

    def lacking(self, nodes: Sequence[Mapping[str, Any]], free: Mapping[str, float]) -> str:
        """Gives what is said where the cluster has no room for them: `ray.nodes()` and `ray.available_resources()`."""
        has = "; ".join(
            f"node {node['NodeID'][:8]} on {node['NodeManagerHostname']}: {_share(node['Resources'])}"
            for node in nodes
            if node["Alive"]
        )
        return (
            f"rollout.workers needs {self}, and within {self.timeout_s:g} s the cluster had no place for that. It has "
            f"{has}; free: {_share(free)}. Lower rollout.workers, or add machines"
        )


def _share(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"


def visible_gpus(hidden: int) -> str:
    """Gives what CUDA_VISIBLE_DEVICES names without the first `hidden` GPUs that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.accelerator.device_count())]
    return ",".join(gpus[hidden:])


def here() -> dict[str, Any]:
    """Tells where this process is: its node of Ray's cluster, or its machine; its number; and what it uses."""
    device: dict[str, Any] = {"threads": torch.get_num_threads()}
    if torch.accelerator.is_available():
        device["gpu"] = torch.accelerator.current_device_index()
    node = socket.gethostname()
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        context = ray.get_runtime_context()
        node = f"{context.get_node_id()[:8]} on {node}"
        device |= {"gpu": ",".join(gpus)} if (gpus := context.get_accelerator_ids().get("GPU")) else {}
    return {"node": node, "process": os.getpid()} | device


def refuse_open(address: str | None = None) -> None:
    """Raises ValueError where the cluster at `address` or RAY_ADDRESS is on a network, and Ray has no token for it:
    whoever reaches such a cluster can run code in it."""
    address = address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        return
    import ray

    services: Any = ray._private.services
    loader: Any = ray._raylet
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode == "token" or (
        mode is None and loader.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    ):
        return
    resolved = services.canonicalize_bootstrap_address(address) if address == "auto" else address
    host = (resolved or "127.0.0.1:0").split("://")[-1].rpartition(":")[0].strip("[]")
    try:
        if ip_address(socket.gethostbyname(host)).is_loopback:
            return
    except (OSError, ValueError):  # an address of IPv6, or a name that is not known here
        if host == "::1":
            return
    raise ValueError(
        f"RAY_ADDRESS={address} is on a network, and RAY_AUTH_MODE={mode or ''} says that Ray asks for no token: "
        "whoever reaches that cluster can run code on its machines. Start it, and quartet, with RAY_AUTH_MODE=token "
        "and the same RAY_AUTH_TOKEN (docs/guides/gpus-and-nodes.md)"
    )
