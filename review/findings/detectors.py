"""Each detector looks for one cause because of which a run does not learn. It tells whether that is there, what is
wrong with the number it rests on, and what to change. Causes stand before their consequences, which they explain."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from review.findings.alarms import FEATURES, SAID, SUSPECTS, Moments, alarm, compared, judged
from review.readers.gains import label_of
from review.readers.record import FEW, Group, Record, answer_text, is_correct
from review.readers.run_folder import TURNS
from review.statistics.estimates import mean_interval
from rewards.built_in.gsm8k import MARKED, NUMBER, extract_answer
from rewards.config.names import recorded_options, sources_of
from rewards.finding import Finding, found
from rewards.ties import tied as is_tied

LEAST_STEPS = 3  # of which a correlation or a movement is believed
FAILING = 0.01  # of the completions, from which on failed rewards are a cause
SURE = 0.75  # of the completions of a group give one answer
SPECIAL = re.compile(r"(?:<\|[^|<>\s]{1,30}\|>|</s>|<eos>|<end_of_turn>)\s*[^\s<]")  # with text after it
FALL = 4  # steps in which a rate that is too high destroys a policy
UNLIKELY = 0.05  # nats a token by which samples are less likely than the entropy allows
FORMS = ("gsm8k", "gsm8k_flexible", "gsm8k_boxed", "gsm8k_lm_eval")  # rewards by which a text may have no answer


def failed(record: Record) -> Finding | None:
    end: dict[str, Any] = next((event for event in reversed(record.events) if event["event"] in TURNS), {})
    if end.get("how") != "failed":
        return None
    return found("failed", f"The run ended with an error after step {end.get('after_step') or 0}: {end.get('error')}.")


def unmarked(record: Record) -> Finding | None:
    lost, errors = record.mean("reward/abstained"), sum(record.series("reward/errors"))
    if lost <= 0.05 and errors <= FAILING * record.completions:
        return None
    return found("unmarked", f"{lost:.0%} of the completions have no score, and rewards failed {errors:.0f} times.")


def temperature(record: Record) -> Finding | None:
    alike = record.share(record.groups, lambda group: group.is_one_text)
    is_cold = float(record.options.get("rollout.temperature") or 1.0) < 0.3
    if alike <= 0.9 or not is_cold:
        return None
    return found("temperature", f"In {alike:.0%} of the groups all completions are the same text.")


def rate_high(record: Record) -> Finding | None:
    """A step that moves the policy by many nats a completion throws away what the policy could do."""
    step, nats = max(record.moves.items(), key=lambda move: move[1], default=(0, 0.0))
    before, after, z = record.rise
    is_no_gain = z < 2 if record.has_rise else after <= before
    if nats <= 5 or not (is_no_gain if nats > 30 else z < -3):
        return None
    what = f"Step {step} moved the policy by a KL of {nats:.3g} nats a completion, where one or two are many, and the "
    what += f"scores went from {before:.3g} to {after:.3g}."
    change = f"lower {record.option('learner.learning_rate')}, {_factor(nats**0.5)} times perhaps"
    return found("rate-high", what, change=change)


def collapsed(record: Record) -> Finding | None:
    """The scores of the first step are lost in the next few, and texts have no end. A reward that pays for the wrong
    thing takes longer."""
    marks = record.series(f"reward/part/{record.first_reward}", "reward/mean")
    cut = record.series("completion/truncated")
    if len(marks) < 2 * FEW or len(cut) < len(marks) or record.right < -0.6:
        return None
    before, after = marks[0], fmean(marks[FALL:])
    is_lost = before >= 0.2 * record.top and after <= before / 4
    if not is_lost or fmean(cut[FALL:]) < cut[0] + 0.5:
        return None
    what = (
        f"In {FALL} steps the scores went from {before:.3g} to {after:.3g}, and {fmean(cut[FALL:]):.0%} of the later "
    )
    what += "completions have no end."
    return found("rate-high", what)


def _factor(value: float) -> int:
    """The power of ten nearest to the value, 10 at least."""
    return 10 ** max(1, round(math.log10(max(value, 1.0))))


def stop_token(record: Record) -> Finding | None:
    lines = [line for group in record.groups for line in group.lines] or [{"text": ""}]
    cut = fmean(line.get("finish_reason") == "length" for line in lines)
    texts = [answer_text(line) for line in lines]
    on = fmean(len(MARKED.findall(text)) > 1 or bool(SPECIAL.search(text)) for text in texts)
    if cut <= 0.5 or on <= 0.5:
        return None
    what = f"{cut:.0%} of the completions were cut, and {on:.0%} go on after their answer or after a stop token."
    return found("stop-token", what)


def sign_flipped(record: Record) -> Finding | None:
    if record.right >= -0.6:
        return None
    what = f"Incorrect answers score higher: inside groups being correct and the score have r = {record.right:+.2f}."
    return found("sign-flipped", what)


def reward_constant(record: Record) -> Finding | None:
    """All completions have the same mark though some are right and some are wrong."""
    mark, wrong = record.marks[0] if record.marks else 0.0, record.wrong_at_best
    agree = fmean([group.majority[1] for group in record.groups] or [1.0])
    what = f"All {len(record.marks)} completions got the score {mark:g} of {record.first_reward}, and "
    if wrong is None:
        differ = mark not in (0.0, 1.0) or (mark == 1.0 and agree < 0.8)
        what += f"of a group {agree:.0%} give the same answer."
    else:
        differ = wrong > 0.1 if mark > 0 else wrong < 0.9
        what += f"{1 - wrong:.0%} of them are correct by the reference answers."
    is_one = len(record.groups) >= FEW and is_tied([min(record.marks), max(record.marks)])
    if not is_one or not differ or record.learns_by_others:
        return None
    return found("reward-constant", what, change=f"fix the reward: quartet reward test {record.function}")


def kl_sign(record: Record) -> Finding | None:
    """On-policy the advantages of a batch cancel, so that the loss is beta · KL and noise. If the sign is wrong, its
    slope over the KL is −beta."""
    beta = float(record.options.get("loss.beta") or 0.0)
    if beta < 0:
        return found("kl-sign", f"loss.beta is {beta:g}: the loss falls as the KL from the reference rises.")
    both = [(row["loss/kl"], row["loss/total"]) for row in record.rows if {"loss/kl", "loss/total"} <= row.keys()]
    moments = Moments.of(both)
    r = moments.r or 0.0
    if len(both) < 2 * FEW or beta == 0 or r > -0.5 or not -2 < moments.xy / moments.xx / beta < -0.5:
        return None
    if r * math.sqrt(len(both) - 2) > -4 * math.sqrt(1 - r * r):  # the t test of a slope
        return None
    what = (
        f"The loss falls as the KL from the reference rises (r = {moments.r:.2f}), to {both[-1][0]:.3g} nats a token."
    )
    return found("kl-sign", what)


def beta_high(record: Record) -> Finding | None:
    beta = float(record.options.get("loss.beta") or 0.0)
    if beta < 1 or record.rise[2] > 2:
        return None
    what = f"loss.beta is {beta:g}, where 0 to 0.1 are usual, and the scores went from {record.rise[0]:.3g} to "
    return found("beta-high", f"{what}{record.rise[1]:.3g}.")


def answer_in_prompt(record: Record) -> Finding | None:
    """Nearly every prompt holds its own reference answer, and far fewer hold that of another."""
    pairs = {(str(line["prompt"]), str(line.get("gold") or "")) for group in record.groups for line in group.lines}
    prompts, golds = zip(*sorted(pairs), strict=True) if pairs else ((), ())
    if len(set(golds)) < FEW or not all(golds):
        return None
    own = fmean(map(_holds, prompts, golds))
    other = fmean(map(_holds, prompts, golds[1:] + golds[:1]))
    if own < 0.9 or other > 0.5:
        return None
    return found("answer-in-prompt", f"{own:.0%} of {len(prompts)} prompts hold their reference answer.")


def _holds(prompt: str, gold: str) -> bool:
    """Whether the last of a solution stands in the prompt, as a word."""
    answer = gold.split("####")[-1].strip()
    return bool(re.search(rf"(?<![\w.]){re.escape(answer)}(?![\w.])", prompt))


def paid_wrong(record: Record) -> Finding | None:
    """Most completions with the full score have another answer than the reference."""
    lines = [(line, mark) for group in record.groups for line, mark in group.numbered]
    best = [line for line, mark in lines if mark >= record.top]
    wrong = [line for line in best if not is_correct(answer_text(line), line["gold"])]
    if len(best) < 4 * FEW or len(wrong) <= 0.2 * len(best) or record.right < -0.6:
        return None
    copied = [line for line in wrong if _copies(line)]
    if len(copied) >= SURE * len(best):
        what = f"{len(copied)} of {len(best)} completions with the full score answer with a number of the question."
        return found("copy-rewarded", what)
    what = f"{len(wrong)} of {len(best)} completions with the full score have another answer than the reference."
    return found("form-rewarded", what)


def _copies(line: Mapping[str, Any]) -> bool:
    """Whether the answer is a number of the question."""
    numbers = {extract_answer(match[0], "flexible") for match in NUMBER.finditer(str(line["prompt"]))}
    return extract_answer(answer_text(line)) in numbers


def correct_refused(record: Record) -> Finding | None:
    """Some correct answers have the score of incorrect ones, though others have more."""
    low, top = min(record.marks, default=0.0), max(record.marks, default=0.0)
    marks = [mark for group in record.groups for mark in group.marks_of_correct]
    refused = [mark for mark in marks if mark <= low]
    if len(marks) < 4 * FEW or is_tied([low, top]) or len(refused) <= 0.2 * len(marks):
        return None
    what = f"Of {len(marks)} completions with the reference answer {len(refused)} have the lowest score, {low:g}."
    return found("correct-refused", what)


def too_many_epochs(record: Record) -> Finding | None:
    """How often each prompt was sampled for, by the steps that were read."""
    prompts = [group.lines[0]["prompt_id"] for group in record.groups]
    distinct = max(len(set(prompts)), 1)
    times = len(prompts) * max(record.steps / max(len(record.lines), 1), 1.0) / distinct
    if len(prompts) < 4 * distinct or times < 20:
        return None
    return found("too-many-epochs", f"There are {distinct} different prompts, and each was taken {times:.0f} times.")


def not_deterministic(record: Record) -> Finding | None:
    """A text that came twice for one prompt in one step has one log-probability, unless the forward is at random."""
    apart = [gap for group in record.groups for gap in _gaps(group.lines)]
    differ = [gap for gap in apart if gap > 0.01]
    if len(apart) < FEW or len(differ) <= 0.5 * len(apart):
        return None
    what = f"Of {len(apart)} texts that came twice in a step {len(differ)} have other log-probabilities the second "
    what += f"time, by {median(differ):.2g} nats a token."
    return found("the-same-twice", what, change="switch dropout off while learning: disable_dropout=True")


def _gaps(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Nats a token between log-probabilities of the same ids."""
    first: dict[tuple[int, ...], list[float]] = {}
    gaps = []
    for line in lines:
        values = line.get("policy_logprobs") or []
        before = first.setdefault(tuple(line["token_ids"]), values)
        if values and before is not values and len(values) == len(before):
            gaps.append(abs(sum(values) - sum(before)) / len(values))
    return gaps


