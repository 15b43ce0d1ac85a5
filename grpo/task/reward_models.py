"""The models beside the policy: those whose scores rewards read, and the teacher of `loss.advantage: distill`.

The scores are any sequence classifier's logit, or the perplexity under a reference policy. They are computed here, and
reach the rewards as columns with a value for every completion.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.run import TrainConfig
from grpo.data.prompts import PromptTemplate, apply_chat_template, encode_prompt
from grpo.learner.terms.teacher_server import TeacherServer
from grpo.source.policy_source import find_policy, shape_of
from policies.attention import sees_prompts_whole
from policies.contradictions import refuse_type
from policies.logprobs import shifted_logprobs
from policies.policy import Policy, PolicyError, read_config, read_tokenizer
from rewards.config.options import Options
from rewards.config.reward import RewardOptions
from rewards.data.examples import Example
from rewards.group_score import GroupScore
from rewards.protocol import PROVIDED
from rewards.registry import MODEL
from rewards.spec import RewardSpec
from rollout.group import Completion, Prompt, RolloutGroup

# Numbers, spaces, lines, other scripts: where tokenizers with one vocabulary may still differ.
PROBES = (
    "12 + 1,030 = 1042.5\n#### 1042",
    "  two  spaces,\ttabs\n\nlines",
    "na\u00efve \u6f22\u5b57 \U0001f642 e\u0301",
    "can't I'll",
)

ModelColumns = dict[str, list[float]]  # name: [G]


def saved_model(model: str) -> str:
    """The folder or hub id that `model` means, for a library that loads it. Raises PolicyError for a checkpoint."""
    source = find_policy(model, read=False)
    if source.checkpoint:
        raise PolicyError(f"model={model!r} means {source.meaning}, which only quartet loads; export it first")
    return source.folder


ROWS = 8  # completions per forward


class RewardModel(Options):
    """A reward whose function is `model:FOLDER_OR_NAME`; `kind` and `label` are its arguments."""

    name: str
    model: str
    kind: Literal["classifier", "chat_classifier", "perplexity"] = "classifier"
    label: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _of_one_kind(self) -> RewardModel:
        if self.kind == "perplexity" and self.label is not None:
            raise ValueError("label is for classifiers; drop it")
        return self

    @classmethod
    def of(cls, reward: RewardOptions) -> RewardModel:
        """Raises ValueError for arguments that it has not."""
        if unknown := sorted(reward.arguments.keys() - {"kind", "label"}):
            raise ValueError(
                f"rewards: {reward.function}: no argument {unknown[0]!r}; a reward model has kind and label"
            )
        name = RewardSpec(reward.function, name=reward.name).label
        return cls(name=name, model=reward.function.removeprefix(MODEL), **reward.arguments)


class ModelRewards:
    """The reward models of a run: frozen, in inference mode, one batch of similar lengths after the other.

    The constructor reads configurations only and raises ValueError for what these tell: a name that is taken, a folder
    that is not there, a classifier whose score is not clear. `load` reads the weights and raises it for the rest.

    >>> helpful = RewardOptions(function="model:models/reward", name="helpful")
    >>> models = ModelRewards([helpful], columns=["question"])
    >>> models.load(torch.device("cpu"))
    >>> models.columns(groups)              # two groups of two completions
    [{'helpful': [0.31, -1.2]}, {'helpful': [2.05, 0.77]}]
    """

    def __init__(self, rewards: Sequence[RewardOptions], columns: Iterable[str] = ()) -> None:
        self.options = [RewardModel.of(reward) for reward in rewards]
        names = {*columns, *PROVIDED}
        for chosen in self.options:
            if chosen.name in names:
                raise ValueError(f"rewards: {chosen.name!r} is the name of another column; give the model another name")
            names.add(chosen.name)
            _check(chosen)
        self.models: list[_Model] = []

    @property
    def names(self) -> list[str]:
        return [chosen.name for chosen in self.options]

    def load(self, device: torch.device) -> None:
        kinds = {"classifier": _Classifier, "chat_classifier": _Classifier, "perplexity": _Perplexity}
        self.models = [kinds[chosen.kind](chosen, device) for chosen in self.options]

    def columns(self, groups: Sequence[RolloutGroup]) -> list[ModelColumns]:
        """One {name: [G]} a group. NaN is a text beyond the model's context, or logits that are not finite."""
        pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
        scores = {model.options.name: iter(model.scores(pairs)) for model in self.models}
        return [
            {name: [next(values) for _ in group.completions] for name, values in scores.items()} for group in groups
        ]

    @staticmethod
    def record(scores: Sequence[GroupScore], columns: Sequence[ModelColumns]) -> None:
        """Let the rollout record keep the columns, for rewards that read them in a replay."""
        for score, marks in zip(scores, columns, strict=True):
            score.extras |= marks


