"""`python -m grpo` is `quartet`."""

import sys

from grpo.run.stop import signals


def main() -> int:
    signals.listen()  # to the end of the process, and before anything else is loaded
    from grpo.cli.parse import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