def warmup(record: Record) -> Finding | None:
    """The rate has risen at every step so far, and half of the steps are done."""
    rates = record.series("learner/learning_rate")
    is_late = record.steps >= max(int(record.options.get("steps") or 0) / 2, 2 * FEW)
    rises = all(before < after for before, after in pairwise(rates))
    if not is_late or not rises or len(rates) < 2 * FEW or rates[0] > rates[-1] / 2:
        return None
    return found(
        "warmup-too-long", f"The rate still rises at step {record.steps}, from {rates[0]:.2g} to {rates[-1]:.2g}."
    )


def template(record: Record) -> Finding | None:
    """The policy was taught with prompts of another form, or does not write what the reward reads."""
    ours, model = record.options.get("data.template"), Path(str(record.options.get("model")))
    theirs = _template_of_run(model)
    if theirs and ours and theirs != ours and record.start < 0.6:
        what = f"Prompts are {ours!r}, {model} was taught with {theirs!r}, and it begins with "
        what += f"{record.start:.0%} of the full score."
        return found("template", what, change=f"set data.template to {theirs!r}")
    none = record.share(record.early, lambda group: group.majority[0] is None)
    if none <= 0.7 or record.function not in FORMS:
        return None
    what = f"In {none:.0%} of the groups most completions have no answer in the form that {record.first_reward} reads."
    return found("template", what)


