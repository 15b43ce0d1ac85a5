"""How often drafts that are looked up are right: counts, no times, so the machine may be busy.

Drafts change no token. So what was sampled once is replayed with every choice of sources (`rollout.draft_sources`),
round by round as a shard decodes it, without a model. The head cannot be replayed: its counts are in the metrics of a
run.

    python benchmarks/drafts.py runs/NAME                                  # the records of a run, epoch by epoch
    python benchmarks/drafts.py --model models/smollm2-135m-mla --temperatures 1.0,0.7 --prompts 12

With `--model` the policy samples GSM8K questions twice, with other noise, and `history` is the first of the two. The
columns: forwards of a row in which there was a draft, and the share of those whose first draft was right; how many of
`--depth` drafts were right in the mean; tokens per forward; rejected drafts per token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here

import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from grpo.config.options import load  # noqa: E402
from grpo.config.run import TrainConfig  # noqa: E402
from grpo.data.examples import load_examples  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402
from grpo.run.records import read_rollouts, recorded_steps  # noqa: E402
from policies.policy import Policy  # noqa: E402
from rollout.depth import DepthController, Kind  # noqa: E402
from rollout.drafts.lookup import Lookup  # noqa: E402
from rollout.engine import Engine  # noqa: E402
from rollout.group import Prompt, shards  # noqa: E402
from rollout.sampling import DraftSource, SamplingParams  # noqa: E402

CHOICES: list[tuple[DraftSource, ...]] = [("siblings",), ("history",), ("siblings", "history")]
Groups = list[tuple[Prompt, list[list[int]]]]  # the token ids of each prompt's completions


@dataclass
class Counts:
    """Of all rows: forwards after the first token, those with a draft, drafts, and how many of them were right."""

    tokens: int = 0
    forwards: int = 0
    with_draft: int = 0
    first_right: int = 0
    drafted: int = 0
    right: int = 0

    def add(self, other: Counts) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def line(self) -> str:
        drafts = max(self.with_draft, 1)
        return (
            f"{self.with_draft / self.forwards:8.2f} {self.first_right / drafts:8.2f} {self.right / drafts:8.2f} "
            f"{self.tokens / self.forwards:8.3f} {(self.drafted - self.right) / self.tokens:8.2f}"
        )


def replay(groups: Groups, params: SamplingParams, vocabulary: int) -> Counts:
    """One shard with `params.draft_tokens` drafts at most, as `Decoding` and `Drafts` do it."""
    assert params.draft_tokens
    lookup = Lookup([prompt for prompt, _ in groups], params, vocabulary)
    controller, depth, counts = DepthController(None, params.draft_tokens), params.draft_tokens, Counts()
    texts = [ids for _, completions in groups for ids in completions]
    for number in range(len(groups)):
        lookup.begin(number)
    written = [1] * len(texts)
    lookup.keep(range(len(texts)), texts, written)
    while live := [row for row, ids in enumerate(texts) if written[row] < len(ids)]:
        most = min(depth, params.max_completion_tokens - min(written[row] for row in live) - 1)
        kept, taken = [], {}
        for row in live:
            rest, right, drafts = texts[row][written[row] :], 0, []
            if most > 0 and (kinds := lookup.kinds(row)):
                kind = max(kinds, key=lambda kind: controller.tokens(kind, depth)[-1])
                drafts = lookup.draft(row, kind[0], most)
                while right < min(len(drafts), len(rest)) and drafts[right] == rest[right]:
                    right += 1
                taken.setdefault(kind, []).append(right)
            kept.append(min(right + 1, len(rest)))
            counts.add(Counts(kept[-1], 1, bool(drafts), right > 0, len(drafts), right))
        observe(controller, taken, most)
        lookup.keep(live, [texts[row][written[row] :] for row in live], kept)
        for row, count in zip(live, kept, strict=True):
            written[row] += count
    return counts


def observe(controller: DepthController, taken: dict[Kind, list[int]], depth: int) -> None:
    for kind, counts in taken.items():
        controller.observe(len(counts), [sum(count > d for count in counts) for d in range(depth)], kind)


# ---- where the tokens come from ----


def of_run(folder: Path, depth: int) -> Iterator[tuple[str, Groups, SamplingParams, int, int]]:
    """The groups of each epoch: the n-th time that a prompt is there belongs to epoch n."""
    config = load(TrainConfig, folder / "config.yaml", {}, [])
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    before: dict[str, list[list[int]]] = {}
    times: Counter[str] = Counter()
    by_epoch: dict[int, list[tuple[int, Groups]]] = {}
    options = config.rollout
    for step in recorded_steps(folder):
        completions: dict[str, list[list[int]]] = {}
        texts = {}
        for row in read_rollouts(folder, step):
            completions.setdefault(row["prompt_id"], []).append(row["token_ids"])
            texts[row["prompt_id"]] = row["prompt"]
        groups = by_epoch.setdefault(max(times[name] for name in completions) + 1, [])
        of_step: Groups = []
        for name, ids in completions.items():
            prompt_ids = tokenizer.encode(texts[name], add_special_tokens=False)
            of_step.append((Prompt(name, "", prompt_ids, history=before.get(name, [])), ids))
        groups.append((step, of_step))
        before |= completions
        times.update(completions.keys())
    for epoch, steps in sorted(by_epoch.items()):
        for step, groups_of_step in steps:
            params = SamplingParams(
                options.group_size,
                options.temperature,
                options.max_completion_tokens,
                seed=config.seed,
                draft_tokens=depth,
                step=step,
            )
            yield f"epoch {epoch}", groups_of_step, params, len(tokenizer), options.prompts_per_shard


def of_model(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, Groups, SamplingParams, int, int]]:
    policy = Policy.load(folder)
    engine, tokenizer = Engine(policy), policy.tokenizer
    prompts = []
    for example in load_examples("gsm8k", "train", limit=args.prompts):
        messages = [{"role": "user", "content": example.columns["question"]}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        prompts.append(Prompt(example.example_id, text, tokenizer.encode(text, add_special_tokens=False)))
    for temperature in args.temperatures:
        stops = tuple(policy.stop_token_ids)
        params = SamplingParams(args.group_size, temperature, args.tokens, stops, draft_tokens=0)
        once, again = (engine.sample(prompts, params.at(step)) for step in (1, 2))
        groups = [
            (replace(b.prompt, history=[c.token_ids for c in a.completions]), [c.token_ids for c in b.completions])
            for a, b in zip(once, again, strict=True)
        ]
        at = replace(params, draft_tokens=args.depth, step=2)
        yield f"T = {temperature}", groups, at, len(engine.trunk.embedding), args.prompts


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a run folder of quartet train")
    parser.add_argument("--model", type=Path, help="a policy that samples GSM8K, in place of a run")
    parser.add_argument("--depth", type=int, default=4, help="drafts per forward")
    parser.add_argument("--temperatures", type=numbers, default=[1.0, 0.7], help="with --model")
    parser.add_argument("--prompts", type=int, default=12, help="with --model")
    parser.add_argument("--group_size", type=int, default=8, help="with --model")
    parser.add_argument("--tokens", type=int, default=120, help="with --model: of a completion, at most")
    parser.add_argument("--json", type=Path, help="write the counts here, with hardware, versions and command")
    args = parser.parse_args()
    if (args.run is None) == (args.model is None):
        parser.error("name a run folder, or a policy by --model")
    torch.set_num_threads(1)
    print(f"{'':24} {'':18} {'draft':>8} {'first':>8} {'right':>8} {'tok/fwd':>8} {'rejected':>8}")
    parts = of_run(args.run, args.depth) if args.run else of_model(args.model, args)
    totals: dict[str, dict[str, Counts]] = {}
    for title, groups, params, vocabulary, shard in parts:
        of_title = totals.setdefault(title, {"+".join(sources): Counts() for sources in CHOICES})
        for sources in CHOICES:
            for part in shards(groups, shard):
                counts = replay(list(part), replace(params, draft_sources=sources), vocabulary)
                of_title["+".join(sources)].add(counts)
    for title, by_sources in totals.items():
        for name, counts in by_sources.items():
            print(f"{title:24} {name:18} {counts.line()}", flush=True)
    if args.json:
        found = {title: {name: asdict(c) for name, c in of.items()} for title, of in totals.items()}
        results = {"environment": describe(), "depth": args.depth, "counts": found}
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
