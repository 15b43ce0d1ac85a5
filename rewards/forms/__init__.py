"""Rewards in the forms of other tools: theirs work here unchanged, and ours work there.

`verl` and `verifiers` are words before a function's file (`verl:my_rewards.py:compute_score`). Each module has
`reward_of`, which makes a reward in TRL's form of what the file defines, inside the process that scores. `nemo_gym` and
`openenv` are servers, and built-in rewards with a `url`. What `as_verl`, `as_verifiers` and `as_verify` return is a
reward of ours that the other tool calls.

A failure there is a failure here, also where the tool itself makes it a 0: the reward managers `prime` and
`rate_limited` of verl (verl/workers/reward_manager/prime.py, verl/experimental/reward_loop/reward_manager/limited.py;
under `naive` it ends the run, verl-project/verl#4417), `Rubric` of verifiers 0.1 (verifiers/rubrics/rubric.py), and
`judge_failsafe` of NeMo-Gym (nemo_gym/judge.py).
"""
