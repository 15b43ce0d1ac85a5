"""The kinds of findings: how bad each is, what it means, and what to change first.

docs/guides/findings.md is made of it. Causes stand before their symptoms, and reports list findings in this order.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

Severity = Literal["error", "warning", "note"]
ERROR: Severity = "error"  # what was measured or trained is not what was meant
WARNING: Severity = "warning"  # it is as meant, and the run learns less by it, or not at all
NOTE: Severity = "note"  # it may be meant


class Kind(NamedTuple):
    """`honest` and `faulty` are one example each: without this finding and with it."""

    severity: Severity
    meaning: str
    change: str
    honest: str
    faulty: str


# kind | severity | what it means | what to change first | honest | faulty
TABLE = r"""
## Runs
failed | error | an error ended the run | fix it, then --resume auto, or start again | the last step | `OSError`
refused | error | the run refuses this | change the option that is named | lora.rank: 8 | lora.rank: 0
memory | error | memory or disk are too small | take one of the named options | 12 of 16 GiB | 20 of 16 GiB
context-too-short | error | prompt and completion do not fit | raise max_model_len | 300 of 512 | 600 of 512
no-device | note | memory was not compared | give --device_gib 80 | a GPU | none
no-step | note | no small model could be trained | try one step of the run | 2 steps | none
not-saved | note | an error loses all steps | lower checkpoint.every | every 10 of 100 | every 200 of 100
not-evaluated | note | nothing is evaluated | eval.limit: 100, and eval.every below steps | 100 problems | none
tracker-missing | note | a tracker is not installed | install it, or leave it out of log.trackers | installed | missing
not-converted | note | the source has no counterpart here | read the line | all options | push_to_hub
## Rewards
reward-fails | error | the reward fails | make it return None where it cannot judge | 0.0 | `IndexError`
unmarked | error | completions have no score
    | see reward_error in events.jsonl, and try the reward: quartet reward test | 0 % | over 5 %
failure-as-number | error | a failure was scored as if it were an answer
    | return None on failure | timeout: None | timeout: 0
not-a-number | error | a reward or advantage is not a number | return a finite number or None | 0.5 | NaN
unscored-counts | error | a rollout without reward has an advantage | leave it out of the loss | None, 0 | None, 0.7
nondeterministic | error | the same text has another score | fix seeds; a judge at temperature 0 | 1, 1 | 1, 0.9
scored-otherwise | error | the record is not what the function returns
    | find which function scored the run | 1, now 1 | 1, now 0
always-same | error | the reward never ran, or never matches | try it: quartet reward test | 0 and 1 | 0 in 64 rollouts
always-zero | warning | a reward function only ever gave 0 | try it: quartet reward test | 0 and 1 | 0 in 64 rollouts
outlier | warning | a value far below the others stands for something else | return None for it | 0, 1 | 0, 1, -100
sum-of-parts | error | the reward is not the weighted sum of its parts
    | add up what is recorded | 0.5 + 1 = 1.5 | 0.5 + 1 = 1
weights-changed | error | weights change within the run | keep one set of weights | 1, 1 | 1, then 0.3
mean-differs | error | the recorded mean is of other rollouts
    | divide by the number of rollouts | 0.5 = 4/8 | 0.44 = 4/9
gold-refused | error | a reference solution misses the full score | fix the reward, or give --template | 1 | 0
wrong-accepted | error | a wrong answer gets the full score | compare with the reference answer | `8` for 7: 0 | 1
form-refused | note | another form of the answer scores less | read equal forms | `7.0`: 1 | `7.0`: 0
odd-accepted | note | a hedge, a denial or the question scores in full | read only the last answer | `7 or 8`: 0 | 1
abstains | note | the function returned None | fine if it cannot judge these | 0 of 154 | 154 of 154
bare-answers | note | solutions have no form around the answer | --template '<answer>{answer}</answer>' | `#### 7` | `7`
nothing-wrong | note | no wrong completion could be tried | use rows with different answers | 7, 8 | yes, yes
length-scored | note | the score follows length | give correctness the largest weight | r = 0.1 | r = 0.6
slow-reward | note | the reward takes most of its time limit
    | raise reward.timeout_s, or make it faster | 1 of 10 s | 7 of 10 s
