"""`python -m grpo` is `quartet`."""

from grpo.cli import main

if __name__ == "__main__":
    main()
