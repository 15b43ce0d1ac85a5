"""What README and the pages show is true: blocks run, commands parse, and what they name exists."""

import ast
import html
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from copies import Copy

from grpo.cli.config.convert import ConvertConfig
from grpo.cli.config.inference import EvalConfig, SampleConfig
from grpo.cli.parse import build_parser
from grpo.config.mtp import MtpConfig
from grpo.config.run import SftConfig, TrainConfig
from grpo.task.plan import Plan
from grpo.task.table import contradictions
from rewards.commands.options import ReplayConfig, RewardTestConfig
from rewards.config.options import load, parse

ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "AGENTS.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
REFERENCE = ROOT / "docs/reference.md"
LIST = ROOT / "docs/llms.txt"
GENERATED = (REFERENCE, ROOT / "docs/guides/migrate.md")
WRITTEN = [page for page in PAGES if page not in GENERATED]
OF_THE_PAST = (ROOT / "CHANGELOG.md", ROOT / "docs/findings.md")  # they name what an older version had

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)(?: title=\S+)?\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL
)
QUOTED = re.compile(r'--8<-- "(\S+)"\n')
COMMENT = re.compile(r"<!-- (?P<key>[\w .]+?)(?:: (?P<value>.*?))? -->")
OPTIONS_OF: dict[str, Any] = {
    "train": TrainConfig,
    "sft": SftConfig,
    "mtp": MtpConfig,
    "eval": EvalConfig,
    "sample": SampleConfig,
    "convert": ConvertConfig,
    "reward test": RewardTestConfig,
    "reward replay": ReplayConfig,
}


