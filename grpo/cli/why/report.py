"""What `quartet why` prints: first the answer in words, then tables."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.cli.why.explain import Explanation, GroupPart, explain
from grpo.run.console import visible

OPPOSES = -0.1  # cosine with the rest from which a group works against it
CLOSE = 1e-3  # a step whose metrics differ by more is not the one that was recorded
NAMED, GROUPS, TOKENS, CHARACTERS = 3, 40, 24, 60


def opponents(found: Explanation) -> list[GroupPart]:
    """The groups that work against the others, the strongest first: by their gradients, or because the step would have
    done more than twice as much without them."""

    def hinders(group: GroupPart) -> bool:
        return group.effect is not None and group.effect * found.change < 0 and abs(group.effect) > abs(found.change)

    against = [group for group in found.groups if group.cosine_with_rest < OPPOSES or hinders(group)]
    return sorted(against, key=lambda group: (group.cosine_with_rest >= OPPOSES, group.cosine_with_rest))


def answer(found: Explanation) -> list[str]:
    """What the step did and because of what, in sentences. A group that works against the others comes first."""
    if not found.updates:
        return [f"Step {found.step} changed nothing: {_why_nothing(found)}."]
    lines = [
        f"{_name(group)} works against the other groups of step {found.step}: the cosine of its gradient with theirs "
        f"is {group.cosine_with_rest:+.2f}{_effect(group)}. Its rewards are {_rewards(group)}: look at them first."
        for group in opponents(found)[:NAMED]
    ]
    change = found.change
    said = f"The step {_raised(change)} the log-probability of {found.held_out} by {abs(change):.3g} nats per token"
    if found.tokens_of is not None:
        group = found.groups[found.tokens_of]
        return [
            *lines,
            f"{said}, to which {_name(group, begins=False)} added {group.effect or 0.0:+.2g}.{_strongest(found)}",
        ]
    causes = [group for group in found.groups if group.effect is not None and group.effect * change > 0]
    causes.sort(key=lambda group: -abs(group.effect or 0.0))
    if causes:
        said += f" because of {_name(causes[0], begins=False)}{_without(causes[0], change)}"
        said += f", and of {_numbers(causes[1:NAMED])}" if causes[1:] else ""
    else:
        said += ", and no group that was left out is the reason"
    return [*lines, f"{said}."]


def tell(run: Path, step: int, console: Console, **given: Any) -> Explanation:
    """Explain a step on this console; `given` and what is raised are those of `explain`."""
    found = explain(run, step, say=partial(_say, console), **given)
    show(found, console)
    return found


def show(found: Explanation, console: Console) -> None:
    for line in answer(found):
        _say(console, line)
    _say(console, _again(found))
    norms, cut = ", ".join(f"{norm:.3g}" for norm in found.norms), sum(n > found.largest_norm for n in found.norms)
    limit = f"; {cut} of them cut to learner.max_grad_norm={found.largest_norm:g}" if cut else ""
    _say(console, f"held out: {found.before:.4f} before, {found.after:.4f} after; norm of each update: {norms}{limit}")
    console.print(_groups(found, console.encoding))
    if found.tokens:
        console.print(_tokens(found, console.encoding))
    if found.what_if:
        console.print(_what_if(found, console.encoding))


def _again(found: Explanation) -> str:
    if not found.compared:
        return "replay: no metric of this step was recorded, so nobody can say whether it is the same step"
    begin = f"checkpoint {found.begins}" if found.begins else "the start of the run"
    if not found.difference:
        return f"replay: from {begin}; all {found.compared} recorded metrics of the learner came out to the same bits"
    close = f"{found.difference:.1g} ({found.worst})"
    if found.difference < CLOSE:
        return f"replay: from {begin}; the {found.compared} recorded metrics of the learner came out within {close}"
    return (
        f"replay: from {begin}; THIS IS NOT THE STEP THAT WAS RECORDED: its metrics differ by up to {close}. The run "
        "may have had another configuration then, another device or another version"
    )


def _groups(found: Explanation, encoding: str) -> Table:
    table = Table(title="groups, the strongest first", title_justify="left")
    removed = sorted({name for group in found.groups for name, share in group.removed.items() if share})
    for name in ("group", "reward", "cut", "norm", "cosine", "with rest", "held out"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in removed:
        table.add_column(f"-{name}", justify="right")
    table.add_column("prompt", overflow="fold", ratio=1)
    shown = [group for group in found.groups if found.tokens_of in (None, group.number)]
    for group in sorted(shown, key=lambda group: -abs(group.norm * group.cosine))[:GROUPS]:
        table.add_row(
            str(group.number),
            "tied" if group.tied else _mean(group.rewards),
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


def _tokens(found: Explanation, encoding: str) -> Table:
    shown = f"the {TOKENS} strongest" if len(found.tokens) > TOKENS else "strongest first"
    table = Table(title=f"tokens of group {found.tokens_of}, {shown}; --json writes all", title_justify="left")
    table.add_column("token")
    for name in ("sample", "position", "weight", "norm", "cosine", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("removed")
    for token in found.tokens[:TOKENS]:
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


def _what_if(found: Explanation, encoding: str) -> Table:
    table = Table(title="what if", title_justify="left")
    table.add_column("the same rollouts with", overflow="fold", ratio=1)
    for name in ("tied groups", "norm", "cosine with the real one", "held out"):
        table.add_column(name, justify="right")
    tied = sum(group.tied for group in found.groups)
    table.add_row("what the run had", str(tied), f"{found.norm:.3g}", "+1.00", f"{found.change:+.3g}")
    for other in found.what_if:
        cosine = "-" if other.cosine is None else f"{other.cosine:+.2f}"
        what = Text(visible(other.what, 200, encoding))
        table.add_row(what, str(other.tied), f"{other.norm:.3g}", cosine, f"{other.change:+.3g}")
    return table


def _why_nothing(found: Explanation) -> str:
    if all(group.tied for group in found.groups):
        return f"in each of its {len(found.groups)} groups all rewards are equal, so there was nothing to prefer"
    return "every advantage was zero"


def _name(group: GroupPart, begins: bool = True) -> str:
    return f"{'G' if begins else 'g'}roup {group.number} ({group.prompt_id})"


def _numbers(groups: list[GroupPart]) -> str:
    return " and ".join(f"group {group.number} ({group.effect:+.2g})" for group in groups)


def _raised(change: float) -> str:
    return "raised" if change > 0 else "lowered" if change < 0 else "did not change"


def _without(group: GroupPart, change: float) -> str:
    """What the step would have done without a group."""
    assert group.effect is not None
    return f" (without it the change would have been {change - group.effect:+.3g})"


def _effect(group: GroupPart) -> str:
    if group.effect is None:
        return ""
    return f", and it {_raised(group.effect)} the held-out log-probability by {abs(group.effect):.2g}"


def _strongest(found: Explanation) -> str:
    if not found.tokens:
        return " None of its tokens has a part."
    token = found.tokens[0]
    done = "raised" if token.weight > 0 else "lowered"
    return f" Its strongest token is {token.text!r} of completion {token.sample}, which the step {done}."


def _rewards(group: GroupPart) -> str:
    shown = ", ".join("none" if reward is None else f"{reward:.3g}" for reward in group.rewards[:16])
    return shown + (", ..." if len(group.rewards) > 16 else "")


def _mean(rewards: list[float | None]) -> str:
    there = [reward for reward in rewards if reward is not None]
    return f"{sum(there) / len(there):.3g}" if there else "-"


def _say(console: Console, text: str) -> None:
    console.print(visible(text.replace("\n", " "), 2000, console.encoding), highlight=False, soft_wrap=True)
