"""examples/quickstart.ipynb: its form, and its cells in turn, in an empty folder, as a notebook runs them."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from copies import Copy

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/quickstart.ipynb"
RUNNER = """
import ast, json, subprocess, sys
from copies import Copy

subprocess.Popen = Copy  # of the commands in cells: none imports torch again
small = sys.argv[2] == "micro"
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        source = "".join(cell["source"])
        if small:
            source = source.replace('"model": "tiny"', '"model": "micro"')
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell["id"], "exec"), names)
        if last is not None:  # a notebook shows its value
            value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
            if value is not None:
                print(cell["id"], getattr(value, "_repr_html_", value.__repr__)()[:500])
"""


def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run(folder, preset="tiny", **variables):
    """What the cells print, in a process of their own, which knows the presets of this one."""
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUNNER, str(NOTEBOOK), preset]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Copy(command, cwd=folder, env=os.environ | variables, **pipes) as process:
        said, errors = process.communicate()
    assert process.returncode == 0, said[-3000:] + errors[-3000:]
    return said


def test_it_is_a_notebook_and_keeps_no_output_that_may_become_old():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in cells():
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        ast.parse("".join(cell["source"]))


@pytest.mark.long
@pytest.mark.slow
def test_its_cells_run_in_an_empty_folder(micro_preset, tmp_path):
    said = run(tmp_path, micro_preset, QUARTET_SHORT="1")
    for part in ("after GRPO, greedy", "<iframe", "<table", "replay: ", "Result('quickstart_runs/own'"):
        assert part in said
    assert len(list((tmp_path / "quickstart_runs").iterdir())) == 8  # the first, two times three seeds, your own loop


@pytest.mark.slow
@pytest.mark.long
def test_it_learns(tmp_path):
    accuracy = dict(re.findall(r"(\w+ GRPO), greedy: ([\d.]+)", run(tmp_path)))
    assert float(accuracy["after GRPO"]) > float(accuracy["before GRPO"]) + 0.15
