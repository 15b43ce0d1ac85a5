"""examples/05_gsm8k_recipe/run.sh goes on wherever it was stopped: run with a `quartet` that only says what it does."""

import os
import subprocess
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "examples/05_gsm8k_recipe/run.sh"

QUARTET = """#!/usr/bin/env bash
# Leaves what the real command leaves, before (stopped) and after (ended) its work.
set -eu
echo "$1" >> calls
option() { local name=$1; shift; while [ "$1" != "$name" ]; do shift; done; echo "$2"; }
case $1 in
  eval) out=$(option "--output" "$@"); left=$out/completions.jsonl; ended=$(option "--json" "$@") ;;
  report) exit ;;
  *) out=runs/gsm8k/$(basename "$2" .yaml | cut -c3-); left=$out/checkpoint; ended=$out/policy ;;
esac
[ -e "$left" ] && [[ "$*" != *"--resume auto"* ]] && echo "already there: $left" && exit 1
mkdir -p "$out"; touch "$left"
[ "$(wc -l < calls)" = "$STOP_AT" ] && exit 130
if [ "$1" = eval ]; then touch "$ended"; else mkdir -p "$ended"; fi
"""
ALL = ["sft", "eval", "mtp", "train", "eval", "report"]


@pytest.mark.parametrize("stop_at", range(1, 6))
def test_the_recipe_goes_on_where_it_was_stopped(tmp_path, stop_at):
    for name, text in (("quartet", QUARTET), ("python", "#!/bin/sh\necho table >> calls\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "STOP_AT": str(stop_at)}
    recipe = ["bash", str(RECIPE), "--threads", "1"]
    stopped = subprocess.run(recipe, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert stopped.returncode == 130
    again = subprocess.run(recipe, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "calls").read_text().split() == [*ALL[:stop_at], *ALL[stop_at - 1 :], "table"]
