"""Options of the commands that use a policy and do not train it: `quartet eval` and `quartet sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from grpo.config.environment import AgentOptions, EnvironmentOptions
from grpo.config.policy import ModelOptions
from grpo.config.sampling import LARGEST_GROUP, LOWEST_TEMPERATURE, AnswerOptions
from grpo.data.folders import run_of
from rewards.config.data import ChatForm, PromptOptions
from rewards.config.json_file import expecting
from rewards.config.names import recorded_options, sources_of
from rewards.config.options import Lines, Options
from rewards.config.reward import RewardsOptions, ScoringOptions
from rewards.spec import RewardSpec


class _UseOptions(EnvironmentOptions, ModelOptions):
    stop: str | list[str] = Field(default_factory=list)
    """Texts that end a completion, like `until` of lm-evaluation-harness: the completion ends before the first of them.
    Give one text, in which \\n is a line break, or a list such as ["Question:", "</s>"]."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        r"""Gives the texts that end a completion. One alone comes from a shell: `\n` is a line break, `\t` a tab."""
        texts = [self.stop.replace(r"\n", "\n").replace(r"\t", "\t")] if isinstance(self.stop, str) else self.stop
        return tuple(texts)

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: str | list[str]) -> str | list[str]:
        if stop == "" or "" in list(stop):
            raise ValueError("an empty text would end every completion; leave it out")
        return stop


class EvaluatedDataOptions(PromptOptions):
    """Where problems come from, and how they become prompts."""

    held_out: float | None = Field(default=None, gt=0, lt=1)
    """Evaluate only the share that a run with this `data.held_out` holds out; null evaluates `eval.split`."""


class EvaluatedOptions(Options):
    """What is evaluated, and how often."""

    split: str | None = None
    """The split; `held_out` for word_problems and reasoning_gym, `test` otherwise."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first problems, at most this many; null uses all."""
    samples: int = Field(default=1, ge=0, le=LARGEST_GROUP)
    """Completions per problem at the sampling temperature; above 1, pass@k and majority votes too (where there is
    an accuracy); 0 for none."""
    greedy: bool = True
    """Evaluate greedy decoding as well."""


class EvaluatedRolloutOptions(AnswerOptions):
    """How the policy answers."""

    temperature: float = Field(default=1.0, ge=LOWEST_TEMPERATURE)
    """Sampling temperature of the sampled row; the greedy row has none."""
    prompts_per_shard: int = Field(default=32, ge=1)
    """Problems that are sampled together."""


class MeasuredConfig(AgentOptions, RewardsOptions, _UseOptions):
    """What is evaluated, and how; quantising measures so, before and after."""

    data: EvaluatedDataOptions = EvaluatedDataOptions()
    eval: EvaluatedOptions = EvaluatedOptions()
    rollout: EvaluatedRolloutOptions = EvaluatedRolloutOptions()
    allow_trained_on: bool = False
    """Evaluate also problems that the policy was trained on, and report how many. Otherwise they are refused."""
    output: Path | None = None
    """A folder for completions.jsonl: every completion with its mark, written while the evaluation goes on."""
    reward: ScoringOptions = ScoringOptions(on_error="drop_sample")

    @model_validator(mode="after")
    def _something(self) -> MeasuredConfig:
        if not (self.eval.samples or self.eval.greedy):
            raise ValueError("eval.samples=0 and eval.greedy=false leave nothing to evaluate; use one of them")
        if self.agent and (self.stop or self.model.startswith(("http://", "https://"))):
            raise ValueError(
                f"agent={self.agent} asks a policy that is loaded here, and stops itself: leave the agent out "
                "(agent: null), or give MODEL as a folder, without stop"
            )
        return self


class EvalConfig(MeasuredConfig):
    """Accuracy or mean reward on held-out problems, sampled and greedy. A run folder brings its data and rewards."""

    command: ClassVar[str] = "eval"
    # What `quartet eval --help` shows; `--help all` shows all.
    common: ClassVar[tuple[str, ...]] = (
        *("data.name", "data.held_out", "data.template", "data.few_shot", "data.prompt_column", "data.solution_column"),
        *("eval.split", "eval.limit", "eval.samples", "eval.greedy", "rewards"),
        *("rollout.temperature", "rollout.max_completion_tokens", "rollout.draft_tokens"),
        *("output", "device", "dtype", "seed"),
    )
    api_key_file: Path | None = None
    """MODEL may be the address of a server, http://HOST:PORT: a file with the key that it wants."""


