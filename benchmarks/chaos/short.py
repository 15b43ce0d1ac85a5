"""`quartet` whose workers may take two minutes to start and not ten, so that one that was stopped is found soon."""

import sys

import rollout.workers
from grpo.__main__ import main

rollout.workers.START_TIMEOUT_S = 120.0

if __name__ == "__main__":
    sys.exit(main())
