r"""Dates, clock times, units and bounds around a number, which math-verify does not compare."""

from __future__ import annotations

import re
from typing import NamedTuple

_CLOCK = re.compile(
    r"(?<![\d:.])(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?(?![\d:]|\.\d)(?:\s*(?P<half>[ap])\.?\s?m\b)?",
    re.IGNORECASE,
)
_GOLD_CLOCK = re.compile(_CLOCK.pattern + r"[.$\s]*", re.IGNORECASE)

_MONTHS = {
    "jan": "uary",
    "feb": "ruary",
    "mar": "ch",
    "apr": "il",
    "may": "",
    "jun": "e",
    "jul": "y",
    "aug": "ust",
    "sep": "tember",
    "oct": "ober",
    "nov": "ember",
    "dec": "ember",
}
_MONTH = rf"(?:(?:{'|'.join(f'{short}(?:{rest})?' for short, rest in _MONTHS.items())}|sept)\b\.?)"
_DATE = re.compile(
    r"(?<![\d/-])(?:(?P<iso>\d{4}-\d{2}-\d{2})|(?P<slashed>\d{1,2}/\d{1,2}/\d{4}))(?![\d/-])"
    rf"|\b(?P<month>{_MONTH}) (?P<day>\d{{1,2}})(?:st|nd|rd|th)?\b(?:,? (?P<year>\d{{4}})\b)?"
    rf"|\b(?P<first>\d{{1,2}})(?:st|nd|rd|th)?(?: of)? (?P<named>{_MONTH})(?:,? (?P<in>\d{{4}})\b)?",
    re.IGNORECASE,
)
_HEDGED = re.compile(r"\bor\s+\S{0,12}\Z|(?:\bnot|n't)\s+\Z", re.IGNORECASE)

# The names of each unit, as `_singular` leaves them.
_NAMES = """
mm millimeter|cm centimeter|dm decimeter|m meter|km kilometer|in inch inche|ft foot feet|yd yard|mi mile
mg milligram|g gram|kg kilogram|t ton tonne|lb pound|oz ounce|ml milliliter|l liter|gal gallon
s sec second|min minute|h hr hour|day|week|month|yr year|cent|dollar|degree deg|radian rad
"""
_UNITS = {name: line.split()[0] for line in re.split(r"[|\n]", _NAMES.strip()) for name in line.split()}
_SPACE = r"(?:\s|~|\\[,;:! ]|\$)*"
_UNIT = re.compile(
    rf"\)?{_SPACE}(?:\\(?:text|mathrm|mbox|rm|textrm)\s*\{{\s*)?"
    rf"(?P<area>square |cubic |sq\.? |cu\.? )?(?P<unit>[A-Za-z]+)\}}?"
    rf"(?:\^?\{{?(?P<power>[23²³])\}}?)?(?:{_SPACE}(?:/|per\b)\s*(?:\\(?:text|mathrm)\{{\s*)?(?P<per>[A-Za-z]+))?"
)
_INCH_OR_IN = re.compile(r"\s+in\s+[a-z]")

_BOUND = (
    r"at (?:least|most)|(?:more|less|fewer|greater|larger|smaller|higher|lower) than(?: or equal to)?"
    r"|up to|almost|nearly"
)
_BOUND_BEFORE = re.compile(rf"\b({_BOUND})[\s$*(\[}}\\]*\Z", re.IGNORECASE)
_BOUND_AFTER = re.compile(r"[\s$*)}\]\\]*\bor (more|less|fewer|greater|above|below|higher|lower)\b", re.IGNORECASE)


class Unit(NamedTuple):
    name: str
    power: str
    per: str | None


def is_date(text: str) -> bool:
    """Return whether the text is a date: 2020-05-06, 5/6/2020, May 6, 2020 or 6 May."""
    return _DATE.fullmatch(text.strip("$. ")) is not None


def has_date(text: str, gold: str) -> bool:
    """Return whether the last date of the text is that of `gold`. Numbers with slashes are compared as they are."""
    found = _last_and_gold(_DATE, text, gold)
    if found is None:
        return False
    date, gold_date = map(_parts, found)
    return date[: len(gold_date)] == gold_date


def _last_and_gold(pattern: re.Pattern[str], text: str, gold: str) -> tuple[re.Match[str], re.Match[str]] | None:
    """Return the last match in the text and that of `gold`, or None if one is missing or words deny the last one."""
    matches = list(pattern.finditer(text))
    reference = pattern.search(gold)
    if not matches or reference is None or _HEDGED.search(text[: matches[-1].start()]):
        return None
    return matches[-1], reference


def _parts(date: re.Match[str]) -> list[int | str]:
    """Month, day and, if it is there, year."""
    if date["slashed"]:
        return ["/", *map(int, date["slashed"].split("/"))]
    if date["iso"]:
        year, *month_and_day = map(int, date["iso"].split("-"))
        return [*month_and_day, year]
    month = list(_MONTHS).index((date["month"] or date["named"])[:3].lower()) + 1
    year_text = date["year"] or date["in"]
    return [month, int(date["day"] or date["first"]), *([int(year_text)] if year_text else [])]


def is_clock(text: str) -> bool:
    """Return whether the text is a clock time, or a ratio that looks like one."""
    return _GOLD_CLOCK.fullmatch(text.strip("$ ")) is not None


def has_clock(text: str, gold: str) -> bool:
    """Return whether the last clock time of the text is that of `gold`. A time without a.m. or p.m. may be either."""
    found = _last_and_gold(_CLOCK, text, gold)
    if found is None:
        return False
    (seconds, certain), (gold_seconds, gold_certain) = map(_seconds, found)
    half_day = 12 * 3600
    if certain and gold_certain:
        return seconds == gold_seconds
    return seconds % half_day == gold_seconds % half_day


def _seconds(time: re.Match[str]) -> tuple[int, bool]:
    """Seconds since midnight, and whether the half of the day is known."""
    hour = int(time["hour"])
    if time["half"]:
        hour = hour % 12 + 12 * (time["half"].lower() == "p")
    certain = bool(time["half"]) or hour == 0 or hour > 12
    return hour * 3600 + int(time["minute"]) * 60 + int(time["second"] or 0), certain


def unit_after(text: str, end: int) -> Unit | None:
    """Return the unit that follows a number which ends at `end`, or None for none and for a word that is no unit."""
    match = _UNIT.match(text, end)
    if match is None or _INCH_OR_IN.match(text, end):
        return None
    name = _UNITS.get(_singular(match["unit"]))
    if name is None:
        return None
    area = (match["area"] or "").strip()[:2]
    power = {"sq": "2", "cu": "3", "²": "2", "³": "3"}.get(area or match["power"] or "", match["power"] or "1")
    return Unit(name, power, _UNITS.get(_singular(match["per"])) if match["per"] else None)


def _singular(name: str) -> str:
    """Return the name without the s of a plural, in American spelling."""
    name = re.sub(r"(met|lit)re", r"\1er", name.lower())
    return name.removesuffix("s") if len(name) > 2 else name


def bound_around(text: str, start: int, end: int) -> str:
    """Return the words that make a bound of the number between `start` and `end`, or ""."""
    before = _BOUND_BEFORE.search(text[max(start - 40, 0) : start])
    after = _BOUND_AFTER.match(text, end)
    found = before or after
    return found[1].lower() if found else ""
