"""Reads a shell script up to the command that it starts, as bash would run it, and runs nothing.

It reads what launch scripts use: assignments, arrays, conditions, loops, functions, files that it sources and the
builtins. Anything else is refused with its line. So is a condition that only a program, a file or a variable that is
not set would decide, if the command depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec

from grpo.cli.migration.shell_builtins import BLANKS, LEAST, Builtins
from grpo.cli.migration.shell_conditions import Conditions, Way
from grpo.cli.migration.shell_patterns import matches
from grpo.cli.migration.shell_state import (
    CHOICE,
    MARK,
    Ended,
    Left,
    Undecided,
    how_to_give,
    is_known,
    mark,
)
from grpo.cli.migration.shell_tree import Node, parse

LOOKS_FOR = {"pkill", "pgrep", "grep", "killall", "ps", "trap"}  # they may name the command, and do not start it
SHELLS = {"bash", "sh", "zsh"}
SUCCEED = {":", "true", "mkdir"}
REFUSED = {"popd", "pushd"}
IMPORTS = re.compile(r"(?:\S*/)?python[\d.]* -c\s+import ([A-Za-z_]\w*)(?: as \w+)?;?\s*")
FAIL = {"CallExpr", "TestClause", "ArithmCmd"}  # under `set -e`
GLOB = re.compile(r"[*?\[]")
MOST_ROUNDS = 1000  # of a loop
ENDLESS = {"true", ":", "[ 1 ]", "((1))", "[[ true ]]"}  # conditions of a loop that only `break` ends


class Shell(Builtins):
    """One shell, which carries out the statements of a script."""

    def command(self, text: str) -> list[str] | None:
        """The arguments of the first command that has the word `program`; None if the script ends without it.

        Raises ValueError for what is not read.
        """
        try:
            self.run_all(parse(text.translate(dict.fromkeys(range(0xE000, 0xE003)))))
        except (Ended, Left):
            pass
        except RecursionError:
            if not self.commands:
                raise ValueError(f"the shell text nests commands or brackets too deeply; {self.way_out()}") from None
        except ValueError:
            if not self.commands:  # else it is after the command
                raise
        return self.commands[0] if self.commands else None

    def refuse_choice(self, name: str, text: str) -> None:
        """Raises Undecided for an option whose value depends on a condition that nobody can decide."""
        for kind, variable, source in MARK.findall(text):
            if kind == CHOICE:
                undecided = self.choices[source]
                raise ValueError(undecided.sentence(variable, effect=f", and {name} depends on it"))

    # ---- variables

    def set(self, assignment: Node) -> None:
        name, array, source = assignment["Name"]["Value"], assignment.get("Array"), assignment["Text"]
        appends = assignment.get("Append")
        value = self.variables.get(name)
        if "Index" in assignment or (array is None and isinstance(value, list | dict)):
            self._set_element(assignment)
            return
        if array is not None and isinstance(value, dict):
            self._set_names(name, value if appends else {}, array)
            return
        if array is None:
            self.assigned = name
            text = self.text(assignment.get("Value"))
            before = self.variables.get(name, "") if appends else ""
            if name in self.asked:
                text = self.given.get(name) or text
            self.asked.clear()
            self.assigned = ""
            self.assign(name, f"{before}{text}")
            return
        values = [*self.all(name)] if appends else []
        for element in array.get("Elems", []):
            if "Index" in element:
                self.refuse(source)
            values += self.fields(element["Value"])
        self.assign(name, values)

    def _set_names(self, name: str, before: dict[str, str], array: Node) -> None:
        """Sets an array by names, `a=([x]=1 [y]=2)`."""
        values = dict(before)
        for element in array.get("Elems", []):
            if "Index" not in element:
                self.refuse(element["Text"])
            values[self.text(element["Index"])] = self.text(element.get("Value"))
        self.assign(name, values)

    def _set_element(self, assignment: Node) -> None:
        """Sets an element of an array, such as `a[1]=x`."""
        name = assignment["Name"]["Value"]
        index, by_name, values = self.index(assignment, name), self.variables.get(name), self.all(name)
        text = self.text(assignment.get("Value"))
        if assignment.get("Append"):
            text = f"{self.get(name, index) or ''}{text}"
        if isinstance(by_name, dict):
            self.assign(name, by_name | {index or "0": text})
        elif all(map(is_known, values)):
            number = int(index or 0) if re.fullmatch(r"\d*", index) else len(values) + 1
            if number > len(values) or "Array" in assignment:
                self.refuse(assignment["Text"])
            self.assign(name, [*values[:number], text, *values[number + 1 :]])

    def substitute(self, node: Node) -> str:
        """Return the text that `$(...)` writes. A mark stands for text that only a program could write."""
        inner = self.copy()
        inner.output = []
        try:
            inner.run_all(node.get("Stmts", []))
        except (Ended, Left):
            pass
        except Undecided:
            self.status, self.cause = None, node["Text"]
            return mark(node["Text"])
        finally:
            self.has_substituted = True
        self.take_status(inner)
        return "".join(inner.output).rstrip("\n")

    # ---- statements

    def run_all(self, statements: Sequence[Node]) -> None:
        for statement in statements:
            self.run(statement)

    def run(self, statement: Node) -> None:
        self.spend(100)
        line = self.line = statement["Pos"]["Line"]
        self.source = statement["Text"]
        node = statement.get("Cmd", {"Type": "CallExpr"})
        carry_out = getattr(self, f"_{node['Type'].lower()}", None)
        if carry_out is None:
            self.refuse()
        output, self.input = self.output, None
        for redirect in statement.get("Redirs", []):
            self._redirect(redirect)
        if statement.get("Background"):
            self._apart([statement | {"Background": False}])
        else:
            carry_out(node)
        self.output, self.input = output, None
        if statement.get("Negated") and self.status is not None:
            self.status = not self.status
        elif node["Type"] in FAIL and self.fails_at_once and self.status is False:
            self.end(f"line {line} fails, and `set -e` ends the script there")

    def _redirect(self, redirect: Node) -> None:
        sign, number = redirect["Op"], redirect.get("N", {}).get("Value", "")
        if sign[0] != "<" and number in ("", "1"):
            self.output = None
        elif sign in ("<<<", "<<", "<<-"):
            self.input = redirect

    def _apart(self, statements: Sequence[Node]) -> None:
        """A shell within this one: what it sets or ends, it sets and ends there."""
        inner = self.copy()
        with suppress(Ended, Left):
            inner.run_all(statements)
        self.take_status(inner)

    def _block(self, node: Node) -> None:
        self.run_all(node["Stmts"])

    def _subshell(self, node: Node) -> None:
        self._apart(node.get("Stmts", []))

    def _timeclause(self, node: Node) -> None:
        if "Stmt" in node:
            self.run(node["Stmt"])

    def _letclause(self, node: Node) -> None:
        values = [self.computed(each, each["Text"]) for each in node["Exprs"]]
        self.status, self.cause = values[-1] != "0" if is_known(values[-1]) else None, values[-1]

    def _binarycmd(self, node: Node) -> None:
        if node["Op"] in ("|", "|&"):
            self._pipeline(node)
        elif node["Op"] == "||" and node["Y"]["Text"].strip() in ("true", ":"):  # however the program ends
            fails_at_once, self.fails_at_once = self.fails_at_once, False
            self.run(node["X"])
            self.fails_at_once, self.status = fails_at_once, True
        else:
            try:
                goes_on = self.holds([node["X"]]) == (node["Op"] == "&&")
            except Undecided as undecided:
                self.try_ways(undecided, way_of([node["Y"]]), way_of([]))
                return
            if goes_on:
                self.run(node["Y"])

    def _pipeline(self, node: Node) -> None:
        if self.output is not None:
            self.undecided(node["Text"])
        for part in (node["X"], node["Y"]):
            inner = self.copy()
            inner.fails_at_once = False
            with suppress(Ended, Left):
                inner.run(part)
        self.status, self.cause = None, node["Text"]

    # ---- branches and loops

    def _ifclause(self, node: Node) -> None:
        other = [_statement_of(node["Else"])] if "Else" in node else []
        if "Cond" not in node:
            self.run_all(node["Then"])
            return
        try:
            holds = self.holds(node["Cond"])
        except Undecided as undecided:
            self.try_ways(undecided, way_of(node["Then"]), way_of(other))
            return
        self.status = True
        if holds:
            self.run_all(node["Then"])
        elif other:
            self.run_all(other)

    def _caseclause(self, node: Node) -> None:
        word = self.settled(self.text(node["Word"]))
        branches = node.get("Items", [])
        if not is_known(word):
            ways = [way_of(branch.get("Stmts", [])) for branch in branches]
            takes_all = any(self.pattern(pattern) == "*" for branch in branches for pattern in branch["Patterns"])
            ways = ways if takes_all else [*ways, way_of([])]
            self.try_ways(Undecided(self.line, f"case {word}", self.way_out()), *ways)
            return
        self.status = True
        for branch in branches:
            if any(matches(word, self.pattern(pattern)) for pattern in branch["Patterns"]):
                if branch["Op"] != ";;":
                    self.refuse(branch["Op"])
                self.run_all(branch.get("Stmts", []))
                return

    def _whileclause(self, node: Node) -> None:
        condition = " ".join(each["Text"].rstrip(" ;") for each in node["Cond"])
        waited, self.waits = self.waits, self.waits or condition in ENDLESS
        self._rounds(node)
        self.waits = waited

    def _rounds(self, node: Node) -> None:
        ends_with = bool(node.get("Until"))
        for _ in range(MOST_ROUNDS):
            try:
                if self.holds(node["Cond"]) == ends_with:
                    self.status = True
                    return
            except Undecided as undecided:
                self._some_rounds(undecided, node["Do"])
                return
            if not self._goes_on(node["Do"]):
                return
        self.refuse(node["Text"])

    def _some_rounds(self, undecided: Undecided, body: Sequence[Node]) -> None:
        """Carries out a loop that nobody can count: once or not at all, and what differs then is not known."""

        def once(shell: Conditions) -> None:
            assert isinstance(shell, Shell)
            shell._goes_on(body)

        self.try_ways(undecided, once, way_of([]))

    def _goes_on(self, body: Sequence[Node]) -> bool:
        """Carries out a round of a loop, and returns whether there may be another."""
        try:
            self.run_all(body)
        except Left as left:
            if left.word == "return":
                raise
            if left.levels > 1:
                raise Left(left.word, left.levels - 1) from None
            return left.word == "continue"
        return True

    def _forclause(self, node: Node) -> None:
        loop = node["Loop"]
        if node.get("Select"):
            self.refuse()
        if loop["Type"] == "CStyleLoop":
            self._counted_loop(loop, node)
            return
        name, items = loop["Name"]["Value"], [*self.arguments]
        if "Items" in loop:
            items = [field for word in loop["Items"] for field in self.settled_fields(word)]
        self.status = True
        if any(not is_known(item) or GLOB.search(item) for item in items):
            self.assign(name, mark(" ".join(items), name))
            self._some_rounds(Undecided(self.line, f"for {name} in {' '.join(items)}", self.way_out()), node["Do"])
            return
        for item in items:
            self.assign(name, item)
            if not self._goes_on(node["Do"]):
                break

    def _counted_loop(self, loop: Node, node: Node) -> None:
        """Carries out `for ((start; condition; step))`."""
        if "Init" in loop:
            self.computed(loop["Init"], node["Text"])
        for _ in range(MOST_ROUNDS):
            goes_on = self.computed(loop["Cond"], loop["Cond"]["Text"]) if "Cond" in loop else "1"
            if not is_known(goes_on):
                self._some_rounds(Undecided(self.line, goes_on, self.way_out()), node["Do"])
                return
            if goes_on == "0" or not self._goes_on(node["Do"]):
                self.status = True
                return
            if "Post" in loop:
                self.computed(loop["Post"], node["Text"])
        self.refuse(node["Text"])

    # ---- commands

    def _funcdecl(self, node: Node) -> None:
        self.functions[node["Name"]["Value"]] = node["Body"]
        self.status = True

    def _declclause(self, node: Node) -> None:
        kind, arguments = node["Variant"]["Value"], node.get("Args", [])
        flags = "".join(self.text(each["Value"]) for each in arguments if "Name" not in each)
        if kind == "nameref" or "n" in flags:
            self.refuse(node["Text"])
        if not re.fullmatch(r"(-\w+)*", flags):
            self.refuse()
        if "f" in flags or "p" in flags:
            return
        self.declare(kind, flags, [each for each in arguments if "Name" in each])

    def settled_fields(self, word: Node) -> list[str]:
        """The words that one word becomes, where what is not set counts as empty, and without quotes as nothing."""
        fields = [(field, self.settled(field)) for field in self.fields(word)]
        return [settled for field, settled in fields if settled or field == settled or '"' in word["Text"]]

    def _callexpr(self, node: Node) -> None:
        words: list[str] = []
        for word in node.get("Args", []):
            words += self.settled_fields(word) if words[:1] in (["["], ["test"]) else self.fields(word)
        assignments = node.get("Assigns", [])
        shell = self
        if assignments and words[:1] == ["read"] and [each["Name"]["Value"] for each in assignments] == ["IFS"]:
            self.do_read(words[1:], self.text(assignments[0].get("Value")) or BLANKS)
            return
        if assignments and words:  # they are for this command only
            if words[0] in self.functions or self.builtin(words[0]):
                self.refuse()
            shell = self.copy()
            shell.exported = self.exported | {each["Name"]["Value"] for each in assignments}
        shell.has_substituted = False
        for assignment in assignments:
            shell.set(assignment)
        if words[:1] != ["return"] and (words or not shell.has_substituted):  # `return` hands on the status before it
            shell.status, shell.code = True, "1"
        if words:
            shell._call(words)
        self.take_status(shell)

    def _call(self, words: list[str]) -> None:
        name, arguments = words[0], words[1:]
        at = next((number for number in range(1, len(words)) if self._is_program(words, number)), 0)
        if body := self.functions.get(name):
            self._call_function(body, arguments)
        elif name in ("command", "builtin", "exec", "nohup") and arguments and not arguments[0].startswith("-"):
            self._call(arguments)
            if name == "exec":
                self.end(f"line {self.line} ends it with exec")
        elif builtin := self.builtin(name):
            if len(arguments) < LEAST.get(name, 0):
                self.refuse()
            builtin(arguments)
        elif at:
            self._start(words[at + 1 :])
        elif name in REFUSED:
            self.refuse()
        else:
            self._outside(words)

    def _start(self, arguments: list[str]) -> None:
        """Takes the command that is looked for. After a second one the rest of the script is of no interest."""
        self.commands.append(arguments)
        self.status = True
        if len(self.commands) > 1:
            if arguments != self.commands[0]:
                self.note(
                    f"Line {self.line} starts it again with other options, and only the first command is "
                    "read; paste the words of another one to read that."
                )
            raise Ended

    def _call_function(self, body: Node, arguments: list[str]) -> None:
        before, self.arguments = self.arguments, arguments
        self.descend()
        self.hidden.append({})
        try:
            self.run(body)
        except Left as left:
            if left.word != "return":
                raise
        self.depth -= 1
        for name, value in self.hidden.pop().items():
            if value is None:
                self.variables.pop(name, None)
            else:
                self.variables[name] = value
        self.arguments = before

    def _outside(self, words: list[str]) -> None:
        """A program that is not started. Its status is not known, nor what it writes."""
        name = words[0].rpartition("/")[2]
        script = next((word for word in words if word.endswith(".sh")), "")
        asks = IMPORTS.fullmatch(" ".join(words))
        if name in SUCCEED:
            self.status = True
        elif (name in SHELLS or script == words[0]) and self.path(script).is_file():
            self._nested(self.content(self.path(script)), words[words.index(script) + 1 :], script)
        elif self._is_started(text := self._script_in(words)):
            self._nested(text, [])
        elif name not in LOOKS_FOR and any(self._is_started(word) for word in words):
            self.refuse()
        elif asks:
            self.status = find_spec(asks[1]) is not None
            self.asked.append(self.assigned)
            way = f"; to say otherwise, {how_to_give(self.assigned)}" if self.assigned else ""
            self.note(f"The script asks for {asks[1]}, which is {'' if self.status else 'not '}installed here{way}.")
        else:
            self._note_other(words)
            self._unknown(words)

    def _script_in(self, words: list[str]) -> str:
        """The text that a shell is given to carry out, by `bash -c` or a here-document; empty if it has none."""
        at = next((number for number, word in enumerate(words) if word.rpartition("/")[2] in SHELLS), None)
        if at is None:
            return ""
        flags = [number for number, word in enumerate(words) if number > at and re.fullmatch("-[a-z]*c", word)]
        text = words[flags[0] + 1] if flags and flags[0] + 1 < len(words) else ""
        if at == 0 and all(word.startswith("-") for word in words[1:]) and not flags:
            text = self.input_text()
        return text if is_known(text) else ""

    def _is_program(self, words: list[str], number: int) -> bool:
        """Whether a word is one of the programs: a module after `-m`, or its file after a Python."""
        if words[number - 1] == "-m":
            return words[number] in self.programs
        files = tuple(f"{program.replace('.', '/')}.py" for program in self.programs)
        return words[number].endswith(files) and any("python" in word for word in words[:number])

    def _is_started(self, word: str) -> bool:
        """Whether a word has one of the programs in it, and not only one with a longer name."""
        names = "|".join(map(re.escape, self.programs))
        return re.search(rf"(?<![\w.])({names})(?![\w.])", word) is not None

    def _note_other(self, words: list[str]) -> None:
        """Keeps the name of another program of the same package, for the error if there is no command."""
        package = self.program.partition(".")[0]
        modules = [words[number + 1] for number, word in enumerate(words[:-1]) if word == "-m"]
        files = [word for word in words[1:2] if word.endswith(".py")]
        for program in [*modules, *files]:
            if "main" in program or program.startswith(f"{package}."):
                self.ends.append(f"line {self.line} starts {program}, which is another program")

    def _nested(self, text: str, arguments: list[str], file: str = "") -> None:
        """Another shell, which has what is exported."""
        inner = self.copy()
        inner.variables = {name: value for name, value in self.variables.items() if name in self.exported}
        inner.variables["OPTIND"] = "1"
        inner.functions, inner.arguments, inner.hidden = {}, arguments, []
        inner.fails_at_once = inner.refuses_unset = False
        if file:
            inner.file = inner.script = str(self.path(file))
        inner.descend()
        with suppress(Ended, Left):
            inner.run_all(parse(text))
        self.take_status(inner)


def _statement_of(branch: Node) -> Node:
    """An `elif` or an `else` as a statement of its own."""
    return branch | {"Cmd": branch | {"Type": "IfClause"}}


def way_of(statements: Sequence[Node]) -> Way:
    """Carries out these statements, for a condition that is tried both ways."""

    def carry_out(shell: Conditions) -> None:
        shell.status = True
        shell.run_all(statements)

    return carry_out