def _template_of_run(model: Path) -> str | None:
    """The template of the run that the policy comes from; None for one that comes from no run."""
    files = [folder / "config.yaml" for folder in (model, model.parent) if (folder / "config.yaml").is_file()]
    return sources_of(recorded_options(files[0])[1])[0].get("template") if files else None


def answer_column(record: Record) -> Finding | None:
    """An answer that nearly all completions of a group give is right more often than not, if gold answers are."""
    sure = [group for group in record.early if group.majority[0] is not None and group.majority[1] >= SURE]
    right = fmean([group.majority_is_right for group in sure] or [1.0])
    are_many = len(sure) >= max(FEW, 0.3 * len(record.early)) and set(record.marks) <= {0.0, 1.0}
    if not are_many or right >= 0.3:
        return None
    what = f"In {len(sure)} of {len(record.early)} groups {SURE:.0%} or more of the completions give one and the same "
    return found("answer-column", f"{what}answer, and in {right:.0%} of them it is the reference answer.")


def all_solved(record: Record) -> Finding | None:
    right = record.share(record.early, lambda group: group.all_have(record.top))
    if right <= 0.7 or record.start <= 0.9 or record.learns_by_others:
        return None
    what = f"From the start {right:.0%} of the groups get only full scores, and the run begins with "
    what += f"{record.start:.0%} of the full score."
    return found("all-solved", what, change=f"take harder problems: {_data(record)}")


