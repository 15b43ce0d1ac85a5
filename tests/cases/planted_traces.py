"""Traces of rollouts with one planted fault each, and honest ones, for the examination of `quartet audit`.

The kinds of faults are fixed here before any detector exists: the first commit of this file is the proof. Each has a
definition, the public issue or paper that shows it happening, the formats whose rows can show it, and the words of which
one must be in the finding that names it. A finding that names another fault, or other rows, does not count.

Formats: `trl` is a folder of `completions_NNNNN.parquet`, written by the installed TRL's own `GRPOTrainer.log`; `verl` is a
folder of `STEP.jsonl` (verl/trainer/ppo/ray_trainer.py, `_dump_generations`); `verifiers` is a folder with `results.jsonl` and
`metadata.json` (verifiers/utils/save_utils.py), or prime-rl's `rollouts/step_N/train_rollouts.jsonl` of the same rows; `gym`
is NeMo-Gym's `rollouts.jsonl` with its neighbours (nemo_gym/rollout_collection.py).
"""

from dataclasses import dataclass

ALL = ("trl", "verl", "verifiers", "gym")
STEPPED = ("trl", "verl", "verifiers")  # formats that say at which step a row was sampled
TOKENS = ("verifiers", "gym")  # formats that may carry token ids, log-probabilities and usage
SUMMED = ("trl", "verifiers", "gym")  # formats that carry a mean, a spread or an advantage beside the rewards


@dataclass(frozen=True)
class Kind:
    """A fault: what is wrong, where it was seen in public, which formats show it, and what must be said of it."""

    definition: str
    source: str
    formats: tuple[str, ...]
    words: str