ids-made-up | note | the function asks for completion_ids | try it in a run: rehearse | texts only | completion_ids
arguments-changed | error | the function changes its arguments | copy them first | same after the call | reversed
prints | error | the function prints | log with log_metric | silent | `no answer`
memory-leak | error | something is kept after each call | drop what the call made | 0 bytes | 6,753 bytes
noise-rewarded | warning | random text scores like an answer | let text that means nothing score less | 0 | 0.9
## Environments
tool-fails | error | a tool fails | fix it | a text | timeout
environment-fails | error | episodes cannot go on | raise only for calls that the policy may correct | a text | timeout
bad-calls-scored | error | refused calls change the reward | score only what tools did | 1, 1 | 1, 0
not-shown | note | nothing shows that the full score can be had | add _demonstration(**columns) | 16 of 16 | none
no-reward | note | get_reward returns no number | try what judges the answers: quartet reward test | 0.5 | None
## Architectures
paths | error | quartet refuses the architecture, or a slower path is taken
    | see the words | own cache, packed | refused
own-code | note | the folder brings code, which is not run | nothing, if the stock type is meant | none | auto_map
weight-files | error | the files are not of config.json | correct config.json | as described | refused
the-same-twice | error | a forward is not deterministic
    | fix its forward first: it drops or adds noise without training, or keeps what it read before | 0 | 0.1
causal | error | a token sees later tokens
    | no trainer can use this: set is_decoder or causal in config.json; route each token alone | 0 | 0.1
prefill-decode-whole-forward | error | the cache changes log-probs
    | sample without this cache (use_cache=False), and report it to transformers | 1e-6 | 0.1
prompt-in-pieces | error | a prompt in two pieces differs
    | read a prompt at once (no prefill_chunk_size, no assistant, no cache of an earlier turn) | 1e-6 | 0.1
rows-in-one-cache | error | reordered rows differ
    | decode a row at a time, without beams, and report it; quartet reads its own cache otherwise | 1e-6 | 0.1
batch-invariance | error | rows read each other | sample and learn one row at a time, and report it | 1e-6 | 0.1
left-right-padding | error | padding changes log-probs
    | read rows of one length together (per_device_train_batch_size=1), or pad the other side | 1e-6 | 0.1
decode-beside-padding | error | padding changes decoding
    | sample prompts of one length together; quartet pads only where it is right | 1e-6 | 0.1
packed-alone | error | packed rows see each other
    | do not pack rows (TRL: packing=False, padding_free=False); quartet packs only where it is right | 1e-6 | 0.1
short-time-steps | error | prompts are clamped, decoded tokens are not
    | set time_step_min in config.json to 1e-9 | 1e-6 | 0.1
windows | error | the window is not applied | keep contexts shorter than it, and report it | they slide | ignored
router | error | router scores tie or are rounded
    | compute the router in float32 (transformers: _keep_in_fp32_modules); break ties by random weights | no ties | 3 %
router-flips | note | bfloat16 chooses other experts
    | dtype: float32; elsewhere replay the sampler's experts | 0 % | 2 %
gradient-checkpointing | error | checkpointing changes gradients
    | leave it off (learner.gradient_checkpointing, gradient_checkpointing=False) | 1e-6 | 0.1
lm-head | error | LM head and configuration differ
    | set tie_word_embeddings in config.json to what the weights are | tied | apart
lora | note | LoRA does not reach all weights | name the other modules in lora.targets | 98 % | 60 %
chat-template | error | the template changes turns
    | over several turns keep the ids of what was sampled, as quartet does, and never render again
    | keeps turns | rewrites turns
stop-and-pad | error | a turn does not end with a stop token
    | name the token that ends a turn in eos_token_id of generation_config.json, and another pad_token
    | `<eos>` | no stop
## Prompts
begins-twice | warning | prompts begin with two BOS tokens | take it out of the template: the tokenizer adds it | 1 | 2
template-twice | warning | questions hold chat markers
    | give the bare question, or use a format string | `2 + 2?` | `<user>2 + 2?`
template-not-used | note | the chat template is not used | set data.template: chat | chat | `{question}`
said-twice | note | prompts repeat a sentence | say it once | once | twice
copies | warning | problems look the same | show the columns that tell them apart, or take copies out | 0 % | 20 %
form-not-asked | warning | no prompt asks for the form that scores | ask for it | `in <answer>` | nothing
generation-prompt | error | prompts lack what an answer begins with
    | write it where the chat template has add_generation_prompt | `...<assistant>` | `...`
answer-in-prompt | error | prompts hold their reference answers
    | take the answer out of the prompt | `2 + 3?` | `2 + 3? (5)`
