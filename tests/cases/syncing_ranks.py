"""Run by test_pool.py in N ranks that share a policy with adapters: three publications, gathered part by part.

Rank 0 returns, of each publication: how many tensors were sent, whether a worker holds the bits that the ranks would
merge themselves, and how many these are.
"""

from pathlib import Path

import torch

from grpo.config.learner import ParallelOptions
from grpo.learner.parallel import join
from grpo.steps.pool import NoPool
from policies.policy import Policy
from policies.sharding import whole
from policies.synced_weights import SyncedWeights
from rollout.decoding.engine import Engine
from rollout.weight_sync.checksums import checksums
from rollout.weight_sync.message import Sender
from rollout.workers.worker import Receiver


def main(source: Path) -> list[tuple[int, bool, int]]:
    torch.set_num_threads(1)
    ranks = join(True, ParallelOptions())
    policy = Policy.load(source, layout=ranks.layout)
    torch.manual_seed(0)
    policy.add_lora(4, 8.0)
    others, sender = NoPool(SyncedWeights.read_parts), Sender(part_bytes=10_000)
    worker = Receiver(Engine(Policy.from_skeleton(policy.skeleton())))
    told = []
    for version in range(3):
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * (1 + version))
        if ranks.first:
            tensors = 0
            for message in sender.messages(policy.synced_weights(), version):
                tensors, held = tensors + len(message.tensors), worker.take_message(message)
        else:
            others.sync_weights(policy.synced_weights(), version)
        merged = {name: whole(tensor) for name, tensor in policy.weights().items()}
        if ranks.first:
            told.append((tensors, held == checksums(merged), len(merged)))
    return told
