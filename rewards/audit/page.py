"""The page of an audit: one file without scripts, whose text is that of the rollouts and nothing else."""

from __future__ import annotations

from html import escape

from rewards.audit.audit import Audit
from rewards.audit.findings import Finding
from rewards.audit.traces import Trace

SHOWN = 20  # rollouts of a finding
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>audit of {count} rollouts</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f5; padding: .6rem; margin: .3rem 0 }}
summary {{ cursor: pointer; padding: .3rem 0 }} article {{ border-top: 1px solid #ddd; padding: .6rem 0 }}
code {{ font-weight: 600 }} p {{ color: #555 }}
</style>
</head>
<body>
<h1>{count} rollouts, {findings} findings</h1>
<p>{figures}</p>
{body}
</body>
</html>
"""


def page(result: Audit) -> str:
    figures = "; ".join(f"{name}: {value}" for name, value in result.figures.items())
    body = "\n".join(map(_section, result.findings)) or "<p>Nothing was found.</p>"
    count, findings = result.rollouts, len(result.findings)
    return PAGE.format(count=count, findings=findings, figures=escape(figures), body=body)


def _section(finding: Finding) -> str:
    rows = "\n".join(map(_article, finding.traces[:SHOWN]))
    more = f"<p>and {len(finding.traces) - SHOWN} more</p>" if len(finding.traces) > SHOWN else ""
    head = f"<summary><code>{escape(finding.kind)}</code> {escape(finding.message)}</summary>"
    return f"<details>{head}\n{rows}\n{more}</details>"


def _article(trace: Trace) -> str:
    numbers = {"step": trace.step, "reward": trace.reward, **trace.parts, "advantage": trace.advantage}
    told = ", ".join(f"{name} {value:g}" for name, value in numbers.items() if value is not None)
    ending = f", {trace.finish_reason}" if trace.finish_reason else ""
    failure = f"<pre>{escape(trace.error)}</pre>" if trace.error else ""
    texts = f"<pre>{escape(trace.prompt)}</pre><pre>{escape(trace.completion)}</pre>{failure}"
    return f"<article>{escape(trace.place)}: {escape(told + ending)}{texts}</article>"
