import io

import pytest
from rich.console import Console

from grpo.run.console import progress_bars, sample_table, step_line
from rewards.console import Terminal, visible
from rewards.group_score import GroupScore
from rollout.group import Completion, Prompt, RolloutGroup


def test_control_characters_are_made_visible_and_long_text_is_cut_in_the_middle():
    for text, shown in {
        "plain é 五 text": "plain é 五 text",
        "a\nb\tc\r": r"a\nb\tc\r",
        "\x1b[2J\x00\x7f\x9b": r"\x1b[2J\x00\x7f\x9b",
        "abc\u202ecba": r"abc\u202ecba",  # right-to-left override
        "\ud800": r"\ud800",
    }.items():
        assert visible(text) == shown
    assert visible("0123456789", limit=5) == "012[... 5 characters ...]89"
    assert visible("0123456789", limit=1) == "0[... 9 characters ...]"
    assert visible("0123456789", limit=10) == "0123456789"
    assert visible("é五", encoding="ascii") == r"\xe9\u4e94"  # which the terminal cannot encode


def test_the_step_line_has_numbers_that_mean_something_and_leaves_out_what_was_not_measured():
    metrics = {"loss/policy": -0.01234, "draft/tokens_per_forward": 3.141, "policy/entropy": 0.5}
    assert step_line(12, metrics) == "step    12  entropy 0.500  3.14 tokens/forward"
    metrics |= {"policy/approx_kl": 0.001234, "learner/grad_norm": 12.345, "group/zero_variance": 0.25}
    shown = "step    12  zero-variance 25%  approx KL 0.0012  grad norm 12  entropy 0.500  3.14 tokens/forward"
    assert step_line(12, metrics) == shown


@pytest.mark.parametrize(("columns", "widest"), [(60, 60), (80, 80), (300, 120)])
def test_samples_are_read_at_the_width_of_the_terminal_and_of_an_eye(columns, widest):
    """The text has most of a narrow terminal, and is not drawn out over a wide one."""
    completions = [Completion([1] * 9, [-0.1] * 9, text, "stop", 0) for text in ("zzzz " * 50, "no")]
    group = RolloutGroup(Prompt("p/0", "Tom has 3 apples. " * 8, [5]), completions)
    console = Console(file=io.StringIO(), width=columns, color_system=None)
    console.print(sample_table(3, [group], [GroupScore([1.0, 0.0], {})], [[0.5, -0.5]]))
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("step 3: sample completions")
    assert max(len(line.rstrip()) for line in lines) <= widest
    assert max(line.count("z") for line in lines) >= (widest - 28) * 4 // 5
    assert sum(line.count("z") for line in lines) == 200
    assert any("reward +1.000" in line and "zzzz" in line for line in lines)


@pytest.mark.parametrize("color", ["1", ""])
def test_what_moves_is_drawn_on_a_terminal_alone(monkeypatch, tmp_path, color):
    monkeypatch.setenv("FORCE_COLOR", color)
    with open(tmp_path / "out", "w") as stream, progress_bars(Terminal(file=stream), enabled=True) as progress:
        progress.add_task("sampling", total=3)
    assert (tmp_path / "out").read_text().strip() == ""
