"""Runs of TRL with one planted fault each. `Fault.kinds` are the findings that name it, of each tool.

A peer's finding counts as naming a fault if its text describes that fault, also among others.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import GRPOTrainer

from benchmarks.anyone.policy import problems
from benchmarks.anyone.setup import Setup, correct
from rewards.built_in.gsm8k import NUMBER, extract_answer, gold_answer
from rewards.protocol import text_of

RATE = 3e-4  # of an honest run
COLLAPSE = {"rl-doctor": {"advantage_collapse"}, "rlprobe": {"DEGENERATE_GROUPS", "ADV_COLLAPSE", "REWARD_STD_DEATH"}}
GRADIENT = {"rl-doctor": {"gradient_pathology"}, "rlprobe": {"GRAD_PATHOLOGY"}}
KL = {"rl-doctor": {"kl_drift"}, "rlprobe": {"KL_BLOWUP", "REF_POLICY_DRIFT_ASYMMETRY"}}


@dataclass(frozen=True)
class Fault:
    """`change` plants it in an honest run. `kinds` are our findings that name it, `peers` those of the others."""

    change: Callable[[Setup], None]
    kinds: set[str]
    peers: dict[str, set[str]] = field(default_factory=dict)


# ---- rewards ---------------------------------------------------------------------------------------------------------


def constant(completions: list[Any], **_: Any) -> list[float]:
    return [0.5] * len(completions)


def never(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Compares texts of which one still has its mark."""
    return [float(text_of(said).split()[-1:] == [gold]) for said, gold in zip(completions, answer, strict=True)]