def _check(chosen: RewardModel) -> None:
    where = f"rewards: {MODEL}{chosen.model}"
    looks_local = chosen.model.startswith(("/", ".", "~")) or chosen.model.count("/") != 1
    if not Path(chosen.model).is_dir() and (looks_local or Path(chosen.model).parent.is_dir()):
        raise ValueError(f"{where}: there is no such folder")
    try:
        config = read_config(saved_model(chosen.model))
    except PolicyError as error:
        raise ValueError(f"{where} cannot be used: {error}") from error
    if chosen.kind == "perplexity":
        return
    classes = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in classes):
        raise ValueError(
            f"{where} is no sequence classifier but {', '.join(classes) or 'of no known kind'}; "
            "for a language model use arguments: {kind: perplexity}"
        )
    labels = ", ".join(f"{i} = {name}" for i, name in sorted(config.id2label.items()))
    if chosen.label is None and config.num_labels != 1:
        raise ValueError(
            f"{where} has {config.num_labels} labels; arguments: {{label: N}} says which logit is the score: {labels}"
        )
    if chosen.label is not None and chosen.label >= config.num_labels:
        raise ValueError(f"{where} has no label {chosen.label}; its labels are {labels}")


class _Model(ABC):
    """What the two kinds share: the context, batches, padding."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, options: RewardModel, device: torch.device) -> None:
        self.options, self.device = options, device
        self.source = saved_model(options.model)
        try:
            self._load()
            if self.tokenizer.pad_token_id is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token
            if self.tokenizer.pad_token_id is None:
                raise ValueError("its tokenizer has neither a padding nor an end token")
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"rewards: {MODEL}{self.source} cannot be loaded: {error}") from error
        # Decoders find the last token by this: another padding token than the tokenizer's would be scored itself.
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model.to(device).eval().requires_grad_(False)
        positions = getattr(self.model.config, "max_position_embeddings", None) or -1  # XLNet says -1: any number
        self.limit = min(positions if positions > 0 else float("inf"), self.tokenizer.model_max_length)

    @abstractmethod
    def _load(self) -> None:
        """Set `model` and `tokenizer`; raise ValueError for what is wrong with them."""

    @abstractmethod
    def _encode(self, prompt: Prompt, completion: Completion) -> tuple[list[int], int]:
        """The token ids that are read, and where what is scored begins in them."""

    @abstractmethod
    def _score(self, token_ids_BT: Tensor, lengths_B: Tensor, starts_B: Tensor) -> Tensor:
        """Scores [B] of rows padded on the right."""

    @torch.inference_mode()
    def scores(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[float]:
        encoded = [self._encode(prompt, completion) for prompt, completion in pairs]
        scores = [float("nan")] * len(pairs)
        readable = [i for i, (ids, start) in enumerate(encoded) if start < len(ids) <= self.limit]
        readable.sort(key=lambda i: len(encoded[i][0]))
        for first in range(0, len(readable), ROWS):
            batch = readable[first : first + ROWS]
            rows = [torch.tensor(encoded[i][0], device=self.device) for i in batch]
            token_ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
            lengths = torch.tensor([len(row) for row in rows], device=self.device)
            starts = torch.tensor([encoded[i][1] for i in batch], device=self.device)
            values = self._score(token_ids, lengths, starts).float()
            for i, value in zip(batch, values.tolist(), strict=True):
                scores[i] = value
        return scores

    def _logits(self, token_ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        steps = torch.arange(token_ids_BT.shape[1], device=self.device)
        mask = (steps < lengths_B[:, None]).long()
        return self.model(input_ids=token_ids_BT, attention_mask=mask).logits


class _Classifier(_Model):
    """The logit of one label, for prompt and completion as one text, or as a chat through the model's own template."""

    def _load(self) -> None:
        refuse_type(self.source)
        self.tokenizer = AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)
        self.model, report = AutoModelForSequenceClassification.from_pretrained(
            self.source, dtype="auto", trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers would make them up
            raise ValueError(f"it lacks the tensors {', '.join(sorted(report['missing_keys'])[:5])}")
        if self.options.kind == "chat_classifier":
            if not self.tokenizer.chat_template:
                raise ValueError("kind: chat_classifier, but its tokenizer has no chat template")
            # A template that raises does so now.
            self._encode(Prompt("", "question", []), Completion([], [], "answer", "stop", 0))

    def _encode(self, prompt: Prompt, completion: Completion) -> tuple[list[int], int]:
        if self.options.kind == "classifier":
            return list(self.tokenizer(prompt.text + completion.text)["input_ids"]), 0
        question = prompt.columns.get("question", prompt.text)
        messages = prompt.messages or [{"role": "user", "content": question}]
        messages = [*messages, {"role": "assistant", "content": completion.text}]
        text = apply_chat_template(self.tokenizer, messages, tokenize=False)
        return self.tokenizer.encode(text, add_special_tokens=False), 0

    def _score(self, token_ids_BT: Tensor, lengths_B: Tensor, starts_B: Tensor) -> Tensor:
        return self._logits(token_ids_BT, lengths_B)[:, self.options.label or 0]


class _Perplexity(_Model):
    """exp(-mean log p) of the completion's tokens after the prompt, including the end token of one that stopped."""

    def _load(self) -> None:
        dtype = getattr(read_config(self.source), "dtype", None) or torch.float32
        policy = Policy.load(self.source, dtype)
        self.model, self.tokenizer = policy.trunk, policy.tokenizer
        self.stop = policy.stop_token_ids[0]

    def _encode(self, prompt: Prompt, completion: Completion) -> tuple[list[int], int]:
        start = self.tokenizer.encode(prompt.text, add_special_tokens=False)
        if start[:1] != [self.tokenizer.bos_token_id]:  # a chat template writes it itself
            start = encode_prompt(Example("", prompt.text, ""), self.tokenizer, PromptTemplate("{question}")).token_ids
        text = self.tokenizer.encode(completion.text, add_special_tokens=False)
        end = [self.stop] if completion.finish_reason == "stop" else []
        return [*start, *text, *end], len(start)

    def _score(self, token_ids_BT: Tensor, lengths_B: Tensor, starts_B: Tensor) -> Tensor:
        logprobs = shifted_logprobs(self._logits(token_ids_BT, lengths_B), token_ids_BT)
        tokens = torch.arange(1, token_ids_BT.shape[1], device=self.device)
        mask = (tokens >= starts_B[:, None]) & (tokens < lengths_B[:, None])
        return (-logprobs.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)).exp()


