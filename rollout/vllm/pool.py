"""vLLM as a pool: the same prompts, parameters and groups as with our own engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.tensor import DTensor

from policies.attention import sees_prompts_whole
from policies.policy import Policy
from policies.routing.heads import DynamicHeadsConfig
from policies.synced_weights import SyncedWeights
from rollout.cost_table import CostTable, Workload
from rollout.decoding.stage import Stage
from rollout.environments.episodes import Episodes
from rollout.faults import Faults, OnFinished, RolloutError, not_finite, prompt_fault
from rollout.group import Prompt, RolloutGroup
from rollout.places import Places, visible_gpus
from rollout.pool import Pool, PoolOptions
from rollout.relay import Relay
from rollout.sampling import SamplingParams
from rollout.vllm import weights as wire
from rollout.vllm.client import Client, Lost
from rollout.vllm.completions import Row
from rollout.vllm.process import VLLMProcess
from rollout.vllm.settings import VLLMSettings
from rollout.weight_sync.sync_check import sync_check_difference

METRICS = {"faults/vllm": "restarts: vLLM died, or was late with a forward or a weight sync, count"}
LOAD_S = 600.0  # vLLM imports itself and makes the model
PAUSE_S = 0.2  # until weights are read again that were moving
LOST_ELSEWHERE = "See its log, start it again at the address in rollout.vllm.url, and go on with --resume auto"
T = TypeVar("T")


class VLLMPool(Pool):
    """A Pool (see rollout/pool.py) whose engine is vLLM's, in a process of its own.

    The prompts of a call are sampled together; vLLM batches them by itself. With an environment every turn of the
    episodes is a request, for which vLLM finds what it has read before in its prefix cache.

    Its noise is not keyed as ours is: the tokens are others than those of our engine, and other ones with drafts than
    without. The same call with the same weights gives the same bits on a CPU.

    A server of our own that dies or hangs is replaced. The new one gets the weights that were published last, passes
    the canaries that the lost one has passed, and does all of the lost call again. The weights come from the learner's
    own tensors, which must still be those that were published. `on_lost` gets each loss; when there were too many since
    the last publication, RolloutError is raised. A server at `settings.url` is not ours to start: its loss is raised.
    """

    def __init__(self, policy: Policy, options: PoolOptions) -> None:
        assert isinstance(options.vllm, VLLMSettings)
        settings = options.vllm
        self.settings, self.policy, self.context = settings, policy, policy.max_length
        if isinstance(policy.config, DynamicHeadsConfig):
            raise RolloutError("rollout.backend=vllm: vLLM computes all attention heads, this policy chooses some")
        if sees_prompts_whole(policy.config):
            raise RolloutError("rollout.backend=vllm: vLLM reads prompts causally, and this policy sees them whole")
        self.precision, self.threads, self.check_stop = options.dtype, options.threads, options.check_stop
        if settings.draft_tokens and policy.mtp is None:
            raise RolloutError(
                f"rollout.draft_tokens={settings.draft_tokens}, but this policy has no MTP head; "
                "set it to 0, or load the policy with a draft head"
            )
        self.stage = Stage(policy.tokenizer)
        self.faults = Faults(options.on_lost)
        self.version: int | None = None  # that vLLM has confirmed
        self.updates = wire.Updates(policy, head=settings.draft_tokens > 0)
        self.checksums: dict[str, str] = {}  # of all that was published, by its name in the layout
        self.synced: tuple[SyncedWeights, int] | None = None  # the learner's tensors, or a copy of them
        self.sync_check: tuple[Sequence[Prompt], SamplingParams, list[RolloutGroup]] | None = None  # of this version
        self.process: VLLMProcess | None = None
        # GPUs that are not the learner's where this machine has any, else its own, in turn unless it samples ahead.
        in_turn, learners = Places(1, options.threads, 1.0, 0.0, options.colocate).taken(policy)
        self.gpus = visible_gpus(learners) if learners else ""
        self.in_turn = in_turn and settings.url is None
        self._is_lost = False
        try:
            self._open()
            self.sync_weights(policy.synced_weights(), 0)
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """A server with the model, whose weights are published next."""
        self._end()
        url, token, why = self.settings.url, self.settings.token, lambda: LOST_ELSEWHERE
        if url is None:
            settings = self.settings
            self.process = VLLMProcess(settings.python, settings.log, self.threads, self.check_stop, self.gpus)
            url, token, why = self.process.url, self.process.token, self.process.told
        self.client = Client(url, token, self.check_stop, why)
        on_cpu = self.client.state()["on_cpu"]
        self.in_turn &= not on_cpu
        load = self.settings.load(self.policy, self.precision, self.context, on_cpu, not self.gpus, self.in_turn)
        [self.state] = self.client.post("/load", load, limit_s=LOAD_S)  # what the server says of itself
        self.context = min(self.context, self.state["context"])
        self._is_lost = False

    def _mended(self, work: str, act: Callable[[], T]) -> T:
        """Calls `act` and gives what it returns; again, with a new server without weights, where the server is lost."""
        while True:
            began = time.monotonic()
            try:
                if self._is_lost:
                    self._open()
                answer = act()
            except Lost as lost:
                if self.settings.url is not None:
                    raise
                self._lose(lost.how, work, began)
            else:
                self.faults.done(work)
                return answer

    def _lose(self, how: str, work: str, began: float) -> None:
        self._is_lost, self.version = True, None
        self.updates.forget()
        why = f"{how}; {self.process.state()}" if self.process else how
        again = "it is started again"
        self.faults.lost("vllm", "vLLM", f"{why} (its log: {self.settings.log})", work=work, since=began, action=again)

    def sync_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """vLLM confirms the digest of every tensor that it was sent, and that it has loaded all of them, before it
        samples with them (contract 5)."""
        self.faults.on_weight_sync()
        self.version = self.synced = self.sync_check = None
        self.asleep = False
        source = SyncedWeights.of(weights)
        try:
            update = self.updates.next_update(source)  # ranks that share the weights gather them here, once

            def act() -> None:
                fits = update.whole or self.updates.follows
                self._send(update if fits else self._everything(source), version)

            self._mended("publish", act)
        except BaseException:
            self.updates.forget()
            raise
        self.synced = source, version

    def _everything(self, source: SyncedWeights) -> wire.Update:
        """All weights, for a server that holds nothing. Raises RolloutError where other ranks would have to take
        part."""
        if any(isinstance(tensor, DTensor) for tensor in source.tensors.values()):
            raise RolloutError(
                "vLLM was lost and started again, but the weights are spread over several ranks, which cannot publish "
                "them again in the middle of a step: go on with --resume auto"
            )
        self.updates.forget()
        return self.updates.next_update(source)

    def _send(self, update: wire.Update, version: int) -> None:
        held, unused = self._upload(update, version)
        wrong = wire.first_difference(update.tensors, held) or next(iter(unused), None)
        if wrong is not None:
            raise RolloutError(
                f"vLLM does not hold what was published as version {version}: the first tensor that differs is {wrong}"
            )
        self.checksums = held if update.whole else self.checksums | held
        self.version = version

    def _upload(self, update: wire.Update, version: int) -> tuple[dict[str, str], list[str]]:
        header, size = update.header() | {"version": version}, wire.length(update.tensors)
        parts = wire.stream(update.tensors)
        answer = self.client.upload("/publish", header, parts, size, limit_s=self.settings.sync_s)
        self.faults.unreported["sync/bytes"] += size
        return answer["held"], answer["unused"]

    def _sync_again(self) -> None:
        """Sync the last weights to a new server, bit for bit. With rollout.staleness the learner may be about to change
        them in another thread: then `keep` has made a copy, which is read next."""
        deadline = time.monotonic() + self.settings.sync_s
        while True:
            assert self.synced is not None
            source, version = self.synced
            if self._upload(self._everything(source), version)[0] == self.checksums:
                break
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"vLLM was lost and started again, and the learner no longer has the weights of version {version}: "
                    "go on with --resume auto"
                )
            self.check_stop()
            time.sleep(PAUSE_S)
        self.version = version
        if self.sync_check is not None:
            prompts, params, passed = self.sync_check
            if fault := sync_check_difference(self._answer(prompts, params)[0], passed, self.precision):
                raise RolloutError(f"vLLM, which was started again, {fault} (version {version})")

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        """One group per prompt, as `Engine.sample` gives them, with its errors. Raises RolloutError for parameters that
        vLLM cannot sample with, and where its server fails or is lost too often."""
        self.check_stop()
        self._synced_version()
        self._check(params)
        told = 0

        def tell(ended: int) -> None:
            nonlocal told
            if on_finished and ended > told:  # a new server begins at 0 again
                on_finished(ended - told)
                told = ended

        def act() -> tuple[list[RolloutGroup], list[str]]:
            if self.version is None:
                self._sync_again()
            return self._answer(prompts, params, tell)

        groups, faults = self._mended("sample", act)
        if fault := not_finite(groups):
            faults.append(fault)
        if faults:
            raise RolloutError("\n".join(faults), groups)
        return groups

    def _synced_version(self) -> int:
        if self.synced is None:
            raise RolloutError("vLLM has not confirmed the last weight sync: sync the weights again")
        return self.synced[1]

    def _answer(
        self, prompts: Sequence[Prompt], params: SamplingParams, tell: Callable[[int], None] = lambda ended: None
    ) -> tuple[list[RolloutGroup], list[str]]:
        """The groups, and why other prompts cannot be continued. `tell` gets the number of completions that have ended.
        Raises Lost where the server is.

        The turns of all rows are sampled together, so that the same call has the same batches, and the same bits.
        """
        version = self.version
        assert version is not None
        episodes, prompts, faults = self.stage.begin_episodes(prompts, params, partial(self._fault, params))
        size, drafts = params.group_size, self.settings.draft_tokens
        rows = [Row(prompt, sample, drafts) for prompt in prompts for sample in range(size)]
        live, goes_on = list(range(len(rows))), False
        while live:
            # Turns that end are no completions.
            turns = self._turn([rows[i] for i in live], params, goes_on, (lambda ended: None) if episodes else tell)
            for i, turn in zip(live, turns, strict=True):
                rows[i].add(turn)
            live, goes_on = self._go_on(rows, live, episodes) if episodes else [], True
            tell(len(rows) - len(live))
        made = [row.completion(self.policy.tokenizer, version, params.temperature) for row in rows]
        groups = [RolloutGroup(prompt, made[i * size : (i + 1) * size]) for i, prompt in enumerate(prompts)]
        if episodes:
            episodes.finish(groups)
        return groups, faults

    def _go_on(self, rows: Sequence[Row], live: Sequence[int], episodes: Episodes) -> list[int]:
        """The rows whose episodes go on, after what their tools wrote. Waits for the tools."""
        episodes.ask({i: rows[i].ids for i in live if rows[i].reason == "stop"})
        written = {i: ids for i, ids in episodes.written(self.check_stop).items() if ids is not None}
        for i, ids in written.items():
            rows[i].write(ids)
        return sorted(written)

    def _turn(
        self, rows: Sequence[Row], params: SamplingParams, goes_on: bool, tell: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        job = {
            "version": self.version,
            "rows": [row.request(params) for row in rows],
            "goes_on": goes_on,
            "temperature": params.temperature,
            "stop_token_ids": list(params.stop_token_ids),
        }
        turns: list[dict[str, Any]] = []
        for answer in self.client.post("/sample", job, limit_s=self.settings.silence_s):
            turns = answer.get("completions", turns)
            tell(len(turns) or answer["ended"])
        if len(turns) != len(rows):
            raise RolloutError(f"vLLM at {self.client.url} gave {len(turns)} completions, not {len(rows)}")
        return turns

    def _fault(self, params: SamplingParams, prompt: Prompt) -> str | None:
        vocabulary = self.policy.config.get_text_config(decoder=True).vocab_size
        return prompt_fault(prompt, params, vocabulary, self.context)

    def sample_on_each(self, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, list[RolloutGroup]]:
        self.sync_check = None
        groups = self.sample(prompts, params)
        self.sync_check = prompts, params, groups
        return {"vLLM": groups}

    def relay(self, params: SamplingParams, cache_tokens: int, max_rows: int) -> Relay:
        """Returns a relay whose requests vLLM answers as they come. Raises RolloutError for parameters that it cannot
        sample with."""
        from rollout.vllm.relay import VLLMRelay

        self.check_stop()
        self._check(params)
        return VLLMRelay(self, self._synced_version(), params, max_rows)

    def keep_weights(self) -> None:
        if self.synced is not None:
            source, version = self.synced
            self.synced = source.copy(), version

    def sleep(self) -> None:
        """vLLM leaves the GPU that it shares with the learner. Experimental: never run on a GPU."""
        if not self.in_turn or self.synced is None:
            return
        self.version, self.synced, self.asleep = None, None, True
        self._mended("sleep", lambda: list(self.client.post("/sleep", {}, limit_s=self.settings.sync_s)))

    def _check(self, params: SamplingParams) -> None:
        params.check()
        drafts = self.settings.draft_tokens
        vocabulary = self.policy.config.get_text_config(decoder=True).vocab_size
        if (params.draft_tokens or 0) != drafts:
            raise RolloutError(
                f"draft_tokens={params.draft_tokens}: this vLLM was started with rollout.draft_tokens={drafts} and "
                "drafts at that depth only"
            )
        if params.record_routing:
            raise RolloutError(
                "learner.routing_replay: the experts that vLLM chose are not recorded; leave rollout.backend out"
            )
        if params.accept != "exact":
            raise RolloutError("accept=margin is our own engine's; vLLM verifies every draft")
        if params.stop_strings:
            raise RolloutError(f"stop={list(params.stop_strings)}: with vLLM completions end with stop tokens alone")
        for token in params.stop_token_ids:
            if not 0 <= token < vocabulary:
                raise ValueError(f"rollout.stop_token_ids: {token} is outside the vocabulary of {vocabulary} tokens")

    def use_costs(self, costs: CostTable | None, work: Workload) -> CostTable:
        raise RolloutError("vLLM drafts at one depth: with it rollout.draft_tokens is a number, or null for none")

    def metrics(self) -> dict[str, float]:
        return self.faults.metrics()

    def close(self) -> None:
        self.stage.close()
        self._end()

    def _end(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None