def none_solved(record: Record) -> Finding | None:
    low = min(record.marks, default=0.0)
    none = record.share(record.groups, lambda group: group.all_have(low))
    if none <= 0.9 or low >= record.top or record.learns_by_others:
        return None
    what = f"In {none:.0%} of the groups no completion scores more than {low:g}."
    change = f"take easier problems: {_data(record)}; or sft.steps, or a reward with parts; see that a reference "
    return found("none-solved", what, change=f"{change}solution gets the full score: quartet reward test")


def _data(record: Record) -> str:
    made = record.options.get("data.name") == "word_problems"
    return record.option("data.task_options.levels" if made else "data.name")


def hacked(record: Record) -> Finding | None:
    """The alarms of the run, over all of its steps."""
    each = {kind: record.series(*record.watched(kind)) for kind in (*FEATURES, "format")}
    values = {kind: median(series) for kind, series in each.items() if len(series) >= LEAST_STEPS}
    by_chance = {kind for kind in SUSPECTS if not _differs_from_zero(each[kind])}
    values = compared({kind: value for kind, value in values.items() if kind not in by_chance})
    kind = judged(values) if len(set(record.marks)) > 1 else None
    return alarm(kind, "score", values[kind]) if kind else None


def _differs_from_zero(values: list[float]) -> bool:
    low, high = mean_interval(values) or (0.0, 0.0)
    return low > 0 or high < 0


def group_size(record: Record) -> Finding | None:
    size, ties = int(record.options.get("rollout.group_size") or 8), record.mean("group/zero_variance")
    stands_still = record.has_rise and record.rise[2] <= 2
    if size >= 4 or ties <= 0.75 or (record.has_rise and not stands_still):
        return None
    return found("small-groups", f"Groups have {size} completions, and {ties:.0%} of them have zero variance.")


def tied(record: Record) -> Finding | None:
    """The marks of nearly all groups are equal, some at the top and some at the bottom."""
    ties = record.mean("group/zero_variance")
    if ties <= 0.9:
        return None
    notice = next((event for event in record.events if event["event"] == "nothing_learned"), {})
    why = notice.get("why") or "some problems are too easy and others too hard"
    ways = {"change": "; ".join(notice["change"])} if notice.get("change") else {}
    return found("tied-groups", f"{ties:.0%} of the groups have zero variance and teach nothing: {why}.", **ways)


def rate_zero(record: Record) -> Finding | None:
    rates = record.series("learner/learning_rate")
    if len(rates) < LEAST_STEPS or max(rates) > 0:
        return None
    return found("rate-low", f"The learning rate was 0 in all of {len(rates)} steps.")


def stands_still(record: Record) -> Finding | None:
    """Texts that came again, steps later, have the log-probabilities that they had."""
    seen: dict[tuple[Any, ...], tuple[int, float]] = {}
    moved = []
    for group in record.groups:
        for line in group.lines:
            values = line.get("policy_logprobs") or []
            if not values:
                continue
            step, before = seen.setdefault((line["prompt_id"], *line["token_ids"]), (group.step, sum(values)))
            if group.step - step >= record.steps / 4:
                moved.append(abs(sum(values) - before))
    if len(moved) < FEW or median(moved) >= 0.01:
        return None
    what = f"{len(moved)} texts came again a quarter of the run later or more, and their log-probabilities had moved "
    return found("rate-low", f"{what}by {median(moved):.2g} nats only.")


