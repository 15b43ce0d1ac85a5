"""What more nodes and batches sampled ahead would give: a simulation of 1 to 64 nodes from costs measured on one.

Every node has samplers and ranks of the learner, and the batch grows with the nodes, so that without any waiting a
step would take the same time on all of them. What is simulated: shards handed to free samplers in their order, a shard
that lasts as long as its longest completion, publications between two batches, scoring by one process, and the schedule
of `rollout.ahead` (grpo/ahead.py). What is not: slower machines, faults, ranks that wait for each other.

The costs come from the JSON of benchmarks/rollout.py, learner.py and publication.py, or with --run from the folder of a
run: its draft_costs.json and metrics. The lengths of completions come from a file of benchmarks/results, or from the
rollouts of the run. For comparison the same is simulated with every completion of the mean length.

    python -m benchmarks.simulate --json benchmarks/results/simulate.json --png docs/images/nodes.png
    python -m benchmarks.simulate --run runs/demo --workers 2
    python -m benchmarks.simulate lengths runs/demo          # {"groups": [[37, 35, ...], ...]} for --lengths
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.run.records import read_metrics, read_rollouts
from rollout.depth import CostTable

RESULTS = Path(__file__).parent / "results"
NODES = (1, 2, 4, 8, 16, 32, 64)
AHEAD = (0, 1, 2)
STEPS, WARM = 60, 10  # steps that are simulated, and those at the beginning that do not count
Group = Sequence[int]  # for each completion of a prompt, the forwards that it takes part in


@dataclass(frozen=True)
class Costs:
    """What was measured on one node, in seconds. `rounds`: milliseconds of a forward by live rows."""

    rounds: CostTable
    learn_per_token: float  # of one rank
    publish: float  # to one node, with its canaries
    publish_bytes: float
    score_per_completion: float

    @classmethod
    def of_results(cls, rollout: Path, learner: Path, publication: Path, workers: int, bytes_sent: float) -> Costs:
        """From JSON of benchmarks. Seconds of a publication are taken to be proportional to its bytes."""
        seconds = json.loads(rollout.read_text())["results"]["ours k=0"]["seconds"]
        table = {}
        for name, taken in seconds.items():
            if found := re.fullmatch(r"(\d+) x (\d+), (\d+) tokens", name):
                prompts, group, tokens = map(int, found.groups())
                table[prompts * group] = 1e3 * fmean(taken) / tokens
        rows = sorted(table)
        learned = json.loads(learner.read_text())
        size = learned["settings"]
        tokens = size["prompts"] * size["group_size"] * size["tokens"]
        sent = json.loads(publication.read_text())["seconds"]["result"]
        largest = max((row for row in sent if "all weights" in row), key=lambda row: float(row.split()[0]))
        row = sent[largest].get(f"{workers} workers") or sent[largest]["1 workers"]
        return cls(
            CostTable(rows, [[table[count]] for count in rows]),
            learned["contenders"]["ours_mla"]["median"]["learn"] / tokens,
            (row["median_s"] + row["canaries_s"]) * bytes_sent / (1e6 * row["mb"]),
            bytes_sent,
            0.0,
        )

    @classmethod
    def of_run(cls, folder: Path) -> Costs:
        """From a run's own metrics, and the table of draft costs that it has measured."""
        lines = [line for line in read_metrics(folder) if "loss/total" in line]
        tokens = sum(line["completion/tokens"] for line in lines)
        completions = sum(line["completion/tokens"] / line["completion/length_mean"] for line in lines)
        table = CostTable.load(folder / "draft_costs.json")
        return cls(
            CostTable(table.rows, [[costs[0]] for costs in table.rounds]),
            sum(line["time/learn"] - line.get("time/wait", 0.0) for line in lines) / tokens,
            fmean(line.get("time/publish", 0.0) for line in lines),
            fmean(line.get("publish/bytes", 0.0) for line in lines),
            sum(line["time/reward"] for line in lines) / completions,
        )


@dataclass(frozen=True)
class Cluster:
    """`bandwidth`: bytes a second out of the learner's first rank, which sends the weights to each other node."""

    nodes: int
    workers: int = 1  # on each node
    ranks: int = 1  # of the learner, on each node
    prompts: int = 16  # of a step, on each node
    prompts_per_shard: int = 8
    bandwidth: float = 1.25e9


def forwards(shard: Sequence[Group]) -> int:
    """Of a shard: as many as its longest completion takes part in.

    >>> forwards([[3, 5], [4, 1]])
    5
    """
    return max(rounds for group in shard for rounds in group)


