"""The pool: the number of workers changes nothing, weights are confirmed, workers may die, nothing remains.

Ray takes seconds to start: the tests share one cluster of three processors, and a pool of two workers in it.
"""

import copy
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import ray
import torch
from talks import BASE, TURNS, talked

import rollout.workers.cluster
from policies.openmp import WAITING
from policies.policy import Policy, checksum
from rewards import RewardSpec, Scorer
from rollout.cost_table import Workload
from rollout.decoding.engine import Engine
from rollout.faults import RolloutError
from rollout.group import Prompt, RolloutGroup
from rollout.pool import PoolOptions
from rollout.requests.serving import Serving
from rollout.sampling import EnvironmentSpec, SamplingParams
from rollout.weight_sync.checksums import checksums
from rollout.weight_sync.message import Sender
from rollout.workers.actors import Call
from rollout.workers.cluster import start_ray
from rollout.workers.kinds import open_pool
from rollout.workers.local_pool import LocalPool
from rollout.workers.ray_pool import Given, RayPool
from rollout.workers.worker import Worker

PROMPTS = [Prompt(f"p/{i}", "", [3 + i, *range(9, 10 + 3 * i)]) for i in range(7)]
PARAMS = SamplingParams(
    group_size=3, temperature=0.9, max_completion_tokens=12, stop_token_ids=tuple(range(7, 280, 20)), draft_tokens=2
)


@pytest.fixture(scope="module")
def policies(random_policy) -> list[Policy]:
    """What is published as version 0, and what as version 1."""
    return [random_policy(21), random_policy(22)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray(3)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def shared(cluster, policies) -> Iterator[RayPool]:
    pool = open_pool(policies[0], PoolOptions(workers=2, prompts_per_shard=2))
    yield pool
    pool.close()


@pytest.fixture
def pool(shared, policies) -> RayPool:
    """The shared pool, both of whose workers hold version 0 again."""
    shared.sync_weights(policies[0].weights(), 0)
    shared.workers.wait_for(2)
    shared._settle_workers()
    return shared


@pytest.fixture(scope="module")
def expected(policies) -> Callable[[int], list[RolloutGroup]]:
    """What one engine in this process samples after version 0, and after version 1."""
    local = open_pool(policies[0], PoolOptions(prompts_per_shard=2))
    sampled = [local.sample(PROMPTS, PARAMS)]
    local.sync_weights(policies[1].weights(), 1)
    sampled.append(local.sample(PROMPTS, PARAMS))
    return sampled.__getitem__


def tokens(groups: list[RolloutGroup]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group.completions] for group in groups]


def again(pool: RayPool) -> None:
    """Sample, find out who is lost, and let the successor in."""
    pool.sample(PROMPTS, PARAMS)
    pool.workers.wait_for(2)
    pool._settle_workers()


@contextmanager
def learning(policy: Policy) -> Iterator[None]:
    """Its weights are not what was published."""
    before = policy.mtp.norm.weight.detach().clone()
    with torch.no_grad():
        policy.mtp.norm.weight.add_(1)
        yield
        policy.mtp.norm.weight.copy_(before)


def call(worker, function: Callable):
    """`function(worker)` in the worker's own process."""
    return worker.__ray_call__.remote(function)


# ---- without Ray ----


def test_contract_4_a_local_pool_samples_the_same_whatever_the_shards(policies, expected):
    for size in (1, 3, 100):
        pool = LocalPool(policies[0], PoolOptions(prompts_per_shard=size))
        assert tokens(pool.sample(PROMPTS, PARAMS)) == tokens(expected(0))


def test_contract_5_a_local_pool_never_samples_with_weights_that_were_not_published(random_policy, expected):
    policy = random_policy(21)
    pool = open_pool(policy, PoolOptions(prompts_per_shard=2))
    assert pool.sample(PROMPTS, PARAMS) == expected(0)
    with torch.no_grad():
        policy.mtp.norm.weight.add_(1.0)
    with pytest.raises(RolloutError, match="has learned since its last weight sync: sync its weights first"):
        pool.sample(PROMPTS, PARAMS)
    pool.sync_weights(policy.weights(), 1)
    assert {c.policy_version for group in pool.sample(PROMPTS, PARAMS) for c in group.completions} == {1}


