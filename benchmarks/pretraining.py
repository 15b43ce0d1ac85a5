"""Small language models from scratch for the benchmarks: text in blocks, training side by side, held-out perplexity."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from grpo.config.learner import BalanceOptions, LearnerOptions, MTPOptions
from grpo.data.word_problems import word_problems
from grpo.learner.batch import PackedRow, Sample, micro_batches
from grpo.learner.learner import Learner
from grpo.learner.optimizer import schedule
from policies.policy import Policy
from policies.presets import small_tokenizer
from policies.routing.routers import Part, RoutingRecorder

HELD_OUT = 0.1  # of the documents


@dataclass
class Text:
    """Documents as blocks of token ids, all of one length, in an order that the seed fixes."""

    tokenizer: object
    train: Tensor  # [blocks, length]
    heldout: Tensor

    def batch(self, step: int, size: int) -> list[PackedRow]:
        """The blocks of step 1, 2, …, as rows in which every token but the first is learned."""
        start = (step - 1) * size
        return rows(self.train[[i % len(self.train) for i in range(start, start + size)]])


def load_text(folder: Path | None, vocab_size: int, length: int, seed: int, documents: int = 12_000) -> Text:
    """Questions with solutions: `train.jsonl` of `folder` (GSM8K's layout), or built-in word problems of all levels.

    A tenth is held out: of GSM8K the end of its training file, of the word problems some whose numbers are in no
    training problem.
    """
    count = round(documents * (1 - HELD_OUT))
    if folder is None:
        splits = [word_problems("train", [1, 2, 3, 4], seed, count=count)]
        splits += [word_problems("heldout", [1, 2, 3, 4], seed, count=documents - count)]
    else:
        lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[:documents]
        cut = round(len(lines) * (1 - HELD_OUT))
        splits = [[json.loads(line) for line in part] for part in (lines[:cut], lines[cut:])]
    texts = [[f"{example['question']}\n{example['answer']}\n" for example in split] for split in splits]
    tokenizer = small_tokenizer(texts[0], vocab_size)
    train, heldout = (_blocks(tokenizer, part, length) for part in texts)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Text(tokenizer, train[order], heldout)


def _blocks(tokenizer, texts: Sequence[str], length: int) -> Tensor:
    ids = [token for text in tokenizer(list(texts))["input_ids"] for token in (*text, tokenizer.eos_token_id)]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def rows(blocks: Tensor) -> list[PackedRow]:
    return [PackedRow(block[:1], [Sample(i, block[1:])]) for i, block in enumerate(blocks.tolist())]


def build(config: DeepseekV3Config | LlamaConfig, tokenizer, seed: int) -> Policy:
    """A fresh policy without a draft head; its weights depend on the seed alone.

    Embeddings start at scale 1: small ones drown in what attention adds, the more the higher the rank of its values,
    and multi-head attention would lose a short race against MLA for that reason alone.
    """
    model = DeepseekV3ForCausalLM if isinstance(config, DeepseekV3Config) else LlamaForCausalLM
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        trunk = model(config)
        trunk.get_input_embeddings().weight.normal_()
    return Policy(trunk, None, tokenizer)


@dataclass
class Run:
    """One model in training: `steps` of them learn, the seconds of each are noted."""

    policy: Policy
    steps: int
    balance: BalanceOptions = field(default_factory=BalanceOptions)
    seconds: list[float] = field(default_factory=list)
    loss: float = math.nan

    def learner(self, learning_rate: float) -> Learner:
        return Learner(
            self.policy,
            LearnerOptions(learning_rate=learning_rate, weight_decay=0.01),
            MTPOptions(loss_weight=0),
            balance=self.balance,
            schedule=schedule("cosine", self.steps, max(1, self.steps // 20)),
        )


def train(
    runs: Mapping[str, Run],
    text: Text,
    batch_size: int,
    learning_rate: float,
    say: Callable[[str], None],
) -> None:
    """Train all runs on the same batches, taking turns step by step, so that noise of the machine hits them alike."""
    learners = {name: run.learner(learning_rate) for name, run in runs.items()}
    most = max(run.steps for run in runs.values())
    for step in range(1, most + 1):
        batch = text.batch(step, batch_size)
        for name, run in runs.items():
            if step <= run.steps:
                started = time.perf_counter()
                run.loss = learners[name].sft_step(batch, step)["loss/sft"]
                run.seconds.append(time.perf_counter() - started)
        if step % max(1, most // 10) == 0 or step == most:
            losses = "  ".join(f"{name} {run.loss:.3f}" for name, run in runs.items() if step <= run.steps)
            say(f"step {step}/{most}, loss: {losses}")


def tokens_per_second(run: Run, tokens_per_step: int) -> float:
    """Median over the steps behind the first two, which warm up."""
    return tokens_per_step / median(run.seconds[2:] or run.seconds)


@torch.no_grad()
def perplexity(policy: Policy, blocks: Tensor, tokens_at_once: int = 8192) -> float:
    """exp of the mean −log p of every token but each block's first."""
    learner = Learner(policy, LearnerOptions(), MTPOptions(loss_weight=0))
    total = 0.0
    for mini in micro_batches(rows(blocks), tokens_at_once, policy.device):
        total -= learner.likelihood.forward(mini).logprobs.sum().item()
    return math.exp(total / (blocks.numel() - len(blocks)))


@torch.no_grad()
def activation_rates(policy: Policy, blocks: Tensor, blocks_at_once: int = 64, part: Part = "mlp") -> Tensor:
    """Share of the tokens that choose each routed expert or dynamic head, [layers, experts]; balanced is k / E."""
    counts, tokens = 0, 0
    for some in blocks.split(blocks_at_once):
        with RoutingRecorder(policy.trunk, part) as routing:
            policy.trunk.get_decoder()(input_ids=some.to(policy.device), use_cache=False)
        experts = routing.logits[0].shape[1]
        counts = counts + torch.stack([torch.bincount(e.flatten(), minlength=experts) for e in routing.experts])
        tokens += some.numel()
    return counts.double() / tokens


def shown(rows_of_table: Iterable[Sequence[object]]) -> str:
    """Cells in columns: words to the left, numbers to the right.

    >>> print(shown([("batch", 1, 32), ("ms", 0.5, 12.25)]))
    batch    1     32
    ms     0.5  12.25
    """
    table = [[f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows_of_table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)] for row in table
    )
    return "\n".join("  ".join(line) for line in lines)
