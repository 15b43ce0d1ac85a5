import pytest

from grpo.run.console import step_line, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 五 text", "plain é 五 text"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[2J\x00\x7f\x9b", r"\x1b[2J\x00\x7f\x9b"),
        ("abc\u202ecba", r"abc\u202ecba"),  # right-to-left override
        ("\ud800", r"\ud800"),
    ],
)
def test_control_characters_are_made_visible(text, shown):
    assert visible(text) == shown


def test_long_text_is_cut_in_the_middle():
    assert visible("0123456789", limit=5) == "012[... 5 characters ...]89"
    assert visible("0123456789", limit=1) == "0[... 9 characters ...]"
    assert visible("0123456789", limit=10) == "0123456789"


def test_what_a_terminal_cannot_encode_is_escaped():
    assert visible("é五", encoding="ascii") == r"\xe9\u4e94"


def test_the_step_line_leaves_out_what_was_not_measured():
    metrics = {"loss/policy": -0.01234, "draft/tokens_per_forward": 3.141, "policy/entropy": 0.5}
    assert step_line(12, metrics) == "step    12  loss -0.0123  entropy 0.500  3.14 tokens/forward"
    assert step_line(12, metrics | {"loss/total": 1.0}).startswith("step    12  loss +1.0000")
