"""Prints docs/guides/migrate.md, which `make reference` writes: coming from TRL or verl, and the tables of names."""

from rewards.config.names import ours, trainers

PAGE = """\
# Coming from TRL or verl

This page is for trying quartet on what you train with TRL or verl already: your script or your command becomes a
configuration, and what has no counterpart is said before anything is trained.

<!-- not run: it needs a script of yours -->
```bash
quartet from-trl train.py                       # writes run.yaml, and run_data/ beside it
quartet from-trl train.py --processes 8 --arguments='--config grpo.yaml' --out eight.yaml --json eight.json
quartet from-verl run_grpo.sh                   # or the command itself, as one word
DEVICE=gpu quartet from-verl run_grpo.sh        # with a variable that the script reads
quartet from-verl 'bash run_grpo.sh trainer.total_epochs=3'
quartet train run.yaml --dry_run
```

## What is read

`quartet from-trl` runs the script in a process of its own up to its `GRPOTrainer(...)`, and no further. Models are not
loaded: `from_pretrained` gives a stand-in with the model's name. Datasets and tokenizers are, since what the script
does to them is part of what it trains on. The process ends after `--timeout_s`, with all that it has started.
`--processes` says how many `accelerate launch` would start.

`quartet from-verl` needs shfmt, which parses the script (`pip install 'quartet-rl[verl]'`). It reads the text of the
command and runs nothing. Options get the values that bash would give them: variables, arrays, functions, loops,
conditions, `eval` and files that the script sources are evaluated, with your environment and the script's arguments.
Anything else is refused with its line, such as `select`, `pushd` or `${{x@Q}}`.

A condition on a file or on the output of a program is tried both ways. If the command is the same, it does not matter.
If an option differs, the error names the condition, the option, and the variable to give:
`MODEL_PATH=/models/small quartet from-verl run_grpo.sh`. A branch that ends the script is not taken, and a note shows
its condition. The test `python3 -c 'import torch_npu'` is answered for the Python that runs quartet, and a note names
the variable that overrides it. If a script starts verl several times, the first command is read, and a note names the
line of the second. You can always pass the command itself: paste the words from `python3 -m verl.trainer.main_ppo` on.

Words such as `+key=value`, `~key` and `{{a:1}}` are read as Hydra reads them. A file that `--config-path` and
`--config-name` name is read if it is here. DAPO's `recipe.dapo.main_dapo` is read like `verl.trainer.main_ppo`.

- **Batches.** TRL counts completions: an update learns from `per_device_train_batch_size` × processes ×
  `gradient_accumulation_steps` of them, which is `prompts_per_step` × `rollout.group_size` here. `max_steps` counts
  updates; `steps` counts batches, each of which has `learner.updates_per_batch` updates (`num_iterations`). verl
  counts prompts: an update learns from `ppo_mini_batch_size` of them. Where one generation serves several updates
  there, each update samples for itself here.
- **Defaults are carried over too**: TRL's linear schedule, β₂ = 0.999, 512 tokens, seed 42; verl's weight decay of
  0.01, dual clip at 3, 30 epochs, GAE. The file says all that has a counterpart.
- **Rewards** stay in the script where it can be imported without work (`if __name__ == "__main__":`). Otherwise the
  functions, with what they reach in the script, are copied into `functions.py` beside the data, where no trainer
  starts. A reward that is made while the script runs, such as a function inside a function, must move to the top of a
  file. A reward that reads `environments` is refused, since they are in other processes: return its score from the
  environment's `get_reward(self)`, which TRL calls too. verl's `compute_score` is read as [it
  is](own-reward.md), `verl:FILE.py:compute_score`.
- **Data**: a dataset of the hub that the script passes on as it is keeps its name. Any other is written as
  `train.jsonl` and `test.jsonl`, with one column more, `gold_text`: the reference answer as a text. It is the column
  with a usual name, such as `answer`, or one that a reward reads. If some row has none, `data.solution_column` is
  `null`. A script without training data, or whose data has pictures, is refused. verl's files
  are read where they are; their gold solution is the column `reward_model.ground_truth`.
- **What is lost** is said in two lists, at the top of the file too: what changes what is learned, and what does not.
  Each line has the reason and the way out.

Three things stay different without an option that says so: prompts come in another order, the sampled tokens are
others, and TRL's first step of a warm-up has a rate of zero where ours has 1/`learner.warmup_steps` of the peak.

## Names

{tables}
Values that are called otherwise:

| option of theirs | theirs: ours |
|---|---|
{values}
"""
TITLES = {
    "trl": "TRL's `GRPOConfig`",
    "trainer": "an argument of TRL's `GRPOTrainer`",
    "lora": "peft's `LoraConfig`",
    "verl": "verl",
}


def page() -> str:
    tables, values = [], []
    for kind, title in TITLES.items():
        rows = {name: row for name, row in trainers()[kind].items() if "same" in row or "to" in row}
        lines = [f"| `{name}` | `{ours(row)[0]}` |" for name, row in sorted(rows.items())]
        tables.append("\n".join([f"| {title} | here |", "|---|---|", *lines, ""]))
        for name, row in rows.items():
            differ = [f"{theirs}: {value}" for theirs, value in row.get("values", {}).items() if str(theirs) != value]
            values += [f"| `{name}` | {', '.join(differ)} |"] if differ else []
    return PAGE.format(tables="\n".join(tables), values="\n".join(values))


if __name__ == "__main__":
    print(page(), end="")
