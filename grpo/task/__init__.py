"""What a run is about: problems, prompts, rewards, sampling."""
