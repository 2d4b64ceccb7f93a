"""`--sample N`, with which the oldest Triton runs the tests."""

import pytest
from sample import sampled


@pytest.mark.parametrize("one_in", [2, 3, 7])
def test_of_each_test_one_case_in_n(one_in):
    names = [f"f.py::test_{k}[{case}]" for k in range(20) for case in range(k)] + ["f.py::test_alone"]
    kept = [names[place].partition("[")[0] for place in sorted(sampled(names, one_in))]
    for k in range(1, 20):
        assert k // one_in <= kept.count(f"f.py::test_{k}") <= -(-k // one_in)
        assert f"f.py::test_{k}" in kept
    assert "f.py::test_alone" in kept
    assert len({min(sampled([f"{k}[{case}]" for case in range(9)], 3)) for k in range(9)}) == 3, "not always the first"
