"""A reward for programs: 1 where the tests of the problem pass, run in the sandbox of `rewards.isolation`."""

from __future__ import annotations

import ast
import json
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from textwrap import dedent

from rewards.isolation.sandbox import Limits, SandboxUnavailable, run_python, unavailable
from rewards.protocol import Completions, right_at, text_of

_FENCE = re.compile(r"(?P<mark>`{3,}|~{3,})(?P<info>[^`~]*)\Z")  # the end of a line: text may come before it
_INLINE = re.compile(r"(?<!`)(?P<mark>`{3,}+)[^`]+(?P=mark)")  # code inside of a line of prose
_ONE_LINE = re.compile(r"(?<!`)(?P<mark>`{3,}+)(?:(?:python|py)[\d.]*[ \t]+)?(?P<code>[^`\n]+)(?P=mark)", re.IGNORECASE)
_NEW_BLOCK = re.compile(r"\s*(?:`{3,}|~{3,})[\w{.]")
CLOSING_INDENT = 3  # more than that of the opening mark, as in CommonMark
MOST_TRIED = 100  # marks inside of programs, for which the code up to there is parsed
_PYTHON = re.compile(r"[{.\s]*(?:python|py)[\d.]*(?![\w-])", re.IGNORECASE)  # python title="x", {.python}, Python3
_DEFINED = re.compile(r"^(?:(?:async[ \t]+)?def|class)[ \t]+(\w+)|^(\w+)[ \t]*(?::[^=\n]*)?=", re.MULTILINE)

# Reads the word by which the results are known before the program can, and says it after each test that passed.
_HARNESS = """
def run():
    import json, os, sys, types
    given, out = json.loads(sys.stdin.readline()), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    program = types.ModuleType("program")  # not __main__: a guard would read input, or end before the tests
    space = program.__dict__
    sys.modules["program"] = program
    exec(compile(given["program"], "program.py", "exec"), space)
    for i, test in enumerate(given["tests"]):
        try:
            exec(compile(test, f"test {i}", "exec"), space)
        except Exception as error:
            os.write(out, f"\\n{given['word']} {i} {type(error).__name__}: {error!s:.200}\\n".encode(errors="replace"))
        else:
            os.write(out, f"\\n{given['word']} {i} passed\\n".encode())
run()
"""


@right_at(1.0)
def code(
    prompts: list | None,
    completions: Completions,
    tests: list,
    partial_marks: bool = False,
    seconds: float = 5.0,
    memory_mib: int = 512,
    concurrency: int = 2,
    log_extra: Callable[[str, list], None] | None = None,
    **_,
) -> list[float]:
    """Gives 1.0 where every test passes, else 0.0, or with `partial_marks` the share that passes.

    The program is the last fenced block of Python that defines a name used by the tests. If no block does, the last
    block is taken; without a block, the whole completion. It is imported, so code under `if __name__ == "__main__":`
    does not run.

    `tests` is for each completion Python text, such as `assert double(2) == 4`, or a list of such texts, which run
    after the program, in its names. A program that fails, ends itself or passes a limit (`seconds`, `memory_mib`, no
    network, no files) has failed the tests that it did not come to: that is no failure of the reward. `code_result` is
    logged for each completion.

    A test runs beside the program that it tests: one that looks for the harness in the interpreter can pass it. Raises
    SandboxUnavailable where no code can be run, and ValueError for tests that are missing or no Python.

    >>> code(None, ["def double(x): return 2 * x", "def double(x): return x"], tests=["assert double(2) == 4"] * 2)
    [1.0, 0.0]
    """
    if problem := unavailable():
        raise SandboxUnavailable(problem)
    limits = Limits(seconds=seconds, memory=memory_mib << 20)
    each = [_tests(texts) for texts in tests]
    programs = [
        program_of(text_of(completion), _names(tests_of_one))
        for completion, tests_of_one in zip(completions, each, strict=True)
    ]
    with ThreadPoolExecutor(max(concurrency, 1)) as threads:
        results = list(threads.map(partial(_passed, limits=limits), programs, each))
    if log_extra:
        log_extra("code_result", [words for _, words in results])
    return [
        passed / len(tests_of_one) if partial_marks else float(passed == len(tests_of_one))
        for (passed, _), tests_of_one in zip(results, each, strict=True)
    ]


