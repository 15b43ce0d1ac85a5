"""The page itself: a frame of HTML, and the scripts and styles that a served page links and a report contains."""

from __future__ import annotations

import html
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCRIPTS = ("base.js", "controls.js", "charts.js", "rollouts.js", "events.js", "main.js")
ASSETS = (*SCRIPTS, "view.css")
PACKAGES = "the page of a run needs Starlette, uvicorn, Plotly and tokenizers: pip install 'quartet-review[view]'"
FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
{head}
</head>
<body>
<header id="bar"></header>
<main id="page" tabindex="-1"><noscript>This page needs JavaScript.</noscript></main>
{scripts}
</body>
</html>
"""


def check_packages(*names: str) -> None:
    """Raises ValueError, which names the extra `view`, if one of these packages is missing. None is imported."""
    if any(importlib.util.find_spec(name) is None for name in names):
        raise ValueError(PACKAGES)


def shell() -> str:
    """Returns the served page, whose parts are files of their own."""
    scripts = "\n".join(f'<script src="/assets/{name}"></script>' for name in ("plotly.js", *SCRIPTS))
    return FRAME.format(title="quartet view", head='<link rel="stylesheet" href="/assets/view.css">', scripts=scripts)


def self_contained(title: str, answers: Mapping[str, Any]) -> str:
    """Returns the same page as one file; `answers` are what the server would have answered, by path."""
    embedded = json.dumps(answers, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    scripts = [plotly(), *(_asset(name) for name in SCRIPTS)]
    parts = [f'<script type="application/json" id="answers">{embedded}</script>']
    parts += ["<script>" + script.replace("</script", "<\\/script") + "</script>" for script in scripts]
    head = f"<style>{_asset('view.css')}</style>"
    return FRAME.format(title=html.escape(title), head=head, scripts="\n".join(parts))


def plotly() -> str:
    """Plotly's script as its Python package ships it. Raises ValueError without it. The package itself is not
    imported, which would take a second."""
    check_packages("plotly")
    package = importlib.util.find_spec("plotly")
    assert package is not None
    assert package.origin is not None
    return (Path(package.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _asset(name: str) -> str:
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")
