r"""Writes the numbers and signs of an answer in one way, as a grammar of LaTeX reads them.

`readable` is for a whole completion: it rewrites what means the same in prose, in plain expressions and in LaTeX.
`in_latex` is for an expression without delimiters: it also rewrites symbols, function names, words and currencies.
Both take time linear in the length of the text.
"""

from __future__ import annotations

import re
from decimal import Decimal

# The full-width characters of ASCII (East Asian text), minus signs, and fractions of one character.
_CHARACTERS: dict[int, int | str] = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_CHARACTERS |= dict.fromkeys((0x2212, 0x2012, 0x2013, 0xFE63), "-")
_CHARACTERS |= dict.fromkeys((0x00A0, 0x2009, 0x202F), " ")
_CHARACTERS |= dict.fromkeys((0x200B, 0x200E, 0xFEFF), "")  # of no width
_CHARACTERS |= {ord("½"): " 1/2", ord("⅓"): " 1/3", ord("⅔"): " 2/3", ord("¼"): " 1/4", ord("¾"): " 3/4"}

_REWRITES = [
    (re.compile(r"\\boxed\s+(?=\{)"), r"\\boxed"),
    (re.compile(r"(?<=\d)\{,\}(?=\d{1,2}(?![\d{]))"), "."),  # 0{,}5, a decimal comma
    (re.compile(r"\{([,:.])\}"), r"\1"),  # 1{,}000, 3{:}30, 1{.}5
    (re.compile(r"(?<=\d)\.(?=\})"), ""),  # \boxed{5.}
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\(?:boldsymbol|bm)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"≈"), r"\\approx "),
    (re.compile(r"(?:^|(?<=[a-z:] ))~(?=\d)", re.MULTILINE), r"\\approx "),  # about 18; in LaTeX a ~ is a blank
    (re.compile(r"(?<=\d) percent\b"), "%"),
    (re.compile(r"(?<=\d),\\!\s?(?=\d)"), ""),  # 56,\!01,\!78 (Indian groups)
    (re.compile(r"\\!\s?"), ""),  # 11,\! 111
    (re.compile(r"\\\$(?=\s?[-+]?[\d.])"), ""),  # \$5
    (re.compile(r"\\(?:mathrm|mathit|mathcal|mathbf|rm)\{([A-Za-z])\}"), r"\1"),  # the grammar ends at \mathrm{e}
    (re.compile(r"(^|[=:({,$] ?|\bis )\+(?=[\d.])", re.MULTILINE), r"\1"),  # is +42
    (re.compile(r"(?<![\w.\\}/^])(\d+) {1,2}(\d+)/(\d+)(?![\w/])"), r"(\1+\2/\3)"),  # 3 1/2
]
_DOUBLED_BACKSLASH = re.compile(r"\\\\(?=[A-Za-z])")
# Thousands in groups: 1\,000, and 1.000.000 if there are two points or more.
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\,\d{3})+|(?:\.\d{3}){2,})(?!\d|\.\d)")
# math-verify deletes these at the end of an expression as units, such as h of 2\\pi r h and t of 3t. Braces keep them.
_VARIABLES = r"(?:ab|bc|(?<!1)st|[cdghlmost]s?)"
_END = r"(?=\s*(?:[$}]|\\[)\]]|[.*]*\s*(?:\n|\Z)))"
_LAST_VARIABLE = re.compile(
    rf"((?<=[\d}}])|(?<=[-+*/=] )|(?<=[\d}}] )(?![ghlms])"
    rf"|(?:(?<![A-Za-z\\{{])[A-Za-z]|\\(?:pi|theta|cdot)) )({_VARIABLES}){_END}"
)
_PRIMED = re.compile(r"(?<![A-Za-z\\])([A-Za-z])(?:('{1,3})|\^\{((?:\\prime){1,3})\}|\^?(\\prime))(?![A-Za-z'])")
_POWER_OF_TEN = (
    r"(?:[eE](?P<e>[-+]?\d{1,2})(?!\.?\w)"
    r"|\s*(?:\\times|\\cdot|[×*])\s*10\^(?:\{(?P<braced>-?\d{1,2})\}|(?P<digit>\d)(?!\w)))"
)
_SCIENTIFIC = re.compile(rf"(?<![\w.\\/^])(?P<digits>\d{{1,20}}(?:\.\d{{1,20}})?){_POWER_OF_TEN}")

_MAGNITUDES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MAGNITUDE_IN_TEXT = re.compile(  # 42\text{ million}
    rf"(?<=[\d}}])(?:\\[ ,]|[\s~])*\\(?:text|mathrm)\{{[\s~]*({'|'.join(_MAGNITUDES)})s?[\s~]*\}}"
)
_MAGNITUDE = re.compile(rf"(?<![\w.,])(?P<digits>[\d,]{{1,20}}(?:\.\d{{1,12}})?) (?P<word>{'|'.join(_MAGNITUDES)})\b")