def program_of(text: str, names: Collection[str] = ()) -> str:
    r"""The last block between marks that says it is Python, else the last one of no language, else the whole text. A
    block that defines one of `names` goes before those that do not, such as an example of its use. Code between marks
    on one line counts if it defines one of them and no block does.

    >>> program_of("So:\n```python\nx = 1\n```\nIt prints:\n```\n1\n```")
    'x = 1\n'
    """
    blocks = list(_blocks(text))
    python = [block for info, block in blocks if _PYTHON.match(info)]
    candidates = python or [block for info, block in blocks if not info.strip()]
    on_one_line = [match["code"].strip() for match in _ONE_LINE.finditer(text)]
    for group in (candidates, on_one_line):
        defining = [block for block in group if _defined(block) & set(names)]
        if defining:
            return defining[-1]
    return candidates[-1] if candidates else text


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield the fenced blocks of a text: the info string of the opening fence, and the code."""
    mark, info, margin, tried, lines = "", "", 0, 0, []
    for line in text.splitlines(keepends=True):
        fence = _FENCE.search(line.rstrip() if mark else _INLINE.sub("", line.rstrip()))
        if fence is None or not fence["mark"].startswith(mark):
            lines.append(line)
            continue
        if mark and tried < MOST_TRIED and not _ends_block(fence, margin, lines):
            lines.append(line)
            tried += 1
            continue
        if mark:
            lines.append(line[: fence.start()])  # code may stand before the mark
            yield info, dedent("".join(lines))
        opens = not mark or fence["info"].strip()  # a mark with an info string also ends a block
        mark, info, lines = (fence["mark"], fence["info"], []) if opens else ("", "", [])
        margin = len(line) - len(line.lstrip())
    if mark:
        yield info, dedent("".join(lines))


def _ends_block(fence: re.Match[str], margin: int, lines: list[str]) -> bool:
    """Return whether a fence ends the block of these lines. A program may contain fences too, in a docstring or a
    string: after code on its line, or far to the right, a fence ends the block only if the lines so far are Python."""
    before = fence.string[: fence.start()]
    if fence["info"].strip():
        return bool(_NEW_BLOCK.match(fence.string))
    if not before.strip("> \t\n") and len(before) <= margin + CLOSING_INDENT:
        return True
    return _is_python(dedent("".join([*lines, before])))


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _defined(block: str) -> set[str]:
    return {function or variable for function, variable in _DEFINED.findall(block)}


def _names(tests: list[str]) -> set[str]:
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def _tests(texts: str | Sequence[str]) -> list[str]:
    tests = [texts] if isinstance(texts, str) else list(texts)
    if not tests or not all(isinstance(test, str) and test.strip() for test in tests):
        raise ValueError(f"tests={texts!r:.200}: a problem has one test or more, each of them Python text")
    for test in tests:
        try:
            ast.parse(test)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"the test {test!r:.200} is no Python: {error}") from error
    return tests


def _passed(program: str, tests: list[str], limits: Limits) -> tuple[int, str]:
    """Runs the tests; counts those that pass, and says in words what became of the others."""
    word = secrets.token_hex(16)
    message = json.dumps({"word": word, "program": program, "tests": tests})
    outcome = run_python(_HARNESS, stdin=f"{message}\n", limits=limits)
    results = dict(line.split(" ", 2)[1:] for line in outcome.stdout.splitlines() if line.startswith(f"{word} "))
    wrong = [f"test {i}: {what}" for i, what in results.items() if what != "passed"]
    if len(results) < len(tests):
        last = outcome.stderr.strip().rpartition("\n")[2]
        wrong.append(f"limit: {outcome.limit}" if outcome.limit else last or f"it ended with {outcome.exit_code}")
    return sum(what == "passed" for what in results.values()), "; ".join(wrong)[:500] or "passed"
