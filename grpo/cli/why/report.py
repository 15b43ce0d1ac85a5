"""What `quartet why` prints: first the answer in words, then tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo.cli.why.explain import Alternative, Explanation, GroupPart, TokenPart, explain
from rewards.console import visible
from rewards.finding import Report

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


def answer(step: Explanation) -> str:
    """What the step did, and because of which groups."""
    if not step.updates:
        return f"Step {step.step} changed nothing."
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
        return f"{line}, {part}.{end}"
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
    return f"{line}."


def tell(run: Path, step: int, console: Console, **options: Any) -> Report:
    """Explain a step; its cost is printed on this console before. `options` and what is raised are those of
    `explain`."""
    return report(explain(run, step, say=lambda text: console.print(text, highlight=False, soft_wrap=True), **options))


def report(step: Explanation) -> Report:
    norms, cut = ", ".join(f"{norm:.3g}" for norm in step.norms), sum(n > step.largest_norm for n in step.norms)
    limit = f"; {cut} of them cut to learner.max_grad_norm={step.largest_norm:g}" if cut else ""
    facts = {
        "replay": _replay(step),
        "held out": f"{step.before:.4f} before, {step.after:.4f} after",
        "norm of each update": f"{norms}{limit}",
    }
    shown = f"the {TOKENS} strongest; --json has all" if len(step.tokens) > TOKENS else "the strongest first"
    tables = {
        "groups, the strongest first": _groups(step),
        f"tokens of group {step.tokens_of}, {shown}": list(map(_token, step.tokens[:TOKENS])),
        "what if": _what_if(step) if step.what_if else [],
    }
    result = Report(answer(step), facts=facts, tables=tables, more=asdict(step))
    if not step.updates:
        why = "every advantage was zero"
        if all(group.tied for group in step.groups):
            why = f"in each of its {len(step.groups)} groups all rewards are equal, so there was nothing to prefer"
        result.add("nothing-learned", f"Step {step.step} changed nothing: {why}.")
        return result
    if step.difference >= CLOSE:
        result.add("step-differs", f"its metrics differ by up to {step.difference:.1g} ({step.worst})")
    for group in opponents(step)[:NAMED]:
        what = f"Group {group.number} works against the other groups of step {step.step}: the cosine of its gradient "
        what += f"with theirs is {group.cosine_with_rest:+.2f}{_effect(group)}. Its rewards are {_rewards(group)}."
        result.add("opposing-group", what, group.prompt_id)
    return result


def _replay(step: Explanation) -> str:
    if not step.compared:
        return "no metric of this step was recorded, so nobody can say whether it is the same step"
    begin = f"checkpoint {step.begins}" if step.begins else "the start of the run"
    if not step.difference:
        return f"from {begin}; all {step.compared} recorded metrics of the learner came out to the same bits"
    close = f"{step.difference:.1g} ({step.worst})"
    if step.difference < CLOSE:
        return f"from {begin}; the {step.compared} recorded metrics of the learner came out within {close}"
    return f"from {begin}; this is not the step that was recorded"


def _groups(step: Explanation) -> list[dict[str, Any]]:
    """`held out`: what the group added, nats per token; `-clip` and so on: weight of its tokens that is gone."""
    removed = sorted({name for group in step.groups for name, share in group.removed.items() if share})
    listed = [group for group in step.groups if step.tokens_of in (None, group.number)]
    rows = []
    for group in sorted(listed, key=lambda group: -abs(group.norm * group.cosine))[:GROUPS]:
        rewards = [reward for reward in group.rewards if reward is not None]
        mean = f"{sum(rewards) / len(rewards):.3g}" if rewards else "-"
        row = {
            "group": group.number,
            "reward": "zero variance" if group.tied else mean,
            "cut": group.cut or "",
            "norm": f"{group.norm:.3g}",
            "cosine": f"{group.cosine:+.2f}",
            "with rest": f"{group.cosine_with_rest:+.2f}",
            "held out": "-" if group.effect is None else f"{group.effect:+.2g}",
        }
        row |= {f"-{name}": f"{group.removed.get(name, 0.0):.0%}" for name in removed}
        rows.append(row | {"prompt": visible(group.prompt, CHARACTERS)})
    return rows


def _token(token: TokenPart) -> dict[str, Any]:
    """Where `weight` is above 0, the step raises the token. `share`: of the step's gradient, along it."""
    return {
        "token": repr(visible(token.text, CHARACTERS)),
        "sample": token.sample,
        "position": token.position,
        "weight": f"{token.weight:+.3g}",
        "norm": f"{token.norm:.3g}",
        "cosine": f"{token.cosine:+.3f}",
        "share": f"{token.share:+.2%}",
        "removed": ", ".join(f"{name} {share:.0%}" for name, share in token.removed.items() if share),
    }


def _what_if(step: Explanation) -> list[dict[str, Any]]:
    real = Alternative("what the run had", step.norm, 1.0, sum(group.tied for group in step.groups), step.change)
    return [
        {
            "the same rollouts with": other.what,
            "zero variance": other.tied,
            "norm": f"{other.norm:.3g}",
            "cosine with the real one": "-" if other.cosine is None else f"{other.cosine:+.2f}",
            "held out": f"{other.change:+.3g}",
        }
        for other in (real, *step.what_if)
    ]


def _raised(change: float) -> str:
    return "raised" if change > 0 else "lowered" if change < 0 else "did not change"


def _effect(group: GroupPart) -> str:
    if group.effect is None:
        return ""
    return f", and it {_raised(group.effect)} the held-out log-probability by {abs(group.effect):.2g}"


def _rewards(group: GroupPart) -> str:
    first = ", ".join("none" if reward is None else f"{reward:.3g}" for reward in group.rewards[:16])
    return first + (", ..." if len(group.rewards) > 16 else "")