# 0.1\overline{6}, of which the grammar reads 0.1; and a fraction of a percent, of which it reads what is before it.
_REPEATING = re.compile(r"(?<![\w.])(?P<whole>\d{1,20})\.(?P<first>\d{0,20})\\overline\s*\{(?P<period>\d{1,20})\}")
_FRACTION = r"\\[dt]?frac\s*(?:\{(?P<over>\d{1,9})\}|(?P<over_digit>\d))"
_FRACTION += r"\s*(?:\{(?P<under>\d{1,9})\}|(?P<under_digit>\d))"
_FRACTION_OF_PERCENT = re.compile(rf"(?<![\w.)}}])(?:(?P<whole>\d{{1,9}})\s*)?{_FRACTION}\s*\\?%")

_SYMBOLS: dict[str, str | int | None] = {
    "π": r"\pi ",
    "∞": r"\infty ",
    "∅": r"\emptyset ",
    "°": r"^{\circ}",
    "²": "^2",
    "³": "^3",
}
_SYMBOLS |= {"×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq "}
_SYMBOLS |= dict.fromkeys("€£¥₹", "")
_SYMBOLS |= {"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "$": ""}
_LATEX = [
    (re.compile(r"\\text\{(\s*[-\d][^{}]*)\}"), r"\1"),  # \text{5 feet}
    (re.compile(r"(\\sqrt\[\w{1,9}\])\s*(\w)"), r"\1{\2}"),  # \sqrt[3]8
    (re.compile(r"(?:(?<![\\A-Za-z])sqrt|√)\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√(\d+|[a-z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|ln|log|exp)(?=[ (])"), r"\\\1"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
]


def readable(text: str) -> str:
    r"""The text with its numbers and signs as both prose and LaTeX have them.

    >>> readable("is +42, −５, 1e3, 11,\\! 111 or 3½")
    'is 42, -5, 1000, 11111 or (3+1/2)'
    """
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if r"\begin" not in text:  # where \\ ends a row of a matrix
        text = _DOUBLED_BACKSLASH.sub(r"\\", text)
    text = _REPEATING.sub(_as_fraction, text)
    text = _FRACTION_OF_PERCENT.sub(_percent_in_full, text)
    text = _GROUPED.sub(_digits, text)
    text = _MAGNITUDE_IN_TEXT.sub(r" \1", text)
    text = _MAGNITUDE.sub(_in_full, text)
    text = _PRIMED.sub(_with_subscript, text)
    text = _LAST_VARIABLE.sub(r"\1{\2}", text)
    return _SCIENTIFIC.sub(_written_out, text)


def in_latex(expression: str) -> str:
    r"""An expression without delimiters in LaTeX, without its currency.

    >>> in_latex("2√3"), in_latex("even"), in_latex("$5")
    ('2\\sqrt{3}', '\\text{even}', '5')
    """
    expression = expression.translate(str.maketrans(_SYMBOLS))
    if is_words(expression) and (len(expression) > 2 or is_word_of_two(expression)):
        return rf"\text{{{expression}}}"
    for pattern, replacement in _LATEX:
        expression = pattern.sub(replacement, expression)
    return expression.strip()


def is_words(text: str) -> bool:
    return text.replace(" ", "").isalpha()


def is_word_of_two(text: str) -> bool:
    """Whether two letters are a word, such as no, on or so, and no product, such as xy: no variable is called o."""
    return len(text) == 2 and text.isalpha() and "o" in text.lower()


def _with_subscript(match: re.Match[str]) -> str:
    """The symbol with its primes as a subscript, since the grammar deletes primes: f'' is f_{pp}."""
    count = len(match[2] or "") or (match[3] or match[4]).count("prime")
    return f"{match[1]}_{{{'p' * count}}}"


def _digits(match: re.Match[str]) -> str:
    return "".join(filter(str.isdigit, match[0]))


def _as_fraction(match: re.Match[str]) -> str:
    first, period = match["first"], match["period"]
    unit = 10 ** len(first)
    over = int(match["whole"] + first) * (10 ** len(period) - 1) + int(period)
    return rf"\frac{{{over}}}{{{unit * (10 ** len(period) - 1)}}}"


def _percent_in_full(match: re.Match[str]) -> str:
    over, under = (int(match[name] or match[f"{name}_digit"]) for name in ("over", "under"))
    if under == 0:
        return match[0]
    percent = int(match["whole"] or 0) + Decimal(over) / under
    return rf"{percent:.12f}\%"


def _in_full(match: re.Match[str]) -> str:
    digits = match["digits"].replace(",", "")
    return f"{Decimal(digits).scaleb(_MAGNITUDES[match['word']]):f}" if digits.strip(".") else match[0]


def _written_out(match: re.Match[str]) -> str:
    exponent = match["e"] or match["braced"] or match["digit"]
    return f"{Decimal(match['digits'] + 'e' + exponent):f}"