def test_a_local_pool_keeps_weights_of_others_apart_from_the_policy(random_policy, policies, expected):
    policy = random_policy(21)
    pool = open_pool(policy, PoolOptions(prompts_per_shard=2))
    before = checksum(policy.weights())
    pool.sync_weights(policies[1].weights(), 1)
    assert pool.sample(PROMPTS, PARAMS) == expected(1)
    assert checksum(policy.weights()) == before


@pytest.mark.parametrize(
    "change", [lambda policy: policy.add_lora(2, 4.0, ["o_proj"]), lambda policy: policy.bfloat16()]
)
def test_a_local_pool_shares_no_weights_of_another_form(random_policy, change):
    policy = random_policy(21)
    assert open_pool(policy).engine.policy is policy
    change(policy)
    assert open_pool(policy).engine.policy is not policy


def test_contract_5_a_worker_without_weights_refuses_to_sample(policies):
    worker = Worker(policies[0].skeleton(), "float32", "float32", "cpu", threads=1)
    with pytest.raises(RolloutError, match="holds policy version -1, but version 0 was asked for"):
        worker.sample(PROMPTS, PARAMS, 0)
    [message] = Sender().messages(policies[0].weights(), 0)
    assert worker.sync_weights(message) == checksums(policies[0].weights())
    assert len(worker.sample(PROMPTS[:1], PARAMS, 0)) == 1


@pytest.mark.parametrize(("why", "replaced"), [("it was killed", [0]), ("to give took too long", [0, 1])])
def test_a_worker_that_dies_while_it_gives_its_weights_costs_no_other_one(why, replaced):
    """The taker lives, and gets the weights from another worker. If the call is late, it may be either of them."""
    pool, lost = object.__new__(RayPool), []
    pool.confirmed, pool.passed = {0}, {0}
    pool.workers = SimpleNamespace(replace=lambda call, *_: lost.append(call.worker))
    pool._given(Call(0, Given(1), 1.0, "to give took too long"), None, ("worker", why))
    assert lost == replaced
    assert pool.confirmed == set()


# ---- with Ray ----


def test_contract_4_workers_sample_what_one_engine_samples(pool, expected):
    """To the bit: the shards are the same, and so are the thread counts."""
    heard: list[int] = []
    assert pool.sample(PROMPTS, PARAMS, heard.append) == expected(0)
    assert sum(heard) == len(PROMPTS) * PARAMS.group_size
    assert pool.sample([], PARAMS) == []
    longest = {g.prompt.prompt_id: max(len(c.token_ids) for c in g.completions) for g in expected(0)}
    assert pool.lengths.longest == longest  # so that the longest shard begins first, with the same tokens
    assert pool.sample(PROMPTS, PARAMS) == expected(0)


@pytest.mark.slow
def test_contract_4_the_number_of_workers_changes_nothing(pool, policies, expected, monkeypatch):
    single = open_pool(policies[0], PoolOptions(workers=1, prompts_per_shard=2))
    try:
        assert single.sample(PROMPTS, PARAMS) == expected(0)
        reversed_groups = single.sample(PROMPTS[::-1], PARAMS)
        assert tokens(reversed_groups) == tokens(expected(0))[::-1]
        ray.kill(single.workers.actors[0])
        with learning(policies[0]), monkeypatch.context() as patch:
            patch.setattr(single, "sync_timeout_s", 0.0)
            with pytest.raises(RolloutError, match="no worker is left that holds version 0, and the learner cannot"):
                single.sample(PROMPTS, PARAMS)
        assert single.sample(PROMPTS, PARAMS) == expected(0)  # the successor gets the weights from the learner again
    finally:
        single.close()
    assert ray.is_initialized()  # the cluster was there before the pool
    assert pool.sample(PROMPTS, PARAMS) == expected(0)


