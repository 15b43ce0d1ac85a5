"""A script for TRL, as its users write them: two rewards, LoRA, vLLM, and options that quartet does not have."""

import sys

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

model_id, output_dir = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_id)
problems = [{"problem": f"{a} + {b} = ?", "solution": str(a + b)} for a in range(2, 8) for b in range(2, 6)]
dataset = Dataset.from_list(problems)
dataset = dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["problem"]}]})


def digits(completions, solution, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [sum(text.count(digit) for digit in gold) / 10 for text, gold in zip(texts, solution, strict=True)]


def letters(completions, **kwargs):
    return [sum(letter.isalpha() for letter in completion[0]["content"]) / 20 for completion in completions]


args = GRPOConfig(
    output_dir=output_dir,
    learning_rate=1e-3,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_generations=4,
    max_completion_length=8,
    max_prompt_length=64,
    max_steps=2,
    warmup_steps=1,
    beta=0.04,
    epsilon_high=0.28,
    top_p=0.95,
    reward_weights=[1.0, 0.5],
    use_vllm=True,
    vllm_gpu_memory_utilization=0.4,
    logging_steps=1,
)
lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
trainer = GRPOTrainer(model_id, [digits, letters], args, train_dataset=dataset, peft_config=lora)
trainer.train()
