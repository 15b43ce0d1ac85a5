"""External agents: programs that ask the policy by OpenAI's API, as the rollouts of a run."""