@dataclass
class Block:
    """One fenced block of a page, with the comments in front of it: `<!-- not run: it needs a GPU -->`."""

    page: Path
    line: int
    language: str
    text: str
    says: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    source, end = page.read_text(encoding="utf-8"), 0
    for found in FENCE.finditer(source):
        before = re.search(r"(?:^ *<!-- .*? -->\n)*\Z", source[end : found.start()], re.MULTILINE)
        says = {comment["key"]: comment["value"] or "" for comment in COMMENT.finditer(before[0] if before else "")}
        text = re.sub(f"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        if quoted := QUOTED.fullmatch(text):
            says["not run"], text = "the file has a test of its own", (ROOT / quoted[1]).read_text(encoding="utf-8")
        yield Block(page, source[: found.start()].count("\n") + 1, found["language"], text, says)
        end = found.end()


BLOCKS = [block for page in WRITTEN for block in blocks(page)]


def of(language: str) -> list[Any]:
    """The blocks of a language that are run, as parameters of a test; those that say `slow` are marked so."""
    return [
        pytest.param(block, id=block.place, marks=[pytest.mark.slow] if "slow" in block.says else [])
        for block in BLOCKS
        if block.language == language and "not run" not in block.says
    ]


DEMO = {
    "model: tiny": "model: micro",
    "  steps: 400": "  steps: 5",
    "  validation: 256": "  validation: 8",
    "prompts_per_step: 32": "prompts_per_step: 4",
    "limit: 512": "limit: 8",
}


@pytest.fixture
def folder(tmp_path, monkeypatch, micro_preset) -> Path:
    """A folder like a user's: the repository's examples and docs are there, and what else a page writes is written.
    The demo is a small one of the micro preset, which a copy of this process knows."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "examples").mkdir()
    for path in (ROOT / "examples").iterdir():
        (tmp_path / "examples" / path.name).symlink_to(path)
    small = tmp_path / "examples/01_demo.yaml"
    text = small.read_text(encoding="utf-8")
    small.unlink()
    for full, less in DEMO.items():
        assert full in text
        text = text.replace(full, less)
    small.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_files(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if name := block.says.get("file"):
            (folder / name).write_text(block.text, encoding="utf-8")


def test_every_block_names_its_language_and_what_is_not_run_says_why():
    known = {"python", "bash", "yaml", "text"}
    assert [block.place for block in BLOCKS if block.language not in known] == []
    assert {block.language for block in BLOCKS} == known
    assert [block.place for block in BLOCKS if block.says.get("not run") == ""] == []
    for block in BLOCKS:
        if block.language == "python":
            compile(block.text, block.place, "exec")


@pytest.mark.parametrize("block", of("python"))
def test_python_runs(block, folder):
    write_files(block.page, folder)
    text = block.text.replace('model="tiny"', 'model="micro"')
    (folder / "block.py").write_text(text, encoding="utf-8")
    options = {"cwd": folder, "env": os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, "text": True}
    with Copy([sys.executable, "block.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def refuse_contradictions(config: Any) -> None:
    if isinstance(config, SftConfig | MtpConfig):  # the model may not be here
        lines = contradictions(Plan(config.model_copy(update={"model": "./nowhere"})))
        assert [line for line in lines if "pip install" not in line] == []


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_is_a_configuration(block, folder):
    model = OPTIONS_OF[block.says.get("options", "train")]
    (folder / "block.yaml").write_text(block.text, encoding="utf-8")
    needed = {} if re.search("^output_dir:", block.text, re.MULTILINE) else {"output_dir": "runs/block"}
    refuse_contradictions(load(model, folder / "block.yaml", needed))


@pytest.mark.parametrize("block", of("bash"))
def test_commands_are_understood(block, folder):
    write_files(block.page, folder)
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            understand(words)


def understand(words: list[str]) -> None:
    """Fails for a command that cannot be what it seems: an option, a file or a target that is not there."""
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    match words:
        case ["quartet", *arguments]:
            understand_quartet(arguments)
        case ["quartet-reward", command, *arguments]:
            understand_quartet([*(() if command == "audit" else ["reward"]), command, *arguments])
        case ["quartet-review", *arguments]:
            understand_quartet(arguments)
        case ["accelerate", "launch", *arguments] | ["torchrun", *arguments]:
            understand_quartet(arguments[arguments.index("grpo") + 1 :])
        case ["make", target, *_]:
            assert re.search(rf"^{target}:.* ##", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        case ["python", script, *_] if script.endswith(".py"):
            assert Path(script).is_file() or (ROOT / script).is_file(), script
        case ["python", "-m", *_] | ["source", ".venv/bin/activate"]:
            pass
        case [script, *_] if script.endswith(".sh"):
            assert os.access(script, os.X_OK), script
        case ["hf" | "pip" | "pytest" | "ray", *_]:
            pass  # programs of others
        case _:
            pytest.fail(f"nobody knows whether this is right, so say why it is not run: {shlex.join(words)}")


def understand_quartet(arguments: list[str]) -> None:
    if arguments[-1] in ("--help", "--version"):
        return
    args = parse(build_parser(arguments), arguments)
    name = next((name for name in OPTIONS_OF if arguments[: len(name.split())] == name.split()), None)
    if name is None:
        assert callable(args.command)
        return
    config = getattr(args, "config", None)
    if config is not None and config.suffix != ".yaml":
        config = None  # quartet mtp MODEL
    assert config is None or config.is_file(), f"{config} is neither in the repository nor written by its page"
    if function := getattr(args, "function", None):
        assert ":" not in function or Path(function.partition(":")[0]).is_file(), function
    needed = {"output_dir": "runs/block"} if "output_dir" in OPTIONS_OF[name].model_fields else {}
    refuse_contradictions(load(OPTIONS_OF[name], config, needed | args.overrides, args.flags))


def prose(page: Path) -> str:
    """A page without its fenced blocks, and without what it includes."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def code_spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.mark.parametrize("page", [*PAGES, LIST], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    included = re.findall(r'^--8<-- "([^":]+)', prose(page), re.MULTILINE)
    places = [page.parent / target.partition("#")[0] for target in targets if not re.match(r"\w+:|#", target)]
    assert [str(place) for place in [*places, *(ROOT / name for name in included)] if not place.exists()] == []


@pytest.mark.parametrize(
    "page", [page for page in WRITTEN if page not in OF_THE_PAST], ids=lambda page: str(page.relative_to(ROOT))
)
def test_files_options_and_metrics_that_are_named_exist(page):
    """`examples/01_demo.yaml`, `rollout.draft_tokens: null`, `--mtp.depth 2`, `loss/kl`."""
    reference = REFERENCE.read_text(encoding="utf-8")
    keys = set(re.findall(r"^\| <h6[^>]*>`([^`]+)`", reference, re.MULTILINE))
    options = {key for key in keys if "/" not in key}
    options |= {key.rpartition(".")[0] for key in options}  # sections inside of sections have no row
    metrics = {re.sub(r"<\w+>", "<>", key) for key in keys if "/" in key}
    sections = {key.partition(".")[0] for key in options if "." in key}
    areas = {key.partition("/")[0] for key in metrics}
    lost = []
    for span in code_spans(page):
        option = re.fullmatch(r"(?:--)?([a-z_]+(?:\.[a-z_]+)+)(?:[:= ].*)?", span)
        if option and option[1].partition(".")[0] in sections and not option[1].endswith((".py", ".yaml", ".jsonl")):
            there = option[1] in options
        elif re.fullmatch(r"[a-z]+/[a-z_<>/0-9]+", span) and span.partition("/")[0] in areas:
            measured = re.sub(r"<\w+>", "<>", re.sub(r"_\d+$", "_<>", span))
            there = bool({span, measured} & metrics) or (ROOT / span).exists()
        elif re.fullmatch(r"(?:examples|benchmarks|docs|tests|grpo|rollout|rewards|review|policies)/[\w./-]*", span):
            there = (ROOT / span).exists()
        else:
            there = True
        lost += [] if there else [span]
    assert lost == []


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_source():
    """What is between two … of a heading must be in one message of the source, in this order."""
    texts = [(ROOT / "grpo/task/table.yaml").read_text(encoding="utf-8")]
    for package in ("grpo", "rollout", "rewards", "review", "policies"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    page = ROOT / "docs/guides/troubleshooting.md"
    messages = re.findall(r"^#### `(.+)`$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(messages) >= 15
    patterns = {message: ".*".join(map(re.escape, re.split(r"\s*…\s*", message))) for message in messages}
    lost = [m for m, pattern in patterns.items() if not any(re.search(pattern, text, re.DOTALL) for text in texts)]
    assert lost == []


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as `make docs` builds it. Zensical writes beside its configuration, so it gets a copy of that."""
    pytest.importorskip("zensical")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    for name in ("examples", "benchmarks", "grpo", "rollout", "rewards", "review", "policies"):
        (folder / name).symlink_to(ROOT / name)
    words = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_holds_every_page_and_needs_no_network(site):
    built = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page.replace("README", "index") for page in pages} <= built
    assert (site / "llms.txt").read_bytes() == LIST.read_bytes()
    elsewhere, lost = set(), set()
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link\b[^>]*?\brel=\"(?:stylesheet|icon|preload)\"[^>]*?\bhref=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link\b[^>]*?\bhref=\"([^\"]+)\"[^>]*?\brel=\"(?:stylesheet|icon|preload)\"", text)
        for target in loaded:
            if re.match(r"(?:\w+:)?//", target):
                elsewhere.add(target)
            elif page.name != "404.html" and not (page.parent / target.split("?")[0].split("#")[0]).exists():
                lost.add(f"{page.relative_to(site)}: {target}")
    assert elsewhere == set()  # it needs no network
    assert lost == set()


@pytest.mark.slow
def test_every_link_inside_the_site_leads_to_a_page_and_a_place(site):
    texts = {page.resolve(): html.unescape(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    places = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in texts.items()}
    lost = set()
    for page, text in texts.items():
        for link in re.findall(r'<a\b[^>]*?\bhref="(?!\w+:|//)([^"]+)"', text if page.name != "404.html" else ""):
            file, _, place = urllib.parse.unquote(link).partition("#")
            target = (page.parent / file).resolve() if file else page
            if not target.exists() or (place and place not in places.get(target, {place})):
                lost.add(f"{page.relative_to(site.resolve())}: {link}")
    assert lost == set()
