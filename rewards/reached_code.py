"""Which code of a file a function can reach: while that stays the same, so do the function's scores."""

from __future__ import annotations

import ast
import hashlib
import symtable
from collections.abc import Iterator

DYNAMIC = {"eval", "exec", "globals", "locals", "vars"}  # with these, a function may use any name of its file


def code_sha256(content: bytes, name: str) -> str:
    """SHA-256 of what the function `name` reaches in the file `content`, or of the whole file where that is not to be
    seen (`reached_source`)."""
    text = reached_source(content, name)
    return hashlib.sha256(content if text is None else text.encode(errors="surrogatepass")).hexdigest()


def reached_source(content: bytes, *functions: str) -> str | None:
    """The source of what the functions reach in the file `content`.

    They reach their own definitions and, by name, the functions, classes, constants and imports of the same file that
    they use, and so on, with the statements that may change them when the file is loaded. Comments, layout, the rest of
    the file and other files are ignored. None if the file is not valid Python, if a function is bound in no visible
    way, or if names are looked up as strings (eval).
    """
    try:
        statements = list(_statements(ast.parse(content)))
        names = [_names(statement) for statement in statements]
    except (SyntaxError, ValueError):
        return None
    binds = [_bound(statement) for statement in statements]
    defined: set[str] = set().union(*binds)  # the file's own names, without built-in functions
    sets = [bound | _changed(statement) & defined for statement, bound in zip(statements, binds, strict=True)]
    reached, included = set(functions), {i for i, bound in enumerate(binds) if "*" in bound}
    while new := {i for i in range(len(statements)) if i not in included and reached & sets[i]}:
        included |= new
        reached |= set().union(*(names[i] for i in new))
    if not defined.issuperset(functions) or reached & DYNAMIC:
        return None
    return "\n".join(ast.unparse(statements[i]) for i in sorted(included))


def is_guard(statement: ast.stmt) -> bool:
    """Tells whether a statement runs only in scripts."""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def _statements(module: ast.Module) -> Iterator[ast.stmt]:
    """The statements of the file, one for each imported name, without those that run only in scripts."""
    for statement in module.body:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield ast.Import([alias])
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                yield ast.ImportFrom(statement.module, [alias], statement.level)
        elif not is_guard(statement):
            yield statement


def _names(statement: ast.stmt) -> set[str]:
    """The names of the file that a statement mentions, without locals of its functions."""

    def visit(table: symtable.SymbolTable) -> Iterator[str]:
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                yield symbol.get_name()
        for child in table.get_children():
            yield from visit(child)

    return set(visit(symtable.symtable(ast.unparse(statement), "reward", "exec")))


def _bound(statement: ast.stmt) -> set[str]:
    """The names to which a statement gives a value; "*" if the file does not show them, and for __future__."""
    if isinstance(statement, ast.ImportFrom) and (statement.module == "__future__" or statement.names[0].name == "*"):
        return {"*"}
    table = symtable.symtable(ast.unparse(statement), "reward", "exec")
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}


def _changed(statement: ast.stmt) -> set[str]:
    """The names whose values a statement may change when the file is loaded: `TABLE["a"] = 1`, `TABLE.update(...)`."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
        return set()
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return _names(statement)
