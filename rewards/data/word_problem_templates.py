"""The templates of the built-in word problems, and the ranges of each level.

A template's letters are its numbers: m and n are drawn from a level's multipliers, other letters from its
quantities, and the result of an equation is computed. Names, things and wording are few and regular, so
that a model of a few million parameters can learn them.
"""

from __future__ import annotations

import operator
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")
WOMEN = ("Anna", "Clara", "Emma", "Grace")
THINGS = ("apples", "books", "cards", "marbles", "pens", "shells", "stamps", "toys")

_EQUATION = re.compile(r"\{(\w)\} ([-+*/]) \{(\w)\} = \{(\w)\}")
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class Template:
    """A question and its worked steps, one equation a line. A step may only repeat what is given.

    `given` are equations worked before the question is asked, for its numbers that have to fit: with
    `{a} * {m} = {x}` the x things of the question can be shared among m friends.
    """

    name: str
    question: str
    steps: tuple[str, ...]
    given: tuple[str, ...] = ()

    @cached_property
    def equations(self) -> list[tuple[str, ...]]:
        """(left, operator, right, result) of each equation, in the order of working."""
        return [match.groups() for match in map(_EQUATION.search, self.given + self.steps) if match]

    @cached_property
    def operands(self) -> list[str]:
        """The letters that are drawn: those used before any equation results in them.

        >>> Template("add", "{a} and {b}?", ("{a} + {b} = {x}",)).operands
        ['a', 'b']
        """
        drawn: dict[str, None] = {}
        worked: set[str] = set()
        for left, _, right, result in self.equations:
            drawn.update((letter, None) for letter in (left, right) if letter not in worked)
            worked.add(result)
        return list(drawn)

    @cached_property
    def asked(self) -> list[str]:
        """The letters whose numbers the question gives, in its order.

        >>> Template("give", "{x} less {b}?", ("{x} - {b} = {y}",), given=("{a} + {b} = {x}",)).asked
        ['x', 'b']
        """
        return [field for _, field, _, _ in string.Formatter().parse(self.question) if field and len(field) == 1]

    def numbers(self, operands: Sequence[int]) -> dict[str, int]:
        """The number of every letter: the operands, and what the equations result in."""
        numbers = dict(zip(self.operands, operands, strict=True))
        for left, sign, right, result in self.equations:
            numbers[result] = _OPERATORS[sign](numbers[left], numbers[right])
        return numbers

    def render(self, operands: Sequence[int], name: str, things: str) -> tuple[str, str]:
        """Question and answer; the answer ends `#### N`."""
        numbers = self.numbers(operands)
        words = {"name": name, "He": "She" if name in WOMEN else "He", "things": things, **numbers}
        lines = [step.format_map(words) for step in self.steps]
        return self.question.format_map(words), "\n".join([*lines, f"#### {numbers[self.equations[-1][-1]]}"])


@dataclass(frozen=True)
class Level:
    quantities: range
    multipliers: range
    templates: tuple[Template, ...]

    def operand_ranges(self, template: Template) -> list[range]:
        """The range of each of the template's operands, in the order of `Template.operands`."""
        return [self.multipliers if letter in "mn" else self.quantities for letter in template.operands]


def _templates(text: str) -> tuple[Template, ...]:
    """One template a paragraph: its name and what is `given`, its question, and a line for each step."""
    templates = []
    for paragraph in text.strip().split("\n\n"):
        asked, *steps = paragraph.split("\n- ")
        head, _, question = asked.partition("\n")
        name, *given = head.split(" | ")
        templates.append(Template(name, question.replace("\n", " "), tuple(steps), tuple(given)))
    return tuple(templates)


ONE_STEP = _templates("""
buys
{name} has {a} {things}. {He} buys {b} more. How many {things} does {name} have now?
- {name} has {a} {things} at first and buys {b} {things} more.
- Now there are {a} + {b} = {x} {things}.

gives | {a} + {b} = {x}
{name} has {x} {things}. {He} gives away {b}. How many {things} are left?
- {name} has {x} {things} at first and gives away {b} {things}.
- There are {x} - {b} = {y} {things} left.

fills_bags
{name} fills {m} bags with {a} {things} each. How many {things} are in the bags?
- {name} fills {m} bags and puts {a} {things} into each bag.
- The bags hold {m} * {a} = {x} {things}.

shares | {a} * {m} = {x}
{name} shares {x} {things} equally among {m} friends. How many {things} does each friend get?
- {name} has {x} {things} and shares them among {m} friends.
- Each friend gets {x} / {m} = {y} {things}.
""")

TWO_STEPS = _templates("""
buys_bags
{name} has {a} {things}. {He} buys {m} bags of {b} {things}. How many {things} does {name} have now?
- {name} has {a} {things} at first and buys {m} bags of {b} {things}.
- The bags hold {m} * {b} = {x} {things}.
- Now there are {a} + {x} = {y} {things}.

gives_each | {m} * {b} = {y} | {a} + {y} = {x}
{name} has {x} {things}. {He} gives {b} {things} to each of {m} friends. How many {things} are left?
- {name} has {x} {things} at first and gives {m} friends {b} {things} each.
- The friends get {m} * {b} = {y} {things}.
- There are {x} - {y} = {z} {things} left.

sells_all
{name} has {a} {things} and finds {b} more. {He} sells all of them for {m} dollars each.
How many dollars does {name} get?
- {name} has {a} {things} at first, finds {b} {things} and sells them for {m} dollars each.
- There are {a} + {b} = {x} {things}.
- All of them bring {x} * {m} = {y} dollars.

shares_rest | {a} * {m} = {y} | {y} + {b} = {x}
{name} has {x} {things}. {He} keeps {b} and shares the rest equally among {m} friends.
How many {things} does each friend get?
- {name} has {x} {things} at first, keeps {b} {things} and shares the rest among {m} friends.
- The friends get {x} - {b} = {y} {things}.
- Each friend gets {y} / {m} = {z} {things}.

buys_twice
{name} has {a} {things}. {He} buys {b} more on Monday and {c} more on Tuesday. How many {things} does {name} have now?
- {name} has {a} {things} at first, buys {b} {things} on Monday and {c} {things} on Tuesday.
- On Monday there are {a} + {b} = {x} {things}.
- Now there are {x} + {c} = {y} {things}.

gives_buys | {a} + {b} = {x}
{name} has {x} {things}. {He} gives away {b} and then buys {c} more. How many {things} does {name} have now?
- {name} has {x} {things} at first, gives away {b} {things} and then buys {c} {things}.
- There are {x} - {b} = {y} {things} left.
- Now there are {y} + {c} = {z} {things}.
""")

