"""From the rows of a dataset to examples, checked; and problems that are made on the spot."""
