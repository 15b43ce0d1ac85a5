"""The task of a run: its problems, how they become prompts, and what scores the answers.

Everything here is checked before a policy is loaded: a missing column or a broken reward costs seconds, not a run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from grpo.config.environment import OF_EPISODES, AgentOptions, rewards_of
from grpo.config.mtp import MtpConfig, scores_nothing
from grpo.config.run import LearningConfig, RunConfig, TrainConfig
from grpo.data.prompts import PromptStream, PromptTemplate, encode_prompt
from grpo.data.trained_on import record_trained_on, trained_on
from grpo.learner.row import PackedRow, Sample
from grpo.run.log import RunLog
from grpo.run.sources import Sources
from grpo.source.policy_source import known_context
from grpo.task.sampling import Actor, agent_of, environment_of
from policies.devices import device_of
from policies.policy import Policy
from review.statistics.estimates import answer_reader
from rewards.config.data import SourceOptions
from rewards.config.reward import RewardOptions, ScoringOptions
from rewards.data.examples import Example, beyond_context, default_held_out_split, gold_checks, load_examples, too_long
from rewards.data.leakage import problem_fingerprint, refuse_overlap
from rewards.protocol import Reward
from rewards.registry import MODEL, name_callable
from rewards.scorer import GroupScore, RewardSpec, Scorer
from rewards.verdicts import Verdicts
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import EnvironmentSpec

if TYPE_CHECKING:
    from grpo.task.reward_models import ModelRewards

TAKE_OUT = "Take them out of one of the two"
LONGEST_TEXT = 4000  # characters of an example that a preset's tokenizer learns from: one endless word takes hours


class Task:
    """Holds training and held-out examples, prompt template and scorer. Close it: the scorer holds processes.

    `parts` are the tasks of several sources of data by label; none where there is one source."""

    parts: Mapping[str, Task] = MappingProxyType({})
    sources: Sources | None = None  # of a run: its files, but for the data

    def __init__(
        self,
        data: SourceOptions,
        rewards: Sequence[RewardOptions],
        scoring: ScoringOptions,
        *,
        seed: int = 0,
        train: bool = True,
        held_out: int | None = 0,
        held_out_split: str | None = None,
        device: str = "auto",
        met: Collection[str] = frozenset(),
        contexts: Mapping[str, int] | None = None,
        scores: bool = True,
        environment: EnvironmentSpec | None = None,
        agent: AgentOptions | None = None,
    ) -> None:
        """`held_out`: how many held-out problems, None for all of them, 0 for none. `device` is the reward models'.

        `met` are fingerprints of problems that the policy was trained on before. Raises ValueError where one of these,
        a training problem or a worked example is among the held-out problems. `contexts` are the numbers of tokens that
        the texts of a column must fit into.
        Without `scores` another process scores, without `rewards` nobody. With an `environment` solutions are episodes.
        """
        checks = gold_checks(r.function for r in rewards if "answer" not in r.arguments)
        checks += [partial(too_long, column, context) for column, context in (contexts or {}).items()]
        self.template = PromptTemplate(data.template)
        load = partial(load_examples, data.name, options=data, seed=seed, checks=checks)
        count = data.limit if train else data.few_shot
        if data.held_out:
            from grpo.data.held_out import held_out_share

            both = held_out_share(data, load, self.template, held_out_split)
        else:
            both = _two_splits(data, load, count, held_out, held_out_split)
        self.train, self.held_out = both[0][:count], both[1][:held_out]
        first = (self.train or self.held_out)[0]
        shown, self.train = self.train[: data.few_shot], self.train[data.few_shot :]
        self.validation: Sequence[Example] = []
        if train:
            self._keep_validation(data.validation, shown)
        self.solved, self.unsolved = _by_solution(self.train, data.solutions)
        self._refuse_overlap(shown, met, data)
        self.template = replace(self.template, few_shot=shown)
        messages = self.template.messages(first)  # raises for a chat that cannot be made
        # A chat template is the model's, and no model is loaded yet: the bare question then replaces its text.
        prompt = first.question if self.template.is_chat else self.template.render(first)
        self.solution_column = data.solution_column or ""
        self.trainer_state: dict[str, Any] = {"global_step": 0, "max_steps": 1, "epoch": 0.0}
        self.prompts_per_step = 0
        self.leads, self.scores, self.on_error = scores, scores and bool(rewards), scoring.on_error
        self.actor = Actor()
        if environment or agent:
            from grpo.task.acting import Acting

            self.actor = Acting(environment, agent, first)
        specs = reward_specs(rewards)
        self.reward_weights = {spec.label: spec.weight for spec in specs}
        judge = specs[0] if specs else RewardSpec("")
        self.first_reward, self.read_answer = judge.label, answer_reader(judge.function, judge.arguments)
        self.models: ModelRewards | None = None
        models = [reward for reward in rewards if reward.function.startswith(MODEL)]
        if models and self.scores:
            from grpo.task.reward_models import ModelRewards

            self.models = ModelRewards(models, first.columns)
        self.verdicts = Verdicts(self.first_reward, "undeclared", None)
        if self.scores:
            self._open_scorer(specs, scoring, first, prompt, messages, device)

    def _open_scorer(
        self,
        specs: list[RewardSpec],
        options: ScoringOptions,
        example: Example,
        prompt: str,
        messages: list[dict[str, Any]] | None,
        device: str,
    ) -> None:
        """The rewards score this example now, rather than when the policy is loaded."""
        more = [*(self.models.names if self.models else ()), *self.actor.columns]
        self.scorer = Scorer(
            specs,
            on_error=options.on_error,
            timeout_s=options.timeout_s,
            columns=[*example.columns, *more],
            pass_variables=options.pass_variables,
        )
        try:
            columns = example.columns | dict.fromkeys(more, 0.0)
            marks = self.scorer.dry_run(prompt, example.solution, columns, messages=messages)
            if self.models:
                self.models.load(device_of(device))
        except BaseException:
            self.scorer.close()
            raise
        declared = self.scorer.right_at(self.first_reward)
        self.verdicts = Verdicts(self.first_reward, declared, marks.parts[self.first_reward][0])

    @classmethod
    def of(cls, config: LearningConfig | MtpConfig, *, scores: bool = True, model_known: bool = True) -> Task:
        """Opens the task of a run with one source of data. Without `model_known` nothing is asked of the model, which
        need not be there."""
        held = config.eval
        context = known_context(config.model) if model_known else None
        learns = isinstance(config, LearningConfig) and config.supervision.steps > 0  # from solutions
        [source] = config.data
        if source.solution_column is None and (learns or source.few_shot):
            raise ValueError(
                "data.solution_column=null: supervised steps and few_shot show solutions; name the column that has them"
            )
        read = [column for column in (source.prompt_column, learns and source.solution_column) if column]
        task = cls(
            source,
            [] if scores_nothing(config) else rewards_of_source(config, source),
            config.reward,
            seed=config.seed,
            held_out=held.limit,
            held_out_split=held.split,
            device=config.device,
            met=trained_on(config.model) if model_known else (),
            contexts=dict.fromkeys(read, context) if context else {},
            scores=scores,
            environment=environment_of(config),
            agent=agent_of(config),
        )
        task.trainer_state["output_dir"] = str(config.output_dir)
        try:
            if isinstance(config, TrainConfig) and learns:
                _refuse_too_few("sft.batch_size", config.sft.batch_size, task.solved)
            grpo = isinstance(config, TrainConfig)
            _refuse_too_few("prompts_per_step", config.prompts_per_step, task.unsolved if grpo else task.solved)
            if isinstance(config, TrainConfig):
                task.trainer_state["max_steps"], task.prompts_per_step = config.steps, config.prompts_per_step
        except ValueError:
            task.close()
            raise
        return task

    def _keep_validation(self, count: int, shown: Sequence[Example]) -> None:
        """Sets the last `count` training problems apart. Problems that are also trained on, `shown` in prompts or held
        out are left out: a choice by held-out problems would raise what is reported on them."""
        if count >= len(self.train) > 0:
            raise ValueError(
                f"data.validation={count} keeps all of the {len(self.train)} training examples; lower it, or use more "
                "data"
            )
        end = len(self.train) - count
        kept, self.train = self.train[end:], self.train[:end]
        self.validation = self.unknown(kept, [*self.train, *self.held_out, *shown]) if count else []

    def unknown(self, examples: Sequence[Example], others: Iterable[Example]) -> list[Example]:
        """Those of the examples whose problems are not among the others, whatever their ids are."""
        known = self.fingerprints(others).keys()
        return [example for example in examples if not known & self.fingerprints([example]).keys()]

    def _refuse_overlap(self, shown: Sequence[Example], met: Collection[str], data: SourceOptions) -> None:
        """Raises ValueError for an evaluated problem that training meets, and for one whose solution a prompt shows."""
        train, shots = self.fingerprints(self.train), self.fingerprints(shown)
        self.trained_on = frozenset({*met, *train, *shots})
        held_out = self.fingerprints(self.held_out)
        hold_out = "hold out a share of the training data by content (data.held_out: 0.1)"
        for known, what, way_out in (
            (shots, "are shown with their solutions as worked examples (few_shot)", f"{TAKE_OUT}, or {hold_out}"),
            (train, f"are trained on too ({data.name}, {data.split})", f"{TAKE_OUT}, or {hold_out}"),
            (dict.fromkeys(met, ""), "were trained on by the run that the model comes from", f"{TAKE_OUT}"),
        ):
            refuse_overlap(held_out, known, what, f"{way_out}.")
        if both := [name for fingerprint, name in train.items() if fingerprint in shots]:
            raise ValueError(
                f"few_shot={data.few_shot}: the first {data.few_shot} examples are shown with their solutions, and "
                f"{len(both)} of the others are the same problems: {', '.join(both[:5])}. Take them out of the data"
            )

    def part_of(self, prompt_id: str) -> Task:
        """The task of the source that a prompt is from."""
        return self

    def stream(self, seed: int, examples: Sequence[Example] | None = None) -> PromptStream:
        """The order in which GRPO takes its examples, or these of them."""
        return PromptStream(self.unsolved if examples is None else examples, seed)

    def describe_rewards(self) -> list[dict[str, Any]]:
        """Describes the reward functions, as a run records them; nothing where another process scores."""
        return self.scorer.describe() if self.scores else []

    def record_split(self, run_log: RunLog) -> None:
        """Write into the run folder what is trained on, and say how the held-out problems are set apart from it."""
        if not self.leads:
            return
        record_trained_on(run_log.output_dir, self.trained_on)
        if not self.held_out:
            return
        line = f"{len(self.held_out):,} held-out problems: none is trained on or shown as a worked example"
        if self.train and self.train[0].example_id.startswith("word_problems/"):
            from rewards.data.word_problems import shared_with_training

            train = [example.example_id for example in self.train]
            held_out = [example.example_id for example in self.held_out]
            templates, numbers = shared_with_training(train, held_out)
            line += f"; {templates:,} share a template with training, {numbers:,} share their numbers"
        run_log.say(line)

    def fingerprints(self, examples: Iterable[Example]) -> dict[str, str]:
        """The problems' fingerprints, with their ids."""
        return {problem_fingerprint(self.template.content(e)): e.example_id for e in examples}

    def check_lengths(
        self, policy: Policy, max_completion_tokens: int | None, *, learns_solutions: bool = False
    ) -> None:
        """Raises ValueError if a prompt leaves no room for its completion (None: nothing is sampled), or for the
        solution that supervised steps learn from: now, rather than when its turn comes."""
        room = policy.max_length - (max_completion_tokens or 0)
        long: list[Prompt] = []
        solved: set[str] = {example.example_id for example in self.solved} if learns_solutions else set()
        long_solutions: list[PackedRow] = []
        for example in (*self.train, *self.validation, *self.held_out):
            text = self.template.render(example, policy.tokenizer)
            if fault := beyond_context(text, policy.max_length):
                raise ValueError(f"the prompt of {example.example_id!r} {fault}; take it out of the data")
            if max_completion_tokens is not None and _may_pass(text, room):
                prompt = self.prompt(example, policy.tokenizer)
                long += [prompt] if len(prompt.token_ids) > room else []
            shows_tools = self.actor.environment is not None  # which are in no template
            if example.example_id in solved and (shows_tools or _may_pass(text + example.solution, policy.max_length)):
                row = self.solution(example, policy.tokenizer, policy.stop_token_ids[0])
                long_solutions += [row] if row.length > policy.max_length else []
        if long:
            raise ValueError(
                f"{len(long)} prompts, the first of them {long[0].prompt_id!r} with {len(long[0].token_ids)} tokens, "
                f"pass the policy's context of {policy.max_length} with max_completion_tokens={max_completion_tokens}; "
                "lower it, or take them out of the data"
            )
        if long_solutions:
            first = long_solutions[0]
            raise ValueError(
                f"{len(long_solutions)} solutions with their prompts, the first of them {first.example_id!r} with "
                f"{first.length} tokens, pass the policy's context of {policy.max_length}; take them out of the data"
            )

    def corpus(self, limit: int = 4000) -> Iterator[str]:
        """Text of the kind that the policy will read, for a preset's tokenizer; of a long one the beginning."""
        solved = {example.example_id for example in self.solved}
        for example in self.train[:limit]:
            text = f"{example.question}\n{example.solution}\n" if example.example_id in solved else example.question
            yield text[:LONGEST_TEXT]

    def prompt(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        return encode_prompt(example, tokenizer, self.template)

    def solution(self, example: Example, tokenizer: PreTrainedTokenizerBase, stop: int) -> PackedRow:
        """Prompt and gold solution as a row to learn from; the solution ends with the stop token. GSM8K's calculator
        marks (`<<48/2=24>>`) are dropped: nothing computes them at test time."""
        prompt, marked = self.prompt(example, tokenizer), example.columns.get(self.solution_column, example.solution)
        row = self.actor.solution(prompt, marked, tokenizer, stop)
        if row is None:
            ids = [*tokenizer.encode(example.solution, add_special_tokens=False), stop]
            row = PackedRow(prompt.token_ids, [Sample(0, ids)])
        return replace(row, example_id=prompt.prompt_id, fingerprint=prompt.fingerprint)

    def reached(self, steps_done: int) -> None:
        """Set what rewards that ask for `trainer_state` receive from now on, by TRL's names."""
        epoch = steps_done * self.prompts_per_step / max(len(self.train), 1)
        self.trainer_state |= {"global_step": steps_done, "epoch": epoch}

    def watched_rewards(self) -> list[str]:
        """The marks that alarms watch: of every reward but those that declare to judge a form or a length, and the
        score where it is something else."""
        declared = [name for name in self.reward_weights if self.scores and self.scorer.right_at(name) is not None]
        return declared if declared and len(self.reward_weights) == 1 else [*declared, "score"]

    @property
    def max_score(self) -> float:
        return self.verdicts.max_score

    def score(self, groups: Sequence[RolloutGroup]) -> list[GroupScore]:
        """The scores of each group, by the rewards of the run."""
        columns = self._model_columns(groups)
        scores = self._score(self.scorer, groups, columns)
        if self.models:
            self.models.record(scores, columns)
        self.verdicts.see_scores(scores)
        return scores

    def score_by(self, rewards: Reward | Sequence[Reward], groups: Sequence[RolloutGroup]) -> list[GroupScore]:
        """Scores the groups by these functions of this process, in place of the rewards of the run."""
        functions = rewards if isinstance(rewards, Sequence) else [rewards]
        specs = [RewardSpec(name_callable(function)) for function in functions]
        models = self.models.names if self.models else []
        columns = [*set(chain.from_iterable(group.prompt.columns for group in groups)), *models, *self.actor.columns]
        with closing(Scorer(specs, columns=columns, on_error=self.on_error)) as scorer:
            return self._score(scorer, groups, self._model_columns(groups))

    def _model_columns(self, groups: Sequence[RolloutGroup]) -> list[dict[str, list[float]]]:
        return self.models.columns(groups) if self.models else [{} for _ in groups]

    def _score(
        self, scorer: Scorer, groups: Sequence[RolloutGroup], columns: Sequence[Mapping[str, Any]]
    ) -> list[GroupScore]:
        return scorer.score(
            [group.prompt.text for group in groups],
            [group.texts for group in groups],
            [group.prompt.columns for group in groups],
            prompt_ids=[group.prompt.prompt_id for group in groups],
            completion_ids=[_token_ids(group) for group in groups],
            completion_columns=self.actor.added(columns, groups),
            trainer_state=self.trainer_state,
            messages=[group.prompt.messages for group in groups],
            turns=[group.turns for group in groups],
        )

    def lost(self) -> dict[str, float]:
        """faults/* of the reward workers since the last call; empty where none was lost."""
        count, seconds = self.scorer.take_lost() if self.scores else (0, 0.0)
        return {"faults/reward_worker": float(count), "faults/reward_seconds": seconds} if count else {}

    def close(self) -> None:
        if self.scores:
            self.scorer.close()

    def __enter__(self) -> Task:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _may_pass(text: str, room: int) -> bool:
    """Whether a text may have more tokens than there is room for. A token is a byte or more; some are added."""
    return len(text.encode(errors="surrogatepass")) > room - 8


def _refuse_too_few(key: str, count: int, examples: Sequence[Example]) -> None:
    """Raises ValueError where a step would ask for more different examples than there are."""
    if count > len(examples):
        raise ValueError(f"{key}={count}, but there are {len(examples)} training examples; lower it, or use more data")


def _by_solution(examples: Sequence[Example], count: int | None) -> tuple[Sequence[Example], Sequence[Example]]:
    """The examples that supervised steps learn from, and those that GRPO learns from (`data.solutions`)."""
    return (examples, examples) if count is None else (examples[:count], examples[count:])


def rewards_of_source(config: RunConfig, source: SourceOptions) -> list[RewardOptions]:
    """The rewards that score the rows of a source."""
    rewards = rewards_of(config)
    return [
        reward
        for spec, reward in zip(reward_specs(rewards), rewards, strict=True)
        if source.rewards is None or spec.label in source.rewards or reward.function in OF_EPISODES
    ]


def reward_specs(rewards: Sequence[RewardOptions]) -> list[RewardSpec]:
    """What scores each reward; the scores of a reward model are a column with its name."""
    specs = []
    for reward in rewards:
        spec = RewardSpec(reward.function, reward.weight, reward.name, dict(reward.arguments))
        if reward.function.startswith(MODEL):
            spec = RewardSpec("column", reward.weight, spec.label, {"name": spec.label})
        specs.append(spec)
    return specs


def _two_splits(
    data: SourceOptions,
    load: Callable[..., Sequence[Example]],
    count: int | None,
    held_out: int | None,
    held_out_split: str | None,
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Loads `wanted` training examples and `held_out` others from their own split; None for all, 0 for none."""
    if count != 0 and held_out != 0 and Path(data.name).is_file():
        raise ValueError(
            f"{data.name} is one file, and rows that are trained on or shown as worked examples must not be evaluated. "
            "Hold out a share of its rows by their content (data.held_out: 0.1, of quartet eval too), or give "
            "a folder with train.jsonl and test.jsonl"
        )
    train = [] if count == 0 else load(split=data.split, limit=count)
    split = held_out_split or default_held_out_split(data.name)
    return train, [] if held_out == 0 else load(split=split, purpose="eval", limit=held_out)


def _token_ids(group: RolloutGroup) -> list[list[int]]:
    return [completion.token_ids for completion in group.completions]
