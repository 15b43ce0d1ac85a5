"""`python -m grpo` is `quartet`."""

import sys

from grpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
