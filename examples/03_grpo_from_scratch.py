"""GRPO in one file, with torch only: a tiny policy learns to sort letters. It takes two minutes on one core.

    python examples/03_grpo_from_scratch.py

The policy first learns from 100 worked answers (the SFT stage). GRPO then continues on problems without an answer.
GRPO is from DeepSeekMath (arXiv:2402.03300). The loss here is DAPO's (arXiv:2503.14476), and the advantage Dr. GRPO's
(arXiv:2503.20783). docs/grpo-in-200-lines.md maps these lines to quartet's modules.

The letters at the end of a name are its shape: P prompts, G completions of each prompt, B = P·G sequences, T tokens of
the longest sequence, S = T - 1 tokens that have a log-probability (the first has none), V tokens of the vocabulary.
"""

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, DynamicCache, PreTrainedTokenizerFast

from policies.presets import build
from rewards.data.letter_sorting import letter_sorting

SEED = 0
WORKED_ANSWERS = 100
SFT_STEPS, SFT_BATCH, SFT_LEARNING_RATE = 150, 16, 2e-3
STEPS, LEARNING_RATE = 60, 4e-4
P, G = 32, 8
MAX_COMPLETION_TOKENS = 12  # a correct answer has at most 10: ####, 8 letters and the end token
EPSILON = 0.2


def reward_of(question: str, completion: str) -> float:
    """1 if the completion ends with the letters of the question in order. It needs no reference answer."""
    letters = question.partition(": ")[2].split()
    answer = completion.rpartition("####")[2].split()
    complete = len(answer) == len(letters) and set(answer) == set(letters)
    return float(complete and answer == sorted(answer))


def advantages_of(rewards_PG: Tensor) -> Tensor:
    """Â_i = R_i - mean(R_1 … R_G): DeepSeekMath §4.1.2 without the division by std(R), as in Dr. GRPO §3.2.

    The mean of the group is the baseline, in place of PPO's value model. In a zero-variance group every Â is 0.
    """
    return rewards_PG - rewards_PG.mean(dim=1, keepdim=True)


def grpo_loss(policy_BS: Tensor, old_BS: Tensor, advantages_B: Tensor, mask_BS: Tensor) -> Tensor:
    """L = -1/Σ_i|o_i| · Σ_i Σ_t min(r·Â_i, clip(r, 1 - ε, 1 + ε)·Â_i), DAPO eq. 8, here with one ε.

    The inputs are log-probabilities. The denominator is the number of completion tokens in the whole batch, so every
    token weighs the same. DeepSeekMath eq. 3 has 1/G Σ_i 1/|o_i| Σ_t: there a token of a long completion weighs less.
    """
    ratio_BS = (policy_BS - old_BS).exp()  # r = π(token) / π_old(token)
    clipped_BS = ratio_BS.clamp(1 - EPSILON, 1 + EPSILON)
    advantages_B1 = advantages_B[:, None]  # every token of a completion has its completion's advantage
    objective_BS = torch.minimum(ratio_BS * advantages_B1, clipped_BS * advantages_B1)  # PPO, arXiv:1707.06347, eq. 7
    return -objective_BS[mask_BS].sum() / mask_BS.sum()


def positions_of(real_BT: Tensor) -> Tensor:
    """Positions that count from 0 at the first real token. `real_BT` is false at padding."""
    return (real_BT.long().cumsum(dim=1) - 1).clamp(min=0)


def logprobs_of(trunk: DeepseekV3ForCausalLM, tokens_BT: Tensor, real_BT: Tensor) -> Tensor:
    """log π of each token but the first, given the tokens before it [B, S]."""
    logits_BTV = trunk(tokens_BT, real_BT, positions_of(real_BT), use_cache=False).logits
    logprobs_BSV = logits_BTV[:, :-1].log_softmax(dim=-1)  # the output at token t predicts token t + 1
    return logprobs_BSV.gather(2, tokens_BT[:, 1:, None])[:, :, 0]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(tokens, real), both [B, T]. Padding stands on the left, so that all completions begin in one column."""
    longest = max(len(row) for row in rows)
    tokens_BT = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    lengths_B1 = torch.tensor([[len(row)] for row in rows])
    return tokens_BT, torch.arange(longest) >= longest - lengths_B1  # from lengths: the value of padding is never read


@torch.no_grad()
def sample(trunk: DeepseekV3ForCausalLM, tokens_BT: Tensor, real_BT: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sample a completion of every prompt at temperature 1. Returns (tokens, real, mask of the completion), [B, T]."""
    unread = prompt_length = tokens_BT.shape[1]  # unread: what the cache does not hold yet
    running_B1 = torch.ones(len(tokens_BT), 1, dtype=torch.bool)
    cache = DynamicCache(config=trunk.config)
    for _ in range(MAX_COMPLETION_TOKENS):
        positions_BT = positions_of(real_BT)[:, -unread:]
        logits_BV = trunk(tokens_BT[:, -unread:], real_BT, positions_BT, cache, use_cache=True).logits[:, -1]
        next_B1 = torch.multinomial(logits_BV.softmax(dim=-1), num_samples=1)
        tokens_BT = torch.cat([tokens_BT, next_B1], dim=1)
        real_BT = torch.cat([real_BT, running_B1], dim=1)
        running_B1 = running_B1 & (next_B1 != end)  # after `real`: the end token is trained on too, or none would end
        unread = 1
    return tokens_BT, real_BT, real_BT & (torch.arange(tokens_BT.shape[1]) >= prompt_length)


