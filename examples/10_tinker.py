"""GRPO on word problems by Tinker's API, as a loop of your own. One variable decides where it trains:

pip install 'quartet-rl[tinker]'
quartet serve --train models/mine &
TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-here python examples/10_tinker.py models/mine
TINKER_API_KEY=tml-... python examples/10_tinker.py Qwen/Qwen3-8B

"""

import sys

from tinker import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient

from rewards.data.word_problems import word_problems

STEPS, PROMPTS, GROUP = 20, 8, 8


def datum(prompt, sequence, advantage):
    """The completion's tokens count, the prompt's do not."""
    before = [0] * (len(prompt) - 1)
    inputs = {
        "target_tokens": before + list(sequence.tokens),
        "logprobs": [0.0] * len(before) + list(sequence.logprobs),
        "advantages": [0.0] * len(before) + [advantage] * len(sequence.tokens),
    }
    return Datum(model_input=ModelInput.from_ints(prompt + list(sequence.tokens[:-1])), loss_fn_inputs=inputs)


model = sys.argv[1]
training = ServiceClient().create_lora_training_client(base_model=model, rank=16, seed=0).result()
tokenizer = training.get_tokenizer()
problems = list(word_problems("train", [1], count=STEPS * PROMPTS))
for step in range(STEPS):
    sampling = training.save_weights_and_get_sampling_client().result()
    asked = []
    for problem in problems[step * PROMPTS : (step + 1) * PROMPTS]:
        prompt = tokenizer.encode(problem["question"] + "\n")
        params = SamplingParams(max_tokens=96, temperature=1.0)
        asked.append((problem, prompt, sampling.sample(ModelInput.from_ints(prompt), GROUP, params)))
    data, rewards = [], []
    for problem, prompt, future in asked:
        sequences = future.result().sequences
        answer = problem["answer"].rpartition("####")[2].strip()
        texts = [tokenizer.decode(sequence.tokens, skip_special_tokens=True) for sequence in sequences]
        scores = [float(text.rpartition("####")[2].strip() == answer) for text in texts]
        mean = sum(scores) / len(scores)
        rewards += scores
        if 0 < mean < 1:  # a zero-variance group teaches nothing
            data += [datum(prompt, s, score - mean) for s, score in zip(sequences, scores, strict=True)]
    if data:
        learned = training.forward_backward(data, "importance_sampling")
        training.optim_step(AdamParams(learning_rate=1e-3)).result()
        learned.result()
    print(f"step {step}: reward {sum(rewards) / len(rewards):.3f}, {len(data)} completions learned from", flush=True)
print(training.save_state("last", overwrite=True).result().path)
