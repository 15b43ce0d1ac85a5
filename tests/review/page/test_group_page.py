"""The colours of a group's tokens, without a browser: node runs the page's scripts on what the server would answer."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from review.page import page

CASES = Path(__file__).parents[2] / "cases"
ASSETS = Path(page.__file__).parent / "assets"
SCRIPTS = [str(ASSETS / name) for name in page.SCRIPTS if name != "main.js"]
READABLE = 4.5  # the contrast of text that WCAG 2 asks for, level AA
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node runs the scripts of the page")

# Every colouring meets values at and beyond both ends of its legend.
LOGPROBS = [0.0, -0.5, -1.5, -3.0, -4.9, -8.8, -50.0]
COMPLETION = {
    "sample": 0,
    "text": "abcdefg",
    "tokens": list("abcdefg"),
    "logprobs": LOGPROBS,
    "policy_logprobs": [0.0, -0.55, -1.4, -4.5, -4.7, -20.0, -1.0],
    "advantage": [-9.0, -1.5, -0.5, 0.0, 0.5, 1.5, 9.0],
    "depths": [0, 1, 2, 3, 5, 8, 16],
    "versions": [0, 1, 2, 3, 5, 7, 9],
    "reward": 1.0,
    "parts": {},
    "extras": {},
    "finish_reason": "stop",
    "policy_version": 0,
    "sampled": None,
}
GROUP = {"prompt_id": "p", "prompt": "Sort these letters: b a", "groups": 1, "completions": [COMPLETION]}


def themes():
    """The inks and the backgrounds of cards of the light and the dark theme, in the style sheet's order."""
    style = (ASSETS / "view.css").read_text(encoding="utf-8")
    inks, cards = (re.findall(rf"--{name}: #(\w+)", style) for name in ("ink", "card"))
    return dict(zip(("light", "dark"), zip(inks, cards, strict=True), strict=True))


def channels(color):
    pairs = [2 * digit for digit in color] if len(color) == 3 else re.findall("..", color)
    return [int(pair, 16) for pair in pairs]


def luminance(rgb):
    """Relative luminance of sRGB (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(ink, card, tint):
    *rgb, alpha = map(float, re.findall(r"[\d.]+", tint))
    below = channels(card)
    mixed = [alpha * color + (1 - alpha) * under for color, under in zip(rgb, below, strict=True)]
    bright, dark = sorted([luminance(channels(ink)), luminance(mixed)], reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def colourings():
    answers = json.dumps({"runs": ["run"], "0/group/1/0": GROUP})
    words = ["node", str(CASES / "group_page.js"), *SCRIPTS]
    done = subprocess.run(words, input=answers, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {colouring["name"]: colouring for colouring in json.loads(done.stdout)}


def test_contrast_is_that_of_wcag():
    assert contrast("000", "ffffff", "rgba(0,0,0,0)") == pytest.approx(21)
    assert contrast("777777", "ffffff", "rgba(255,255,255,1)") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(colourings, theme):
    ink, card = themes()[theme]
    unreadable = {}
    for name, colouring in colourings.items():
        for text, tint in colouring["tokens"] + colouring["legend"]:
            found = contrast(ink, card, tint) if tint else 21.0
            if found < READABLE:
                unreadable[name, text] = round(found, 2)
    assert not unreadable


def test_the_less_likely_a_token_the_darker_it_is(colourings):
    tints = [tint for _, tint in colourings["log-probability"]["tokens"]]
    strengths = [float(tint.split(",")[-1].rstrip(")")) for tint in tints]
    assert strengths == sorted(strengths)
    assert len(set(strengths[:5])) == 5


def test_every_colouring_but_plain_has_a_legend_of_different_colours(colourings):
    for name, colouring in colourings.items():
        shades = [tint for _, tint in colouring["legend"]]
        assert bool(shades) == (name != "plain")
        assert len(set(shades)) == len(shades)