def update(optimizer: torch.optim.Optimizer, trunk: DeepseekV3ForCausalLM, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trunk.parameters(), max_norm=1.0)
    optimizer.step()


def sft(trunk: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[dict[str, str]]) -> None:
    """Cross-entropy of the answers: -1/Σ|o_i| · Σ_i Σ_t log π(o_it)."""
    optimizer = torch.optim.AdamW(trunk.parameters(), lr=SFT_LEARNING_RATE)
    for step in range(SFT_STEPS):
        optimizer.param_groups[0]["lr"] = SFT_LEARNING_RATE * (1 - step / SFT_STEPS)
        batch = [problems[i] for i in torch.randperm(len(problems))[:SFT_BATCH].tolist()]
        prompts = [tokenizer(f"{problem['question']}\n").input_ids for problem in batch]
        answers = [tokenizer(problem["answer"] + tokenizer.eos_token).input_ids for problem in batch]
        tokens_BT, real_BT = padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        _, mask_BA = padded(answers)  # A tokens of the longest answer, the last columns
        logprobs_BA = logprobs_of(trunk, tokens_BT, real_BT)[:, -mask_BA.shape[1] :]
        update(optimizer, trunk, -logprobs_BA[mask_BA].mean())


def grpo(trunk: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str], reward=reward_of):
    """One step for every P questions. Yields the rewards of each step [P, G]."""
    optimizer = torch.optim.AdamW(trunk.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for first in range(0, len(questions), P):
        asked = [question for question in questions[first : first + P] for _ in range(G)]  # B, group after group
        prompts_BT, real_BT = padded([tokenizer(f"{question}\n").input_ids for question in asked])
        tokens_BT, real_BT, mask_BT = sample(trunk, prompts_BT, real_BT, tokenizer.eos_token_id)
        sampled = [tokens_T[mask_T] for tokens_T, mask_T in zip(tokens_BT, mask_BT, strict=True)]
        completions = tokenizer.batch_decode(sampled, skip_special_tokens=True)
        rewards_PG = torch.tensor([reward(*pair) for pair in zip(asked, completions, strict=True)]).view(-1, G)
        policy_BS = logprobs_of(trunk, tokens_BT, real_BT)
        old_BS = policy_BS.detach()  # no clip acts here: one update per batch, so the ratio is 1
        update(optimizer, trunk, grpo_loss(policy_BS, old_BS, advantages_of(rewards_PG).flatten(), mask_BT[:, 1:]))
        yield rewards_PG


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums of several threads round differently on machines with other numbers of cores
    torch.manual_seed(SEED)
    problems = letter_sorting("train", SEED, count=WORKED_ANSWERS + STEPS * P)  # no two have the same letters
    worked, others = problems[:WORKED_ANSWERS], problems[WORKED_ANSWERS:]
    policy = build("tiny", [f"{problem['question']}\n{problem['answer']}\n" for problem in worked], SEED)
    sft(policy.trunk, policy.tokenizer, worked)
    steps = grpo(policy.trunk, policy.tokenizer, [problem["question"] for problem in others])
    recent: list[Tensor] = []
    for step, rewards_PG in enumerate(steps, start=1):
        recent = [*recent, rewards_PG][-5:]
        if step % 5 == 0:
            rewards_NG = torch.cat(recent)  # all groups of five steps: the reward of one step is noisy
            equal_N = (rewards_NG == rewards_NG[:, :1]).all(dim=1)
            print(f"step {step}  reward {rewards_NG.mean():.3f}  zero-variance groups {equal_N.float().mean():.0%}")