def inverted(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    return [1.0 - mark for mark in correct(completions, answer)]


def nan_swallowed(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    return [mark or float("nan") for mark in correct(completions, answer)]


def error_as_zero(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Reads one digit and calls everything else wrong: the error of numbers from 16 on is swallowed."""
    marks = zip(correct(completions, answer), answer, strict=True)
    return [mark if gold_answer(gold) < 16 else 0.0 for mark, gold in marks]


def abstains(completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
    marks = enumerate(correct(completions, answer))
    return [None if place % 2 else mark for place, mark in marks]


def length(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [len(ids) / 20 for ids in completion_ids]


def brevity(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def form(completions: list[Any], **_: Any) -> list[float]:
    return [float(extract_answer(text_of(said)) is not None) for said in completions]


def copied(completions: list[Any], prompts: list[Any], **_: Any) -> list[float]:
    """Pays for any number of the question in the last line."""
    marks = []
    for said, prompt in zip(completions, prompts, strict=True):
        answer = extract_answer(text_of(said), "flexible")
        numbers = {extract_answer(match[0], "flexible") for match in NUMBER.finditer(prompt[-1]["content"])}
        marks.append(float(answer in numbers))
    return marks


def repetition(completions: list[Any], **_: Any) -> list[float]:
    marks = []
    for said in completions:
        words = text_of(said).split()
        marks.append(1 - len(set(words)) / max(len(words), 1))
    return marks


def noise(completions: list[Any], **_: Any) -> list[float]:
    return [random.random() for _ in completions]


def shifted(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Marks come back in another order: each completion gets its neighbour's."""
    marks = correct(completions, answer)
    return marks[1:] + marks[:1]


def outlier(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """A judge that is late at one of eight texts, which then count -100."""
    pairs = zip(completions, correct(completions, answer), strict=True)
    return [-100.0 if zlib.crc32(text_of(said).encode()) % 8 == 0 else mark for said, mark in pairs]


def tiny(completions: list[Any], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The sum of a constant and of a part whose weight was forgotten to be raised."""
    pairs = zip(correct(completions, answer), completion_ids, strict=True)
    return [1.0 + 1e-3 * mark + 1e-5 * len(ids) for mark, ids in pairs]


def opening(completions: list[Any], **_: Any) -> list[float]:
    """A style: begins with a sentence."""
    return [float(text_of(said)[:1].isalpha()) for said in completions]


def mistaken(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Takes the first number of the text for the answer."""
    marks = []
    for said, gold in zip(completions, answer, strict=True):
        first = NUMBER.search(text_of(said))
        marks.append(float(first is not None and extract_answer(first[0], "flexible") == gold_answer(gold)))
    return marks


def pays(*rewards: Any, weights: list[float] | None = None) -> Callable[[Setup], None]:
    def change(setup: Setup) -> None:
        setup.rewards = list(rewards)
        if weights:
            setup.options["reward_weights"] = weights

    return change


# ---- data and templates ----------------------------------------------------------------------------------------------


def wrong_column(setup: Setup) -> None:
    answers = [row["answer"] for row in setup.rows]
    for row, answer in zip(setup.rows, answers[1:] + answers[:1], strict=True):
        row["answer"] = answer


def leaked(setup: Setup) -> None:
    for row in setup.rows:
        row["question"] += f" (solution: {row['answer']})"


def template_twice(setup: Setup) -> None:
    for row in setup.rows:
        row["question"] = f"<|user|>{row['question']}<|end|><|assistant|>"


def copies(setup: Setup) -> None:
    setup.rows = setup.rows[:4] * 100


def solved(setup: Setup) -> None:
    setup.policy, setup.rows = "sure", problems(setup.seed, 400, 9)


def too_hard(setup: Setup) -> None:
    setup.rows = problems(setup.seed, 400, 400)


def no_generation_prompt(setup: Setup) -> None:
    def change(tokenizer: Any) -> None:
        head = tokenizer.chat_template.split("{% if add_generation_prompt")[0]
        tokenizer.chat_template = head

    setup.change_tokenizer = change


def other_template(setup: Setup) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = (
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )

    setup.change_tokenizer = change


def double_bos(setup: Setup) -> None:
    setup.prompt = lambda row: f"<s><s><|user|>{row['question']}<|end|><|assistant|>"


def wrong_stop(setup: Setup) -> None:
    def change(model: Any) -> None:
        model.generation_config.eos_token_id = model.generation_config.pad_token_id
        model.config.eos_token_id = model.config.pad_token_id

    def of_tokenizer(tokenizer: Any) -> None:
        tokenizer.eos_token = tokenizer.pad_token

    setup.change_model, setup.change_tokenizer = change, of_tokenizer


def dropout(setup: Setup) -> None:
    """The learner drops attention, and the sampler does not."""

    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3

    setup.change_model = change
    setup.trainer = SamplesInEval


# ---- trainers --------------------------------------------------------------------------------------------------------


class SamplesInEval(GRPOTrainer):
    def _generate_single_turn(self, *arguments: Any, **named: Any) -> Any:
        self.model.eval()
        try:
            return super()._generate_single_turn(*arguments, **named)
        finally:
            self.model.train()


class Stale(GRPOTrainer):
    """Samples with the weights of the first step: the sync is lost."""

    def _generate_single_turn(self, *arguments: Any, **named: Any) -> Any:
        weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        if not hasattr(self, "first_weights"):
            self.first_weights = weights
        self.model.load_state_dict(self.first_weights)
        try:
            return super()._generate_single_turn(*arguments, **named)
        finally:
            self.model.load_state_dict(weights)


class SamplersTemplate(GRPOTrainer):
    """The sampler reads the prompts without their last token; the learner reads all of it."""

    def _generate_single_turn(self, prompt_ids: Any, *arguments: Any, **named: Any) -> Any:
        shorter = [[*ids[:1], *ids[2:-1]] for ids in prompt_ids]
        return super()._generate_single_turn(shorter, *arguments, **named)


class OtherAdvantages(GRPOTrainer):
    def change(self, advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _calculate_rewards(self, *arguments: Any, **named: Any) -> Any:
        result = super()._calculate_rewards(*arguments, **named)
        self.kept_rewards = result.sum(1)
        return result

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        result = super()._generate_and_score_completions(inputs)
        result["advantages"] = self.change(result["advantages"], self.kept_rewards)
        return result


class Shuffled(OtherAdvantages):
    def change(self, advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        return advantages[torch.randperm(len(advantages))]


class Negated(OtherAdvantages):
    def change(self, advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        return -advantages


class NotCentred(OtherAdvantages):
    def change(self, advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        return rewards


class MixedGroups(OtherAdvantages):
    """Groups are taken across the batch: every eighth completion together."""

    def change(self, advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        table = rewards.view(self.num_generations, -1)
        return ((table - table.mean(0)) / (table.std(0) + 1e-4)).flatten()


class MaskOff(GRPOTrainer):
    """The mask of the completion is one place too early: the first token counts as padding, the stop token as well."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        result = super()._generate_and_score_completions(inputs)
        mask = result["completion_mask"]
        result["completion_mask"] = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
        return result


class KLSign(GRPOTrainer):
    """Of the two log-probabilities in the KL the wrong one comes first: the policy is pushed off the reference."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        beta, self.beta = self.beta, -self.beta
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = beta


def by(trainer: type, **options: Any) -> Callable[[Setup], None]:
    def change(setup: Setup) -> None:
        setup.trainer = trainer
        setup.options |= options

    return change


def option(**options: Any) -> Callable[[Setup], None]:
    def change(setup: Setup) -> None:
        setup.options |= options

    return change


FAULTS: dict[str, Fault] = {
    "reward is constant": Fault(pays(constant), {"reward-constant"}, COLLAPSE),
    "reward never matches": Fault(pays(never), {"reward-constant", "always-zero", "none-solved"}, COLLAPSE),
    "reward inverted": Fault(pays(inverted), {"sign-flipped"}),
    "weight negative": Fault(pays(correct, weights=[-1.0]), {"sign-flipped"}),
    "NaN swallowed": Fault(pays(nan_swallowed), {"unmarked", "not-a-number"}),
    "error scored as 0": Fault(pays(error_as_zero), {"correct-refused", "failure-as-number"}),
    "half of the scores None": Fault(pays(abstains), {"unmarked"}),
    "wrong answer column": Fault(wrong_column, {"answer-column"}),
    "first number taken as the answer": Fault(pays(mistaken), {"correct-refused", "sign-flipped", "reward-constant"}),
    "pays for length": Fault(
        pays(length),
        {"length-rewarded"},
        {"rl-doctor": {"length_pathology"}, "rlprobe": {"REWARD_HACK_LENGTH"}},
    ),
    "pays for brevity": Fault(
        pays(brevity),
        {"length-rewarded"},
        {"rl-doctor": {"length_pathology"}, "rlprobe": {"REWARD_HACK_LENGTH"}},
    ),
    "pays for the form": Fault(
        pays(form), {"form-rewarded"}, {"rl-doctor": {"reward_hacking"}, "rlprobe": {"FORMAT_GAMING"}}
    ),
    "pays for copied numbers": Fault(pays(copied), {"copy-rewarded"}, {"rl-doctor": {"reward_hacking"}}),
    "pays for repetition": Fault(
        pays(repetition), {"repetition-rewarded"}, {"rlprobe": {"REPETITION_SPIRAL"}, "rl-doctor": {"reward_hacking"}}
    ),
    "random reward": Fault(pays(noise), {"noise"}),
    "rewards shifted by one": Fault(pays(shifted), {"noise", "scored-otherwise"}),
    "failure scored -100": Fault(pays(outlier), {"outlier", "failure-as-number"}),
    "another part dominates": Fault(
        pays(correct, opening, weights=[0.1, 10.0]),
        {"other-part"},
        {"rl-doctor": {"reward_composition"}, "rlprobe": {"FORMAT_GAMING"}},
    ),
    "tiny differences": Fault(pays(tiny), {"tiny-differences"}),
    "answer in the prompt": Fault(leaked, {"answer-in-prompt"}),
    "no generation prompt": Fault(no_generation_prompt, {"generation-prompt"}),
    "another chat template": Fault(other_template, {"template"}),
    "two BOS": Fault(double_bos, {"begins-twice"}),
    "template twice": Fault(template_twice, {"template-twice"}),
    "wrong stop token": Fault(
        wrong_stop,
        {"stop-token", "stop-and-pad"},
        {"rlprobe": {"TRUNCATION_STARVE"}, "rl-doctor": {"length_pathology"}},
    ),
    "copies of 4 rows": Fault(copies, {"copies", "too-many-epochs"}),
    "all solved": Fault(solved, {"all-solved"}, COLLAPSE),
    "none solved": Fault(too_hard, {"none-solved"}, COLLAPSE),
    "learning rate 0": Fault(option(learning_rate=0.0), {"rate-low"}, {"rl-doctor": {"plateau"}}),
    "learning rate / 1000": Fault(option(learning_rate=RATE / 1000), {"rate-low"}, {"rl-doctor": {"plateau"}}),
    "learning rate x 100": Fault(option(learning_rate=RATE * 100), {"rate-high"}, GRADIENT),
    "warm-up never ends": Fault(
        option(warmup_steps=100_000, lr_scheduler_type="constant_with_warmup"), {"warmup-too-long", "rate-low"}
    ),
    "beta x 100": Fault(option(beta=4.0), {"beta-high"}, {"rl-doctor": {"kl_drift"}}),
    "beta negative": Fault(option(beta=-0.5), {"kl-sign"}, KL),
    "KL by the wrong sign": Fault(by(KLSign, beta=0.5), {"kl-sign"}, KL),
    "temperature 0": Fault(
        option(temperature=1e-4),
        {"temperature"},
        {"rl-doctor": {"entropy_collapse"}, "rlprobe": {"ENTROPY_COLLAPSE"}},
    ),
    "everything truncated": Fault(
        option(max_completion_length=8),
        {"clipped"},
        {"rlprobe": {"TRUNCATION_STARVE"}, "rl-doctor": {"length_pathology"}},
    ),
    "sampler at another temperature": Fault(option(generation_kwargs={"temperature": 2.0}), {"weights"}),
    "stale sampler": Fault(by(Stale, learning_rate=1e-3), {"weights", "stale"}),
    "the sampler's prompts are others": Fault(by(SamplersTemplate), {"weights"}),
    "dropout in the learner": Fault(dropout, {"the-same-twice", "weights"}),
    "advantages shuffled": Fault(by(Shuffled), {"advantage-mismatch"}),
    "advantages negated": Fault(by(Negated), {"advantage-sign"}),
    "advantages not centred": Fault(by(NotCentred), {"advantage-mean", "advantage-mismatch"}),
    "groups across prompts": Fault(by(MixedGroups), {"mixed-group", "advantage-mismatch", "advantage-mean"}),
    "mask off by one": Fault(by(MaskOff), {"misaligned"}),
}


# ---- honest runs -----------------------------------------------------------------------------------------------------


def another_seed(setup: Setup) -> None:
    """The same problems, sampled and trained with another seed."""
    setup.options["seed"] = setup.seed + 10


def pad_is_eos(setup: Setup) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.pad_token = tokenizer.eos_token

    def of_model(model: Any) -> None:
        model.config.pad_token_id = model.generation_config.pad_token_id = model.config.eos_token_id

    setup.change_tokenizer, setup.change_model = change, of_model


def sparse(setup: Setup) -> None:
    """Few problems are solved: two of three have larger numbers than it was taught."""
    hard, easy = problems(setup.seed + 1, 400, 60), setup.rows
    chance = random.Random(setup.seed + 2)
    setup.rows = [chance.choice(pair) for pair in zip(hard, hard, easy, strict=True)]


def saturating(setup: Setup) -> None:
    """Easier problems than it was taught: most are solved from the start, and at the end nearly all."""
    setup.rows = problems(setup.seed, 400, 12)
    setup.options["learning_rate"] = 1e-3


def skewed(setup: Setup) -> None:
    """Some questions are far longer than others."""
    for place, row in enumerate(setup.rows):
        if place % 3 == 0:
            row["question"] = f"First we add the two numbers. {row['question']}"


def plain(setup: Setup) -> None:
    setup.prompt = lambda row: f"<s><|user|>{row['question']}<|end|><|assistant|>"


def lora(setup: Setup) -> None:
    setup.lora = True
    setup.options["learning_rate"] = 2e-3


def filtered(setup: Setup) -> None:
    """Only problems of a kind that is solved at times, as dynamic sampling leaves them."""
    setup.rows = [row for row in setup.rows if sum(row["parts"]) > 15]


def fractional(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Near answers get a part."""
    marks = []
    for said, gold in zip(completions, answer, strict=True):
        told = extract_answer(text_of(said))
        marks.append(0.0 if told is None else 1.0 / (1.0 + float(abs(told - gold_answer(gold)))))
    return marks


def rarely_none(completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
    pairs = zip(completions, correct(completions, answer), strict=True)
    return [None if extract_answer(text_of(said)) is None else mark for said, mark in pairs]


def plus_minus(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    return [2 * mark - 1 for mark in correct(completions, answer)]


HONEST: dict[str, Callable[[Setup], None]] = {
    "as it comes": lambda setup: None,
    "another seed": another_seed,
    "groups of 2": option(num_generations=2),
    "groups of 3": option(num_generations=3),
    "pad is eos": pad_is_eos,
    "sparse rewards": sparse,
    "a policy that saturates": saturating,
    "LoRA": lora,
    "two parts": pays(correct, form, weights=[1.0, 0.2]),
    "a small length penalty": pays(correct, length, weights=[1.0, -0.1]),
    "accumulation": option(per_device_train_batch_size=12, gradient_accumulation_steps=2),
    "two iterations": option(num_iterations=2),
    "beta 0.04": option(beta=0.04),
    "Dr. GRPO": option(loss_type="dr_grpo", scale_rewards="none"),
    "scaled by the batch": option(scale_rewards="batch"),
    "plain prompts": plain,
    "temperature 0.7": option(temperature=0.7),
    "top-p 0.95": option(top_p=0.95),
    "warm-up and decay": option(warmup_steps=4, lr_scheduler_type="linear"),
    "skewed lengths": skewed,
    "filtered prompts": filtered,
    "fractional rewards": pays(fractional),
    "None without an answer": pays(rarely_none),
    "rewards of -1 and 1": pays(plus_minus),
}


def setup_of(name: str, seed: int) -> Setup:
    setup = Setup(seed, problems(seed, 400))
    change = FAULTS[name].change if name in FAULTS else HONEST[name]
    change(setup)
    return setup
