"""Reads a shell script up to the command that it starts, as bash would run it, and runs nothing.

It reads what verl's launch scripts use: assignments, arrays, `if`, `case`, functions and a few builtins. Anything else
is refused with its line. So is a condition that only a program, a file or a variable that is not set would decide.
"""

from __future__ import annotations

import operator
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from grpo.cli.migration.shell_tree import Node, parse
from grpo.cli.migration.shell_words import (
    MARK,
    SECRET,
    UNKNOWN,
    UNSET,
    Value,
    Words,
    is_empty,
    is_known,
    mark,
    matches,
    names_in,
    shown,
)

IS_SECRET = re.compile("KEY|TOKEN(?!S|_LEN)|SECRET|PASS")  # variables whose values are not written
OF_MACHINE = {"HOSTNAME", "RANDOM", "SECONDS", "UID", "EUID", "OSTYPE"}
LOOKS_FOR = {"pkill", "pgrep", "grep", "killall", "ps"}  # they may name the command, and do not start it
OTHER_NAMES = {"[": "test", ".": "source"}
SHELLS = {"bash", "sh", "zsh"}
SUCCEED = {":", "true", "mkdir"}
REFUSED = {"break", "continue", "false", "getopts", "mapfile", "popd", "pushd", "read", "readarray", "return", "shift"}
IMPORTS = re.compile(r"(?:\S*/)?python[\d.]* -c\s+import ([A-Za-z_]\w*)(?: as \w+)?;?\s*")
EQUAL = {"=", "==", "!="}
NUMBER = re.compile(r"\s*[-+]?\d+\s*")
NUMBERS = {f"-{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
FAIL = {"CallExpr", "TestClause", "ArithmCmd"}  # under `set -e`
DEEPEST = 50


class Reached(Exception):
    """The command, whose arguments it has."""


class Ended(Exception):
    """`exit`, or a command that fails under `set -e`."""


class Undecided(ValueError):
    """A condition or an output that only a program or the machine decides."""


class Shell(Words):
    """The state of one shell: its variables, and where it is."""

    def __init__(self, program: str, environment: Mapping[str, str], file: Path | None = None):
        self.program = program
        self.given = {name: value for name, value in environment.items() if not IS_SECRET.search(name)}
        self.variables: dict[str, Value] = {name: mark(f"${name}", name) for name in OF_MACHINE}
        self.variables |= {"PWD": os.getcwd()} | self.given
        for name in environment.keys() - self.given.keys():
            self.variables[name] = environment[name] and mark(f"${name}", name, SECRET)
        self.exported = {*environment, "PWD"}
        self.arguments: list[str] = []
        self.functions: dict[str, Node] = {}
        self.notes: dict[str, None] = {}
        self.ends: list[str] = []
        self.status: bool | None = True
        self.cause = ""  # of a status that is not known
        self.output: list[str] | None = None  # what a substitution writes; None: nobody reads it
        self.printed, self.source, self.line = "", "", 0
        self.fails_at_once = self.refuses_unset = self.misses_source = False
        self.assigned = ""  # the variable whose value is being read
        self.asked: list[str] = []  # the variable whose value depends on a module
        self.depth = 0
        self.file = str(file or "bash")

    def command(self, text: str) -> list[str] | None:
        """The arguments of the first command that has the word `program`; None if the script ends without it.

        Raises ValueError for what is not read.
        """
        try:
            self.run_all(parse(text.translate(dict.fromkeys((0xE000, 0xE001, 0xE002)))))
        except Reached as reached:
            return list(reached.args)
        except Ended:
            pass
        return None

    def refuse(self, source: str = "") -> NoReturn:
        """Raises ValueError for what is not read: the statement, or a part of it."""
        source = (source or self.source).splitlines()[0]
        raise ValueError(f"line {self.line} of the shell text: `{source}` is not read; {self.way_out()}")

    def undecided(self, cause: str) -> NoReturn:
        """Refuses a condition, and names the variables that would decide it."""
        names = [name for name in names_in(cause) if name.isidentifier() or name.isdigit()]
        ways = [*map(how_to_give, dict.fromkeys(names)), self.way_out()]
        problem = f"`{' '.join(shown(cause).split())}` cannot be decided without running it"
        raise Undecided(f"line {self.line} of the shell text: {problem}; {', or '.join(ways)}")

    def way_out(self) -> str:
        return f"pass the command itself: paste the words from `python3 -m {self.program}` on"

    # ---- variables

    def assign(self, name: str, value: Value) -> None:
        """Sets a variable. One whose value only a program knows is read from the environment."""
        if name == "IFS":
            self.refuse()
        self.variables[name] = self._given(name, value) if isinstance(value, str) else value

    def _given(self, name: str, value: str) -> str:
        nameless = [source for kind, cause, source in MARK.findall(value) if kind == UNKNOWN and not cause]
        if not nameless:
            return value
        if name in self.given:
            self.note(f"{name}={self.given[name]} is read from the environment in place of {nameless[0]}.")
            return self.given[name]
        return MARK.sub(lambda found: mark(found[3], found[2] or name, found[1]), value)

    def set(self, assignment: Node) -> None:
        name, array, source = assignment["Name"]["Value"], assignment.get("Array"), assignment["Text"]
        appends = assignment.get("Append")
        if "Index" in assignment or (array is None and isinstance(self.variables.get(name), list)):
            self.refuse(source)
        if array is None:
            self.assigned = name
            text = self.text(assignment.get("Value"))
            before = self.variables.get(name, "") if appends else ""
            if name in self.asked:
                text = self.given.get(name, text)
            self.asked.clear()
            self.assigned = ""
            self.assign(name, f"{before}{text}")
            return
        values = self.all(name) if appends else []
        for element in array.get("Elems", []):
            if "Index" in element:
                self.refuse(source)
            values = values + self.fields(element["Value"])
        self.assign(name, values)

    def missing(self, name: str, source: str, required: bool = False) -> str:
        """The text of a variable that is not set. Where bash would end the script for want of it, a note names it."""
        if required or self.refuses_unset:
            self.note(f"{name} is not set, and bash would end the script for want of it; {how_to_give(name)}.")
            self.variables[name] = mark(source, name)
            return mark(source, name)
        return "" if name == self.assigned else mark(source, name, UNSET)  # `S=$S$x` begins with an empty text

    def substitute(self, node: Node) -> str:
        """Return the text that `$(...)` writes. A mark stands for text that only a program could write."""
        inner = self.copy()
        inner.output = []
        try:
            inner.run_all(node.get("Stmts", []))
        except Ended:
            pass
        except Undecided:
            self.status, self.cause = None, node["Text"]
            return mark(node["Text"])
        self.status = inner.status
        return "".join(inner.output).rstrip("\n")

    def copy(self) -> Shell:
        """A shell within this one: what it sets, this one does not see."""
        inner = copy(self)
        inner.variables, inner.functions = dict(self.variables), dict(self.functions)
        return inner

    # ---- conditions

    def note(self, sentence: str) -> None:
        self.notes[sentence] = None

    def settled(self, text: str) -> str:
        """The text for a condition, where a variable that is not set counts as empty, as it does in bash."""
        if self.refuses_unset or self.misses_source:
            return text
        for kind, name, source in MARK.findall(text):
            if kind == UNSET:
                self.note(f"{name} is not set and counts as empty in a condition, as in bash; {how_to_give(name)}.")
                text = text.replace(mark(source, name, UNSET), "")
        return text

    def holds(self, statements: Sequence[Node]) -> bool:
        """Return whether a condition holds. Raises Undecided if that depends on a program."""
        fails_at_once, self.fails_at_once = self.fails_at_once, False
        self.run_all(statements)
        self.fails_at_once = fails_at_once
        if self.status is None:
            self.undecided(self.cause)
        return self.status

    def _testclause(self, node: Node) -> None:
        self.status = self._condition(node["X"])

    def _condition(self, node: Node) -> bool:
        """Return whether the condition inside of `[[ ... ]]` holds."""
        sign, first, second = node.get("Op", ""), node.get("X", node), node.get("Y", node)
        if sign == "!":
            return not self._condition(first)
        if sign == "&&":
            return self._condition(first) and self._condition(second)
        if sign == "||":
            return self._condition(first) or self._condition(second)
        if node["Type"] not in ("Word", "UnaryTest", "BinaryTest"):
            self.refuse(node["Text"])
        left = self.settled(self.text(first))
        if node["Type"] != "BinaryTest":
            return self._checked(sign or "-n", left)
        right = self.text(second)
        if sign not in EQUAL:
            return self._compared(left, sign, right)
        if not is_known(left + right):
            self.undecided(f"{left} {sign} {right}")
        return matches(left, self.pattern(second)) != (sign == "!=")

    def do_test(self, words: list[str]) -> None:
        words = words[:-1] if words[-1:] == ["]"] else words
        is_negated = len(words) > 1 and words[0] == "!"
        words = words[is_negated:]
        if len(words) > 3:
            self.refuse()
        elif len(words) == 3:
            result = self._compared(*words)
        else:
            result = self._checked(words[0] if len(words) == 2 else "-n", "".join(words[-1:]))
        self.status = result != is_negated

    def _checked(self, sign: str, text: str) -> bool:
        text = self.settled(text)
        empty = is_empty(text)
        if sign not in ("-n", "-z") or empty is None:
            self.undecided(f"{sign} {text}")
        return empty == (sign == "-z")

    def _compared(self, left: str, sign: str, right: str) -> bool:
        left, right = self.settled(left), self.settled(right)
        if sign in EQUAL and is_known(left + right):
            return (left == right) != (sign == "!=")
        if sign in NUMBERS and NUMBER.fullmatch(left) and NUMBER.fullmatch(right):
            return NUMBERS[sign](int(left), int(right))
        self.undecided(f"{left} {sign} {right}")

    def _arithmcmd(self, node: Node) -> None:
        value = self.computed(node["X"], node["Text"])
        if not is_known(value):
            self.undecided(value)
        self.status = value != "0"

    # ---- commands

    def run_all(self, statements: Sequence[Node]) -> None:
        for statement in statements:
            self.run(statement)

    def run(self, statement: Node) -> None:
        line = self.line = statement["Pos"]["Line"]
        self.source = statement["Text"]
        node = statement.get("Cmd", {"Type": "CallExpr"})
        carry_out = getattr(self, f"_{node['Type'].lower()}", None)
        if carry_out is None or statement.get("Negated"):
            self.refuse()
        output = self.output
        for redirect in statement.get("Redirs", []):
            if redirect["Op"][0] != "<" and redirect.get("N", {}).get("Value", "1") == "1":
                self.output = None
        carry_out(node)
        self.output = output
        if node["Type"] in FAIL and self.fails_at_once and self.status is False:
            self.end(f"line {line} fails, and `set -e` ends the script there")

    def end(self, why: str) -> NoReturn:
        self.ends.append(why)
        raise Ended

    def _block(self, node: Node) -> None:
        self.run_all(node["Stmts"])

    def _binarycmd(self, node: Node) -> None:
        if node["Op"] in ("|", "|&"):
            self._pipeline(node)
        elif node["Op"] == "||" and node["Y"]["Text"].strip() in ("true", ":"):  # however the program ends
            fails_at_once, self.fails_at_once = self.fails_at_once, False
            self.run(node["X"])
            self.fails_at_once, self.status = fails_at_once, True
        elif self.holds([node["X"]]) == (node["Op"] == "&&"):
            self.run(node["Y"])

    def _pipeline(self, node: Node) -> None:
        if self.output is not None:
            self.undecided(node["Text"])
        for part in (node["X"], node["Y"]):
            inner = self.copy()
            inner.fails_at_once = False
            inner.run(part)
        self.status, self.cause = None, node["Text"]

    def _ifclause(self, node: Node) -> None:
        branch: Node | None = node
        while branch and "Cond" in branch:
            if self.holds(branch["Cond"]):
                break
            branch = branch.get("Else")
        self.status = True
        self.run_all(branch["Then"] if branch else ())

    def _caseclause(self, node: Node) -> None:
        word = self.settled(self.text(node["Word"]))
        if not is_known(word):
            self.undecided(f"case {word}")
        self.status = True
        for branch in node.get("Items", []):
            if any(matches(word, self.pattern(pattern)) for pattern in branch["Patterns"]):
                if branch["Op"] != ";;":
                    self.refuse(branch["Op"])
                self.run_all(branch.get("Stmts", []))
                return

    def _funcdecl(self, node: Node) -> None:
        self.functions[node["Name"]["Value"]] = node["Body"]
        self.status = True

    def _declclause(self, node: Node) -> None:
        if node["Variant"]["Value"] != "export":
            self.refuse(node["Text"])
        for each in node.get("Args", []):
            if "Name" not in each:
                self.refuse()
            if "Naked" not in each:
                self.set(each)
            self.exported = self.exported | {each["Name"]["Value"]}
        self.status = True

    def _callexpr(self, node: Node) -> None:
        words: list[str] = []
        for word in node.get("Args", []):
            fields = self.fields(word)
            if words[:1] in (["["], ["test"]) and '"' not in word["Text"]:  # bash drops what is not set
                fields = [each for each in fields if is_known(each) or self.settled(each)]
            words += fields
        assignments = node.get("Assigns", [])
        shell = self
        if assignments and words:  # they are for this command only
            if words[0] in self.functions or self.builtin(words[0]):
                self.refuse()
            shell = self.copy()
            shell.exported = self.exported | {each["Name"]["Value"] for each in assignments}
        shell.status = True
        for assignment in assignments:
            shell.set(assignment)
        if words:
            shell._call(words)
        self.status, self.cause = shell.status, shell.cause

    def _call(self, words: list[str]) -> None:
        name, arguments = words[0], words[1:]
        at = words.index(self.program) if self.program in words else 0
        if body := self.functions.get(name):
            self._call_function(body, arguments)
        elif builtin := self.builtin(name):
            builtin(arguments)
        elif at and words[at - 1] == "-m":
            raise Reached(*words[at + 1 :])
        elif name in REFUSED or words[:2] == ["printf", "-v"]:
            self.refuse()
        else:
            self._outside(words)

    def builtin(self, name: str) -> Callable[[list[str]], None] | None:
        return getattr(self, f"do_{OTHER_NAMES.get(name, name)}", None)

    def _call_function(self, body: Node, arguments: list[str]) -> None:
        before, self.arguments = self.arguments, arguments
        self._descend()
        self.run(body)
        self.depth -= 1
        self.arguments = before

    def _descend(self) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            self.refuse("a function or a file that calls itself without end")

    def _outside(self, words: list[str]) -> None:
        """A program that is not started. Its status is not known, nor what it writes."""
        name = words[0].rpartition("/")[2]
        script = next((word for word in words if word.endswith(".sh")), "")
        asks = IMPORTS.fullmatch(" ".join(words))
        if name in SUCCEED:
            self.status = True
        elif (name in SHELLS or script == words[0]) and self.path(script).is_file():
            self._nested(self.path(script), words[words.index(script) + 1 :])
        elif name not in LOOKS_FOR and any(self.program in word for word in words):
            self.refuse()
        elif asks:
            self.status = find_spec(asks[1]) is not None
            self.asked.append(self.assigned)
            way = f"; to say otherwise, {how_to_give(self.assigned)}" if self.assigned else ""
            self.note(f"The script asks for {asks[1]}, which is {'' if self.status else 'not '}installed here{way}.")
        else:
            self._unknown(words)

    def _unknown(self, words: list[str]) -> None:
        self.status, self.cause = None, " ".join(words)
        if self.output is not None:
            self.undecided(self.cause)

    def _nested(self, path: Path, arguments: list[str]) -> None:
        """Another shell, which has what is exported."""
        inner = self.copy()
        inner.variables = {name: value for name, value in self.variables.items() if name in self.exported}
        inner.functions, inner.arguments = {}, arguments
        inner.fails_at_once = inner.refuses_unset = False
        inner.file = str(path)
        inner._descend()
        with suppress(Ended):
            inner.run_all(parse(path.read_text(encoding="utf-8")))
        self.status, self.cause = inner.status, inner.cause

    def path(self, file: str) -> Path:
        return Path(str(self.variables["PWD"])) / Path(file).expanduser()

    # ---- builtins

    def do_echo(self, words: list[str]) -> None:
        while words and re.fullmatch(r"-[neE]+", words[0]):
            words = words[1:]
        self.write(" ".join(words) + "\n")

    def write(self, text: str) -> None:
        self.printed = shown(text).strip()
        self.status = True
        if self.output is not None:
            self.output.append(text)

    def do_exit(self, words: list[str]) -> None:
        code = words[0] if words else "0"
        self.status = code == "0"
        printed = f", after it prints {self.printed!r}" if self.printed else ""
        self.end(f"line {self.line} ends it with exit {shown(code)}{printed}")

    def do_set(self, words: list[str]) -> None:
        for word in words:
            if not re.fullmatch(r"[-+][a-zA-Z]+|pipefail", word):
                self.refuse()
            if "e" in word and word != "pipefail":
                self.fails_at_once = word[0] == "-"
            if "u" in word:
                self.refuses_unset = word[0] == "-"

    def do_unset(self, words: list[str]) -> None:
        for word in words:
            if not word.isidentifier():
                self.refuse()
            self.variables.pop(word, None)

    def do_eval(self, words: list[str]) -> None:
        self._pass_over(is_known(" ".join(words)))

    def do_source(self, words: list[str]) -> None:
        self._pass_over(is_known(words[0]) and self.path(words[0]).is_file())

    def _pass_over(self, is_here: bool) -> None:
        """Notes a text that is not here. What it would set is not known, and does not count as empty."""
        if is_here:
            self.refuse()
        self.misses_source = True
        self.note(f"`{self.source}` is not read; give the variables that it sets.")
        self._unknown([self.source])

    def do_cd(self, words: list[str]) -> None:
        folder = words[-1] if words else "~"
        if folder == "-":
            self.refuse()
        self.variables["PWD"] = os.path.normpath(self.path(folder)) if is_known(folder) else folder
        self.status = True

    def do_pwd(self, words: list[str]) -> None:
        self.write(f"{self.variables['PWD']}\n")

    def do_dirname(self, words: list[str]) -> None:
        path = words[-1]
        self.write(f"{os.path.dirname(path.rstrip('/')) or '.'}\n" if is_known(path) else path)

    def do_basename(self, words: list[str]) -> None:
        path, *ends = [word for word in words if word != "--"]
        name = path.rstrip("/").rpartition("/")[2].removesuffix("".join(ends))
        self.write(f"{name}\n" if is_known(path) else path)

    def do_date(self, words: list[str]) -> None:
        if len(words) == 1 and re.fullmatch(r"\+(%[YmdHMSyjFTs]|[^%])*", words[0]):
            self.write(time.strftime(words[0][1:]) + "\n")
        else:
            self._unknown(["date", *words])


def how_to_give(name: str) -> str:
    """How a person gives a variable or an argument that a script needs."""
    if name.isdigit():
        return f"run `quartet from-verl 'bash SCRIPT.sh ARGUMENTS'` with argument {name}"
    if name.isidentifier():
        return f"run `{name}=VALUE quartet from-verl SCRIPT.sh`"
    return "run `quartet from-verl 'bash SCRIPT.sh KEY=VALUE'` with the options that it changes"
