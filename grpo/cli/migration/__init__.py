"""Reads what was written for other trainers, a script with TRL's trainer or a command of verl's, as options of ours."""
