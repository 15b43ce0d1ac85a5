"""`quartet` whose workers may take two minutes to start or for a shard, so that one that was stopped is found soon.

Costs of drafts are measured and then replaced by a table, since weights depend on them: a draft head rests while drafts
gain nothing.
"""

import sys

import grpo.steps.pool
import rollout.workers.actors
from grpo.__main__ import main
from rollout.cost_table import CostTable, Workload
from rollout.workers.ray_pool import RayPool

rollout.workers.actors.START_TIMEOUT_S = 120.0
grpo.steps.pool.TIMEOUT_S, grpo.steps.pool.SYNC_TIMEOUT_S = 120.0, 20.0
measure = RayPool.use_costs


def use_costs(pool: RayPool, costs: CostTable | None, work: Workload) -> CostTable:
    found = measure(pool, costs, work)
    table = [
        [(1 + 0.02 * rows) * (1 + 0.15 * k) for k in range(len(depths))]
        for rows, depths in zip(found.rows, found.rounds, strict=True)
    ]
    pool.costs = CostTable(found.rows, table)
    return pool.costs


RayPool.use_costs = use_costs  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