def test_contract_5_every_worker_samples_with_what_was_published_last(pool, policies, expected):
    pool.sync_weights(policies[1].weights(), 1)
    groups = pool.sample(PROMPTS, PARAMS)
    assert groups == expected(1)
    assert {completion.policy_version for group in groups for completion in group.completions} == {1}
    assert tokens(groups) != tokens(expected(0))


def test_contract_5_weights_that_a_worker_does_not_confirm_are_not_sampled_with(pool, policies, monkeypatch, expected):
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "difference", lambda self, held: max(held))
        with pytest.raises(RolloutError, match=r"worker \d does not hold .* version 1: .* is trunk.model.norm"):
            pool.sync_weights(policies[1].weights(), 1)
    with pytest.raises(RolloutError, match="sync the weights again"):
        pool.sample(PROMPTS, PARAMS)
    pool.sync_weights(policies[1].weights(), 1)
    assert pool.sample(PROMPTS, PARAMS) == expected(1)


@pytest.mark.slow
def test_contract_5_with_adapters_workers_get_a_and_b_alone_and_a_new_one_everything(pool, random_policy):
    """Tokens are those of a pool in this process that was given merged weights."""
    policy = random_policy(21)
    policy.add_lora(rank=2, alpha=4.0, targets=["o_proj", "experts"])
    policy.mtp.requires_grad_(False)
    local, sent = open_pool(policy, PoolOptions(prompts_per_shard=2)), []
    pool.metrics()
    for version in range(4):
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if ".lora_B." in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version)))
        if version == 3:
            ray.kill(pool.workers.actors[1])
        pool.sync_weights(policy.synced_weights(), version)
        local.sync_weights(policy.weights(), version)
        assert pool.sample(PROMPTS, PARAMS) == local.sample(PROMPTS, PARAMS)
        if version == 3:  # its successor has started, and gets the weights from the other worker
            pool.workers.wait_for(2)
            pool._settle_workers()
        sent.append(pool.metrics()["sync/bytes"])
    assert sent[1] == sent[2] < 0.2 * sent[0]
    assert sent[3] == sent[0] + sent[1]
    assert pool.sample(PROMPTS, PARAMS) == local.sample(PROMPTS, PARAMS)


def test_contract_5_a_worker_whose_digests_differ_after_a_and_b_gets_everything(pool, random_policy):
    policy = random_policy(21)
    policy.add_lora(rank=2, alpha=4.0, targets=["o_proj"])

    def spoil(worker) -> None:
        with torch.no_grad():
            worker.engine.policy.trunk.get_input_embeddings().weight.add_(1)

    pool.sync_weights(policy.synced_weights(), 0)
    ray.get(call(pool.workers.actors[0], spoil))
    pool.metrics()
    pool.sync_weights(policy.synced_weights(), 1)
    assert pool.metrics()["sync/bytes"] > sum(t.nbytes for t in policy.weights().values())
    assert tokens(pool.sample(PROMPTS, PARAMS)) == tokens(
        open_pool(policy, PoolOptions(prompts_per_shard=2)).sample(PROMPTS, PARAMS)
    )


def test_a_publication_is_in_shared_memory_part_by_part(pool, policies, expected, monkeypatch):
    core, real = ray._private.worker.global_worker.core_worker, ray.put
    sizes: dict[str, int] = {}
    held: list[int] = []

    def put(message):
        reference = real(message)
        sizes[reference.hex()] = message.bytes
        counts = {str(name): count["local"] for name, count in core.get_all_reference_counts().items()}
        held.append(sum(size for name, size in sizes.items() if any(name in key and counts[key] for key in counts)))
        return reference

    monkeypatch.setattr(ray, "put", put)
    monkeypatch.setattr(pool.sender, "part_bytes", 20_000)
    pool.sync_weights(policies[1].weights(), 1)
    assert sum(sizes.values()) == sum(tensor.nbytes for tensor in policies[1].weights().values())
    assert 0 < max(held) < 0.5 * sum(sizes.values())
    assert pool.sample(PROMPTS, PARAMS) == expected(1)


