"""The answer in words, and its tables, of explanations made by hand."""

from dataclasses import replace

from rich.console import Console

from grpo.cli.why.explain import Alternative, Explanation, GroupPart, TokenPart
from grpo.cli.why.report import answer, opponents, report
from rewards.commands.printer import show
from rewards.kinds import NOTE


def part(number: int, rest: float, effect: float | None = None) -> GroupPart:
    rewards = [1.0, 0.0, None]
    return GroupPart(number, f"p/{number}", "2 + 2 = ?\n", rewards, False, 0, 1.0, 0.5, rest, effect)


FOUND = Explanation(
    run="runs/a",
    step=7,
    begins=5,
    compared=9,
    worst="",
    difference=0.0,
    updates=1,
    held_out="the gold solutions of 8 held-out problems",
    before=-1.5,
    after=-1.25,
    norms=[3.0],
    largest_norm=1.0,
    groups=[part(0, 0.2, 0.05), part(1, 0.3, 0.125), part(2, 0.1, -0.02), part(3, 0.1)],
)


def shown(found: Explanation) -> str:
    console = Console(width=220, record=True)
    show(report(found), console)
    return console.export_text()


def test_the_step_raised_it_because_of_the_group_that_added_most():
    assert answer(FOUND) == (
        "The step raised the log-probability of the gold solutions of 8 held-out problems by 0.25 nats per token "
        "because of group 1 (p/1) (without it the change would have been +0.125), and of group 0 (+0.05)."
    )
    lowered = answer(replace(FOUND, after=-1.75))  # group 2 is the only one that lowered it
    assert "The step lowered" in lowered
    assert "because of group 2 (p/2) (without" in lowered


def test_a_group_that_works_against_the_others_is_named_first():
    found = replace(FOUND, groups=[*FOUND.groups[:3], part(3, -0.4, -0.01), part(4, -0.6), part(5, 0.0, -0.3)])
    assert [group.number for group in opponents(found)] == [4, 3, 5]  # the last: without it .55 in place of .25
    first, second, _ = report(found).findings
    assert (first.kind, first.severity, first.where) == ("opposing-group", NOTE, ("p/4",))
    assert first.evidence == (
        "Group 4 works against the other groups of step 7: the cosine of its gradient with theirs is -0.60. Its "
        "rewards are 1, 0, none."
    )
    assert "is -0.40, and it lowered the held-out log-probability by 0.01. Its" in second.evidence
    assert report(found).title.startswith("The step raised")
    assert opponents(replace(FOUND, groups=[part(0, -0.09, -0.2)])) == []


def test_a_step_that_changed_nothing_says_why():
    groups = [replace(part(n, 0.0), tied=True) for n in range(2)]
    [said] = report(replace(FOUND, updates=0, groups=groups)).findings
    assert said.evidence == (
        "Step 7 changed nothing: in each of its 2 groups all rewards are equal, so there was nothing to prefer."
    )
    [said] = report(replace(FOUND, updates=0)).findings
    assert said.evidence == "Step 7 changed nothing: every advantage was zero."


def test_the_replay_says_how_close_it_came():
    assert "all 9 recorded metrics of the learner came out to the same bits" in shown(FOUND)
    assert "came out within 2e-05 (loss/kl)" in shown(replace(FOUND, worst="loss/kl", difference=2e-5))
    other = replace(FOUND, worst="loss/kl", difference=2e-3)
    assert "this is not the step that was recorded" in shown(other)
    assert [finding.kind for finding in report(other).faults] == ["step-differs"]
    assert "no metric of this step was recorded" in shown(replace(FOUND, compared=0))
    assert "norm of each update: 3; 1 of them cut to learner.max_grad_norm=1" in shown(FOUND)
    assert "from the start of the run" in shown(replace(FOUND, begins=0))


def test_one_group_is_shown_with_its_tokens_and_what_others_would_have_done():
    tokens = [TokenPart(1, 4, " \x1b[2J7", -0.1, 0.5, 0.25, 0.125, {"clip": 0.5, "truncation": 0.0})]
    found = replace(FOUND, tokens_of=1, tokens=tokens, what_if=[Alternative("loss.advantage=rloo", 2.0, None, 1, 0.5)])
    assert answer(found).endswith(
        "to which group 1 (p/1) added +0.12. Its strongest token is ' \\x1b[2J7' of completion 1, which the step "
        "lowered."
    )
    text = shown(found)
    assert "\x1b" not in text
    [row] = [line for line in text.splitlines() if "+12.50%" in line]
    assert "-0.1" in row
    assert "+0.250" in row
    assert "clip 50%" in row
    assert "truncation" not in row
    [row] = [line for line in text.splitlines() if "loss.advantage=rloo" in line]
    assert "+0.5" in row
    assert " - " in row
    assert "group 0" not in text.replace("group 1", "")
    assert text.count("2 + 2 = ?") == 1
    hostile = shown(replace(FOUND, groups=[replace(FOUND.groups[0], prompt="\x1b[31m[red]", prompt_id="a\x07\nb")]))
    assert "\x1b" not in hostile
    assert "\x07" not in hostile
    assert "\\x1b[31m[red]" in hostile


def test_what_was_removed_has_a_column_where_something_was():
    for share in (0.0, 0.25):
        groups = [replace(part(0, 0.1), removed={"clip": share}), part(1, 0.1)]
        assert ("-clip" in shown(replace(FOUND, groups=groups)).split("prompt")[0]) == bool(share)
