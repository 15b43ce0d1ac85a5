"""A calculator for arithmetic, as the marks in GSM8K's solutions ask one."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

LONGEST = 200  # characters of an expression
_LARGEST = 10**30  # no step of a calculation may give more
_OPERATIONS: Mapping[type, Callable[[Fraction, Fraction], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def evaluate(expression: str) -> str:
    """The value of an arithmetic expression: exact, and rounded to 6 digits after the decimal point.

    It has numbers, + - * / // % ** and brackets. Python's parser reads it, and only nodes of arithmetic are accepted:
    nothing is run. Raises ValueError, which says what is wrong.

    >>> evaluate("0.1 + 0.2"), evaluate("2 * (1/3)"), evaluate("48/2")
    ('0.3', '0.666667', '24')
    """
    if len(expression) > LONGEST:
        raise ValueError(f"an expression may have {LONGEST} characters, not {len(expression)}")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error
    except (SyntaxError, UnicodeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} is not an arithmetic expression") from error
    whole, rest = divmod(abs(round(value * 10**6)), 10**6)
    text = f"{whole}.{rest:06d}".rstrip("0").rstrip(".")
    return f"-{text}" if value < 0 and text != "0" else text


def _value(node: ast.expr) -> Fraction:
    value: object
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        if node.value == math.inf:  # Python reads 1e999 so
            raise ValueError("a number is too large (inf)")
        value = Fraction(str(node.value))  # 0.1 is a tenth
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand) * (1 if isinstance(node.op, ast.UAdd) else -1)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and (right.denominator != 1 or abs(right) > 100):
            raise ValueError("an exponent must be a whole number up to 100")
        value = Fraction(_OPERATIONS[type(node.op)](left, right))
    else:
        raise ValueError(f"{ast.unparse(node)[:40]!r} is no number, and no operation with + - * / // % **")
    if max(abs(value.numerator), value.denominator) > _LARGEST:
        raise ValueError("a number is too large")
    return value


class Calculator:
    """An environment whose one tool evaluates arithmetic. Rewards judge the answer, as without a tool.

    >>> calculator = Calculator()
    >>> calculator.reset(answer="#### 24")
    >>> calculator.calculate("48/2")
    '24'
    """

    pure = True

    def reset(self, **columns: object) -> None:
        """Keeps nothing between problems."""

    def calculate(self, expression: str) -> str:
        """Evaluates an arithmetic expression.

        Args:
            expression: Numbers with + - * / and brackets, such as 48/2.
        """
        return evaluate(expression)
