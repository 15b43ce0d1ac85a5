"""Where workers are: places in a cluster, and clusters that nobody guards."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray
import torch

from rollout.faults import RolloutError
from rollout.group import Prompt
from rollout.places import Places, refuse_open
from rollout.sampling import SamplingParams
from rollout.weight_sync.message import Sender
from rollout.workers.cluster import Seclusion, start_ray, stop_ray
from rollout.workers.kinds import PoolOptions, open_pool
from rollout.workers.worker import Worker

PROMPTS = [Prompt(f"p/{i}", "", [3 + i, *range(9, 10 + 3 * i)]) for i in range(6)]
PARAMS = SamplingParams(group_size=2, max_completion_tokens=8, draft_tokens=0)


CLUSTERS = [
    ("192.0.2.1:6379", None, True),
    ("192.0.2.1:6379", "disabled", True),
    ("ray://192.0.2.1:10001", None, True),
    ("[2001:db8::1]:6379", None, True),
    ("no-such-host.invalid:6379", None, True),
    ("192.0.2.1:6379", "token", False),
    ("127.0.0.1:6379", None, False),
    ("[::1]:6379", None, False),
    ("localhost:6379", "disabled", False),
    ("local", None, False),
    (None, None, False),
]


@pytest.mark.parametrize(("address", "mode", "refused"), CLUSTERS)
def test_a_cluster_on_a_network_is_refused_without_a_token(monkeypatch, tmp_path, address, mode, refused):
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray looks for a token
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("RAY_AUTH_MODE", mode), ("RAY_ADDRESS", address)):
        if value:
            monkeypatch.setenv(name, value)
    Seclusion._tell_ray()  # an earlier test of this process may have had a token
    if not refused:
        return refuse_open()
    with pytest.raises(ValueError, match=r"RAY_ADDRESS=.* is on a network, .*RAY_AUTH_MODE=token"):
        refuse_open()


@pytest.mark.parametrize(
    ("gpus", "ranks", "colocate", "expected"),
    [
        (4, None, None, (False, 1)),  # the learner's own, and three for workers
        (4, "2", None, (False, 2)),
        (1, None, None, (True, 0)),  # there is only one: in turn
        (4, "4", None, (True, 0)),
        (4, "2", True, (True, 0)),  # as the user says
        (1, None, False, (False, 1)),  # sampling ahead
    ],
)
def test_who_has_which_gpu(monkeypatch, gpus, ranks, colocate, expected):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    places, policy = Places(1, 1, 1.0, 1.0, colocate), SimpleNamespace(device=torch.device("cuda:0"))
    assert places.taken(policy) == expected
    assert places.taken(SimpleNamespace(device=torch.device("cpu"))) == (bool(colocate), 0)


@pytest.mark.parametrize(("visible", "seen"), [(None, "1,2"), ("5,3,4", "3,4")])
def test_ray_does_not_see_the_gpu_of_the_learner(monkeypatch, visible, seen):
    found: list[str | None] = []
    monkeypatch.setattr(ray, "init", lambda **_: found.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    start_ray(1, hidden_gpus=1)
    stop_ray()
    assert found == [seen]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_a_worker_sleeps_until_the_next_publication(random_policy):
    """On a GPU it leaves the memory; here only that it has nothing to decode with, and then the same tokens."""
    policy, sender = random_policy(21), Sender()
    worker = Worker(policy.skeleton(), "float32", "float32", "cpu", threads=1)
    [message] = sender.messages(policy.synced_weights(), 0)
    held = worker.sync_weights(message)
    before = worker.sample(PROMPTS, PARAMS, 0)
    worker.sleep()
    assert not hasattr(worker.engine, "trunk")
    with pytest.raises(RolloutError, match="sleeps until the next weight sync"):
        worker.sample(PROMPTS, PARAMS, 0)
    [message] = sender.messages(policy.synced_weights(), 0)
    assert worker.sync_weights(message) == held
    assert worker.sample(PROMPTS, PARAMS, 0) == before


@pytest.fixture
def nodes() -> Iterator:
    """Simulated machines: of the first one nothing is to be had."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": {"worker_niceness": 0}})
    ray.init(address=cluster.address, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.long
def test_a_machine_that_leaves_is_one_loss_and_one_that_comes_is_used(random_policy, nodes):
    """The tokens are those of one process, whoever samples them."""
    policy, lost, ready = random_policy(21), [], {}
    expected = open_pool(policy, PoolOptions(prompts_per_shard=1)).sample(PROMPTS, PARAMS)
    with pytest.raises(RolloutError, match=r"needs 3 x 1 CPU, and within 1 s the cluster had no place"):
        open_pool(policy, PoolOptions(workers=3, placement_timeout_s=1))
    first, second = nodes.add_node(num_cpus=1), nodes.add_node(num_cpus=2)
    options = PoolOptions(
        workers=3,
        prompts_per_shard=1,
        on_lost=lambda *what: lost.append(what),
        on_ready=lambda worker, where: ready.update({worker: where["node"][:8]}),
    )
    pool = open_pool(policy, options)
    assert sorted(ready) == [0, 1, 2]
    assert sorted(ready.values()) == sorted([first.node_id[:8], *[second.node_id[:8]] * 2])
    assert pool.sample(PROMPTS, PARAMS) == expected
    nodes.remove_node(second)
    assert pool.sample(PROMPTS, PARAMS) == expected
    assert len(pool.confirmed) == 1
    assert [action for *_, action in lost] == ["it is replaced"]
    assert pool.metrics()["faults/node"] == 1
    pool.sync_weights(policy.synced_weights(), 1)  # it goes on with one
    third = nodes.add_node(num_cpus=2)
    pool.workers.wait_for(3)
    pool._settle_workers()
    assert pool.confirmed == {0, 1, 2}
    assert sorted(ready.values()) == sorted([first.node_id[:8], *[third.node_id[:8]] * 2])
    for group, other in zip(pool.sample(PROMPTS, PARAMS), expected, strict=True):
        assert [c.token_ids for c in group.completions] == [c.token_ids for c in other.completions]
    pool.close()