gold-truncated | warning | reference solutions are too long | raise rollout.max_completion_tokens | 0 % | 20 %
thought-truncated | warning | thinking is cut before the answer | raise rollout.max_completion_tokens | 4096 | 256
## Advantages and groups
advantage-mismatch | error | advantages are not rewards less their mean
    | compute them per group | 1 0: +½ −½ | 1 0: +½ +½
advantage-sign | error | worse answers are raised | turn the sign | 1 0: +½ −½ | 1 0: −½ +½
advantage-mean | error | the baseline is not a known one | subtract the mean of the group | 1 0: +½ −½ | 1 0: +1 0
denominators-differ | error | groups have different divisors | use one divisor for all groups | all by std | a few by 1
masked-in-denominator | error | masked tokens count in the loss | divide by unmasked tokens | 6 of 9: 6 | 6 of 9: 9
denominator | error | the loss is divided by no token count | divide by the number of tokens | 6 tokens: 6 | 6 tokens: 7
mixed-group | error | rewards of different prompts are compared | group by prompt | q1 q1 | q1 q2
group-size | warning | groups lost rollouts | keep groups whole, or drop them | 8, 8 | 8, 7
answer-changed | error | a prompt has two reference answers | repair the data | q1: 7, 7 | q1: 7, 8
## Tokens and turns
stop-token | warning | the policy does not stop after its answer
    | name the token that ends an answer as eos_token_id in generation_config.json of model
    | `#### 4<eos>` | `#### 4 #### 4…`
misaligned | error | lengths of ids, log-probs or masks differ | record them together | 9, 9 | 9, 8
round-trip | error | the ids are not the text
    | hand ids, never text, from the sampler to the learner | ids of `4` | ids of `5`
bad-logprobs | error | log-probs are impossible | record those of the sampler | −0.2 | +0.2
two-temperatures | error | one token in one context has two log-probs
    | score at the sampling temperature | −0.2, −0.2 | −0.2, −0.9
broken-prefix | error | a turn does not begin with the turns before it
    | append ids, never render again | abc, abcd | abc, abd
thoughts-dropped | error | a template removed earlier thoughts
    | train each turn as it was shown | `<think>` kept | `<think>` gone
cut-as-finished | error | a truncated rollout is recorded as finished
    | record finish_reason: length | limit: length | limit: stop
prompt-in-completion | error | the prompt is judged with the answer | cut it off before scoring | `5` | `2 + 3? 5`
marks-in-completion | error | chat markers are in the judged text
    | stop at the end of the turn | `5` | `5<|im_end|>user`
## Steps and data
step-order | error | steps go back | keep one file per run | 1, 2, 3 | 1, 2, 1
missing-steps | error | steps are missing | find the lost files | 1, 2, 3 | 1, 3, 4
clock | error | times go back | look for two runs in one folder | 9:01, 9:02 | 9:02, 9:01
duplicate-rows | error | rows are recorded twice | truncate the file on resume | a, b | a, a
repeated-step | error | a step was trained twice | resume after the saved step | a, b | a, b, a
skipped-data | error | data rows were skipped | save the position in the data | 1, 2, 3 | 1, 2, 9
stale | warning | rollouts are of an old policy | sync weights more often | 1 step old | 9 steps old
version-ahead | error | the version is of a later policy | record the sampler's version | step 5: 4 | step 5: 6
leakage | error | evaluation problems were trained on | remove them from the training data | none | 2 of 100
## Learning
temperature | warning | completions of a group are the same text | raise rollout.temperature to 1 | 1.0 | 0.1
rate-high | warning | a step destroyed what the policy could do
    | lower learner.learning_rate | KL 1 nat | KL over 30 nats, or 5 and scores fall
kl-sign | error | the KL term pushes the policy off its reference
    | set loss.beta to 0 or above, and subtract the KL from the reward | +0.04 | −0.04
sign-flipped | error | incorrect answers score higher
    | turn the sign of the reward or of its weight | r = 0.9 | r < −0.6
reward-constant | error | correct and incorrect answers score the same | fix the reward | 1 and 0 | 1 for all
template | warning | the policy does not know the form of prompt or answer
    | show the form in data.template or data.few_shot, or teach it with sft.steps; a chat model needs template: chat
    | `#### 4` | over 70 % without an answer
other-part | warning | another reward is learned than the first
    | lower its weight in rewards | r = 0.8, 0.2 | r = 0.1, 0.9
noise | warning | equal texts score differently | fix seeds; a judge at temperature 0 | 1, 1 | 1, 0
length-rewarded | warning | longer or shorter completions score higher
    | give correctness the largest weight | r = 0.2 | r = 0.9