class SampledDataOptions(PromptOptions):
    """How your prompts are written, and where worked examples come from."""

    template: Annotated[str | ChatForm, Lines] = "{prompt}"
    """A format string around `prompt`, or `chat` for the model's own chat template, or what its messages say, as in
    `quartet eval`. A run folder brings its own."""


class SampledRolloutOptions(AnswerOptions):
    """How the policy answers."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy."""


class SampleConfig(_UseOptions):
    """Completions of your own prompts. A run folder brings its template, worked examples, temperature and limit."""

    command: ClassVar[str] = "sample"
    # What `quartet sample --help` shows; `--help all` shows all.
    common: ClassVar[tuple[str, ...]] = (
        *("samples", "stop", "data.template", "data.few_shot", "data.name"),
        *("rollout.temperature", "rollout.max_completion_tokens", "rollout.draft_tokens", "rollout.lossy_margin"),
        *("tools", "environment", "device", "dtype", "threads", "seed"),
    )
    samples: int = Field(default=4, ge=1, le=LARGEST_GROUP)
    """Completions per prompt."""
    data: SampledDataOptions = SampledDataOptions()
    rollout: SampledRolloutOptions = SampledRolloutOptions()


def defaults_of_run(folder: Path, data: str | None = None) -> dict[str, Any]:
    """Options of `quartet eval` that a run folder brings, so that the same held-out problems are evaluated. `quartet
    sample` takes those that it has, so that a prompt looks as it did in training.

    A checkpoint inside a run brings the options of its run. `data` is what the user asks for: data other than the
    run's have their own split, columns and number of problems. A failing reward does not end an evaluation: where the
    run says `abort`, the completion has no mark, and the failure is counted.
    """
    run_folder = run_of(folder) if (folder / "manifest.json").is_file() else folder
    path = run_folder / "config.yaml"
    if not path.is_file():
        return {}
    _, run = recorded_options(path)
    with expecting(path, "configuration of a run"):
        brought = _defaults(run, data)
        EvalConfig.model_validate(brought, context={"checked_only": True})
    return brought


def _defaults(run: dict[str, Any], data: str | None) -> dict[str, Any]:
    sources, rollout, reward = sources_of(run), run["rollout"], dict(run["reward"])
    whole = sources[0] | {
        "name": " + ".join(source.get("label") or source["name"] for source in sources)
    }  # none of several is meant
    of_data = next((source for source in sources if source["name"] == data), whole)
    if names := of_data.get("rewards") if of_data is not whole else None:
        labels = [RewardSpec(each["function"], name=each["name"]).label for each in run["rewards"]]
        scores = [each for each, label in zip(run["rewards"], labels, strict=True) if label in names]
        run = run | {"rewards": scores}
    if reward["on_error"] == "abort":
        reward["on_error"] = "drop_sample"
    prompts = ("template", "few_shot", "chat_template_kwargs")
    problems = ("name", "split", "held_out", "task_options", "prompt_column", "solution_column")
    sampling = ("temperature", "max_completion_tokens", "draft_tokens")
    acting = (*EnvironmentOptions.model_fields, *AgentOptions.model_fields)
    brought: dict[str, Any] = {
        "data": {name: of_data[name] for name in prompts if name in of_data},
        "rollout": {name: rollout[name] for name in sampling},
        **{name: run[name] for name in ("seed", "rewards", *acting) if name in run},
        "reward": reward,
    }
    if data not in (None, of_data["name"]):
        return brought
    brought["data"] |= {name: of_data[name] for name in problems if name in of_data}
    split = None if of_data.get("held_out") else run["eval"]["split"]
    return brought | {"eval": {"split": split, "limit": run["eval"]["limit"] or None}}