def test_an_error_in_a_worker_arrives_as_it_is_and_the_pool_goes_on(pool, expected):
    with pytest.raises(RolloutError, match="^prompt 'p/x' has no tokens") as caught:
        pool.sample([*PROMPTS, Prompt("p/x", "", [])], PARAMS)
    assert tokens(caught.value.groups) == tokens(expected(0))  # of every worker, also of the one that met it
    with pytest.raises(ValueError, match="^rollout.stop_token_ids: 999"):
        pool.sample(PROMPTS, replace(PARAMS, stop_token_ids=(999,)))
    assert pool.sample(PROMPTS, PARAMS) == expected(0)


def test_workers_wait_briefly_for_their_threads_and_are_as_important_as_the_learner(pool, monkeypatch):
    def seen(worker) -> tuple:
        return {name: os.environ.get(name) for name in WAITING}, os.nice(0)

    assert ray.get([call(worker, seen) for worker in pool.workers.actors]) == [(WAITING, os.nice(0))] * 2


@pytest.mark.slow
def test_rewards_in_a_ray_actor_give_the_scores_that_they_give_here(pool):
    faulty = Path(__file__).parents[2] / "cases/faulty_rewards.py"
    specs = [RewardSpec("gsm8k"), RewardSpec("gsm8k_format", 0.1), RewardSpec(f"{faulty}:unpicklable", weight=0.01)]

    def grade(_: object) -> list[float | None]:  # local, so that it travels by value: workers cannot import this file
        with Scorer(specs) as scorer:
            [score] = scorer.score(["p"], [["#### 1", "#### 2", "none"]], [{"answer": "2"}], prompt_ids=["a"])
        return score.rewards

    scores = grade(None)
    assert len(set(scores)) == 3
    assert ray.get(call(pool.workers.actors[0], grade)) == scores


# ---- workers that die ----


def test_contract_4_a_worker_that_dies_is_replaced_and_gives_the_same_tokens(pool, expected):
    before = list(pool.workers.actors)
    ray.kill(before[0])
    assert pool.sample(PROMPTS, PARAMS) == expected(0)
    assert pool.workers.actors[0] is not before[0]
    assert pool.workers.actors[1] is before[1]
    assert pool.faults.since_sync == 1


@pytest.mark.slow
def test_contract_4_a_worker_that_dies_while_it_samples_is_replaced(pool, policies, expected):
    """The second worker's process ends without a word as soon as the first shard is done."""
    died = []

    def on_finished(_: int) -> None:
        if not died:
            died.append(call(pool.workers.actors[1], lambda _: os._exit(1)))

    assert pool.sample(PROMPTS, PARAMS, on_finished) == expected(0)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(died)
    with learning(policies[0]):  # what its successor lacks it can get from the other worker alone
        pool.workers.wait_for(2)
        pool._settle_workers()
    assert pool.confirmed == {0, 1}
    pool.sync_weights(policies[0].weights(), 0)  # and one that dies between two steps
    assert pool.sample(PROMPTS, PARAMS) == expected(0)


@pytest.mark.long
def test_contract_4_episodes_are_the_same_with_workers_and_after_one_is_killed_in_the_middle(
    cluster, random_policy, tmp_path
):
    """A random policy that calls tools: every other token begins a call, and one in twenty ends a turn. A tool kills
    the worker whose child it is."""
    policy = random_policy(23, vocab_size=471)
    policy.tokenizer.add_tokens([f"<<{number}=" for number in range(200)])
    echo = Path(__file__).parents[2] / "cases" / "guessing.py"
    spec = EnvironmentSpec(environments=(("", f"{echo}:Guess"),), max_turns=4)
    prompts = [replace(prompt, text="3 + 4 = 7, how many"[: 5 + i]) for i, prompt in enumerate(PROMPTS)]
    params = replace(PARAMS, max_completion_tokens=40, environment=spec)
    local = open_pool(policy, PoolOptions(prompts_per_shard=2))
    alone = local.sample(prompts, params)
    local.close()
    assert sum(c.tools.calls for group in alone for c in group.completions) > 3
    pool = open_pool(policy, PoolOptions(workers=1, prompts_per_shard=2))
    try:
        assert pool.sample(prompts, params) == alone
        prompts = [replace(prompt, columns={"kill": str(tmp_path / "killed")}) for prompt in prompts]
        again = pool.sample(prompts, params)
        assert [group.completions for group in again] == [group.completions for group in alone]
        assert len((tmp_path / "killed").read_text().splitlines()) == 1  # between two turns of an episode
        assert pool.metrics()["faults/worker"] == 1
    finally:
        pool.close()