repetition-rewarded | warning | repetition scores higher | give correctness the largest weight | r = 0 | r = 0.6
copy-rewarded | warning | numbers of the question score as answers | compare with the reference answer | r = 0 | r = 0.6
form-rewarded | warning | the form of an answer is enough
    | compare with the reference answer | best score: 0 % wrong | over 10 %
identical-rewarded | warning | one text scores for different questions
    | compare with the reference answer | 7, 8 | `I am sure`
correct-refused | error | correct answers score like incorrect ones
    | score one of them by hand: quartet reward test | 0 % | over 20 %
answer-column | error | reference answers are of other problems
    | compare data.solution_column, the reward and the rows | agreed answers: 90 % correct | under 30 %
all-solved | warning | little is left to learn | take harder problems | 60 % solved | over 90 %
none-solved | warning | no completion is better than another
    | take easier problems, sft.steps, or a reward with parts; try the reference: quartet reward test
    | 10 % solved | 0 %
held-out-falls | warning | training reward rises, held-out accuracy falls
    | read the best completions | both rise | 2 errors lower
empty-rewarded | error | an empty completion scores higher | score it lowest | empty: 0 | empty: 1
probe-rewarded | error | text to the grader, many answers or a copy score high
    | read only the last answer | `7` | `give full marks`
empty-answer | error | an empty answer scores high | refuse it | `\boxed{7}` | `\boxed{}`
loop-rewarded | error | a repeated sentence scores high | read only the answer | one sentence | 6 times
answer-missing | error | high scores without the reference answer
    | compare with the reference answer | `7` for 7 | `8` for 7
template-rewarded | error | one long text scores for several prompts
    | compare with the reference answer | 3 texts | 1 text
too-many-epochs | warning | the data repeat too often | lower steps | 2 epochs | 40
warmup-too-long | warning | warm-up never ends | lower learner.warmup_steps | 10 of 200 | 200 of 200
rate-unusual | warning | the rate is outside of what learned | set learner.learning_rate: 1e-6 | 1e-6 | 0.1
step-differs | warning | the replayed step is not the recorded one
    | use the run's configuration, device and version | 1e-7 | 0.02
nothing-learned | note | a step changed nothing | look at group/zero_variance of other steps | one update | none
opposing-group | note | a group's gradient opposes the others | look at its rewards first | cosine 0.2 | −0.4
beta-high | warning | the KL term outweighs the reward | lower loss.beta to 0.04 or 0 | 0.04 | 4
small-groups | warning | few completions are compared | raise rollout.group_size to 8 | 8 | 2, and no gain
tied-groups | warning | zero-variance groups teach nothing
    | leave out problems that are always or never solved; raise rollout.group_size | 30 % | over 90 %
rate-low | warning | nothing moves | raise learner.learning_rate | the bound is over 20 % | 0.8 %
tiny-differences | warning | tiny differences are scaled up
    | round the reward, or set loss.scale_rewards to none | 0.1, 0.9 | 0.801, 0.802
weights | warning | completions are of another policy than the one that learns
    | lower rollout.staleness, learner.updates_per_batch, rollout.quantization, or see mismatch/* | ratio 1.01 | 1.5
entropy | warning | exploration ended | raise rollout.temperature or loss.entropy_coef | several texts | one text
clipped | warning | completions are truncated | raise rollout.max_completion_tokens, or reward brevity | 2 % | over 25 %
length-drift | warning | length doubles or halves, and reward does not rise | reward brevity | 100 to 110 | 100 to 250
evaluation | warning | too few held-out problems to show the gain | raise eval.limit, or take more seeds | 400 | 50
training-only | warning | held-out problems do not gain
    | train on more problems, data.limit; take fewer steps, steps; or set loss.beta above 0. Read the best completions
    | both +0.2 | +0.2, +0.0
rate-decay | warning | the decay of the rate may explain the gain
    | set sft.schedule: linear | linear, linear | constant, linear
"""


def sections() -> dict[str, dict[str, Kind]]:
    """The kinds by the headings of the table."""
    read: dict[str, dict[str, Kind]] = {}
    for line in TABLE.replace("\n    ", " ").strip().splitlines():
        if line.startswith("## "):
            kinds = read[line.removeprefix("## ")] = {}
            continue
        name, severity, *words = line.split(" | ")
        kinds[name] = Kind(cast(Severity, severity), *words)
    return read


KINDS = {name: kind for kinds in sections().values() for name, kind in kinds.items()}
ORDER = {name: place for place, name in enumerate(KINDS)}
