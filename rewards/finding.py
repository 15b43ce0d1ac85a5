"""What every instrument yields: findings, and with them what it has read. rewards/commands/printer.py shows them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Protocol

from rewards.kinds import KINDS, NOTE, ORDER, Severity


class Case(Protocol):
    """A row that shows a finding: a rollout, or a completion that was tried."""

    @property
    def place(self) -> str: ...

    def as_row(self) -> dict[str, Any]: ...


Where = str | Case  # an option's key, a step, a test's script, or a row


@dataclass(frozen=True)
class Finding:
    """Something is wrong, or worth a look. `evidence` is a sentence with its number, `change` what to change first."""

    kind: str
    severity: Severity
    where: tuple[Where, ...]
    evidence: str
    cause: str
    change: str

    @property
    def is_fault(self) -> bool:
        return self.severity != NOTE

    def as_json(self, most: int = 200) -> dict[str, Any]:
        """The finding as files have it, with at most so many of its rows."""
        words = {name: getattr(self, name) for name in ("kind", "severity", "evidence", "cause", "change")}
        return words | {"count": len(self.where), "where": list(map(row_of, self.where[:most]))}


def row_of(where: Where) -> dict[str, Any]:
    """What is shown of a place.

    >>> row_of("rewards[0].function")
    {'place': 'rewards[0].function'}
    """
    return {"place": where} if isinstance(where, str) else {"place": where.place} | where.as_row()


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_plain, value))
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def found(kind: str, evidence: str, where: Iterable[Where] | str = (), **others: Any) -> Finding:
    """A finding with the severity, the cause and the first change of its kind, unless `others` name better ones.

    >>> found("advantage-sign", "3 of 8 groups", ["rollouts.jsonl:6"]).severity
    'error'
    """
    row = KINDS[kind]
    usual = {"severity": row.severity, "cause": row.meaning, "change": row.change}
    places = (where,) if isinstance(where, str) else tuple(where)
    return Finding(kind, where=places, evidence=evidence, **usual | others)


@dataclass
class Report:
    """What an instrument has read and found.

    `facts` are numbers and words by name, `tables` have rows by title, each a value by column, and `more` goes to the
    file of --json only. `lacking` is what the source does not have, with the kinds of findings that need it.
    """

    title: str
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    lacking: dict[str, list[str]] = field(default_factory=dict)

    def own(self) -> dict[str, Any]:
        """What a kind of report adds, as files have it."""
        usual = {each.name for each in fields(Report)}
        names = [each.name for each in fields(self) if each.name not in usual]
        return {name: _plain(getattr(self, name)) for name in names} | self.more

    @property
    def in_order(self) -> list[Finding]:
        """Faults before notes, and causes before their symptoms, in the order of the table of kinds."""
        return sorted(self.findings, key=lambda finding: (not finding.is_fault, ORDER[finding.kind]))

    def add(self, kind: str, evidence: str, where: Iterable[Where] | str = (), **others: Any) -> None:
        """Adds `found(...)`; the same finding counts once."""
        finding = found(kind, evidence, where, **others)
        if finding not in self.findings:
            self.findings.append(finding)

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_fault]

    @property
    def notes(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.is_fault]