def shard_seconds(shard: Sequence[Group], rounds: CostTable) -> float:
    """Every forward at the cost of the rows that still live then.

    >>> shard_seconds([[1, 3]], CostTable([1, 2], [[10.0], [16.0]]))     # 16 + 10 + 10 ms
    0.036
    """
    ends = sorted(rounds_of for group in shard for rounds_of in group)
    total, reached = 0.0, 0
    for i, end in enumerate(ends):
        total += (end - reached) * rounds.milliseconds(len(ends) - i, 0) if end > reached else 0.0
        reached = max(reached, end)
    return round(total / 1e3, 12)


def hand_out(seconds: Sequence[float], workers: int) -> float:
    """When all shards are done, if the next one always goes to the first free worker.

    >>> hand_out([3, 1, 1, 2], workers=2)     # one takes 3, the other 1, 1 and 2
    4.0
    """
    free = [0.0] * workers
    for taken in seconds:
        heapq.heappush(free, heapq.heappop(free) + taken)
    return max(free)


@dataclass(frozen=True)
class Batch:
    """Of one step: seconds until it is sampled, of all samplers together, of scoring and of learning."""

    sampling: float
    busy: float
    scoring: float
    learning: float


def schedule(batches: Sequence[Batch], publish: float, ahead: int) -> list[float]:
    """When each step has been learned, by the rules of grpo/ahead.py.

    Batch t needs the weights of step t - 1 - ahead, and the batch before it complete. Publishing takes the time of
    samplers and learner, between two batches. A step updates the policy only when the batch `ahead` of it has begun;
    with `ahead` 1, when that batch is complete.

    >>> step = Batch(sampling=3, busy=3, scoring=0, learning=2)
    >>> schedule([step] * 3, publish=1, ahead=0)     # sample 3, learn 2, publish 1, and again
    [5.0, 11.0, 17.0]
    >>> schedule([step] * 3, publish=1, ahead=1)     # from step 1 on: publish 1, then the longer one of 3 and 2
    [6.0, 10.0, 12.0]
    """
    total, ready, done = len(batches), dict[int, float](), [0.0]

    def sampled(number: int, start: float) -> None:
        if number <= total:
            ready[number] = start + batches[number - 1].sampling + batches[number - 1].scoring

    if ahead == 0:
        for number, batch in enumerate(batches, 1):
            sampled(number, done[-1] + (publish if number > 1 else 0.0))
            done.append(ready[number] + batch.learning)
        return done[1:]
    for number in range(1, ahead + 1):
        sampled(number, ready.get(number - 1, 0.0))
    for number, batch in enumerate(batches, 1):
        begun = max(done[-1], ready[number])
        published = publish if number > 1 else 0.0  # the first weights were published before the run
        update = begun + batch.learning
        if number + ahead <= total:
            start = max(begun, ready[number + ahead - 1]) + published
            sampled(number + ahead, start)
            update = max(update + published, start)
            if ahead == 1:
                update = max(update, ready[number + 1])
        done.append(update)
    return done[1:]


def simulate(costs: Costs, groups: Sequence[Group], cluster: Cluster, ahead: int, seed: int = 0) -> dict[str, float]:
    """A step's seconds, and the share of them that samplers and learner are idle. Each step draws its groups anew."""
    chance, batches = random.Random(seed), []
    for _ in range(STEPS):
        drawn = chance.choices(groups, k=cluster.prompts * cluster.nodes)
        size = cluster.prompts_per_shard
        seconds = [shard_seconds(drawn[i : i + size], costs.rounds) for i in range(0, len(drawn), size)]
        completions, tokens = sum(map(len, drawn)), sum(map(sum, drawn))
        batches.append(
            Batch(
                hand_out(seconds, cluster.workers * cluster.nodes),
                sum(seconds),
                completions * costs.score_per_completion,
                tokens * costs.learn_per_token / (cluster.ranks * cluster.nodes),
            )
        )
    publish = costs.publish + (cluster.nodes - 1) * costs.publish_bytes / cluster.bandwidth
    done = schedule(batches, publish, ahead)
    counted = batches[WARM : STEPS - WARM]  # at the end nothing more is sampled ahead
    lasted = done[STEPS - WARM - 1] - done[WARM - 1]
    busy = sum(batch.busy for batch in counted) / (cluster.workers * cluster.nodes)
    return {
        "step_s": lasted / len(counted),
        "samplers_idle": max(0.0, 1 - busy / lasted),
        "learner_idle": max(0.0, 1 - sum(batch.learning for batch in counted) / lasted),
    }


def equal(groups: Sequence[Group]) -> list[Group]:
    """The same groups with completions of their mean length."""
    mean = round(fmean(rounds for group in groups for rounds in group))
    return [[mean] * len(group) for group in groups]