@pytest.mark.slow
def test_workers_that_keep_dying_stop_the_run_with_advice(pool, monkeypatch):
    """A start takes seconds, so this worker only counts as dead. That real deaths are noticed has tests of its own."""
    monkeypatch.setattr(pool.faults, "most", 0)
    before, lost = list(pool.workers.actors), []
    monkeypatch.setattr(pool.faults, "on_lost", lambda *what: lost.append(what))
    monkeypatch.setattr(pool.workers, "_get", Mock(side_effect=ray.exceptions.RayActorError()))
    with pytest.raises(
        RolloutError, match=r"\d+ losses since .* the last one .* worker \d: .*lower rollout.workers or"
    ):
        pool.sample(PROMPTS, PARAMS)
    assert [action for *_, action in lost] == ["the run ends"]
    assert pool.workers.actors == before
    monkeypatch.undo()


@pytest.mark.slow
def test_contract_4_a_late_worker_is_replaced_and_its_shard_sampled_again(pool, expected, monkeypatch):
    """Its deadline has passed, so it is killed; the shard goes to its successor, which gives the same tokens."""
    lost: list[tuple] = []
    monkeypatch.setattr(pool.faults, "on_lost", lambda *what: lost.append(what))
    monkeypatch.setattr(pool, "timeout_s", 4.0)  # an honest shard takes a fraction of it, also beside other work
    pool.metrics()
    before, busy = list(pool.workers.actors), call(pool.workers.actors[0], lambda _: time.sleep(600))
    assert pool.sample(PROMPTS, PARAMS) == expected(0)
    assert lost == [("worker 0", "its shard took longer than 4 s", "it is replaced")]
    assert pool.workers.actors[0] is not before[0]
    assert pool.workers.actors[1] is before[1]
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(busy)
    told = pool.metrics()
    assert (told["faults/worker"], told["faults/sampling_seconds"] > 4) == (1, True)
    assert pool.metrics() == {}


@pytest.mark.slow
def test_contract_5_a_stopped_worker_is_named_in_a_publication_and_replaced(pool, policies, expected, monkeypatch):
    lost: list[tuple] = []
    monkeypatch.setattr(pool.faults, "on_lost", lambda *what: lost.append(what))
    monkeypatch.setattr(pool, "sync_timeout_s", 5.0)
    before = list(pool.workers.actors)
    psutil.Process(ray.get(call(before[1], lambda _: os.getpid()))).suspend()
    pool.sync_weights(policies[1].weights(), 1)
    reason = "to take the weights over took longer than 5 s"
    assert lost == [("worker 1", reason, "it is replaced")]
    assert pool.workers.actors[0] is before[0]
    assert pool.sample(PROMPTS, PARAMS) == expected(1)


@pytest.mark.slow
def test_contract_13_every_worker_samples_the_canaries_and_a_new_one_passes_those_of_the_others(pool, expected):
    groups = pool.sample_on_each(PROMPTS[:2], PARAMS)
    local = expected(0)[:2]
    assert groups == {"worker 0": local, "worker 1": local}
    *asked, passed = pool.sync_check
    others = copy.deepcopy(passed)
    for completion in others[0].completions:
        completion.logprobs[0] += 0.1  # as if the others were other samplers
    pool.sync_check = (*asked, others)
    ray.kill(pool.workers.actors[0])
    with pytest.raises(RolloutError, match="worker 0, which is new, samples other canaries than those before it"):
        again(pool)
    assert pool.passed == {1}
    pool.sync_check = (*asked, passed)
    again(pool)
    assert pool.passed == {0, 1}
    assert pool.sample(PROMPTS, PARAMS) == expected(0)


