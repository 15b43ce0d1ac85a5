"""What the overview draws, without a browser: node runs the page's scripts on what the server would answer."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from review.page import page
from review.page.run_files import RunFiles, finite
from tests.cases.control_results import control_result, rewards, write_control

CASES = Path(__file__).parents[2] / "cases"
SCRIPTS = [str(Path(page.__file__).parent / "assets" / name) for name in page.SCRIPTS if name != "main.js"]
CONTROLS = "Held-out accuracy by seconds: GRPO and its controls"
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node runs the scripts of the page")


def drawn(overview):
    answers = json.dumps({"runs": [overview["name"]], "0/overview": finite(overview)})
    words = ["node", str(CASES / "overview_page.js"), *SCRIPTS]
    done = subprocess.run(words, input=answers, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {card["title"]: card for card in found["cards"]}, found["text"]


def overview(rows, **changes):
    steps = [{"step": step, **row} for step, row in enumerate(rows)]
    empty = {"name": "run", "headline": [], "meanings": {}, "recorded": [], "config": "", "machine": "", "ended": None}
    return empty | {"rows": steps, "control": None} | changes


@pytest.fixture
def controlled(tmp_path):
    folder = shutil.copytree(CASES / "run_to_view", tmp_path / "run")
    write_control(folder, control_result())
    return RunFiles(folder).overview()


def test_grpo_and_its_controls_are_a_card_after_the_results(controlled):
    cards, _ = drawn(controlled)
    assert list(cards)[:3] == ["Reward", "Held out, 95 % intervals", CONTROLS]
    lines = cards[CONTROLS]["data"]
    assert [line["name"] for line in lines] == ["GRPO", "supervised steps", "rejection sampling"]
    assert [line["x"] for line in lines] == [[0, 30, 60]] * 3
    assert lines[0]["y"] == [0.3, 0.7, 0.9]
    for line in lines:
        bars = line["error_y"]
        assert all(0 < above < 0.06 for above in bars["array"])
        assert all(0 < below < 0.06 for below in bars["arrayminus"])
    assert cards[CONTROLS]["layout"]["xaxis"]["title"]["text"] == "seconds of training after the SFT stage"


def test_beneath_it_is_a_table_with_the_paired_differences(controlled):
    cards, _ = drawn(controlled)
    text = cards[CONTROLS]["text"]
    for words in ("start (SFT stage)", "GRPO minus it, sampled", "0.500 (0.460 to 0.540)", "+0.400 (+0.350 to +0.450)"):
        assert words in text
    assert "same 512 held-out problems" in text
    assert "Controls: words of supervised_0.001; words of rejection." in text


def test_a_click_on_seconds_opens_no_step(controlled):
    cards, _ = drawn(controlled)
    assert cards["Reward"]["click"] == "#/0/step/1"
    assert cards[CONTROLS]["click"] == ""
    cards, _ = drawn(controlled | {"control": None})
    assert CONTROLS not in cards


def test_rewards_are_not_called_an_accuracy(tmp_path):
    folder = shutil.copytree(CASES / "run_to_view", tmp_path / "run")
    write_control(folder, control_result(grpo=3.5, of=rewards, half=None))
    cards, _ = drawn(RunFiles(folder).overview())
    card = cards["Held-out reward by seconds: GRPO and its controls"]
    assert not any("error_y" in line for line in card["data"])


@pytest.mark.parametrize(
    ("metrics", "title", "value"),
    [
        ({"reward/errors": 0, "reward/abstained": 0.0, "faults/reward_worker": 0}, "Faults", 0),
        ({"completion/truncated": 0.0, "completion/aborted": 0.0}, "Truncated and aborted, share", 0),
        ({"draft/tokens_per_forward": 1.0, "eval/tokens_per_forward": 1.0}, "Tokens per forward", 1),
        ({"policy/ratio_mean": 1 - 5e-8, "policy/clip_fraction": 0.0}, "Ratio and clipping", "0 and 1"),
    ],
)
def test_a_chart_that_shows_nothing_is_named_and_not_drawn(metrics, title, value):
    cards, text = drawn(overview([metrics | {"reward/mean": 0.5}] * 3))
    assert list(cards) == ["Reward"]
    assert f"Constant in all steps, so not drawn: {title} ({value})." in text


def test_one_fault_in_one_step_is_drawn_also_in_a_smoothed_chart():
    rows = [{"reward/errors": 0, "reward/abstained": 0.0}] * 3 + [{"reward/errors": 1}]
    cards, text = drawn(overview(rows))
    assert {line["name"] for line in cards["Faults"]["data"]} == {"errors", "abstained"}
    assert "not drawn" not in text


def test_a_metric_that_is_never_a_number_has_no_chart_and_hides_no_other():
    rows = [{"policy/entropy": None, "eval/accuracy": None, "eval/reward_mean": 1.5}] * 2
    cards, _ = drawn(overview(rows))
    assert list(cards) == ["Held out, 95 % intervals"]
    assert cards["Held out, 95 % intervals"]["data"][0]["y"] == [1.5, 1.5]


def test_a_reward_that_is_always_0_is_a_result_and_drawn():
    cards, _ = drawn(overview([{"reward/mean": 0.0, "eval/accuracy": 0.0}] * 3))
    assert list(cards) == ["Reward", "Held out, 95 % intervals"]


def test_no_two_curves_of_a_chart_have_the_same_name(controlled):
    made = {"draft/tokens_per_forward": 1.5, "eval/tokens_per_forward": 1.7, "reward/part/a_b": 0.2}
    made |= {"reward/part/a b": 0.3, "faults/errors": 1}
    rows = [made | {"reward/mean": 0.1 * step, "reward/errors": step} for step in range(3)]
    for shown in (controlled, overview(rows)):
        cards, _ = drawn(shown)
        for card in cards.values():
            names = [line["name"] for line in card["data"] if line.get("showlegend") is not False]
            assert len(names) == len(set(names)), names
    names = [line["name"] for line in cards["Tokens per forward"]["data"]]
    assert names == ["draft/tokens_per_forward", "eval/tokens_per_forward"]


def test_the_names_of_curves_are_above_the_plot_and_cover_no_tick(controlled):
    cards, _ = drawn(controlled)
    several = [card["layout"] for card in cards.values() if card["layout"]["showlegend"]]
    assert len(several) > 1
    for layout in several:
        assert layout["legend"]["y"] > 1
        assert layout["legend"]["yanchor"] == "bottom"
