"""The commands that read runs: rows of `quartet`'s table, and all that `quartet-review` has. What does the work is
imported inside the functions, since the page needs packages of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from rewards.commands.command_line import Command, argument, json_argument, write

VIEW = (
    argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder; several are drawn over one another"),
    argument("--host", default="127.0.0.1", help="the address to listen on, by default this machine alone"),
    argument("--port", type=int, default=0, help="by default one that is free"),
)
REPORT = (
    argument("run", type=Path, metavar="RUN", help="a run folder"),
    argument("--output", type=Path, metavar="FILE.html", help="by default report.html in the run folder"),
    argument("--steps", type=int, nargs="+", metavar="N", help="steps whose rollouts it shows; by default three"),
)
_RUNS = "run folders; those that differ in nothing but the seed are one group"
COMPARE = (
    argument("runs", type=Path, nargs="+", metavar="RUN", help=_RUNS),
    argument("--metrics", nargs="+", default=[], metavar="NAME", help="by default reward/mean and eval/accuracy"),
    argument("--steps", type=int, nargs="+", default=[], metavar="N", help="by default at most twelve, evenly spaced"),
    json_argument("what the tables show"),
)
_RUN = "a run folder, also of a run that goes on or has failed, or rollouts of another trainer; nothing is touched"
DIAGNOSE = (argument("run", type=Path, metavar="RUN", help=_RUN), json_argument("what was found"))


def commands() -> dict[str, Command]:
    """Every command by its name."""
    return {
        "view": Command(
            "a page of one or more runs, live",
            _view,
            VIEW,
            example="runs/demo",
            about="Serve a page of one or more runs, live while they train: curves, and rollouts token by token.",
        ),
        "report": Command(
            "the same page as one HTML file",
            _report,
            REPORT,
            example="runs/demo",
            about="Write the page of `quartet view` as one HTML file to send away.",
        ),
        "compare": Command(
            "the curves of several runs, in numbers",
            _compare,
            COMPARE,
            example="runs/seed0 runs/seed1 runs/other0 runs/other1",
            about="Compare the curves of runs: the median over seeds, with its interval.",
        ),
        "diagnose": Command(
            "what to change first in a run that does not learn",
            _diagnose,
            DIAGNOSE,
            example="runs/demo",
            about="Find out what to change first in a run that does not learn, and why.",
        ),
    }


def _view(args: argparse.Namespace) -> None:
    from review.page.server import view

    view(args.runs, args.host, args.port)


def _report(args: argparse.Namespace) -> None:
    from review.page.report import report

    print(report(args.run, args.output or args.run / "report.html", args.steps))


def _compare(args: argparse.Namespace) -> None:
    from review.compare.compare import as_json, compare, show
    from rewards.console import Terminal

    comparison = compare(args.runs, args.metrics, args.steps)
    show(comparison, Terminal())
    write(args.json, as_json(comparison))


def _diagnose(args: argparse.Namespace) -> int:
    from review.findings.report import report
    from rewards.commands.printer import publish

    return publish(report(args.run), args)