def lengths_of(folder: Path) -> list[Group]:
    """Of a run's rollouts: by prompt, the forwards of each completion."""
    groups: dict[tuple, list[int]] = {}
    for path in sorted((folder / "rollouts").glob("step_*")):
        for row in read_rollouts(folder, int(path.name[5:11])):
            rounds = row["draft"]["target_forwards"] if row.get("draft") else len(row["token_ids"])
            groups.setdefault((row["step"], row["draw"], row["prompt_id"]), []).append(max(1, rounds))
    return list(groups.values())


def draw(path: Path, rows: list[dict[str, Any]], caption: str) -> None:
    from matplotlib.figure import Figure  # pip install matplotlib

    figure = Figure(figsize=(9, 5.2), dpi=110, layout="constrained", facecolor="white")
    kinds = list(dict.fromkeys(row["lengths"] for row in rows))
    shown = (("step_s", "seconds of a step"), ("samplers_idle", "samplers idle"), ("learner_idle", "learner idle"))
    axes = figure.subplots(len(kinds), len(shown), sharex=True, sharey="col", squeeze=False)
    for line, kind in zip(axes, kinds, strict=True):
        for panel, (name, title) in zip(line, shown, strict=True):
            for ahead, color in zip(AHEAD, ("#767676", "#0072B2", "#E69F00"), strict=True):
                chosen = [row for row in rows if (row["lengths"], row["ahead"]) == (kind, ahead)]
                nodes, values = [row["nodes"] for row in chosen], [row[name] for row in chosen]
                style = "--" if ahead == 2 else "-"
                panel.plot(nodes, values, style, color=color, marker=".", label=f"ahead {ahead}")
            panel.set_xscale("log", base=2)
            panel.set_xticks(NODES, [str(count) for count in NODES])
            panel.set_ylim(0, None if name == "step_s" else 1)
            panel.set_title(f"{title}, {kind}", fontsize=9)
            panel.grid(color="#E6E6E6")
            panel.spines[["top", "right"]].set_visible(False)
        line[0].legend(fontsize=8, frameon=False)
    for panel in axes[-1]:
        panel.set_xlabel("nodes")
    figure.text(0.5, -0.03, caption, ha="center", fontsize=7, color="#767676")
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["simulate", "lengths"], default="simulate")
    parser.add_argument("folder", type=Path, nargs="?", help="of a run, for `lengths`")
    parser.add_argument("--run", type=Path, help="take costs and lengths from this run")
    parser.add_argument("--rollout", type=Path, default=RESULTS / "rollout_drafts.json")
    parser.add_argument("--learner", type=Path, default=RESULTS / "learner_bf16.json")
    parser.add_argument("--publication", type=Path, default=RESULTS / "publication.json")
    parser.add_argument("--bytes", type=float, default=2.7e8, help="of a publication (135 M parameters in bf16)")
    parser.add_argument("--lengths", type=Path, default=RESULTS / "lengths_demo.json")
    parser.add_argument("--workers", type=int, default=1, help="samplers on each node")
    parser.add_argument("--ranks", type=int, default=3, help="ranks of the learner on each node")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step on each node")
    parser.add_argument("--prompts_per_shard", type=int, default=8)
    parser.add_argument("--bandwidth", type=float, default=1.25e9, help="bytes a second out of a node")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()

    if options.what == "lengths":
        if options.folder is None:
            parser.error("lengths: give the folder of a run")
        print(json.dumps({"groups": lengths_of(options.folder)}))
        return 0
    if options.run:
        groups = lengths_of(options.run)
        costs, source = Costs.of_run(options.run), str(options.run)
    else:
        groups = json.loads(options.lengths.read_text())["groups"]
        files = (options.rollout, options.learner, options.publication)
        costs = Costs.of_results(*files, options.workers, options.bytes)
        source = ", ".join(path.name for path in (*files, options.lengths))
    rows = []
    for name, chosen in (("recorded lengths", groups), ("equal lengths", equal(groups))):
        for nodes in NODES:
            shape = (options.workers, options.ranks, options.prompts, options.prompts_per_shard, options.bandwidth)
            for ahead in AHEAD:
                result = simulate(costs, chosen, Cluster(nodes, *shape), ahead)
                rows.append({"lengths": name, "nodes": nodes, "ahead": ahead} | result)
                shown = "  ".join(f"{key} {value:7.3f}" for key, value in result.items())
                print(f"{name:18s} {nodes:3d} nodes  ahead {ahead}  {shown}")
    if options.json:
        what = {"source": source, "costs": asdict(costs), "cluster": asdict(Cluster(1, *shape)), "rows": rows}
        options.json.write_text(json.dumps(what, indent=1) + "\n")
    if options.png:
        draw(
            options.png,
            rows,
            f"simulated from {source}; on each node {options.workers} sampler and {options.ranks} ranks",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
