"""The predictions in the notebook are those of the plan as it is."""

import doctest
from pathlib import Path

NOTES = Path(__file__).parent.parent / "bench" / "NOTES.md"


def test_predictions_are_those_of_the_plan():
    found = doctest.testfile(str(NOTES), module_relative=False)
    assert found.attempted > 10
    assert found.failed == 0, "the plan or its model has changed: correct the numbers in the notebook, and its table"
