"""Faults that runs of other trainers have: each detector on a miniature record with the fault and without it."""

from collections.abc import Sequence
from typing import Any

import pytest
from miniature_runs import write

from review.findings.report import diagnose
from review.findings.templates import of_prompts, of_template
from review.readers.record import Record
from rewards.audit.detectors.tokens import ids
from rewards.audit.findings import Rollouts
from rewards.audit.traces import Trace
from rewards.records import read_rollouts, rollout_path

STEPS = 20


def run(folder: Any, rows: Any, metrics: dict[str, Any] | None = None, **options: Any) -> Record:
    """A run of STEPS steps. `rows(step, prompt, sample)` gives the line of a completion, or changes to one."""
    import json

    import zstandard

    mixed = [("#### 1", 1.0), ("#### 2", 0.0), ("#### 3", 0.0), ("#### 4", 1.0)]
    write(folder, steps=((mixed,) * 4,) * STEPS, metrics=metrics, options={"steps": STEPS, **options})
    for step in range(1, STEPS + 1):
        lines = read_rollouts(folder, step)
        for place, line in enumerate(lines):
            line |= rows(step, place // 4, place % 4)
        content = "".join(json.dumps(line) + "\n" for line in lines)
        rollout_path(folder, step).write_bytes(zstandard.compress(content.encode()))
    return Record(folder)


def kinds(record: Record) -> list[str]:
    return [finding.kind for finding in diagnose(record)]


def nothing(step: int, prompt: int, sample: int) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(("question", "is_found"), [("What is {} + 1? ({})", True), ("What is {} + 1?", False)])
def test_the_answer_stands_in_the_prompt(tmp_path: Any, question: str, is_found: bool) -> None:
    def rows(step: int, prompt: int, sample: int) -> dict[str, Any]:
        number = 100 + 4 * step + prompt
        return {"prompt": question.format(number, number + 7), "gold": f"#### {number + 7}"}

    assert ("answer-in-prompt" in kinds(run(tmp_path, rows))) == is_found


@pytest.mark.parametrize(("gap", "is_found"), [(0.5, True), (1e-5, False)])
def test_a_text_has_two_log_probabilities_in_a_step(tmp_path: Any, gap: float, is_found: bool) -> None:
    def rows(step: int, prompt: int, sample: int) -> dict[str, Any]:
        return {"text": "#### 1", "token_ids": [1, 2], "policy_logprobs": [-1.0, -1.0 - gap * sample]}

    assert ("the-same-twice" in kinds(run(tmp_path, rows))) == is_found


@pytest.mark.parametrize(("logprob", "is_found"), [(-1.5, True), (-1.0, False), (-0.5, False)])
def test_samples_are_less_likely_than_the_entropy_allows(tmp_path: Any, logprob: float, is_found: bool) -> None:
    def rows(step: int, prompt: int, sample: int) -> dict[str, Any]:
        return {"policy_logprobs": [logprob - 0.001 * step] * 3, "token_ids": [1, 2, sample]}

    assert ("weights" in kinds(run(tmp_path, rows, {"policy/entropy": 1.0}))) == is_found


@pytest.mark.parametrize(("sign", "is_found"), [(-1, True), (1, False)])
def test_the_loss_falls_as_the_kl_rises(tmp_path: Any, sign: int, is_found: bool) -> None:
    kl = [0.01 * step for step in range(STEPS)]
    noise = [0.005 * (-1) ** step for step in range(STEPS)]
    loss = [sign * 0.5 * one + other for one, other in zip(kl, noise, strict=True)]
    record = run(tmp_path, nothing, {"loss/kl": kl, "loss/total": loss}, loss={"beta": 0.5})
    assert ("kl-sign" in kinds(record)) == is_found


@pytest.mark.parametrize(("beta", "kind"), [(-0.04, "kl-sign"), (4.0, "beta-high"), (0.04, None)])
def test_a_beta_that_no_run_needs(tmp_path: Any, beta: float, kind: str | None) -> None:
    found = set(kinds(run(tmp_path, nothing, loss={"beta": beta}))) & {"kl-sign", "beta-high"}
    assert found == ({kind} if kind else set())


@pytest.mark.parametrize(("refused", "is_found"), [(True, True), (False, False)])
def test_correct_answers_have_the_lowest_score(tmp_path: Any, refused: bool, is_found: bool) -> None:
    def rows(step: int, prompt: int, sample: int) -> dict[str, Any]:
        correct = sample in (0, 3)
        mark = float(correct and not (refused and prompt == 1))
        text = f"#### {step if correct else step + 1}\n{sample}"
        return {"text": text, "gold": f"#### {step}", "parts": {"gsm8k": mark}, "reward": mark}

    assert ("correct-refused" in kinds(run(tmp_path, rows))) == is_found


@pytest.mark.parametrize(
    ("answer", "kind"), [("copied", "copy-rewarded"), ("another", "form-rewarded"), ("correct", None)]
)
def test_the_full_score_goes_to_other_answers_than_the_reference(tmp_path: Any, answer: str, kind: str | None) -> None:
    def rows(step: int, prompt: int, sample: int) -> dict[str, Any]:
        said = {"copied": step, "another": step + 50, "correct": step + 1}[answer]
        text = f"#### {said if sample in (0, 3) else 99}\n{sample}"
        return {"text": text, "gold": f"#### {step + 1}", "prompt": f"What is {step} + 1?"}

    found = set(kinds(run(tmp_path, rows))) & {"copy-rewarded", "form-rewarded"}
    assert found == ({kind} if kind else set())


@pytest.mark.parametrize(("distinct", "is_found"), [(3, True), (80, False)])
def test_few_prompts_come_again_and_again(tmp_path: Any, distinct: int, is_found: bool) -> None:
    def rows(step: int, prompt: int, sample: int) -> dict[str, Any]:
        return {"prompt_id": str((4 * step + prompt) % distinct)}

    assert ("too-many-epochs" in kinds(run(tmp_path, rows))) == is_found


RATES = {
    "still rising": ([1e-8 * step for step in range(1, STEPS + 1)], "warmup-too-long"),
    "zero": ([0.0] * STEPS, "rate-low"),
    "warm-up and decay": ([1e-6 * min(step, 5, STEPS - step + 1) for step in range(1, STEPS + 1)], None),
}


@pytest.mark.parametrize("name", RATES)
def test_the_rates_of_a_run(tmp_path: Any, name: str) -> None:
    rates, kind = RATES[name]
    found = set(kinds(run(tmp_path, nothing, {"learner/learning_rate": rates}))) & {"warmup-too-long", "rate-low"}
    assert found == ({kind} if kind else set())


@pytest.mark.parametrize(("moved", "is_found"), [(1e-4, True), (0.2, False)])
def test_texts_that_come_again_have_the_log_probabilities_that_they_had(
    tmp_path: Any, moved: float, is_found: bool
) -> None:
    def rows(step: int, prompt: int, sample: int) -> dict[str, Any]:
        return {"prompt_id": str(prompt), "policy_logprobs": [-1.0 - moved * step / STEPS]}

    assert ("rate-low" in kinds(run(tmp_path, rows))) == is_found


@pytest.mark.parametrize(("after", "is_found"), [(0.0, True), (0.4, False)])
def test_a_policy_is_destroyed_in_the_first_steps(tmp_path: Any, after: float, is_found: bool) -> None:
    cut = [0.0] * 2 + [1.0 - after] * (STEPS - 2)
    marks = [0.6] * 2 + [after] * (STEPS - 2)
    metrics = {"reward/part/gsm8k": marks, "completion/truncated": cut, "policy/approx_kl": None}
    assert ("rate-high" in kinds(run(tmp_path, nothing, metrics))) == is_found


class Tokenizer:
    """Of words, as transformers' has it."""

    bos_token, bos_token_id = "<s>", 0
    words: Sequence[str] = ("<s>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
    all_special_tokens = words

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def get_vocab(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words)}

    get_added_vocab = get_vocab

    def convert_tokens_to_ids(self, word: str) -> int:
        return self.get_vocab()[word]

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.words[token]

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [place for place, word in enumerate(self.words) if word in text]}

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool = False, **_: Any) -> str:
        import jinja2

        template = jinja2.Environment(autoescape=False).from_string(self.chat_template)
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
INSTRUCT = "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
INSTRUCT += "{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
TEMPLATES = {
    "as it was taught": (TURNS + GENERATION, 3, []),
    "nothing before an answer": (INSTRUCT, 3, []),
    "no generation prompt": (TURNS, 3, ["generation-prompt"]),
    "another stop token": (TURNS + GENERATION, 4, ["stop-and-pad"]),
    "unknown markers": (TURNS.replace("<|{{", "<|im_{{") + GENERATION.replace("<|", "<|im_"), 3, ["template"]),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_chat_template_shows(name: str) -> None:
    template, stop, expected = TEMPLATES[name]
    assert [finding.kind for finding in of_template(Tokenizer(template), None, [stop])] == expected


def test_what_the_first_prompts_show() -> None:
    tokenizer = Tokenizer(TURNS)
    row = {"prompt": [{"role": "user", "content": "<|user|>2 + 2?"}]}
    line = {"prompt_id": "a", "prompt_ids": [0, 0, 1]}
    assert [each.kind for each in of_prompts(tokenizer, [row], [line])] == ["begins-twice", "template-twice"]
    assert of_prompts(tokenizer, [{"prompt": "<|user|>2 + 2?"}], [{"prompt_id": "a", "prompt_ids": [0, 1]}]) == []


@pytest.mark.parametrize(("mask", "is_found"), [([1, 1, 0], True), ([1, 1, 1], False), ([0, 0, 0], False)])
def test_a_mask_leaves_out_tokens_of_one_turn(mask: list[int], is_found: bool) -> None:
    trace = Trace("a", 1, "quartet", "?", "#### 1", token_ids=[1, 2, 3], loss_mask=mask, reward=1.0)
    found = [finding for finding in ids(Rollouts([trace])) if finding.kind == "misaligned" and finding.where]
    assert bool(found) == is_found
