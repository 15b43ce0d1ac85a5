"""The policy: DeepSeek-V3 architecture (MoE + MLA) with a multi-token prediction head, without anything of RL."""
