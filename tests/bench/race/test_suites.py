"""The cases of the race: every row of the tables once, and what each takes counted by hand."""

import csv
from collections import Counter
from dataclasses import astuple, replace

import pytest
import torch

from bench.race import suites
from bench.race.arithmetic import bytes_moved, input_bytes, operations, parameter_bytes
from bench.report.results import DTYPES, Case


def case(cell: str = "lstm", input: int = 3, hidden: int = 3, layers: int = 1, bidirectional: bool = False,
         batch: int = 2, steps: int = 7, dtype: str = "fp16", mode: str = "forward") -> Case:  # fmt: skip
    return Case("suite", "name", cell, input, hidden, layers, bidirectional, batch, steps, dtype, mode)


def rows(table: str) -> list[dict[str, str]]:
    with (suites.WORKLOADS / f"{table}.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["cell"] in ("lstm", "gru")]


# Arithmetic


def test_operations_are_deepbenchs() -> None:
    """2 * G * H * H * B * T, its own count, where the input's product is left out."""
    lstm = case(input=0, hidden=1760, batch=16, steps=50)
    assert operations(lstm) == 19_824_640_000
    assert operations(replace(lstm, cell="gru")) == 14_868_480_000
    assert operations(replace(lstm, input=1760)) == 2 * 19_824_640_000
    assert operations(replace(lstm, mode="training")) == 3 * 19_824_640_000


def test_operations_of_layers_and_directions() -> None:
    """By hand: 2 * 3 * 3 * (3 + 5) * 14 in each direction, then 2 * 3 * 3 * (3 + 6) * 14."""
    stack = case("gru", input=5, layers=2, bidirectional=True)
    assert operations(stack) == 2 * 2016 + 2 * 2268
    assert operations(replace(stack, layers=1)) == 2 * 2016
    assert operations(replace(stack, bidirectional=False)) == 2016 + 2 * 9 * (3 + 3) * 14


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_parameters_are_torchs(cell: str, bidirectional: bool, layers: int) -> None:
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](5, 3, layers, bidirectional=bidirectional)
    count = sum(p.numel() for p in module.parameters())
    for dtype, size in (("fp16", 2), ("bf16", 2), ("tf32", 4), ("fp32", 4)):
        assert parameter_bytes(case(cell, 5, 3, layers, bidirectional, dtype=dtype)) == count * size


def test_without_the_inputs_product() -> None:
    """No W_ih and no b_ih; the input is as wide as the gates."""
    bare = case("gru", input=0)
    assert parameter_bytes(bare) == (9 * 3 + 9) * 2
    assert input_bytes(bare) == 7 * 2 * 9 * 2
    assert input_bytes(replace(bare, input=5)) == 7 * 2 * 5 * 2
    assert input_bytes(replace(bare, dtype="tf32")) == 7 * 2 * 9 * 4


def test_bytes_moved() -> None:
    """LSTM, I=H=3: 12 rows of 3 + 3 + 2 numbers; x and y of 7 * 2 * 3 each."""
    forward = case()
    assert bytes_moved(forward) == 2 * (96 + 42 + 42)
    assert bytes_moved(replace(forward, mode="training")) == 3 * 2 * (96 + 42 + 42)
    assert bytes_moved(replace(forward, layers=2)) == 2 * (96 + 96 + 42 + 42 + 42)
    assert bytes_moved(replace(forward, bidirectional=True)) == 2 * (2 * 96 + 42 + 84)


# Suites


@pytest.mark.parametrize("skip_input", [False, True])
def test_every_row_of_deepbench(skip_input: bool) -> None:
    suite = "deepbench_skip_input" if skip_input else "deepbench"
    expected = set()
    for row in rows("deepbench"):
        hidden, batch, steps = (int(row[name]) for name in ("hidden", "batch", "steps"))
        shape = (row["cell"], 0 if skip_input else hidden, hidden, 1, False, batch, steps, "bf16")
        expected.add((*shape, "forward"))
        if row["set"] == "training":
            expected.add((*shape, "training"))
    found = suites.cases([suite], ["bf16"])
    assert {astuple(c)[2:-1] for c in found} == expected
    assert len(found) == len(expected)
    assert {c.suite for c in found} == {suite}
    assert len(expected) > 100


def test_every_row_of_flashrnn() -> None:
    expected = {
        (row["cell"], int(row["hidden"]), int(row["hidden"]), 1, False, int(row["batch"]), int(row["steps"]), "bf16", m)
        for row in rows("flashrnn")
        for m in ("forward", "training")
    }
    assert {astuple(c)[2:-1] for c in suites.cases(["flashrnn"], ["bf16"])} == expected
    assert len(expected) > 10


def test_every_model() -> None:
    found = list(suites.models("fp16"))
    assert [c.name for c in found] == [row["model"] for row in rows("models")]
    by_name = {c.name: astuple(c)[2:-1] for c in found}
    training = ("fp16", "training")
    assert by_name["SpeechBrain seq2seq encoder"] == ("lstm", 1024, 1024, 4, True, 8, 400, *training)
    assert by_name["RNN-T encoder part 1"] == ("lstm", 240, 1024, 2, False, 16, 557, *training)
    assert by_name["DeepFilterNet2"] == ("gru", 256, 256, 3, False, 32, 300, *training)


@pytest.mark.parametrize("name", suites.SUITES)
def test_a_suite_has_both_cells_or_what_its_table_has(name: str) -> None:
    found = list(suites.SUITES[name]("tf32"))
    assert {c.suite for c in found} == {name}
    assert {c.dtype for c in found} == {"tf32"}
    assert {c.cell for c in found} == ({"lstm"} if name == "flashrnn" else {"lstm", "gru"})
    assert all(min(c.hidden, c.layers, c.batch, c.steps) >= 1 for c in found)


def test_equal_work_is_there_once() -> None:
    everything = suites.cases()
    assert max(Counter(c.key for c in everything).values()) == 1
    assert {c.suite for c in everything} == set(suites.SUITES)
    each = {c.key for name in suites.SUITES for dtype in DTYPES for c in suites.SUITES[name](dtype)}
    assert {c.key for c in everything} == each
    directions = suites.cases(["directions"], ["fp16"])
    shared = [c for c in suites.cases(["stacked", "directions"], ["fp16"]) if c.layers == 1 and not c.bidirectional]
    assert {c.suite for c in shared if c.hidden == 256} == {"stacked"}, "the first suite has it"
    assert {c.key for c in directions} <= {c.key for c in suites.cases(["stacked", "directions"], ["fp16"])}


def test_the_first_dtype_comes_first() -> None:
    found = suites.cases(["short", "stacked"], ["bf16", "fp32"])
    order = list(dict.fromkeys((c.dtype, c.suite) for c in found))
    assert order == [("bf16", "short"), ("bf16", "stacked"), ("fp32", "short"), ("fp32", "stacked")]


def test_miniatures_reach_every_kind() -> None:
    everything = suites.cases()
    small = suites.miniatures(everything)
    assert max(max(c.input, c.hidden, c.batch * c.steps) for c in small) <= 12
    assert len({c.key for c in small}) == len(small) < 100

    def kinds(cases: list[Case]) -> set[tuple[object, ...]]:
        return {(c.cell, c.input > 0, c.layers > 1, c.bidirectional, c.dtype, c.mode) for c in cases}

    assert kinds(small) == kinds(everything)
