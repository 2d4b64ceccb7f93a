"""`--sample N`: of each test one case in N, and one at least."""

import zlib
from collections.abc import Sequence


def sampled(names: Sequence[str], one_in: int) -> set[int]:
    """The places in ``names``, tests as "file::test[case]". Where it begins differs from test to test, so that not all
    run with the first cell alone."""
    cases: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        cases.setdefault(name.partition("[")[0], []).append(place)
    found: set[int] = set()
    for name, places in cases.items():
        found |= set(places[zlib.crc32(name.encode()) % min(one_in, len(places)) :: one_in])
    return found
