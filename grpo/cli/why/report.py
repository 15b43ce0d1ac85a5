"""What `quartet why` prints: first the answer in words, then tables."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from grpo.cli.why.explain import Explanation, GroupPart, explain
from rewards.console import visible

OPPOSES = -0.1  # cosine with the rest from which a group works against it
CLOSE = 1e-3  # a step whose metrics differ by more is not the one that was recorded
NAMED, GROUPS, TOKENS, CHARACTERS = 3, 40, 24, 60


def opponents(step: Explanation) -> list[GroupPart]:
    """Returns the groups that work against the others, the strongest first: by their gradients, or because the step
    would have done more than twice as much without them."""

    def hinders(group: GroupPart) -> bool:
        return group.effect is not None and group.effect * step.change < 0 and abs(group.effect) > abs(step.change)

    against = [group for group in step.groups if group.cosine_with_rest < OPPOSES or hinders(group)]
    return sorted(against, key=lambda group: (group.cosine_with_rest >= OPPOSES, group.cosine_with_rest))


def answer(step: Explanation) -> list[str]:
    """Returns sentences on what the step did and because of what. A group that works against the others comes first."""
    if not step.updates:
        why = "every advantage was zero"
        if all(group.tied for group in step.groups):
            why = f"in each of its {len(step.groups)} groups all rewards are equal, so there was nothing to prefer"
        return [f"Step {step.step} changed nothing: {why}."]
    lines = [
        f"Group {group.number} ({group.prompt_id}) works against the other groups of step {step.step}: the cosine of "
        f"its gradient with theirs is {group.cosine_with_rest:+.2f}{_effect(group)}. Its rewards are "
        f"{_rewards(group)}: look at them first."
        for group in opponents(step)[:NAMED]
    ]
    change = step.change
    line = f"The step {_raised(change)} the log-probability of {step.held_out} by {abs(change):.3g} nats per token"
    if step.tokens_of is not None:
        group = step.groups[step.tokens_of]
        end = " None of its tokens has a part."
        if step.tokens:
            token = step.tokens[0]
            done = "raised" if token.weight > 0 else "lowered"
            end = f" Its strongest token is {token.text!r} of completion {token.sample}, which the step {done}."
        part = f"to which group {group.number} ({group.prompt_id}) added {group.effect or 0.0:+.2g}"
        return [*lines, f"{line}, {part}.{end}"]
    effects = [(group, group.effect) for group in step.groups if group.effect is not None]
    causes = sorted((it for it in effects if it[1] * change > 0), key=lambda it: -abs(it[1]))
    if causes:
        (group, effect), *others = causes
        line += f" because of group {group.number} ({group.prompt_id})"
        line += f" (without it the change would have been {change - effect:+.3g})"
        named = [f"group {other.number} ({its:+.2g})" for other, its in others[: NAMED - 1]]
        line += f", and of {' and '.join(named)}" if named else ""
    else:
        line += ", and no group that was left out is the reason"
    return [*lines, f"{line}."]


def tell(run: Path, step: int, console: Console, **options: Any) -> Explanation:
    """Explain a step on this console; `options` and what is raised are those of `explain`."""
    explanation = explain(run, step, say=partial(_say, console), **options)
    show(explanation, console)
    return explanation


def show(step: Explanation, console: Console) -> None:
    for line in (*answer(step), _replay(step)):
        _say(console, line)
    norms, cut = ", ".join(f"{norm:.3g}" for norm in step.norms), sum(n > step.largest_norm for n in step.norms)
    limit = f"; {cut} of them cut to learner.max_grad_norm={step.largest_norm:g}" if cut else ""
    _say(console, f"held out: {step.before:.4f} before, {step.after:.4f} after; norm of each update: {norms}{limit}")
    console.print(_groups(step, console.encoding))
    if step.tokens:
        console.print(_tokens(step, console.encoding))
    if step.what_if:
        console.print(_what_if(step, console.encoding))


def _replay(step: Explanation) -> str:
    if not step.compared:
        return "replay: no metric of this step was recorded, so nobody can say whether it is the same step"
    begin = f"checkpoint {step.begins}" if step.begins else "the start of the run"
    if not step.difference:
        return f"replay: from {begin}; all {step.compared} recorded metrics of the learner came out to the same bits"
    close = f"{step.difference:.1g} ({step.worst})"
    if step.difference < CLOSE:
        return f"replay: from {begin}; the {step.compared} recorded metrics of the learner came out within {close}"
    return (
        f"replay: from {begin}; THIS IS NOT THE STEP THAT WAS RECORDED: its metrics differ by up to {close}. The run "
        "may have had another configuration then, another device or another version"
    )


def _groups(step: Explanation, encoding: str) -> Table:
    removed = sorted({name for group in step.groups for name, share in group.removed.items() if share})
    headings = ("group", "reward", "cut", "norm", "cosine", "with rest", "held out")
    numbers = [Column(name, justify="right", no_wrap=True) for name in headings]
    shares = [Column(f"-{name}", justify="right") for name in removed]
    prompt = Column("prompt", overflow="fold", ratio=1)
    table = Table(*numbers, *shares, prompt, title="groups, the strongest first", title_justify="left")
    listed = [group for group in step.groups if step.tokens_of in (None, group.number)]
    for group in sorted(listed, key=lambda group: -abs(group.norm * group.cosine))[:GROUPS]:
        rewards = [reward for reward in group.rewards if reward is not None]
        mean = f"{sum(rewards) / len(rewards):.3g}" if rewards else "-"
        table.add_row(
            str(group.number),
            "zero variance" if group.tied else mean,
            str(group.cut or ""),
            f"{group.norm:.3g}",
            f"{group.cosine:+.2f}",
            f"{group.cosine_with_rest:+.2f}",
            "-" if group.effect is None else f"{group.effect:+.2g}",
            *(f"{group.removed.get(name, 0.0):.0%}" for name in removed),
            Text(visible(group.prompt, CHARACTERS, encoding)),
        )
    table.caption = "held out: what the group added, nats per token; -clip and so on: weight of its tokens that is gone"
    return table


def _tokens(step: Explanation, encoding: str) -> Table:
    order = f"the {TOKENS} strongest" if len(step.tokens) > TOKENS else "strongest first"
    headings = ("sample", "position", "weight", "norm", "cosine", "share")
    numbers = [Column(name, justify="right", no_wrap=True) for name in headings]
    title = f"tokens of group {step.tokens_of}, {order}; --json writes all"
    table = Table("token", *numbers, "removed", title=title, title_justify="left")
    for token in step.tokens[:TOKENS]:
        table.add_row(
            Text(repr(visible(token.text, CHARACTERS, encoding))),
            str(token.sample),
            str(token.position),
            f"{token.weight:+.3g}",
            f"{token.norm:.3g}",
            f"{token.cosine:+.3f}",
            f"{token.share:+.2%}",
            ", ".join(f"{name} {share:.0%}" for name, share in token.removed.items() if share),
        )
    table.caption = "weight above 0: the step raises the token; share: of the step's gradient, along it"
    return table


def _what_if(step: Explanation, encoding: str) -> Table:
    numbers = [
        Column(name, justify="right") for name in ("zero variance", "norm", "cosine with the real one", "held out")
    ]
    rollouts = Column("the same rollouts with", overflow="fold", ratio=1)
    table = Table(rollouts, *numbers, title="what if", title_justify="left")
    tied = sum(group.tied for group in step.groups)
    table.add_row("what the run had", str(tied), f"{step.norm:.3g}", "+1.00", f"{step.change:+.3g}")
    for other in step.what_if:
        cosine = "-" if other.cosine is None else f"{other.cosine:+.2f}"
        what = Text(visible(other.what, 200, encoding))
        table.add_row(what, str(other.tied), f"{other.norm:.3g}", cosine, f"{other.change:+.3g}")
    return table


def _raised(change: float) -> str:
    return "raised" if change > 0 else "lowered" if change < 0 else "did not change"


def _effect(group: GroupPart) -> str:
    if group.effect is None:
        return ""
    return f", and it {_raised(group.effect)} the held-out log-probability by {abs(group.effect):.2g}"


def _rewards(group: GroupPart) -> str:
    first = ", ".join("none" if reward is None else f"{reward:.3g}" for reward in group.rewards[:16])
    return first + (", ..." if len(group.rewards) > 16 else "")


def _say(console: Console, text: str) -> None:
    console.print(visible(text.replace("\n", " "), 2000, console.encoding), highlight=False, soft_wrap=True)
