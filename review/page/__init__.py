"""The page of a run: what `quartet view` serves and `quartet report` writes into one file."""
