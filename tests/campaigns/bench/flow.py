"""Solve the baseline's matching as a flow of least cost, built arc by arc with OR-Tools.

    python tests/campaigns/bench/flow.py COSTS.npz

It prints the seconds, and the total cost of each stage. It must be a separate process, because
OR-Tools next to Horovod ends in a segmentation fault. `make setup` does not install OR-Tools, which
requires an older protobuf than ONNX. The solver itself needs only NumPy, so install it without its
dependencies:

    .venv/bin/pip install --no-deps ortools==9.15.6755

Shapes: G groups of matched channels, S and T channels of the student and the teacher.
"""

import json
import sys
import time

import numpy as np
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

SCALE = 10**6  # the solver's costs are integers


def solve(cost: np.ndarray) -> np.ndarray:
    """Return the matching (G, S) of least cost (S, T).

    G units leave each student channel. At most one reaches each teacher channel.
    """
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
    start = time.perf_counter()
    matchings = [solve(cost) for cost in costs]
    seconds = time.perf_counter() - start
    totals = [
        np.take_along_axis(cost, matching.T, axis=1).sum()
        for cost, matching in zip(costs, matchings, strict=True)
    ]
    print(json.dumps({"seconds": seconds, "totals": totals}))


if __name__ == "__main__":
    main()