@pytest.mark.long
def test_what_while_waiting_raises_ends_every_wait(pool, policies, monkeypatch):
    """A stop that is asked for while a worker does not answer."""

    class GivenUp(Exception):
        pass

    def stop() -> None:
        polls.append(1)
        if len(polls) == 3:
            raise GivenUp

    monkeypatch.setattr(pool.workers, "while_waiting", stop)
    busy = call(pool.workers.actors[0], lambda _: time.sleep(600))
    for wait in (
        lambda: pool.use_costs(None, Workload(2)),
        lambda: pool.sample(PROMPTS[:2], PARAMS),
        lambda: pool.sync_weights(policies[1].weights(), 1),
    ):
        polls = []
        with pytest.raises(GivenUp):
            wait()
    assert pool.sender.version == 1  # ranks that share the weights have gathered all of them
    with pytest.raises(RolloutError, match="not confirmed by every worker"):
        pool.sample(PROMPTS, PARAMS)
    ray.kill(pool.workers.actors[0])
    monkeypatch.undo()
    del busy


@pytest.mark.slow
def test_contract_5_a_worker_that_dies_while_draft_costs_are_measured_is_replaced(pool, expected):
    ray.kill(pool.workers.actors[0])
    pool.metrics()
    try:
        costs = pool.use_costs(None, Workload(2))
        assert costs.rows == [1, 2]
        assert pool.costs is costs
        assert pool.metrics()["faults/worker"] == 1.0
        assert tokens(pool.sample(PROMPTS, PARAMS)) == tokens(expected(0))  # the new worker holds the weights
    finally:
        pool.costs = None


# ---- Ray itself dies ----


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_dead_process_of_ray_is_named_before_it_takes_this_one_along(pool, policies, monkeypatch, name):
    with subprocess.Popen(["sleep", "600"]) as process:
        monkeypatch.setitem(pool.cluster.processes, name, psutil.Process(process.pid))
        pool.cluster.check(ask=True)
        process.kill()  # now it is a zombie, like a raylet for which no process waits
        for use in (lambda: pool.sample(PROMPTS, PARAMS), lambda: pool.sync_weights(policies[1].weights(), 1)):
            with pytest.raises(RolloutError, match=rf"Ray's {name} \(process {process.pid}\) has died.*--resume auto"):
                use()


@pytest.mark.slow
def test_nothing_of_a_pool_stays_in_the_memory_that_dies_with_the_raylet(pool):
    """Ray ends a driver at once that owns something there."""
    gc.collect()  # errors of the tests before this one hold their frames
    owned = ray._private.worker.global_worker.core_worker.get_all_reference_counts()
    assert [reference for reference in owned.values() if reference["local"] > 0] == []


# ---- other users of the machine ----

INTRUDER = """
import os, sys
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient

def overwrites(**variables):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)
    os.environ |= variables
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        GcsClient(address=sys.argv[1]).internal_kv_put(b"actor class", b"pickled", True, b"fun", 5)
    except Exception as error:
        return type(error).__name__
    return "yes"

print(overwrites(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=sys.argv[2]))
print(overwrites())
print(overwrites(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a guess"))
"""


@pytest.mark.slow
def test_a_client_without_the_token_is_refused(pool):
    """Whoever may write there has a worker load a pickled class of his. Who knows the token is let in."""
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert len(token.read_text()) >= 32
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert (
        token.parent == Path(ray._private.worker._global_node.get_temp_dir_path()).parent
    )  # sockets, logs, spilled objects
    words = [ray.get_runtime_context().gcs_address, str(token)]
    done = subprocess.run([sys.executable, "-c", INTRUDER, *words], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["yes", "AuthenticationError", "AuthenticationError"], done.stderr


def test_a_cluster_that_the_user_names_keeps_the_users_settings(monkeypatch):
    seen: list[dict] = []
    monkeypatch.setattr(ray, "init", lambda **given: seen.append(given | dict(os.environ)))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/somebody/token")
    start_ray(1, "192.0.2.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.2:6379")
    start_ray(1)
    assert [(s["address"], s["RAY_AUTH_MODE"], s["RAY_AUTH_TOKEN_PATH"]) for s in seen] == [
        ("192.0.2.1:6379", "token", "/home/somebody/token"),
        ("192.0.2.2:6379", "token", "/home/somebody/token"),
    ]


def test_a_ray_that_does_not_start_is_named_and_leaves_nothing(monkeypatch):
    """Ray raises a bare Exception, and forgets what it has started."""
    started: list[subprocess.Popen] = []

    def init(_temp_dir: str, **_) -> None:
        started.append(subprocess.Popen([sys.executable, "-c", "input()", _temp_dir], stdin=subprocess.PIPE))
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(rollout.workers.cluster, "_seclusion", None)
    for name in rollout.workers.cluster.Seclusion.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rollout.workers.cluster.Seclusion, "_tell_ray", lambda _: None)  # the shared cluster goes on
    with pytest.raises(RolloutError, match=r"Ray did not start: The current node timed out.*rollout.workers=0"):
        start_ray(1)
    [process] = started
    assert process.wait(timeout=20) != 0
    assert not Path(process.args[-1]).parent.exists()
    assert "RAY_AUTH_MODE" not in os.environ