TWO_HARDER_STEPS = _templates("""
loses_gives | {a} + {b} = {y} | {y} + {c} = {x}
{name} has {x} {things}. {He} loses {a} and gives away {b}. How many {things} are left?
- In all {a} + {b} = {y} {things} are gone.
- There are {x} - {y} = {z} {things} left.

times_as_many
A friend has {a} {things}. {name} has {m} times as many and buys {b} more. How many {things} does {name} have now?
- {name} has {m} * {a} = {x} {things}.
- Now there are {x} + {b} = {y} {things}.

shares_bags | {a} * {n} = {x}
{name} has {m} bags of {x} {things}. {He} shares all of them equally among {n} friends.
How many {things} does each friend get?
- The bags hold {m} * {x} = {y} {things}.
- Each friend gets {y} / {n} = {z} {things}.

spends | {m} * {a} = {y} | {y} + {b} = {x}
{name} has {x} dollars. {He} buys {m} {things} for {a} dollars each. How many dollars are left?
- The {things} cost {m} * {a} = {y} dollars.
- There are {x} - {y} = {z} dollars left.

earns
{name} has {b} dollars. {He} sells {m} {things} for {a} dollars each. How many dollars does {name} have now?
- The {things} bring {m} * {a} = {x} dollars.
- Now there are {b} + {x} = {y} dollars.

adds_to_bags | {a} * {m} = {x}
{name} puts {x} {things} into {m} bags, the same number in each. Then {name} adds {b} more to each bag.
How many {things} are in each bag now?
- At first each bag holds {x} / {m} = {y} {things}.
- Now each bag holds {y} + {b} = {z} {things}.

has_fewer | {a} + {b} = {x}
{name} has {x} {things}. A friend has {b} fewer. How many {things} do they have together?
- The friend has {x} - {b} = {y} {things}.
- Together they have {x} + {y} = {z} {things}.

morning_evening
{name} fills {m} bags in the morning and {n} bags in the evening. Each bag holds {a} {things}.
How many {things} are in the bags?
- There are {m} + {n} = {x} bags.
- The bags hold {x} * {a} = {y} {things}.
""")

THREE_STEPS = _templates("""
bags_boxes
{name} has {m} bags of {a} {things} and {n} boxes of {b} {things}. How many {things} does {name} have in all?
- The bags hold {m} * {a} = {x} {things}.
- The boxes hold {n} * {b} = {y} {things}.
- In all there are {x} + {y} = {z} {things}.

spends_more | {m} * {a} = {y} | {y} + {b} = {z} | {z} + {c} = {x}
{name} has {x} dollars. {He} buys {m} {things} for {a} dollars each and a bag for {b} dollars.
How many dollars are left?
- The {things} cost {m} * {a} = {y} dollars.
- In all {name} pays {y} + {b} = {z} dollars.
- There are {x} - {z} = {w} dollars left.

three_days
{name} finds {a} {things} on Monday, {m} times as many on Tuesday and {b} on Wednesday.
How many {things} does {name} find in all?
- On Tuesday {name} finds {m} * {a} = {x} {things}.
- By Tuesday there are {a} + {x} = {y} {things}.
- In all there are {y} + {b} = {z} {things}.

sells_together
{name} has {a} {things}. A friend has {b} more than {name}. They sell all of them for {m} dollars each.
How many dollars do they get?
- The friend has {a} + {b} = {x} {things}.
- Together they have {a} + {x} = {y} {things}.
- They get {y} * {m} = {z} dollars.

keeps_gives_shares | {a} * {m} = {z} | {z} + {c} = {y} | {y} + {b} = {x}
{name} has {x} {things}. {He} keeps {b}, gives {c} to a teacher and shares the rest equally among {m} friends.
How many {things} does each friend get?
- Without those kept there are {x} - {b} = {y} {things}.
- The friends get {y} - {c} = {z} {things}.
- Each friend gets {z} / {m} = {w} {things}.

fills_keeps
{name} puts {a} {things} and then {b} more into each of {m} bags. There are {c} {things} left over.
How many {things} did {name} have at first?
- Each bag holds {a} + {b} = {x} {things}.
- The bags hold {m} * {x} = {y} {things}.
- At first there were {y} + {c} = {z} {things}.
""")

LEVELS = {
    1: Level(range(2, 10), range(2, 6), ONE_STEP),
    2: Level(range(2, 10), range(2, 6), TWO_STEPS),
    3: Level(range(2, 21), range(2, 10), TWO_HARDER_STEPS),
    4: Level(range(2, 51), range(2, 10), THREE_STEPS),
}
