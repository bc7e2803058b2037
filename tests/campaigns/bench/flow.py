"""The assignment as a flow of least cost, built arc by arc with OR-Tools: the baseline's way to solve a matching.

python tests/campaigns/bench/flow.py COSTS.npz: prints the seconds and the total cost of each stage. A process of its own, as
OR-Tools ends in a segmentation fault beside Horovod. It is not among what `make setup` installs: it asks for an older protobuf
than ONNX has here. The solver needs neither that nor pandas, absl-py and immutabledict, but numpy alone:

    .venv/bin/pip install --no-deps ortools==9.15.6755
"""

import json
import sys
import time

import numpy as np
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

SCALE = 10**6  # the solver's costs are whole numbers


def solve(cost: np.ndarray) -> np.ndarray:
    """Return the matching (G, S) of least cost (S, T): G units leave each student channel, one at most meets a teacher's."""
    S, T = cost.shape
    G, source, sink = T // S, S + T, S + T + 1
    flow = SimpleMinCostFlow()
    for a in range(S):
        flow.add_arc_with_capacity_and_unit_cost(source, a, G, 0)
        for b in range(T):
            flow.add_arc_with_capacity_and_unit_cost(a, S + b, 1, round(cost[a, b] * SCALE))
    for b in range(T):
        flow.add_arc_with_capacity_and_unit_cost(S + b, sink, 1, 0)
    flow.set_node_supply(source, G * S)
    flow.set_node_supply(sink, -G * S)
    if flow.solve() != flow.OPTIMAL:
        raise RuntimeError("the flow has no best solution")
    columns = [[] for _ in range(S)]
    for arc in range(flow.num_arcs()):
        if flow.tail(arc) < S and flow.flow(arc):
            columns[flow.tail(arc)].append(flow.head(arc) - S)
    return np.array(columns).T


def main() -> None:
    costs = list(np.load(sys.argv[1]).values())
    begun = time.perf_counter()
    matchings = [solve(cost) for cost in costs]
    seconds = time.perf_counter() - begun
    totals = [
        np.take_along_axis(cost, matching.T, axis=1).sum()
        for cost, matching in zip(costs, matchings, strict=True)
    ]
    print(json.dumps({"seconds": seconds, "totals": totals}))


if __name__ == "__main__":
    main()