# ---- processes ----

SCRIPT = """
import ctypes, os, signal, sys, threading
import ray
from policies.policy import Policy, checksum
from rollout.group import Prompt
from rollout.workers.kinds import PoolOptions, open_pool
from rollout.sampling import SamplingParams

library, action, over, seen = ctypes.CDLL(None), ctypes.create_string_buffer(512), threading.Event(), set()

def look():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        library.sigaction(int(number), None, action)  # the address of the handler comes first
        seen.add((number, action.raw[:8], signal.getsignal(number)))

def watch():
    while not over.wait(0.001):
        look()

signal.signal(signal.SIGTERM, lambda *_: None)
look()
usual, watcher = set(seen), threading.Thread(target=watch)
watcher.start()
policy, params = Policy.load(sys.argv[1]), SamplingParams(2, max_completion_tokens=4)
pool = open_pool(policy, PoolOptions(workers=1))
print("sampled", len(pool.sample([Prompt("p", "", [3, 4])], params)), flush=True)
input()
pool.close()
over.set()
watcher.join()
look()
print("handlers", seen - usual, flush=True)
print("closed", os.environ.get("RAY_AUTH_MODE"), flush=True)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
pool = open_pool(policy, PoolOptions(workers=1))
print("sampling", flush=True)
while True:  # until it is interrupted
    pool.sample([Prompt("p", "", [3, 4])] * 8, params)
"""


@pytest.fixture
def script(policies, tmp_path) -> Iterator[subprocess.Popen]:
    """A user's script with a pool of its own, in a process group of its own."""
    policies[0].save(tmp_path / "policy")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "RAY_AUTH"))
    }
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "policy"],
        cwd=Path(__file__).parents[3],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),
        text=True,
        start_new_session=True,
    )
    yield process
    process.kill()
    process.wait()


def line(script: subprocess.Popen, word: str) -> str:
    """What the script prints after this word."""
    for text in script.stdout:
        if text.startswith(word):
            return text.removeprefix(word).strip()
    raise AssertionError(f"the script ended before it said {word!r}")


def ray_processes(script: subprocess.Popen) -> list[psutil.Process]:
    """Everything that the script started, by descent and by the Ray session that their command lines name."""
    found = set(psutil.Process(script.pid).children(recursive=True))
    assert {"raylet", "gcs_server"} <= {process.name() for process in found}
    [session] = {word for process in found for word in process.cmdline() if word.startswith("--session-name=")}
    for process in psutil.process_iter(["cmdline"]):
        if any(session.removeprefix("--session-name=") in word for word in process.info["cmdline"] or ()):
            found.add(process)
    return list(found)


def is_loopback(ip: str) -> bool:
    address = ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def begin_second_pool(script: subprocess.Popen) -> None:
    """Close the first pool. Ray had no handler of its own while it started, worked and ended, neither in Python nor in
    C++, of which Python does not know."""
    script.stdin.write("\n")
    script.stdin.flush()
    handlers = line(script, "handlers")
    assert handlers == "set()" or sys.platform != "linux"  # the form of a signal's action is the system's own
    assert line(script, "closed") == "None"


