"""The data files of measured constants and steps: read as they are, refused where they are anything else."""

import copy
import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from persistrnn.kernels.planner.hardware import DEVICES, corrected
from persistrnn.kernels.planner.measurements import MEASURABLE, MEASURED, Provenance, Step, measurements

STEP = {
    "cell": "lstm", "hidden": 1024, "batch": 16, "directions": 1, "dtype": "bf16", "backward": False,
    "path": "persistent", "microseconds": 1.25,
}  # fmt: skip
GOOD: dict[str, Any] = {
    "provenance": {
        "device": "NVIDIA H200", "driver": "570.1", "torch": "2.13", "triton": "3.9.0", "commit": "abc1234",
        "date": "2026-01-02", "command": "make gpu",
    },
    "constants": {"exchange": 0.66, "l2_rate": 58},
    "steps": [STEP, STEP | {"backward": True, "path": "torch"}],
}  # fmt: skip


def write(folder: Path, content: object, name: str = "h200") -> Path:
    (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def changed(*path: Any, to: object) -> dict[str, Any]:
    """GOOD with one value replaced or added."""
    result = copy.deepcopy(GOOD)
    place: Any = result
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return result


def without(*path: Any) -> dict[str, Any]:
    result = copy.deepcopy(GOOD)
    place: Any = result
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return result


def test_without_a_file_the_record_stays(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert measurements("h100", tmp_path) is None
    assert corrected(DEVICES["h100"], tmp_path) == DEVICES["h100"]


def test_measurements_are_what_the_file_says(tmp_path: Path) -> None:
    found = measurements("h200", write(tmp_path, GOOD))
    assert found is not None
    assert asdict(found.provenance) == GOOD["provenance"]
    assert found.constants == GOOD["constants"]
    assert found.steps == [
        Step("lstm", 1024, 16, 1, "bf16", False, "persistent", 1.25),
        Step("lstm", 1024, 16, 1, "bf16", True, "torch", 1.25),
    ]
    assert measurements("h200", tmp_path) is found, "read once"


KEYS = [field.name for field in fields(Provenance)]
MALFORMED = [
    # (content, the given value as the message must show it, what it must say is allowed)
    ("{", "not JSON", "JSON"),
    ([1], "[1]", "provenance, constants, steps"),
    (changed("other", to=1), "'other'", "provenance, constants, steps"),
    *((without(key), "list of keys", "provenance, constants, steps") for key in GOOD),
    *((without("provenance", key), "list of keys", ", ".join(KEYS)) for key in KEYS),
    (changed("provenance", "date", to=" "), "' '", "not empty"),
    (changed("provenance", "commit", to=12), "12", "a text"),
    (changed("constants", "shared", to=1024), "'shared'", ", ".join(MEASURABLE)),
    (changed("constants", to=[]), "[]", ", ".join(MEASURABLE)),
    *((changed("constants", "exchange", to=value), "exchange is", "above 0") for value in (0, 0.0)),
    *(
        (changed("constants", "exchange", to=value), f"'{value}'", "finite number")
        for value in (-0.5, math.nan, math.inf, "0.7", True, None)
    ),
    (changed("steps", to={}), "{}", "list"),
    (changed("steps", 0, to=7), "7", "cell, hidden"),
    (without("steps", 0, "path"), "list of keys", "cell, hidden"),
    (changed("steps", 0, "layers", to=1), "'layers'", "cell, hidden"),
    (changed("steps", 0, "cell", to=""), "''", "not empty"),
    (changed("steps", 0, "hidden", to=0), "'0'", "at least 1"),
    (changed("steps", 0, "hidden", to=1024.0), "1024.0", "integer"),
    (changed("steps", 0, "batch", to=True), "True", "integer"),
    *((changed("steps", 0, "directions", to=value), f"'{value}'", "1, 2") for value in (3, True, 1.0)),
    (changed("steps", 0, "dtype", to="fp8"), "'fp8'", "fp16, bf16, tf32, fp32"),
    (changed("steps", 0, "backward", to="both"), "'both'", "true or false"),
    (changed("steps", 0, "path", to=[]), "[]", "persistent, torch"),
    (changed("steps", 0, "microseconds", to=0.0), "0.0", "above 0"),
    (changed("steps", 1, to=STEP | {"microseconds": 9.5}), "9.5", "once"),
]


@pytest.mark.parametrize(("content", "given", "allowed"), MALFORMED)
def test_malformed_files_are_refused(tmp_path: Path, content: object, given: str, allowed: str) -> None:
    write(tmp_path, content)
    with pytest.raises(ValueError, match="allowed: ") as caught:
        corrected(DEVICES["h200"], tmp_path)
    found, _, remedy = str(caught.value).partition("allowed: ")
    assert str(tmp_path / "h200.json") in found
    assert given in found.removeprefix(str(tmp_path / "h200.json"))
    assert allowed in remedy


def test_the_files_of_the_repository_are_well_formed() -> None:
    for path in MEASURED.glob("*.json"):
        assert path.stem in DEVICES, path
        assert measurements(path.stem) is not None