def check_teacher(config: TrainConfig) -> None:
    """Raises ValueError for a teacher with another tokenizer than the policy's, before either of them is loaded, and
    TeacherError for a server that does not score tokens."""
    if config.distill.model is None:
        return
    named = f"distill.teacher={config.distill.teacher!r}"
    sources = [find_policy(model, read=False) for model in (config.model, config.distill.model)]
    policy, teacher = (source.base for source in sources)
    if fault := _difference(read_tokenizer(policy), read_tokenizer(teacher)):
        raise ValueError(
            f"{named} reads other tokens than model={config.model!r}: {fault}. A teacher scores the ids that the "
            "policy has sampled: name one with the same tokenizer"
        )
    if config.distill.url is not None:
        if sees_prompts_whole(shape_of(sources[1])):
            raise ValueError(
                f"{named} has prompt_attention=bidirectional, and its server would read its prompts causally; "
                "leave the address out to load the teacher here"
            )
        ids = read_tokenizer(policy).encode(PROBES[0], add_special_tokens=False)
        server = TeacherServer(config.distill.url, config.distill.model)
        server.score([ids], [1], config.distill.top_k or 0)


def _difference(policy: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """Says how two tokenizers differ, in words; empty where they do not."""
    ours, other = policy.get_vocab(), teacher.get_vocab()
    if different := sorted(token for token in ours.keys() | other.keys() if ours.get(token) != other.get(token)):
        first = different[0]
        return (
            f"{len(different)} of {len(ours)} tokens have another id or are not there, the first of them {first!r} "
            f"({ours.get(first)} and {other.get(first)})"
        )
    for text in PROBES:
        ids = [tokenizer.encode(text, add_special_tokens=False) for tokenizer in (policy, teacher)]
        if ids[0] != ids[1]:
            return f"{text!r} is {ids[0]} for one and {ids[1]} for the other"
    if policy.eos_token_id != teacher.eos_token_id:
        return f"they end a text with {policy.eos_token!r} and {teacher.eos_token!r}"
    return ""