@pytest.mark.slow
def test_a_cluster_listens_on_loopback_only_and_neither_close_nor_a_signal_leaves_anything_behind(script):
    """The signal reaches the script alone. test_parse.py sends one to the group of a run with workers."""
    line(script, "sampled 1")
    running = ray_processes(script)
    listening = set()
    for process in running:
        sockets = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        listening |= {socket.laddr.ip for socket in sockets}
        command = process.cmdline()
        if any(word.endswith("dashboard/dashboard.py") for word in command):
            assert "--disable-frontend" in command  # Ray starts it without, for its usage statistics
            assert sockets == []
    [folder] = {word.partition("=")[2] for process in running for word in process.cmdline() if "--temp_dir=" in word}
    assert Path(folder).is_dir()
    assert listening
    assert [ip for ip in listening if not is_loopback(ip)] == []
    begin_second_pool(script)
    assert psutil.wait_procs(running, timeout=20)[1] == []
    assert not Path(folder).parent.exists()
    line(script, "sampling")
    running = ray_processes(script)
    script.send_signal(signal.SIGINT)
    assert script.wait(timeout=60) != 0
    assert psutil.wait_procs(running, timeout=30)[1] == []


@pytest.mark.long
@pytest.mark.parametrize(("number", "send"), [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_a_signal_while_a_second_pool_samples_leaves_no_process(script, number, send):
    """A terminal sends Ctrl-C to the whole group."""
    line(script, "sampled 1")
    begin_second_pool(script)
    line(script, "sampling")
    running = ray_processes(script)
    send(script.pid, number)
    assert script.wait(timeout=60) != 0
    assert psutil.wait_procs(running, timeout=30)[1] == []


@pytest.mark.slow
def test_contract_4_requests_of_agents_are_decoded_where_their_caches_are_and_outlive_a_worker(pool, policies):
    expected = talked(Serving(Engine(policies[0]).decoder, replace(BASE, draft_tokens=0)))

    asked = replace(BASE, draft_tokens=2), 10_000, 4
    relay = pool.relay(*asked)
    found = talked(relay)
    assert set(relay.actor_of.values()) == set(pool.workers.actors)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert all((one.cached > 0) == (turn % TURNS > 0) for turn, one in enumerate(found))  # each found its own worker
    pool.metrics()
    relay, killed = pool.relay(*asked), pool.workers.actors[1]
    found = talked(relay, lambda rounds: ray.kill(killed) if rounds == 4 else None)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert pool.metrics()["faults/worker"] == 1
    pool.sync_weights(policies[1].weights(), 1)
    with pytest.raises(RolloutError, match="holds policy version 1, but version 0 was asked for"):
        talked(relay)


@pytest.mark.long
def test_contract_5_weights_that_the_learner_updates_while_they_are_sent_again_are_sent_once_more(
    cluster, random_policy, monkeypatch
):
    """rollout.staleness: a thread gives the weights to a new worker, while the learner makes its copy and goes on. The
    update comes after the digest, and before the bytes are in shared memory."""
    policy = random_policy(24)
    pool = open_pool(policy, PoolOptions(workers=1, prompts_per_shard=2))
    try:
        expected, put, sent = pool.sample(PROMPTS, PARAMS), pool.cluster.put, []

        def torn(message, *arguments):
            if not sent:
                pool.keep_weights()
                with torch.no_grad():
                    for parameter in policy.parameters():
                        parameter.add_(1)
            sent.append(message)
            return put(message, *arguments)

        monkeypatch.setattr(pool.cluster, "put", torn)
        ray.kill(pool.workers.actors[0])
        assert pool.sample(PROMPTS, PARAMS) == expected
        assert len(sent) == 2
        monkeypatch.setattr(pool, "sync_timeout_s", 3.0)
        monkeypatch.setattr(pool.sender, "difference", lambda held: "trunk.norm")  # and one that never holds them
        ray.kill(pool.workers.actors[0])
        with pytest.raises(RolloutError, match="does not hold what was published as version 0: .* is trunk.norm"):
            pool.sample(PROMPTS, PARAMS)
    finally:
        pool.close()
