"""A pool whose workers are Ray actors: it hands shards out to them and publishes weights."""

from __future__ import annotations

import time
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor

from policies.devices import empty_cache
from policies.policy import Policy
from rollout.cost_table import CostTable, Workload
from rollout.faults import Faults, OnFinished, RolloutError
from rollout.group import Prompt, RolloutGroup, shards
from rollout.places import Places
from rollout.pool import Pool, PoolOptions
from rollout.relay import Relay
from rollout.sampling import SamplingParams
from rollout.weight_sync.checksums import Held
from rollout.weight_sync.message import Message, Moved, Sender
from rollout.weight_sync.sync_check import sync_check_difference
from rollout.workers.actors import START_TIMEOUT_S, Call, Lost, Workers
from rollout.workers.cluster import Cluster

METRICS = {
    "faults/worker": "Ray workers replaced because they died, or were late with a shard or a weight sync, count",
    "faults/node": "Ray workers that were replaced since their machine left the cluster, count",
    "faults/object_store": "times that Ray's object store was full and was waited for, count",
    "time/sync_transfer": "sending the weights to the Ray workers, until all confirm them; part of time/sync, seconds",
}


@dataclass
class Given:
    """A call by which a worker gives its weights to another."""

    to: int


class Lengths:
    """How long the longest completion of each prompt was when it was last sampled.

    Shards that should take longest begin first, so that at the end few workers wait for one. What a shard holds, and so
    every token, is the same in any order.

    >>> lengths.order([[short], [long, short], [new]])      # a prompt that was never sampled counts as the mean
    [1, 2, 0]
    """

    def __init__(self) -> None:
        self.longest: dict[str, int] = {}

    def order(self, shards: Sequence[Sequence[Prompt]]) -> list[int]:
        """The numbers of the shards, in the order in which they begin."""
        usual = fmean(self.longest.values()) if self.longest else 0.0
        expected = [max(self.longest.get(prompt.prompt_id, usual) for prompt in shard) for shard in shards]
        return sorted(range(len(shards)), key=lambda number: -expected[number])

    def saw(self, groups: Sequence[RolloutGroup]) -> None:
        """Note the lengths of groups that were just sampled."""
        for group in groups:
            if group.completions:
                self.longest[group.prompt.prompt_id] = max(len(c.token_ids) for c in group.completions)


