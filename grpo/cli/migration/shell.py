"""Reads a shell script up to the command that it starts, as bash would run it, and runs nothing.

Assignments, conditions, loops, functions and the builtins that change variables are carried out here. No other program
is started. A condition that depends on one is taken both ways: `outcomes` returns what the script does in each case.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from grpo.cli.migration.shell_tree import Node, parse
from grpo.cli.migration.shell_words import MARK as MARKS
from grpo.cli.migration.shell_words import (
    SECRET,
    UNKNOWN,
    UNSET,
    NotKnown,
    Value,
    Words,
    is_empty,
    is_known,
    mark,
    matches,
    names_in,
    shown,
)

MOST_OUTCOMES = 256
MOST_COMMANDS = 20_000
IS_SECRET = re.compile("KEY|TOKEN(?!S|_LEN)|SECRET|PASS")  # variables whose values are not written
OF_MACHINE = {"HOSTNAME", "RANDOM", "SECONDS", "UID", "EUID", "PPID", "OSTYPE", "HOSTTYPE", "LINENO", "EPOCHSECONDS"}
PREFIXES = {"nohup", "exec", "command", "builtin", "env", "sudo", "time"}
LOOKS_FOR = {"pkill", "pgrep", "grep", "killall", "ps"}  # they may name the command, and do not start it
SHELLS = {"bash", "sh", "zsh"}
IMPORTS = re.compile(r"import ([A-Za-z_]\w*)( as \w+)?;?")
UNARY = {f"-{letter}" for letter in "abcdefghknoprstuvwxzGLNOS"}
FAIL = {"CallExpr", "DeclClause", "LetClause", "TestClause", "ArithmCmd", "Subshell"}  # under `set -e`
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=", re.S)
BINARY = {"=", "==", "!=", "=~", "<", ">", "-eq", "-ne", "-lt", "-le", "-gt", "-ge", "-nt", "-ot", "-ef"}


@dataclass(frozen=True)
class Decision:
    """A condition that depends on the machine or on a variable that is not set, and the way that was taken."""

    condition: str
    causes: tuple[str, ...]
    """The variables to give, or the condition itself."""
    choice: int
    choices: int


@dataclass
class Outcome:
    """What a script does when its undecided conditions are taken in one way."""

    words: list[str] | None
    """The arguments of the command; None if the script ends without it."""
    decisions: list[Decision]
    notes: list[str]
    end: str = ""
    """How the script ends without the command."""


class Reached(Exception):
    def __init__(self, words: list[str]):
        self.words = words


class Ended(Exception):
    """`exit`, or a command that fails under `set -e`."""


class Returned(Exception):
    pass


class Leaves(Exception):
    """`break` and `continue`."""

    def __init__(self, loops: int, goes_on: bool):
        self.loops, self.goes_on = loops, goes_on


class FromOutside(Exception):
    """What a substitution writes depends on a program or on an undecided condition."""


def outcomes(text: str, program: str, environment: Mapping[str, str], file: Path | None = None) -> list[Outcome]:
    """What the script does up to the command that has the word `program`, for each way of its undecided conditions.

    Raises ValueError for what cannot be read, and where there are too many ways.
    """
    script = parse(text.translate(dict.fromkeys((0xE000, 0xE001, 0xE002))))
    plans: list[list[int]] = [[]]
    found: list[Outcome] = []
    while plans:
        plan = plans.pop()
        shell = Shell(program, environment, plan, file)
        outcome = shell.outcome(script)
        found.append(outcome)
        choices = [decision.choice for decision in outcome.decisions]
        for place in range(len(plan), len(choices)):
            others = range(1, outcome.decisions[place].choices)
            plans += [[*choices[:place], other] for other in others]
        if len(found) + len(plans) > MOST_OUTCOMES:
            causes = sorted({cause for decision in outcome.decisions for cause in decision.causes})
            raise ValueError(f"too many conditions are undecided; give {', '.join(causes)}, or the command itself")
    return found


class Shell:
    """The state of one shell: its variables, and which ways it takes."""

    def __init__(self, program: str, environment: Mapping[str, str], plan: Iterable[int], file: Path | None):
        self.program, self.plan = program, list(plan)
        self.given = {name: value for name, value in environment.items() if not IS_SECRET.search(name)}
        self.variables: dict[str, Value] = dict(self.given)
        for name in environment:
            if IS_SECRET.search(name) and environment[name]:
                self.variables[name] = mark(f"${name}", name, SECRET)
        self.variables.setdefault("PWD", os.getcwd())
        for name in OF_MACHINE:
            self.variables.setdefault(name, mark(f"${name}", name))
        self.exported = set(environment)
        self.arguments: list[str] = []
        self.named: set[str] = set()
        self.functions: dict[str, Node] = {}
        self.locals: list[dict[str, Value | None]] = []
        self.words = Words(self)
        self.decisions: dict[str, Decision] = {}
        self.notes: dict[str, None] = {}
        self.file = "bash"
        self.status: int | None = 0
        self.cause = ""  # of a status that is not known
        self.output: list[str] | None = None  # what a substitution writes; None: nobody reads it
        self.printed, self.line = "", 0
        self.fails_at_once = self.refuses_unset = self.substitutes = self.misses_source = self.guesses = False
        self.assigned = ""  # the variable whose value is being read
        self.probes: list[str] = []  # modules that the script asks for
        self.conditions = self.commands = self.depth = 0
        if file:
            self.enter_file(str(file))

    def enter_file(self, file: str) -> None:
        self.file = file
        self.variables["BASH_SOURCE"] = {"0": file}

    def outcome(self, script: list[Node]) -> Outcome:
        words, end = None, "it ends without one"
        try:
            self.run_all(script)
        except Reached as reached:
            words = reached.words
        except Ended as ended:
            end = str(ended)
        except (Returned, Leaves):
            pass
        return Outcome(words, list(self.decisions.values()), list(self.notes), end)

    # ---- variables

    def assign(self, name: str, value: Value, index: Node | None = None) -> None:
        """Sets a variable. One whose value only a program knows is read from the environment."""
        if isinstance(value, str) and index is None:
            value = self._given(name, value)
        if index is None:
            old = self.variables.get(name)
            if isinstance(old, dict) and isinstance(value, str):
                value = old | {"0": value}
            self.variables[name] = value
            return
        array = self.array(name)
        array[self.words.index(name, index)] = str(value)
        self.variables[name] = array

    def _given(self, name: str, value: str) -> str:
        nameless = [source for kind, cause, source in MARKS.findall(value) if kind == UNKNOWN and not cause]
        if not nameless:
            return value
        if name in self.given:
            self.note(f"{name}={self.given[name]} is read from the environment in place of {nameless[0]}.")
            return self.given[name]
        return MARKS.sub(lambda found: mark(found[3], found[2] or name, found[1]), value)

    def array(self, name: str) -> dict[str, str]:
        value = self.variables.get(name, {})
        return dict(value) if isinstance(value, dict) else {"0": value}

    def set(self, assignment: Node) -> None:
        name, index, appends = assignment["Name"]["Value"], assignment.get("Index"), assignment.get("Append", False)
        if array := assignment.get("Array"):
            self._set_array(name, array.get("Elems", []), appends)
            return
        probes, self.assigned = len(self.probes), name
        text = self.words.text(assignment.get("Value"))
        self.assigned = ""
        if len(self.probes) > probes:
            text = self.given.get(name, text)
        if appends:
            text = (self.words.get(name, index) or "") + text
        self.assign(name, text, index)

    def _set_array(self, name: str, elements: list[Node], appends: bool) -> None:
        array = self.array(name) if appends else {}
        for element in elements:
            if index := element.get("Index"):
                array[self.words.index(name, index)] = self.words.text(element.get("Value"))
                continue
            for text in self.words.fields(element["Value"]):
                array[str(max((int(key) for key in array if key.isdigit()), default=-1) + 1)] = text
        self.variables[name] = array

    def special(self, name: str) -> str:
        known = {"#": str(len(self.arguments)), "0": self.file, "-": "", "@": " ".join(self.arguments)}
        if name == "?" and self.status is not None:
            return str(self.status)
        return known.get(name, mark(f"${name}"))

    def missing(self, name: str, source: str, required: bool = False) -> str:
        """The text of a variable that is not set. Where bash would end the script for want of it, a note names it."""
        if required or self.refuses_unset:
            self.note(f"{name} is not set, and bash would end the script for want of it; {how_to_give(name)}.")
            if name.isidentifier():
                self.variables[name] = mark(source, name)
            return mark(source, name)
        return "" if name == self.assigned else mark(source, name, UNSET)  # `S=$S$x` begins with an empty text

    def substitute(self, node: Node) -> str:
        """What `$(...)` writes, and a mark where a program would write it."""
        inner = self.copy()
        inner.output, inner.substitutes = [], True
        try:
            inner.run_all(node.get("Stmts", []))
        except (Ended, Returned):
            pass
        except FromOutside:
            self.status, self.cause = None, node["Text"]
            return mark(node["Text"])
        self.status = inner.status
        return "".join(inner.output or []).rstrip("\n")

    def copy(self) -> Shell:
        """A shell within this one: what it sets, this one does not see."""
        inner = Shell.__new__(Shell)
        inner.__dict__.update(self.__dict__)
        inner.variables, inner.functions = dict(self.variables), dict(self.functions)
        inner.named, inner.exported = set(self.named), set(self.exported)
        inner.arguments = list(self.arguments)
        inner.words = Words(inner)
        return inner

    # ---- conditions

    def note(self, sentence: str) -> None:
        self.notes[sentence] = None

    def settled(self, text: str) -> str:
        """The text for a condition, where a variable that is not set counts as empty, as it does in bash."""
        if self.refuses_unset or self.misses_source:
            return text
        for kind, name, source in MARKS.findall(text):
            if kind == UNSET:
                self.note(f"{name} is not set and counts as empty in a condition, as in bash; {how_to_give(name)}.")
                text = text.replace(mark(source, name, UNSET), "")
        return text

    def decide(self, condition: str, causes: Iterable[str] = (), choices: int = 2) -> int:
        """Which way an undecided condition takes, the same one wherever it is asked again."""
        if self.substitutes:
            raise FromOutside
        if condition not in self.decisions:
            place = len(self.decisions)
            choice = self.plan[place] if place < len(self.plan) else 0
            named = tuple(dict.fromkeys(causes)) or (f"`{' '.join(condition.split())[:80]}`",)
            self.decisions[condition] = Decision(condition, named, choice, choices)
        return self.decisions[condition].choice

    def holds(self, statements: Sequence[Node]) -> bool:
        """Whether a condition holds; where nobody knows, the way that is planned."""
        self.conditions += 1
        self.run_all(statements)
        self.conditions -= 1
        if self.status is None:
            self.guesses = True
            self.status = self.decide(shown(self.cause), names_in(self.cause))
        return self.status == 0

    def concludes(self, result: bool | None, cause: str) -> None:
        self.status = None if result is None else int(not result)
        self.cause = cause

    # ---- commands

    def run_all(self, statements: Sequence[Node]) -> None:
        for statement in statements:
            self.run(statement)

    def run(self, statement: Node) -> None:
        self.line, node = statement["Pos"]["Line"], statement.get("Cmd", {"Type": "CallExpr"})
        self.commands += 1
        if self.commands > MOST_COMMANDS:
            raise ValueError(f"line {self.line} of the shell text: it does not end after {MOST_COMMANDS:,} commands")
        if statement.get("Negated"):
            self.status = int(self.holds([statement | {"Negated": False}]))
            return
        output = self.output
        for redirect in statement.get("Redirs", []):
            if redirect["Op"][0] != "<" and redirect.get("N", {}).get("Value", "1") == "1":
                self.output = None
        carry_out = getattr(self, f"_{node['Type'].lower()}", None)
        if carry_out is None:
            raise ValueError(f"line {self.line} of the shell text cannot be read: {node['Type']} is not supported")
        try:
            carry_out(node)
        finally:
            self.output = output
        if node["Type"] in FAIL and self.fails_at_once and self.status and not self.conditions:
            raise Ended(f"line {statement['Pos']['Line']} fails, and `set -e` ends the script there")

    def _block(self, node: Node) -> None:
        self.run_all(node["Stmts"])

    def _timeclause(self, node: Node) -> None:
        self.run(node["Stmt"])

    def _binarycmd(self, node: Node) -> None:
        if node["Op"] in ("|", "|&"):
            self._pipeline(node)
        elif self.holds([node["X"]]) == (node["Op"] == "&&"):
            self.run(node["Y"])

    def _pipeline(self, node: Node) -> None:
        if self.substitutes and self.output is not None:
            raise FromOutside
        for part in (node["X"], node["Y"]):
            inner = self.copy()
            inner.output, inner.conditions = None, 1
            inner.run(part)
        self.concludes(None if self.conditions else True, node["Text"])

    def _ifclause(self, node: Node) -> None:
        branch: Node | None = node
        while branch and "Cond" in branch:
            if self.holds(branch["Cond"]):
                break
            branch = branch.get("Else")
        self.status = 0
        self.run_all(branch["Then"] if branch else ())

    def _caseclause(self, node: Node) -> None:
        word, branches, passes = self.settled(self.words.text(node["Word"])), node.get("Items", []), False
        planned = None
        if not is_known(word):
            takes_all = bool(branches) and any(pattern["Text"] == "*" for pattern in branches[-1]["Patterns"])
            choices = len(branches) + (not takes_all)
            planned = self.decide(f"case {shown(word)} (line {node['Pos']['Line']})", names_in(word), choices)
        self.status = 0
        for number, branch in enumerate(branches):
            is_chosen = number == planned if planned is not None else self._takes(word, branch["Patterns"])
            if passes or is_chosen:
                self.run_all(branch.get("Stmts", []))
                if branch["Op"] == ";;":
                    return
                passes = branch["Op"] == ";&"

    def _takes(self, word: str, patterns: list[Node]) -> bool:
        return any(matches(word, self.words.pattern(pattern)) for pattern in patterns)

    def _forclause(self, node: Node) -> None:
        loop = node["Loop"]
        if loop["Type"] == "CStyleLoop":
            self._count(loop, node["Do"])
            return
        words = [word for each in loop.get("Items", []) for word in self.words.fields(each)]
        for word in words if "InPos" in loop else self.arguments:
            self.assign(loop["Name"]["Value"], word)
            if self._leaves(node["Do"]):
                break

    def _count(self, loop: Node, body: list[Node]) -> None:
        self._compute(loop.get("Init"))
        while True:
            self.guesses = False
            goes_on = "Cond" not in loop or self._compute(loop["Cond"]) != "0"
            guesses = self.guesses
            if not goes_on or self._leaves(body) or guesses:  # how often is not known: at most once
                break
            self._compute(loop.get("Post"))

    def _compute(self, node: Node | None) -> str:
        value = self.words.computed(node, f"(({node['Text']}))" if node else "")
        if is_known(value):
            return value
        self.guesses = True
        return str(1 - self.decide(shown(value), names_in(value)))

    def _whileclause(self, node: Node) -> None:
        while True:
            self.guesses = False
            holds, waits = self.holds(node["Cond"]), self.guesses
            if holds == node.get("Until", False) or self._leaves(node["Do"]):
                break
            if waits:  # for the machine, and the loop ends when that has what it waits for
                break
        self.status = 0

    def _leaves(self, body: list[Node]) -> bool:
        """Runs the body of a loop once, and tells whether the loop is left."""
        try:
            self.run_all(body)
        except Leaves as leaves:
            if leaves.loops > 1:
                raise Leaves(leaves.loops - 1, leaves.goes_on) from None
            return not leaves.goes_on
        return False

    def _subshell(self, node: Node) -> None:
        inner = self.copy()
        try:
            inner.run_all(node["Stmts"])
        except Ended:
            inner.status = inner.status or 1
        self.status, self.cause = inner.status, inner.cause

    def _funcdecl(self, node: Node) -> None:
        self.functions[node["Name"]["Value"]], self.status = node["Body"], 0

    def _arithmcmd(self, node: Node) -> None:
        value = self.words.computed(node.get("X"), node["Text"])
        self.concludes(value != "0" if is_known(value) else None, value)

    def _letclause(self, node: Node) -> None:
        for each in node["Exprs"]:
            self._arithmcmd({"X": each, "Text": node["Text"]})

    def _testclause(self, node: Node) -> None:
        condition = Condition(self)
        self.concludes(condition.holds(node["X"]), condition.cause("[[", "]]"))

    def _declclause(self, node: Node) -> None:
        assigned = [each for each in node.get("Args", []) if "Naked" not in each]
        words = [each["Name"]["Value"] for each in node.get("Args", []) if "Naked" in each and "Name" in each]
        for each in node.get("Args", []):
            words += self.words.fields(each["Value"]) if "Naked" in each and "Value" in each else []
        names = {word for word in words if word.isidentifier()} | {each["Name"]["Value"] for each in assigned}
        options = "".join(word[1:] for word in words if word.startswith("-"))
        self.exported |= names if node["Variant"]["Value"] == "export" or "x" in options else set()
        self.named |= names if "A" in options else set()
        if self.locals and node["Variant"]["Value"] == "local":
            for name in names:
                self.locals[-1].setdefault(name, self.variables.get(name))
        for each in assigned:
            self.set(each)
        for word in words:
            if match := ASSIGNMENT.match(word):  # an expanded one, such as `export "$PAIR"`
                self.assign(match[1], word[match.end() :])
        self.status = 0

    def _callexpr(self, node: Node) -> None:
        words: list[str] = []
        for word in node.get("Args", []):
            fields = self.words.fields(word)
            if words[:1] in (["["], ["test"]) and '"' not in word["Text"]:  # bash drops what is not set
                fields = [each for each in fields if is_known(each) or self.settled(each)]
            words += fields
        assignments = node.get("Assigns", [])
        before = dict(self.variables)
        if not node.get("Args"):
            self.status = 0
        for assignment in assignments:
            self.set(assignment)
        if not node.get("Args"):
            return
        ours = {assignment["Name"]["Value"] for assignment in assignments}  # for this command only
        exported = self.exported
        self.exported = exported | ours
        try:
            self._call(words)
        finally:
            self.exported = exported | (self.exported - ours)
            for name in ours:
                if name in before:
                    self.variables[name] = before[name]
                else:
                    self.variables.pop(name, None)

    def _call(self, words: list[str]) -> None:
        at = words.index(self.program) if self.program in words else 0
        if at and words[at - 1] == "-m" and not self.builtin(words[0]) and words[0] not in LOOKS_FOR:
            raise Reached(words[at + 1 :])
        while words and words[0] in PREFIXES and len(words) > 1 and not words[1].startswith("-"):
            words = words[1:]
            while words and (given := ASSIGNMENT.match(words[0])):  # of env
                self.assign(given[1], words[0][given.end() :])
                self.exported.add(given[1])
                words = words[1:]
        if not words:
            self.status = 0
        elif body := self.functions.get(words[0]):
            self._call_function(body, words[1:])
        elif builtin := self.builtin(words[0]):
            self.status, self.cause = 0, ""
            builtin(words[1:])
        else:
            self._outside(words)

    def builtin(self, name: str) -> Callable[[list[str]], None] | None:
        names = {"[": "test", ".": "source", ":": "true"}
        return getattr(self, f"do_{names.get(name, name)}", None) if re.fullmatch(r"[a-z:.[]+", name) else None

    def _call_function(self, body: Node, arguments: list[str]) -> None:
        if self.depth > 50:
            raise ValueError("a function of the shell text calls itself without end")
        before, self.arguments = self.arguments, arguments
        self.locals.append({})
        self.depth += 1
        try:
            self.run(body)
        except Returned:
            pass
        finally:
            self.depth -= 1
            self.arguments = before
            for name, value in self.locals.pop().items():
                if value is None:
                    self.variables.pop(name, None)
                else:
                    self.variables[name] = value

    def _outside(self, words: list[str]) -> None:
        """A program that is not started. Its status is not known, nor what it writes."""
        name = words[0].rpartition("/")[2]
        if name in SHELLS and "-c" in words[:-1]:
            at = words.index("-c") + 1
            self._nested(words[at], words[at + 2 :])
        elif name in SHELLS or name.endswith(".sh"):
            files = [number for number, word in enumerate(words) if word.endswith(".sh")]
            if files and (path := self.path(words[files[0]])).is_file():
                self._nested(path.read_text(encoding="utf-8"), words[files[0] + 1 :], str(path))
                return
            self._unknown(words)
        elif name not in LOOKS_FOR and (inner := next((word for word in words[1:] if self.starts(word)), None)):
            self._nested(inner, [])  # of ssh, srun, docker
        elif (module := self._imported(words, name)) is not None:
            found = find_spec(module) is not None
            self.probes.append(module)
            way = f"; to say otherwise, {how_to_give(self.assigned)}" if self.assigned else ""
            self.note(f"The script asks for {module}, which is {'' if found else 'not '}installed here{way}.")
            self.concludes(found, "")
        else:
            self._unknown(words)

    def starts(self, text: str) -> bool:
        return re.search(rf"-m\s+{re.escape(self.program)}\b", text) is not None

    @staticmethod
    def _imported(words: list[str], name: str) -> str | None:
        """The module of `python3 -c 'import MODULE'`, which asks whether this machine has it."""
        asks = re.fullmatch(r"python[\d.]*", name) and len(words) == 3 and words[1] == "-c"
        match = IMPORTS.fullmatch(words[2].strip()) if asks else None
        return match[1] if match else None

    def _unknown(self, words: list[str]) -> None:
        if self.output is not None:
            raise FromOutside
        self.concludes(None if self.conditions else True, " ".join(words))

    def _nested(self, text: str, arguments: list[str], file: str = "bash") -> None:
        """Another shell, which has what is exported."""
        if self.depth > 50:
            raise ValueError(f"{file} starts itself without end")
        inner = self.copy()
        inner.variables = {name: value for name, value in self.variables.items() if name in self.exported}
        inner.functions, inner.arguments, inner.depth = {}, arguments, self.depth + 1
        inner.fails_at_once = inner.refuses_unset = False
        inner.enter_file(file)
        try:
            inner.run_all(parse(text))
        except Ended as ended:
            self.printed = str(ended)
            inner.status = inner.status or 0
        self.status, self.cause = inner.status, inner.cause

    def path(self, file: str) -> Path:
        return Path(str(self.variables["PWD"])) / Path(file).expanduser()

    # ---- builtins

    def do_true(self, words: list[str]) -> None:
        pass

    do_trap = do_wait = do_umask = do_ulimit = do_shopt = do_alias = do_mkdir = do_sleep = do_rm = do_touch = do_true

    def do_false(self, words: list[str]) -> None:
        self.status = 1

    def do_test(self, words: list[str]) -> None:
        words = words[:-1] if words[-1:] == ["]"] else words
        condition, tree = Condition(self), _tree(words) if words else None
        self.concludes(tree is not None and condition.holds(tree), condition.cause("[", "]"))

    def do_echo(self, words: list[str]) -> None:
        while words and re.fullmatch(r"-[neE]+", words[0]):
            words = words[1:]
        self.write(" ".join(words) + "\n")

    def write(self, text: str) -> None:
        self.printed = shown(text).strip()
        if self.output is not None:
            self.output.append(text)

    def do_exit(self, words: list[str]) -> None:
        code = words[0] if words else str(self.status or 0)
        self.status = int(code) if code.isdigit() else 1
        printed = f", after it prints {self.printed!r}" if self.printed else ""
        raise Ended(f"line {self.line} ends it with exit {code}{printed}")

    def do_return(self, words: list[str]) -> None:
        if words:
            self.status = int(words[0]) if words[0].isdigit() else None
        raise Returned

    def do_break(self, words: list[str]) -> None:
        raise Leaves(int(words[0]) if words else 1, False)

    def do_continue(self, words: list[str]) -> None:
        raise Leaves(int(words[0]) if words else 1, True)

    def do_shift(self, words: list[str]) -> None:
        count = int(words[0]) if words else 1
        self.status = int(count > len(self.arguments))
        if not self.status:
            self.arguments = self.arguments[count:]

    def do_set(self, words: list[str]) -> None:
        while words and re.match(r"[-+]", words[0]):
            word, *words = words
            on, letters = word[0] == "-", word[1:]
            if word in ("--", "-"):
                self.arguments = words
                return
            option = words.pop(0) if "o" in letters and words else ""
            self.fails_at_once = on if "e" in letters or option == "errexit" else self.fails_at_once
            self.refuses_unset = on if "u" in letters or option == "nounset" else self.refuses_unset
        if words:
            self.arguments = words

    def do_unset(self, words: list[str]) -> None:
        for word in words:
            name, _, index = word.partition("[")
            if index:
                array = self.array(name)
                array.pop(index[:-1], None)
                self.variables[name] = array
            else:
                self.variables.pop(name, None)

    def do_eval(self, words: list[str]) -> None:
        text = " ".join(words)
        if is_known(text):
            self.run_all(parse(text))
        else:
            self._unknown(["eval", *words])

    def do_source(self, words: list[str]) -> None:
        file = words[0] if words else ""
        if is_known(file) and (path := self.path(file)).is_file():
            try:
                script = parse(path.read_text(encoding="utf-8", errors="replace"))
            except ValueError:
                script = None
            if script is not None:
                with suppress(Returned):
                    self.run_all(script)
                return
        self.misses_source = True
        self.note(f"{shown(file)}, which the script sources, is not read; give the variables that it sets.")
        self._unknown(["source", *words])

    def do_read(self, words: list[str]) -> None:
        names = [word for word in words if word.isidentifier()] or ["REPLY"]
        for name in names:
            self.assign(name, mark(f"${name}"))
        self.concludes(None, " ".join(["read", *words]))

    def do_cd(self, words: list[str]) -> None:
        words = [word for word in words if not word.startswith("-")]
        folder = words[0] if words else str(self.variables.get("HOME", ""))
        if is_known(folder):
            folder = os.path.normpath(os.path.join(str(self.variables["PWD"]), folder))
        self.variables["PWD"] = folder

    def do_pwd(self, words: list[str]) -> None:
        self.write(f"{self.variables['PWD']}\n")

    def do_dirname(self, words: list[str]) -> None:
        self._of_path([word for word in words if word != "--"], lambda path: os.path.dirname(path.rstrip("/")) or ".")

    def do_basename(self, words: list[str]) -> None:
        words = [word for word in words if word != "--"]
        end = words[1] if len(words) == 2 else ""
        self._of_path(words[:1], lambda path: path.rstrip("/").rpartition("/")[2].removesuffix(end))

    def _of_path(self, words: list[str], change: Callable[[str], str]) -> None:
        for word in words:
            self.write((change(word) if is_known(word) else word) + "\n")

    def do_date(self, words: list[str]) -> None:
        if len(words) == 1 and re.fullmatch(r"\+(%[YmdHMSyjFTs]|[^%])*", words[0]):
            self.write(time.strftime(words[0][1:]) + "\n")
        else:
            self._unknown(["date", *words])


class Condition:
    """`[ ... ]`, or `[[ ... ]]`, whose words are expanded here; None is what nobody knows."""

    def __init__(self, shell: Shell):
        self.shell, self.read = shell, list[str]()

    def cause(self, opening: str, closing: str) -> str:
        return " ".join([opening, *self.read, closing])

    def holds(self, node: Node | str) -> bool | None:
        if isinstance(node, str) or node["Type"] == "Word":
            return self._checked("-n", node)
        operator = node.get("Op", "")
        if node["Type"] == "ParenTest":
            return self.holds(node["X"])
        if operator == "!":
            value = self.holds(node["X"])
            return None if value is None else not value
        if operator in ("&&", "||"):
            values, decides = [self.holds(node["X"]), self.holds(node["Y"])], operator == "||"
            return decides if decides in values else None if None in values else not decides
        return self._compared(node) if node["Type"] == "BinaryTest" else self._checked(operator, node["X"])

    def _text(self, word: Node | str) -> str:
        return self.shell.settled(word if isinstance(word, str) else self.shell.words.text(word))

    def _checked(self, operator: str, word: Node | str) -> bool | None:
        text = self._text(word)
        self.read.append(text if operator in ("-n", "-z") else f"{operator} {text}")
        if operator in ("-n", "-z"):
            empty = is_empty(text)
            if empty is None or (empty and not is_known(text)):  # `settled` has left a variable that is required
                return None
            return empty == (operator == "-z")
        if operator == "-v":
            return bool(self.shell.variables.get(text))
        return None if text else False

    def _compared(self, node: Node) -> bool | None:
        operator, pattern = node["Op"], node["Y"]
        left, right = self._text(node["X"]), self._text(pattern)
        self.read += [left, operator, right]
        if not is_known(left) or not is_known(right) or operator in ("-nt", "-ot", "-ef"):
            return None
        if operator.startswith("-"):
            return self._numbers(left, operator, right, strict=isinstance(pattern, str))
        if operator == "=~":
            return self._found(left, self.shell.words.pattern(pattern))
        if operator in "<>":
            return left < right if operator == "<" else left > right
        same = left == right if isinstance(pattern, str) else matches(left, self.shell.words.pattern(pattern))
        return same != (operator == "!=")

    def _numbers(self, left: str, operator: str, right: str, strict: bool) -> bool | None:
        if strict and not all(re.fullmatch(r"\s*[-+]?\d+\s*", each) for each in (left, right)):
            return False  # bash prints an error, and the condition does not hold
        try:
            first, second = (self.shell.words.evaluated(each.strip()) for each in (left, right))
        except NotKnown:
            return None
        order = {"-eq": first == second, "-ne": first != second, "-lt": first < second, "-le": first <= second}
        return (order | {"-gt": first > second, "-ge": first >= second})[operator]

    def _found(self, text: str, pattern: str) -> bool | None:
        if "[:" in pattern:  # a class such as [:digit:], which Python does not have
            return None
        try:
            found = re.search(pattern, text)
        except re.error:
            return None
        if found:
            groups = {str(number): group or "" for number, group in enumerate((found[0], *found.groups()))}
            self.shell.variables["BASH_REMATCH"] = groups
        return found is not None


def _tree(words: list[str]) -> Node | str | None:
    """The words of `[` as the tree that `[[` has; None where bash prints an error, and the condition does not hold."""
    for word, operator in (("-o", "||"), ("-a", "&&")):
        if word in words[1:-1]:
            at = words.index(word, 1)
            first, second = _tree(words[:at]), _tree(words[at + 1 :])
            return {"Type": "BinaryTest", "Op": operator, "X": first or "", "Y": second or ""}
    if words[0] == "!" and len(words) > 1:
        return {"Type": "UnaryTest", "Op": "!", "X": _tree(words[1:]) or ""}
    if words[0] == "(" and words[-1] == ")" and len(words) > 2:
        return _tree(words[1:-1])
    if len(words) == 3 and words[1] in BINARY:
        return {"Type": "BinaryTest", "Op": words[1], "X": words[0], "Y": words[2]}
    if len(words) == 2 and words[0] in UNARY:
        return {"Type": "UnaryTest", "Op": words[0], "X": words[1]}
    return words[0] if len(words) == 1 else None


def how_to_give(name: str) -> str:
    """How a person gives a variable or an argument that a script needs."""
    if name.isdigit():
        return f"run `quartet from-verl 'bash SCRIPT.sh ARGUMENTS'` with argument {name}"
    if name.isidentifier():
        return f"run `{name}=VALUE quartet from-verl SCRIPT.sh`"
    return "run `quartet from-verl 'bash SCRIPT.sh KEY=VALUE'` with the options that it changes"