KINDS = {
    "failure_counted_as_zero": Kind(
        "A reward function, judge or tool failed (the row records the error), and the row has the reward 0.",
        "https://github.com/huggingface/trl/pull/6427 · https://github.com/radixark/miles/issues/2800",
        ALL,
        r"fail|error|timed? ?out|unscored",
    ),
    "nan_in_group": Kind(
        "One reward of a group is NaN (null where JSON has no NaN), and the rows of its group are trained on.",
        "https://github.com/huggingface/trl/pull/5775",
        ALL,
        r"nan|not a number|null|missing reward|no reward|non-?finite|not finite",
    ),
    "unscored_in_mean": Kind(
        "A row that no reward function scored counts as 0 in the mean of its group, so that its advantage is not 0.",
        "https://github.com/huggingface/trl/pull/5902",
        ("trl", "verifiers"),
        r"unscored|not scored|no reward|abstain|failed|error|counted as 0|mean|baseline|advantage",
    ),
    "wrong_denominator": Kind(
        "A mean or a spread is divided by another number than that of the rows it is about.",
        "https://github.com/huggingface/trl/issues/6369 · https://github.com/radixark/miles/pull/2796",
        SUMMED,
        r"denominator|divid|mean|spread|deviation|scale|average|count",
    ),
    "advantages_not_centred": Kind(
        "The advantages of a group do not sum to 0: the baseline is the mean of the batch or of nothing.",
        "https://github.com/XU-YIJIE/grpo-flat/issues/2",
        ("trl", "verifiers"),
        r"cent(re|er)|sum|mean|baseline|advantage",
    ),
    "reward_differs": Kind(
        "The recorded reward of some rows is not what the reward function returns for their text.",
        "https://github.com/PRIME-RL/RL-Compositionality/issues/6",
        ALL,
        r"differ|mismatch|scored again|re-?scor|recomput|not what|disagree",
    ),
    "rewards_shifted": Kind(
        "The rewards of a step belong to the neighbouring rows: the column is shifted by one row.",
        "https://github.com/NVIDIA-NeMo/RL/pull/3794",
        ALL,
        r"shift|another row|other row|neighbou?r|misalign|off by one|differ|disagree",
    ),
    "sign_flipped": Kind(
        "A reward or an advantage has the opposite sign: the better row is the one that is punished.",
        "https://github.com/huggingface/trl/issues/2771",
        ALL,
        r"sign|opposite|negat|invert|revers|flip",
    ),
    "weights_changed": Kind(
        "The total is a weighted sum of its parts with other weights from some step or row on.",
        "https://github.com/huggingface/trl/issues/5352",
        ALL,
        r"weight|sum of (its|the) parts|parts|total|combin",
    ),
    "reward_never_ran": Kind(
        "One of the reward functions has the same value in every row: it never ran, or never matches anything.",
        "https://github.com/huggingface/open-r1/issues/235",
        ALL,
        r"constant|same (value|for)|never|all (are )?(0|the same|equal)|no signal|tied|always",
    ),
    "truncated_as_finished": Kind(
        "A sample that reached the limit of tokens is recorded as finished, and is trained on as such.",
        "https://github.com/agentscope-ai/Trinity-RFT/issues/608 · https://github.com/OpenRLHF/OpenRLHF/pull/1327",
        TOKENS,
        r"truncat|limit|cut|length|unfinished",
    ),
    "ids_not_the_text": Kind(
        "The ids of a sample decode to another text than the one that was rewarded.",
        "https://github.com/verl-project/verl/issues/3960",
        TOKENS,
        r"round.?trip|decode|ids|tokens? (differ|mismatch)|text",
    ),
    "retokenised_between_turns": Kind(
        "The next turn's prompt has the same text as what was sampled, in other ids.",
        "https://github.com/verl-project/verl/issues/6719",
        TOKENS,
        r"re-?tokeni[sz]|prefix|round.?trip|ids",
    ),
    "prefix_broken": Kind(
        "The next turn's prompt does not begin with the tokens of the turns before it.",
        "https://github.com/PrimeIntellect-ai/prime-rl/issues/1334",
        TOKENS,
        r"prefix|begin|extend|continu",
    ),
    "thoughts_dropped": Kind(
        "The thoughts of an earlier turn are absent from the prompt of the next one.",
        "https://github.com/verl-project/verl/issues/6854",
        TOKENS,
        r"thought|think|reason",
    ),
    "stale_version": Kind(
        "Rows of a step were sampled by weights that are many versions older than the others'.",
        "https://github.com/THUDM/slime/issues/1800 · https://github.com/PrimeIntellect-ai/prime-rl/pull/1902",
        TOKENS,
        r"stale|version|old(er)?|off.?policy|lag",
    ),
    "evaluation_problem": Kind(
        "A problem of the evaluation is trained on, word for word.",
        "https://github.com/Open-Source-O1/Open-O1/issues/10",
        ALL,
        r"evaluation|held.?out|leak|contaminat",
    ),
    "evaluation_problem_renamed": Kind(
        "A problem of the evaluation is trained on under other names, spelling or punctuation.",
        "https://arxiv.org/abs/2311.04850 · https://github.com/z-lab/dflash/issues/43",
        ALL,
        r"evaluation|held.?out|leak|contaminat|near.?duplicate",
    ),
    "format_without_answer": Kind(
        "An answer that is well formed and empty gets the reward of a right one.",
        "https://github.com/Liuziyu77/Visual-RFT/issues/176",
        ALL,
        r"format|empty answer|without (an )?answer|no answer|hack|empty",
    ),
    "empty_rewarded": Kind(
        "An empty completion gets the reward of a right one.",
        "https://github.com/alibaba/ROLL/issues/303",
        ALL,
        r"empty|blank|no text",
    ),
    "copied_from_prompt": Kind(
        "A completion that only repeats the prompt gets the reward of a right one.",
        "https://github.com/jsboige/CoursIA/pull/11312",
        ALL,
        r"cop(y|ied|ies)|prompt|question|echo|repeat",
    ),
    "repeated_text": Kind(
        "A completion that repeats one sentence over and over gets the highest rewards.",
        "https://github.com/Visual-Agent/DeepEyes/issues/24 · https://github.com/HarryHsing/EchoInk/issues/5",
        ALL,
        r"repe(at|tit)|loop|degenerat",
    ),
    "length_collapse": Kind(
        "The completions shrink to a few words within some steps while the reward does not fall.",
        "https://github.com/om-ai-lab/VLM-R1/issues/280 · https://github.com/alibaba/ROLL/issues/303",
        STEPPED,
        r"length|short|shr(i|a|u)nk|collaps|drift",
    ),
    "length_runaway": Kind(
        "The completions grow several times longer within some steps while the reward does not rise.",
        "https://github.com/huggingface/trl/pull/3138 · https://github.com/agentscope-ai/Trinity-RFT/issues/176",
        STEPPED,
        r"length|long|grow|grew|explo|drift|runaway",
    ),
    "group_of_two_prompts": Kind(
        "A group holds samples of two different problems, which share one baseline.",
        "https://github.com/PeterGriffinJin/Search-R1/issues/65",
        ALL,
        r"mix|two (prompts|problems|different|golds|answers)|different (prompts|problems|answers|golds)|group|several",
    ),
    "group_short": Kind(
        "A group has fewer samples than the others: some were lost.",
        "https://github.com/NVIDIA-NeMo/labs-molt/pull/48",
        ALL,
        r"group|fewer|size|short|incomplete|lost|missing|uneven",
    ),
    "duplicates_after_resume": Kind(
        "The samples of a step are there twice: after a resume they were written or trained on again.",
        "https://github.com/hiyouga/EasyR1/issues/57",
        ALL,
        r"duplicat|twice|again|repeat|identical|same samples",
    ),
    "skipped_after_resume": Kind(
        "Steps, or the problems of a stretch of the data, are missing in the middle of the run.",
        "https://github.com/NVIDIA-NeMo/RL/pull/2519",
        ALL,
        r"gap|skip|missing|absent|lost",
    ),
    "logprobs_positive": Kind(
        "Some log-probabilities are greater than 0, so that they are not those of a distribution.",
        "https://github.com/pytorch/rl/issues/4226",
        TOKENS,
        r"log.?prob|positive|greater than 0",
    ),
    "logprobs_of_two_temperatures": Kind(
        "The same token after the same context has different log-probabilities in rows of one version: "
        "some are of the temperature at which was sampled, some of 1.",
        "https://github.com/huggingface/trl/issues/4159 · https://github.com/allenai/open-instruct/pull/1678",
        TOKENS,
        r"temperature|log.?prob",
    ),
    "token_counts_differ": Kind(
        "The recorded number of tokens is not that of the ids.",
        "https://github.com/PrimeIntellect-ai/verifiers/pull/2295",
        TOKENS,
        r"count|usage|number of tokens|tokens",
    ),
    "special_tokens_in_text": Kind(
        "The rewarded text holds the template's special tokens, such as an end of turn, a padding or a second start.",
        "https://github.com/verl-project/verl/pull/715 · https://github.com/OpenRLHF/OpenRLHF/issues/775",
        ALL,
        r"special|template|<\||token",
    ),
    "order_broken": Kind(
        "The steps or times contradict the order of the rows: a step under another's file, an end before its start.",
        "https://github.com/NVIDIA-NeMo/RL/pull/1447",
        ALL,
        r"order|before|step|time|negative|start",
    ),
}
PAIRS = [(kind, form) for kind, what in KINDS.items() for form in what.formats]
EXAM = [(kind, form, 0) for kind, form in PAIRS] + [(kind, form, 1) for kind, form in PAIRS[: 200 - len(PAIRS)]]
