"""What the forward saves: an exact minimum of tiles saved and of work done again.

Picard 1976: a choice in which some things force others, at the least cost, is a minimum cut.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

from .graph import Graph

FORBIDDEN = 1e6  # a price that is never paid, yet can be filled by a flow


def cut(
    graph: Graph, required: Sequence[int], price: Callable[[int], float], again: Callable[[int], float]
) -> list[int]:
    """Which nodes to keep, so that all of ``required`` can be had: a node is either kept, at ``price``, or computed
    again, at ``again`` (inf: cannot be), from nodes that can be had. Returns those kept, free ones too."""
    source, sink = -1, -2
    edges: dict[int, dict[int, float]] = {source: {}}
    nodes = graph.needs(required)
    for v in nodes:
        had, redone = 2 * v, 2 * v + 1
        cost = min(price(v), FORBIDDEN)
        edges.setdefault(had, {})[sink] = cost
        gain = cost - again(v)
        if gain > 0 and not graph.name(v):
            edges[source][redone] = gain
            edges[redone] = {2 * u: math.inf for u in graph.arguments(v)} | {had: math.inf}
    for v in required:
        edges[source][2 * v] = math.inf
    side = _source_side(edges, source, sink)
    return [v for v in nodes if 2 * v in side and 2 * v + 1 not in side and graph.value(v) is None]


def _source_side(edges: dict[int, dict[int, float]], source: int, sink: int) -> set[int]:
    """Of the minimum cut that is nearest to the source (Edmonds and Karp 1972)."""
    residual: dict[int, dict[int, float]] = {}
    for u, ends in edges.items():
        for v, capacity in ends.items():
            residual.setdefault(u, {})[v] = residual.get(u, {}).get(v, 0.0) + capacity
            residual.setdefault(v, {}).setdefault(u, 0.0)
    while True:
        before, queue = {source: source}, deque([source])
        while queue:
            u = queue.popleft()
            for v, capacity in residual.get(u, {}).items():
                if capacity > 1e-9 and v not in before:
                    before[v] = u
                    queue.append(v)
        if sink not in before:
            return set(before)
        path, v = [], sink
        while v != source:
            path.append((before[v], v))
            v = before[v]
        size = min(residual[u][v] for u, v in path)
        for u, v in path:
            residual[u][v] -= size
            residual[v][u] += size
