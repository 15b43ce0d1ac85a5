"""What bash itself carries out in a script: `cd`, `set`, `shift`, `read` and the like."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator

from grpo.cli.migration.shell_conditions import Conditions
from grpo.cli.migration.shell_state import Left, is_known, mark, shown
from grpo.cli.migration.shell_tree import Node, assigned_names, parse

OTHER_NAMES = {"[": "test", ".": "source", "readarray": "mapfile"}
LONG = {"errexit": "e", "nounset": "u"}  # of `set -o`
LEAST = {"source": 1, ".": 1, "printf": 1, "dirname": 1, "basename": 1, "getopts": 2, "mapfile": 1, "readarray": 1}
BLANKS = " \t\n"


class Builtins(Conditions):
    """The builtins of a shell, each a method `do_NAME` with its words."""

    def _unknown(self, words: list[str]) -> None:
        self.status, self.cause = None, " ".join(words)
        if self.output is not None:
            self.undecided(self.cause)

    def builtin(self, name: str) -> Callable[[list[str]], None] | None:
        return getattr(self, f"do_{OTHER_NAMES.get(name, name)}", None)

    # ---- texts

    def write(self, text: str) -> None:
        self.printed = shown(text).strip()
        self.status = True
        if self.output is not None:
            self.output.append(text)

    def do_echo(self, words: list[str]) -> None:
        while words and re.fullmatch(r"-[neE]+", words[0]):
            words = words[1:]
        self.write(" ".join(words) + "\n")

    def do_printf(self, words: list[str]) -> None:
        name = words[1] if words[:1] == ["-v"] else ""
        form, *values = words[2:] if name else words
        parts = form.replace("\\n", "\n").split("%s")
        text = ""
        if "%" not in "".join(parts) and len(parts) == len(values) + 1:
            text = parts[0] + "".join(value + part for value, part in zip(values, parts[1:], strict=True))
        if name:
            self.assign(name, text or mark(self.source))
            self.status = True
        elif text or not form:
            self.write(text)
        else:
            self._unknown(["printf", *words])

    def do_dirname(self, words: list[str]) -> None:
        path = words[-1]
        self.write(f"{os.path.dirname(path.rstrip('/')) or '.'}\n" if is_known(path) else path)

    def do_basename(self, words: list[str]) -> None:
        path, *ends = [word for word in words if word != "--"]
        if path.startswith("-"):
            self._unknown(["basename", *words])
            return
        name = path.rstrip("/").rpartition("/")[2].removesuffix("".join(ends))
        self.write(f"{name}\n" if is_known(path) else path)

    def do_date(self, words: list[str]) -> None:
        if len(words) == 1 and re.fullmatch(r"\+(%[YmdHMSyjFTs]|[^%])*", words[0]):
            self.write(time.strftime(words[0][1:]) + "\n")
        else:
            self._unknown(["date", *words])

    def do_cd(self, words: list[str]) -> None:
        folder = words[-1] if words else "~"
        if folder == "-":
            self.refuse()
        self.variables["PWD"] = os.path.normpath(self.path(folder)) if is_known(folder) else folder
        self.status = True

    def do_pwd(self, words: list[str]) -> None:
        self.write(f"{self.variables['PWD']}\n")

    # ---- the shell itself

    def do_exit(self, words: list[str]) -> None:
        code = words[0] if words else "0"
        self.status, self.code = code == "0", code
        printed = f", after it prints {self.printed!r}" if self.printed else ""
        self.end(f"line {self.line} ends it with exit {shown(code)}{printed}")

    def do_false(self, _: list[str]) -> None:
        self.status = False

    def do_break(self, words: list[str]) -> None:
        raise Left("break", int(words[0]) if words and words[0].isdigit() else 1)

    def do_continue(self, words: list[str]) -> None:
        raise Left("continue", int(words[0]) if words and words[0].isdigit() else 1)

    def do_return(self, words: list[str]) -> None:
        if words:
            self.status = words[0] == "0" if is_known(words[0]) else None
            self.code = self.cause = words[0]
        raise Left("return")

    def do_set(self, words: list[str]) -> None:
        for number, word in enumerate(words):
            if word == "--":
                self.arguments = words[number + 1 :]
                break
            if number and re.fullmatch(r"[-+][a-zA-Z]*o", words[number - 1]):
                self._set_flags(words[number - 1][0], LONG.get(word, ""))
            elif re.fullmatch(r"[-+][a-zA-Z]+", word):
                self._set_flags(word[0], word[1:])
            else:
                self.refuse()
        self.status = True

    def _set_flags(self, sign: str, letters: str) -> None:
        if "e" in letters:
            self.fails_at_once = sign == "-"
        if "u" in letters:
            self.refuses_unset = sign == "-"

    def do_shift(self, words: list[str]) -> None:
        count = words[0] if words else "1"
        if not count.isdigit():
            self.refuse()
        self.status = int(count) <= len(self.arguments)
        if self.status:
            self.arguments = self.arguments[int(count) :]

    def do_getopts(self, words: list[str]) -> None:
        """Takes an option of one letter from the arguments; `:` after a letter means that it has a value."""
        letters, name = words[0].lstrip(":"), words[1]
        given = self.get("OPTIND") or "1"
        rest = self.arguments[int(given) - 1 :] if given.isdigit() else []
        self.status = bool(rest) and len(rest[0]) > 1 and rest[0][0] == "-" and rest[0] != "--"
        if len(words) > 2 or (self.status and len(rest[0]) > 2 and rest[0][1] + ":" not in letters):
            self.refuse()  # several letters in a word
        if not self.status:
            return
        letter, value, taken = rest[0][1], rest[0][2:], 1
        if f"{letter}:" in letters and not value:
            value, taken = "".join(rest[1:2]), 2
        self.variables |= {name: letter if letter in letters else "?", "OPTARG": value}
        self.variables["OPTIND"] = str(int(given) + taken)

    def do_unset(self, words: list[str]) -> None:
        for word in [word for word in words if word not in ("-v", "-f")]:
            if not is_known(word):
                self.note(f"Line {self.line}: `{self.source}` unsets what nobody can name, and is passed over.")
            elif not word.isidentifier():
                self.refuse()
            self.variables.pop(word, None)
            self.functions.pop(word, None)
        self.status = True

    def do_read(self, words: list[str], separator: str = BLANKS) -> None:
        """Sets variables to the words of a line. The line is known if the script has it as a text."""
        names = [word for word in words if not word.startswith("-")] or ["REPLY"]
        flags = "".join(word for word in words if word.startswith("-"))
        text = self.input_text()
        if set(flags) - set("-ra") or not is_known(text):
            for name in filter(str.isidentifier, names):
                self.assign(name, mark(self.source, name))
            self.status, self.cause = None, self.source
            return
        line = text.split("\n")[0]
        parts = list(_split(line, separator))
        self.status = True
        if "a" in flags:
            self.assign(names[0], parts)
            return
        if len(parts) > len(names):
            self.refuse()  # the last variable has the rest of the line as it is
        for number, name in enumerate(names):
            self.assign(name, parts[number] if number < len(parts) else "")

    def do_mapfile(self, words: list[str]) -> None:
        name = words[-1]
        if not name.isidentifier():
            self.refuse()
        self.assign(name, [mark(self.source, name)])
        self.status = True

    def declare(self, kind: str, flags: str, assignments: list[Node]) -> None:
        """Carries out `export`, `local`, `declare` and `readonly`."""
        for each in assignments:
            name = each["Name"]["Value"]
            if self.hidden and kind in ("local", "declare", "typeset") and "g" not in flags:
                self.hidden[-1].setdefault(name, self.variables.get(name))
                if "Naked" in each:
                    self.variables.pop(name, None)
            if "A" in flags and not isinstance(self.variables.get(name), dict):
                self.variables[name] = dict[str, str]()
            if "Naked" not in each:
                self.set(each)
            if kind == "export" or "x" in flags:
                self.exported = self.exported | {name}
        self.status = True

    def set(self, assignment: Node) -> None:
        raise NotImplementedError

    # ---- texts that are scripts

    def input_text(self) -> str:
        """The text of a here-document, or of `<<< text`. A mark stands for what only a program or a file would give."""
        node = self.input
        if node is None:
            return mark(self.source)
        if node["Op"] == "<<<":
            return self.text(node["Word"])
        parts = node.get("Hdoc", {}).get("Parts", [])
        is_plain = any(part["Type"] != "Lit" for part in node["Word"]["Parts"])  # of <<'EOF'
        return "".join(part["Value"] for part in parts) if is_plain else self.text_of(parts)

    def text_of(self, parts: list[Node]) -> str:
        return "".join(text for text, _ in self.pieces(parts, quoted=True))

    def do_eval(self, words: list[str]) -> None:
        text = " ".join(words)
        if is_known(text):
            self.run_all(parse(text))
        else:
            self.pass_over()

    def do_source(self, words: list[str]) -> None:
        """Reads a file as a part of the script. Of one that cannot be read, what it sets is not known."""
        path = self.path(words[0])
        if not is_known(words[0]) or not path.is_file():
            self.pass_over()
            return
        before, text = self.copy(), self.content(path)
        self.descend()
        self.file, self.arguments = str(path), words[1:] or self.arguments
        try:
            self.run_all(parse(text))
        except Left:
            pass
        except ValueError as error:
            if self.commands:
                raise
            vars(self).update(vars(before))
            self._pass_over_file(text, str(path), error)
        self.file, self.depth = before.file, before.depth
        self.arguments = before.arguments if words[1:] else self.arguments

    def _pass_over_file(self, text: str, path: str, error: ValueError) -> None:
        self.pass_over(f" ({path}, {error})")
        try:
            names = assigned_names(parse(text))
        except ValueError:
            return
        for name in names:
            self.variables[name] = mark(self.source, name)

    def pass_over(self, why: str = "") -> None:
        """Notes a text that is not here. What it would set is not known, and does not count as empty."""
        self.misses_source = True
        self.note(f"`{self.source}` is not read{why}; give the variables that it sets.")
        self._unknown([self.source])


def _split(line: str, separator: str) -> Iterator[str]:
    """The parts of a line, as `read` splits it."""
    if not separator.strip():
        yield from line.split()
        return
    parts = line.split(separator)
    yield from parts[:-1] if parts[-1] == "" else parts
