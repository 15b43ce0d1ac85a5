"""The tiny chat policy that every run starts from: it adds two numbers, and is taught in half a minute on a CPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policies.presets import small_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OPENINGS = ("", "Let us add.\n", "First we add the two numbers.\n")  # so that lengths differ in a group
ROLES = ["<s>", "<|user|>", "<|assistant|>"]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
BATCH = 64


def problem(chance: random.Random, largest: int = 20) -> dict[str, Any]:
    """One row of the data set.

    >>> problem(random.Random(0))["answer"]
    '#### 42'
    """
    a, b = chance.randint(2, largest), chance.randint(2, largest)
    return {"question": f"What is {a} + {b}?", "answer": f"#### {a + b}", "parts": [a, b]}


def problems(seed: int, count: int, largest: int = 20) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    return [problem(chance, largest) for _ in range(count)]


def solution(row: dict[str, Any], opening: str) -> str:
    a, b = row["parts"]
    return f"{opening}{a} + {b} = {a + b}\n#### {a + b}"


def tokenizer() -> PreTrainedTokenizerFast:
    rows = problems(0, 400)
    corpus = [f"{row['question']} {solution(row, OPENINGS[place % 3])}" for place, row in enumerate(rows)]
    made = small_tokenizer(corpus, 400)
    made.add_special_tokens({"bos_token": ROLES[0], "additional_special_tokens": ROLES[1:]})
    made.chat_template = TEMPLATE
    return made


def teach(folder: Path, steps: int, seed: int = 0) -> Path:
    """Trains the policy on solutions for so many steps, and saves it with its tokenizer."""
    torch.manual_seed(seed)
    words = tokenizer()
    ends = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=256, **SHAPE, **ends))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    chance = random.Random(seed)
    for _ in range(steps):
        ids, labels = _batch(words, chance)
        loss = model(input_ids=ids, attention_mask=(ids != words.pad_token_id).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _batch(words: PreTrainedTokenizerFast, chance: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    rows, marks = [], []
    for _ in range(BATCH):
        row = problem(chance)
        messages = [{"role": "user", "content": row["question"]}]
        prompt = words.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = words(solution(row, chance.choice(OPENINGS)))["input_ids"] + [words.eos_token_id]
        rows.append(prompt + answer)
        marks.append([-100] * len(prompt) + answer)
    width = max(map(len, rows))
    ids = [row + [words.pad_token_id] * (width - len(row)) for row in rows]
    labels = [row + [-100] * (width - len(row)) for row in marks]
    return torch.tensor(ids), torch.tensor(labels)