class RayPool(Pool):
    """Ray actors with an engine each. A worker that dies or is late is replaced, and its shard is sampled again, which
    gives the same tokens. Raises RolloutError when workers are lost again and again, or when Ray itself dies.

    No copy of the weights is kept. A new worker gets them from another one, or else from the learner's own tensors,
    which must still be those that were published.
    """

    def __init__(self, policy: Policy, options: PoolOptions) -> None:
        import ray

        dtype = options.dtype
        self.prompts_per_shard, self.precision, self.check_stop = options.prompts_per_shard, dtype, options.check_stop
        self.policy = policy
        self.faults, self.lengths = Faults(options.on_lost), Lengths()
        self.timeout_s, self.sync_timeout_s = options.timeout_s, options.sync_timeout_s
        places = Places(options.workers, options.threads, options.gpus, options.placement_timeout_s, options.colocate)
        self.in_turn, learners = places.taken(policy)
        self.cluster = Cluster(places.count * places.threads, options.address, learners)
        if not self.cluster.ask(ray.cluster_resources).get("GPU"):
            places = replace(places, gpus=0.0)
        precisions = (str(kind).removeprefix("torch.") for kind in (next(policy.parameters()).dtype, dtype))
        arguments = (policy.skeleton(), *precisions, "auto" if places.gpus else "cpu", places.threads, options.copies)
        self.sender = Sender(cast=dtype if policy.backend == "transformers" else None)
        self.synced: int | None = None  # the version that the confirmed workers hold
        self.confirmed: set[int] = set()
        self.costs: CostTable | None = None
        # Prompts and parameters of the canaries of this version, and what a worker has sampled that passed them.
        self.sync_check: tuple[Sequence[Prompt], SamplingParams, list[RolloutGroup]] | None = None
        self.passed: set[int] = set()  # the workers that have passed them
        try:
            self.workers = Workers(places, arguments, self.cluster, self.check_stop, self.faults, options.on_ready)
            self.workers.wait_for(places.count)
            self.sync_weights(policy.synced_weights(), 0)
        except BaseException:  # also a stop of the run: a pool whose making failed can be closed only here
            self.close()
            raise

    def sync_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Every worker that is there confirms the digests of what it holds before any worker samples with it
        (contract 5). One that starts later gets the weights then.

        Where the policy has adapters, a worker that holds the version before gets A and B, and what else is trained. If
        this is cut short, no worker samples before the next publication.
        """
        self.synced, self.sync_check, self.asleep = None, None, False
        self.faults.on_weight_sync()
        if self.in_turn:
            empty_cache()
        started = time.monotonic()
        self._stream(self.sender.messages(weights, version), self.workers.there() or self.workers.wait_for(1))
        self._settle_workers()
        self.faults.unreported["time/sync_transfer"] += time.monotonic() - started
        self.synced = version

    def _stream(self, messages: Iterator[Message], to: Sequence[int], *, again: bool = False) -> None:
        """These workers take a publication over, all at once and part by part. Those are not confirmed afterwards that
        were lost, or that do not hold what the publication follows. What is sent `again` may have moved between its
        digest and its arrival: then Moved is raised.

        A part goes through shared memory, once for each node, and leaves it before the next one; see cluster.py. The
        time of its workers begins when it is there.
        """
        former, self.confirmed, self.passed = self.confirmed, set(), set()
        held: dict[int, Held] = {}
        late = f"to take the weights over took longer than {self.sync_timeout_s:g} s"
        taking, since = set(to), None
        try:
            for message in messages:
                if message.first:
                    since = message.since
                    taking &= former if since is not None else taking
                if not taking:
                    break
                limit_s = self.sync_timeout_s
                sent = self.cluster.put(message, self.faults, limit_s, self.workers.while_waiting)
                self.faults.unreported["sync/bytes"] += message.bytes
                calls = {self.workers.call(i, "sync_weights", sent): Call(i, None, limit_s, late) for i in taking}
                while calls:
                    for call, answer, lost in self.workers.ended(calls):
                        if lost:
                            self._replace(call, lost)
                            taking.discard(call.worker)
                        held[call.worker] = _sound(answer)
                del sent
        finally:
            for _ in messages:  # ranks that share the weights are gathering them
                pass
        for i in taking:
            if (wrong := self.sender.difference(held[i])) is None:
                self._confirm(i)
            elif again:
                raise Moved(self._refusal(i, wrong))
            elif since is None:
                raise RolloutError(self._refusal(i, wrong))

    def _stream_again(self, to: Sequence[int]) -> None:
        """Publish once more from the learner's tensors. Some move in a forward of the learner and come back (peft's
        routed experts). With rollout.staleness the learner may update them in another thread while they are read: then
        `keep` has made a copy."""
        deadline = time.monotonic() + self.sync_timeout_s
        while True:
            try:
                return self._stream(self.sender.again(), to, again=True)
            except Moved:
                if time.monotonic() > deadline:
                    raise
                self.workers.pause()

    def _refusal(self, i: int, wrong: str) -> str:
        return (
            f"worker {i} does not hold what was published as version {self.sender.version}: the first tensor that "
            f"differs is {wrong}"
        )

    def _confirm(self, i: int) -> None:
        self.confirmed.add(i)
        self.faults.done(("weights", i))

    def _replace(self, call: Call, lost: Lost, work: Hashable = None) -> None:
        for those in (self.confirmed, self.passed):
            those.discard(call.worker)
        self.workers.replace(call, lost, work)

    def _settle_workers(self) -> None:
        """Every worker that is there has the weights and has passed the canaries."""
        for _ in self._done({}, 0.0, "", everyone=True):
            pass

    def _done(
        self, jobs: Mapping[int, tuple[str, tuple]], limit_s: float, late: str, *, everyone: bool = False
    ) -> Generator[tuple[int, Any], None, None]:
        """Has workers do `jobs` in this order, each a method and its arguments. Returns the number of a job and its
        answer, as they come. A job whose worker is lost, or takes longer than `limit_s`, is done by another one.

        A worker without the weights gets them from one that has no job, and passes the canaries that the others have
        passed; with `everyone` this ends only when all have.
        """
        waiting = list(jobs.items())[::-1]
        calls: dict[Any, Call] = {}
        try:
            while waiting or calls or (everyone and not self._all_in()):
                self._hand_out(waiting, calls, limit_s, late, everyone)
                for call, answer, lost in self.workers.ended(calls) if calls else ():
                    if isinstance(call.what, Given):
                        self._given(call, answer, lost)
                    elif lost:
                        self._replace(call, lost, ("job", call.what[0]) if call.what else None)
                        waiting += [call.what] if call.what else []
                    elif call.what:
                        self.faults.done(("job", call.what[0]))
                        yield call.what[0], answer
                    else:
                        assert self.sync_check is not None
                        new = f"worker {call.worker}, which is new,"
                        if fault := sync_check_difference(_sound(answer), self.sync_check[2], self.precision):
                            raise RolloutError(f"{new} {fault} (version {self.synced})")
                        self.passed.add(call.worker)
        finally:
            for call in calls.values():
                if isinstance(call.what, Given):  # it would go on taking old weights
                    self.workers.restart(call.what.to)

    @property
    def ready(self) -> set[int]:
        """Gives the workers that may sample."""
        return self.passed if self.sync_check else self.confirmed

    def _all_in(self) -> bool:
        return bool(self.ready) and self.ready.issuperset(self.workers.there())

    def _hand_out(self, waiting: list, calls: dict[Any, Call], limit_s: float, late: str, everyone: bool) -> None:
        """Something to do for each worker that has nothing to do."""
        busy = {call.worker for call in calls.values()}
        busy |= {call.what.to for call in calls.values() if isinstance(call.what, Given)}
        free = [i for i in self.workers.there() if i not in busy]
        lacking = [i for i in free if i not in self.confirmed]
        if not self.confirmed and not busy:
            return self._stream_again(lacking) if lacking else self.workers.pause()

        def ask(i: int, what: object, limit_s: float, late: str, method: str, *arguments: object) -> None:
            calls[self.workers.call(i, method, *arguments)] = Call(i, what, limit_s, late)

        limit = f"took longer than {self.sync_timeout_s:g} s"
        for i in sorted(self.confirmed.intersection(free)):
            if self.sync_check and i not in self.passed:
                prompts, params, _ = self.sync_check
                arguments = list(prompts), params, self.sender.version, self.costs
                ask(i, None, self.sync_timeout_s, f"its canaries {limit}", "sample", *arguments)
            elif lacking and (waiting or everyone):
                taker = lacking.pop(0)
                told = f"to give worker {taker} its weights worker {i} {limit}"
                ask(i, Given(taker), self.sync_timeout_s, told, "give", self.workers.actors[taker])
            elif waiting:
                job = waiting.pop()
                method, arguments = job[1]
                ask(i, job, limit_s, late, method, *arguments)

    def _given(self, call: Call, answer: tuple[Held | Lost, int] | None, lost: Lost | None) -> None:
        """Tells what has become of two workers of which one has given the other its weights."""
        taker = call.what.to
        if lost:
            self._replace(call, lost)
            _, why = lost
            if why == call.late:  # nobody knows which of them does not answer
                self._replace(replace(call, worker=taker), lost)
            return  # else the taker gets the weights from another worker
        held, sent = _sound(answer)
        self.faults.unreported["sync/bytes"] += sent
        if isinstance(held, tuple):
            self._replace(replace(call, worker=taker), held)
        elif wrong := self.sender.difference(held):
            raise RolloutError(self._refusal(taker, wrong))
        else:
            self._confirm(taker)

    def _version(self) -> int:
        if self.synced is None:
            raise RolloutError("the last weight sync was not confirmed by every worker: sync the weights again")
        return self.synced

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        self.check_stop()
        version, parts = self._version(), shards(prompts, self.prompts_per_shard)
        order = self.lengths.order(parts)
        jobs = {number: ("sample", (list(parts[number]), params, version, self.costs)) for number in order}
        done: dict[int, list[RolloutGroup]] = {}
        faults: dict[int, str] = {}
        late = f"its shard took longer than {self.timeout_s:g} s"
        with closing(self._done(jobs, self.timeout_s, late)) as answers:
            for number, answer in answers:
                if isinstance(answer, RolloutError):
                    faults[number], done[number] = str(answer), answer.groups
                else:
                    done[number] = answer
                    if on_finished:
                        on_finished(len(parts[number]) * params.group_size)
        self.lengths.saw(groups := [group for number in sorted(done) for group in done[number]])
        if faults:
            raise RolloutError("\n".join(faults[number] for number in sorted(faults)), groups)
        return groups

    def sample_on_each(self, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, list[RolloutGroup]]:
        """Sample on each worker that holds the weights; one that is lost meanwhile is replaced, and passes them
        later."""
        self.check_stop()
        version, self.sync_check, groups = self._version(), None, dict[int, list[RolloutGroup]]()
        late = f"its canaries took longer than {self.sync_timeout_s:g} s"
        while not groups:
            self._settle_workers()
            arguments, limit_s = (list(prompts), params, version, self.costs), self.sync_timeout_s
            calls = {self.workers.call(i, "sample", *arguments): Call(i, 0, limit_s, late) for i in self.confirmed}
            while calls:
                for call, answer, lost in self.workers.ended(calls):
                    if lost:
                        self._replace(call, lost)
                    else:
                        groups[call.worker] = _sound(answer)
        self.sync_check, self.passed = (prompts, params, groups[min(groups)]), set(groups)
        return {f"worker {i}": groups[i] for i in sorted(groups)}

    def relay(self, params: SamplingParams, cache_tokens: int, max_rows: int) -> Relay:
        """Returns a relay whose requests the workers answer as they come."""
        from rollout.workers.ray_relay import RayRelay

        self.check_stop()
        return RayRelay(self, self._version(), params, cache_tokens, max_rows)

    def keep_weights(self) -> None:
        self.sender.copy_weights()

    def sleep(self) -> None:
        if not self.in_turn or self.asleep:
            return
        self.synced, self.asleep = None, True
        late = f"it took longer than {self.sync_timeout_s:g} s to leave the GPU"
        calls = {self.workers.call(i, "sleep"): Call(i, None, self.sync_timeout_s, late) for i in self.confirmed}
        while calls:
            for call, _, lost in self.workers.ended(calls):
                if lost:
                    self._replace(call, lost)

    def use_costs(self, costs: CostTable | None, work: Workload) -> CostTable:
        """One worker measures them alone, with the threads that a worker has."""
        if costs is None:
            limit = max(self.timeout_s, START_TIMEOUT_S) * (3 if work.graphs else 1)  # they may have to be compiled
            late = f"no answer to measure_costs after {limit:g} s"
            [(_, costs)] = self._done({0: ("measure_costs", (work,))}, limit, late)
        self.costs = _sound(costs)
        return self.costs

    def metrics(self) -> dict[str, float]:
        return self.faults.metrics()

    def close(self) -> None:
        with suppress(RolloutError, AttributeError):  # if the cluster has died, no worker is left
            self.cluster.check()
            self.workers.close()
        self.cluster.close()


def _sound(answer: object) -> Any:
    """Passes on what a worker has answered, unless it is an error."""
    if isinstance(answer, RolloutError):
        raise answer
    return answer