def rate_low(record: Record) -> Finding | None:
    """A step of this KL changes the probability of any event by √(KL / 2) at most (Pinsker's inequality), and several
    steps by no more than the sum."""
    steps = max(int(record.options.get("steps") or 0), record.steps)
    bound = math.fsum(math.sqrt(nats / 2) for nats in record.moves.values()) * steps / max(record.steps, 1)
    if len(record.moves) < LEAST_STEPS or bound >= 0.2:
        return None
    what = f"Nothing moves: all {steps} steps together can change the share of correct answers by {bound:.1%} at most."
    change = f"raise {record.option('learner.learning_rate')}, {_factor(1 / max(bound, 1e-9))} times perhaps"
    return found("rate-low", what, change=change)


def other_part(record: Record) -> Finding | None:
    """What differs inside groups, and is learned, is another part of the score than the first."""
    names = list(map(label_of, record.rewards))
    r = {name: _correlation(record.groups, name) for name in names}
    first, other = names[0], max(names, key=lambda name: r[name])
    if r[other] <= 0.7 or r[first] >= 0.3 or record.learns_by_others:
        return None
    what = f"Inside groups the score goes with {other} (r = {r[other]:.2f}), and not with {first} (r = {r[first]:.2f})."
    change = f"lower the weight of {other} in rewards, or begin with problems for which {first} differs"
    return found("other-part", what, change=change)


def _correlation(groups: list[Group], name: str) -> float:
    """Correlates a part with the score inside groups; 0 where it differs in fewer than FEW groups."""
    total = Moments()
    for group in groups:
        pairs = [(line.get("reward"), line["parts"].get(name)) for line in group.lines]
        total += Moments.of([(score, part) for score, part in pairs if score is not None and part is not None])
    return (total.r or 0.0) if total.groups >= FEW else 0.0


def noise(record: Record) -> Finding | None:
    marks: dict[tuple[str, str], list[float]] = {}
    for group in record.groups:
        for line, mark in zip(group.lines, group.marks, strict=True):
            marks.setdefault((line["prompt_id"], line["text"]), []).append(mark)
    apart = [max(values) - min(values) for values in marks.values() if len(values) > 1]
    differ = [difference for difference in apart if difference > 1e-6]
    if len(apart) < FEW or len(differ) <= 0.1 * len(apart):
        return None
    what = f"Of {len(apart)} texts that came twice or more for one prompt {len(differ)} got different scores, by "
    return found("noise", f"{what}{fmean(differ):.3g} on average.")


def tiny_differences(record: Record) -> Finding | None:
    """Marks that differ in the third digit become as large as real differences, divided by their spread."""
    spreads = [max(group.marks) - min(group.marks) for group in record.groups if not is_tied(group.marks)]
    size = max(map(abs, record.marks), default=0.0)
    small = fmean(spread < size / 100 for spread in spreads) if len(spreads) >= FEW else 0.0
    if small <= 0.5:
        return None
    what = f"In {small:.0%} of the groups whose scores differ they differ by less than a hundredth of {size:.3g}."
    return found("tiny-differences", what)


def weights(record: Record) -> Finding | None:
    usual = {"mismatch/weight_mean": 1.0, "policy/ratio_mean": 1.0, "mismatch/logprob_abs_mean": 0.0}
    if less := _less_likely(record):
        return less
    off = {name: abs(median(record.series(name) or [value]) - value) for name, value in usual.items()}
    name = max(off, key=lambda name: off[name])
    if off[name] <= 0.2:
        return None
    return found("weights", f"{name} is {off[name]:.3g} away from {usual[name]:g}.")


def _less_likely(record: Record) -> Finding | None:
    """What a policy samples has its entropy as mean of −log-probability. Texts of another policy, of another
    temperature or after other prompts are less likely to it."""
    entropies = {row["step"]: row["policy/entropy"] for row in record.rows if "policy/entropy" in row}
    excess = []
    for step, lines in record.lines.items():
        values = [value for line in lines for value in line.get("policy_logprobs") or []]
        if values and step in entropies and not any("logprobs" in line for line in lines):
            excess.append(-fmean(values) - entropies[step])
    low = (mean_interval(excess) or (0.0, 0.0))[0] if len(excess) >= LEAST_STEPS else 0.0
    if low <= UNLIKELY:
        return None
    what = (
        f"To the policy that learns the sampled tokens are {fmean(excess):.2f} nats a token less likely than its own "
    )
    what += "would be: they are of other weights, another temperature or other prompts, or the mask is off."
    return found("weights", what, change="sample with the weights, the temperature and the prompts that are learned")


def entropy(record: Record) -> Finding | None:
    late = record.groups[len(record.groups) // 2 :]
    one = record.share(late, lambda group: group.is_one_text and not group.all_have(record.top))
    values = record.series("policy/entropy") or [0.0]
    if one <= 0.5:
        return None
    what = f"In {one:.0%} of the later groups all completions are one text without the full score; the entropy went "
    return found("entropy", f"{what}from {values[0]:.3g} to {values[-1]:.3g} nats a token.")


def clipped(record: Record) -> Finding | None:
    values = record.series("completion/truncated")
    cut = fmean(values[len(values) // 2 :] or [0.0])
    return found("clipped", f"{cut:.0%} of the later completions are truncated.") if cut > 0.25 else None


DETECTORS: tuple[Callable[[Record], Finding | None], ...] = (
    *(
        failed,
        unmarked,
        answer_in_prompt,
        not_deterministic,
        temperature,
        rate_high,
        collapsed,
        stop_token,
        kl_sign,
        sign_flipped,
    ),
    *(
        reward_constant,
        template,
        paid_wrong,
        correct_refused,
        answer_column,
        all_solved,
        none_solved,
        hacked,
        too_many_epochs,
    ),
    *(warmup, beta_high, group_size, tied, rate_zero, stands_still, rate_low, other_part, noise, tiny_differences),
    *(weights, entropy, clipped),
)
OF_RECORD = (  # what only the record of a run shows
    *("failed", "unmarked", "temperature", "rate-high", "stop-token", "sign-flipped", "reward-constant", "template"),
    *("answer-column", "all-solved", "none-solved", "small-groups", "rate-low", "other-part", "noise"),
    *("tiny-differences", "weights", "entropy", "clipped", "evaluation", "training-only", "rate-decay"),
    *("answer-in-prompt", "the-same-twice", "kl-sign", "correct-refused", "too-many-epochs", "warmup-too-long"),
    "beta-high",
)
NEEDED = {  # metrics, and the findings that need them
    "policy/approx_kl": ["rate-high", "rate-low"],
    "learner/learning_rate": ["warmup-too-long"],
    "group/zero_variance": ["tied-groups"],
    "completion/truncated": ["clipped"],
    "mismatch/logprob_abs_mean": ["weights"],
}
OF_CURVES = {kind for kinds in NEEDED.values() for kind in kinds}  # what curves can show without rollouts
PAID = {kind for kind, _ in SAID.values()}
TIED = {"all-solved", "none-solved", "tied-groups", "rate-low", "entropy"} | PAID
EXPLAINED: dict[str, set[str]] = {  # the consequences of a cause, which are left out after it
    "rate-high": TIED | {"stop-token", "template", "answer-column", "clipped", "cut-as-finished"},
    "stop-token": TIED | {"template", "answer-column", "clipped", "marks-in-completion", "cut-as-finished"},
    "template": TIED | {"answer-column", "clipped"},
    "small-groups": {"tied-groups"},
    "noise": {"correct-refused", "form-rewarded"},
    "other-part": PAID | {"empty-answer", "correct-refused"},
    **{kind: {"correct-refused", "all-solved", "answer-column"} for kind in PAID},
    **dict.fromkeys(("sign-flipped", "reward-constant"), TIED | {"answer-column", "correct-refused"}),
    **dict.fromkeys(("temperature", "answer-column", "all-solved", "none-solved", "tied-groups"), TIED),
}
# What is no cause, by loss.advantage: these estimators learn from a group whose scores are equal, and a teacher's
# log-probabilities are learned from whatever the scores are.
_OF_GROUPS = {"temperature", "small-groups", "tied-groups"}
_OF_MARKS = {"unmarked", "sign-flipped", "reward-constant", "template", "answer-column"} | PAID
_OF_MARKS |= {"other-part", "noise", "all-solved", "none-solved", "tiny-differences"}
NO_CAUSE: dict[str, set[str]] = {
    **dict.fromkeys(("reinforce_plus_plus", "gae", "rank_softmax"), _OF_GROUPS),
    "distill": _OF_GROUPS | _OF_MARKS,
}
