"""``persistrnn plan``: text and JSON whose numbers add up, and an answer to every wrong argument. No GPU."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.inspect import picture, plan_command
from persistrnn.kernels.inspect.plan_command import as_text, main, sourced
from persistrnn.kernels.planner.forecast import Error
from persistrnn.kernels.planner.hardware import DEVICES, Hardware, corrected, live, named
from persistrnn.kernels.planner.measurements import Step
from persistrnn.kernels.planner.plan import DTYPES, Plan, plan_layer
from persistrnn.kernels.planner.problem import Problem
from persistrnn.kernels.planner.tiling import Tiling

WORKLOADS = Path(__file__).resolve().parents[2] / "bench" / "workloads"
PASSES = ("forward", "backward")
SMALL = ("--cell", "gru", "--hidden", "64", "--device", "h200")


def rows(name: str) -> list[tuple[str, int, int, int]]:
    """(cell, hidden, batch, directions) of every LSTM and GRU of a table, each once."""
    with open(WORKLOADS / f"{name}.csv", newline="") as file:
        found = [
            (row["cell"], int(row["hidden"]), int(row["batch"]), 1 + int(row.get("bidirectional", "0")))
            for row in csv.DictReader(file)
            if row["cell"] in CELLS
        ]
    return list(dict.fromkeys(found))


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)."""
    try:
        status = main(arguments)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def number(text: str) -> int:
    return int(text.replace(",", ""))


def check_text(text: str, found: Plan) -> None:
    """The numbers of both passes are in the text, and add up there."""
    for name, section in zip(PASSES, re.split(r"^(?:forward|backward)$", text, flags=re.M)[1:], strict=True):
        part = getattr(found, name)
        homes = re.search(
            r"W_hh of one direction: ([\d,]+) bytes in registers \+ ([\d,]+) in shared memory \+ ([\d,]+) streamed "
            r"each step\s+= ([\d,]+), all (\d) x (\d+) x (\d+) x (\d) bytes of it; ([\d.]+)% resident",
            section,
        )
        assert homes, section
        registers, shared, streamed, total, *factors = map(number, homes.groups()[:-1])
        assert (registers, shared, streamed) == dataclasses.astuple(part.shares)
        assert registers + shared + streamed == total
        assert factors == [CELLS[found.cell].gates, found.hidden, found.hidden, DTYPES[found.dtype]]
        assert factors[0] * factors[1] * factors[2] * factors[3] == total
        assert float(homes[9]) == pytest.approx(100 * (registers + shared) / total, abs=0.1)

        bars = re.findall(r"(shared memory|registers) +\[([^]]{64})\] ([\d,]+) bytes\n(.*)", section)
        assert [bar[0] for bar in bars] == ["shared memory", "registers"]
        for _, _, whole, key in bars:
            assert sum(number(n) for n in re.findall(r"[\d,]+(?=   |$)", key)) == number(whole)

        step = re.search(
            r"compute ([\d.]+) \+ weights ([\d.]+) \+ state ([\d.]+) \+ synchronisation ([\d.]+) \+ pointwise ([\d.]+) "
            r"= ([\d.]+), x ([\d,]+) rounds? = ([\d.]+)",
            section,
        )
        assert step, section
        *parts, once, rounds, predicted = (float(n.replace(",", "")) for n in step.groups())
        assert sum(parts) == pytest.approx(once, abs=0.03)
        assert parts == pytest.approx(list(dataclasses.astuple(part.cost)), abs=0.006)
        assert rounds == part.rounds
        assert predicted == pytest.approx(part.cost.total * part.rounds, abs=0.006)
        assert f"floor of any plan {found.floor:.2f} us" in section
    assert "All times are predicted by the cost model, none is measured; so are the bytes." in text
    units = found.directions * found.hidden * DTYPES[found.dtype]
    gates, state = (6, 2) if found.cell == "lstm" else (5, 1)  # y, the LSTM's c, and with "gates" 4 more
    assert f"  gates: {gates * units:,} bytes per step and row, and " in text
    assert f"  state: {state * units:,} bytes per step and row, and " in text


@pytest.mark.parametrize("table", ["deepbench", "flashrnn", "models"])
def test_text_of_every_workload_adds_up(table: str) -> None:
    shapes = rows(table)
    assert len(shapes) >= {"deepbench": 60, "flashrnn": 8, "models": 15}[table]
    for cell, hidden, batch, directions in shapes:
        found = plan_layer(Problem(CELLS[cell], hidden, batch, directions, "bf16", named("h200")))
        check_text(as_text(found, CELLS[cell], 1024, "for a test"), found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_text_for_every_device_and_dtype(capsys: pytest.CaptureFixture[str], device: str, dtype: str) -> None:
    arguments = ("--cell", "lstm", "--hidden", "320", "--batch", "33", "--directions", "2")
    status, out, err = call(capsys, *arguments, "--device", device, "--dtype", dtype)
    assert (status, err) == (0, "")
    found = plan_layer(Problem(CELLS["lstm"], 320, 33, 2, dtype, named(device)))
    assert out.startswith(f"lstm H=320 B=33 D=2 {dtype} on {device} ")
    check_text(out, found)
    assumed = sourced(found.hardware, "assumed")
    assert f"Assumed in the record of {device}: {', '.join(assumed)}.\n" in out


# JSON


def test_the_models_error_is_printed_where_there_are_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = CELLS["lstm"]
    found = plan_layer(Problem(cell, 1024, 16, 1, "bf16", DEVICES["h200"]))
    assert "measured over predicted" not in as_text(found, cell, 1024, "a test")
    steps = [Step("lstm", 1024, 16, 1, "bf16", False, "persistent", us) for us in (2.0, 4.0, 9.0)]
    errors = tuple(Error(step, predicted=2.0) for step in steps)
    monkeypatch.setattr(plan_command.forecast, "errors", lambda cell, hardware: errors)
    text = as_text(found, cell, 1024, "a test")
    assert (
        "Against 3 measured steps of the lstm on h200, measured over predicted is 1.00 to 4.50, in the middle 2.00."
        in text
    )


def test_measured_numbers_are_named(tmp_path: Path) -> None:
    provenance = dict.fromkeys(("device", "driver", "torch", "triton", "commit", "date", "command"), "x")
    (tmp_path / "h200.json").write_text(
        json.dumps({"provenance": provenance, "constants": {"exchange": 0.5}, "steps": []})
    )
    found = plan_layer(Problem(CELLS["gru"], 64, 1, 1, "bf16", corrected(DEVICES["h200"], tmp_path)))
    text = as_text(found, CELLS["gru"], 1024, "for a test")
    assert "Measured, in the record of h200: exchange.\n" in text + "\n"
    assert "Assumed in the record of h200: barrier, launch." in text


def as_read(value: object) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(("cell", "hidden", "batch", "directions"), rows("models"))
def test_json_has_the_whole_plan(
    capsys: pytest.CaptureFixture[str], cell: str, hidden: int, batch: int, directions: int
) -> None:
    status, out, err = call(
        capsys, "--cell", cell, "--hidden", str(hidden), "--batch", str(batch), "--directions", str(directions),
        "--device", "h200", "--dtype", "tf32", "--json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    given = json.loads(out)
    found = plan_layer(Problem(CELLS[cell], hidden, batch, directions, "tf32", named("h200")))

    def contains(whole: Any, part: Any) -> bool:
        if isinstance(part, dict):
            return all(key in whole and contains(whole[key], value) for key, value in part.items())
        return bool(whole == part)

    whole = dataclasses.asdict(found)
    assert whole.pop("heads") == 1
    for name in PASSES:
        for of_some in Tiling.OF_SOME_CELLS:  # which this cell has not
            del whole[name]["tiling"][of_some]
    assert contains(given, as_read(whole))
    assert given["floor_us"] == found.floor
    assert given["times"] == "predicted"
    assert "exchange" in given["assumed"] + given["measured"]
    assert given["device_from"] == "named by --device"
    for name in PASSES:
        part = given[name]
        shares = part["shares"]
        assert shares["registers"] + shares["shared"] + shares["streamed"] == shares["sum"]
        assert shares["sum"] == {"lstm": 4, "gru": 3}[cell] * hidden**2 * 4
        assert given["predicted_us"][name] == pytest.approx(part["cost"]["total"] * part["rounds"])
        assert given["torch_us"][name] > 0
        for memory in ("shared_memory", "registers"):
            held = dict(part["multiprocessor"][memory])
            assert held.pop("whole") == sum(held.values())


# The device


def test_without_a_gpu_it_plans_for_an_h200_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, _ = call(capsys, "--cell", "gru", "--hidden", "64")
    assert status == 0
    assert "on h200 (sm_90, 132 multiprocessors; no GPU here: planned for h200; --device names another)" in out


def test_with_a_gpu_it_plans_for_what_that_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hardware(device: torch.device) -> Hardware:
        assert device == torch.device("cuda", 3)
        return live("NVIDIA H200 MIG 1g.18gb", "sm_90", 16, 232_448, 65_536, 8 << 20)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(launch, "hardware", hardware)
    status, out, _ = call(capsys, "--cell", "gru", "--hidden", "512")
    assert status == 0
    assert "on NVIDIA H200 MIG 1g.18gb (sm_90, 16 multiprocessors; the GPU at hand)" in out
    check_text(out, plan_layer(Problem(CELLS["gru"], 512, 16, 1, "bf16", hardware(torch.device("cuda", 3)))))


# Errors

WRONG = [
    (("--device", "gtx1080"), "'gtx1080'", "mi300x"),
    (("--hidden", "0"), "'0'", "from 1 to"),
    (("--hidden", "-3"), "'-3'", "from 1 to"),
    (("--hidden", "12.5"), "'12.5'", "an integer"),
    (("--hidden", "\u00b2"), "'\u00b2'", "an integer"),
    (("--batch", "1" + "0" * 400), "'1000", "from 1 to"),
    (("--directions", "3"), "3", "1, 2"),
    (("--dtype", "float64"), "'float64'", "fp16"),
    (("--dtype", "int8"), "'int8'", "tf32"),
    (("--cell", "rnn"), "'rnn'", "gru"),
    (("--draw", "chip.png"), "'chip.png'", "ends in .svg"),
    (("--draw", "no/such/folder/chip.svg"), "'no/such/folder/chip.svg'", "folder that exists"),
    (("--draw", "a" * 300 + ".svg"), "aaa.svg'", "a file that you may write"),
]


@pytest.mark.parametrize(("arguments", "given", "allowed"), WRONG)
def test_wrong_arguments_are_refused_at_the_door(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...],
    given: str, allowed: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, *SMALL, *arguments)
    assert (status, out) == (2, "")
    message = err.splitlines()[-1]
    assert message.startswith(f"persistrnn plan: error: argument {arguments[0]}: ")
    assert given in message
    assert allowed in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["half", "torch.float16", "BFLOAT16", "float32", "tf32"])
def test_torchs_names_of_dtypes_are_understood(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, _ = call(capsys, *SMALL, "--dtype", name)
    assert status == 0
    expected = {"half": "fp16", "torch.float16": "fp16", "BFLOAT16": "bf16", "float32": "fp32", "tf32": "tf32"}
    assert f" {expected[name]} on h200" in out


def test_layer_without_a_plan_is_an_error_and_draws_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    drawing = tmp_path / "chip.svg"
    status, out, err = call(capsys, *SMALL, "--hidden", "100000", "--draw", str(drawing))
    assert (status, out) == (1, "")
    assert err.startswith("persistrnn plan: hidden_size=100000: ")
    assert err.count("\n") == 1
    assert not drawing.exists()


# As a user runs it


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "persistrnn", "plan", *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=120, cwd=WORKLOADS
    )


def test_command_draws_the_same_in_every_process(tmp_path: Path) -> None:
    path = tmp_path / "chip.svg"
    done = run(*SMALL, "--draw", str(path), "--json", PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cell"] == "gru"
    expected = picture.svg(plan_layer(Problem(CELLS["gru"], 64, 16, 1, "bf16", named("h200"))))
    assert path.read_text(encoding="utf-8") == expected


def test_reader_may_leave_early() -> None:
    command = f"{sys.executable} -m persistrnn plan {' '.join(SMALL)} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, cwd=WORKLOADS)
    assert done.stderr == ""


def test_a_plan_that_is_expected_to_spill_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for hidden in ("2460", "26750"):
        status, out, err = call(capsys, "--cell", "gru", "--hidden", hidden, "--device", "h200")
        assert (status, err) == (0, "")
        assert re.search(r"spills: about \d+ registers per thread are needed, and there are \d+", out)
    assert "spills" not in call(capsys, *SMALL)[1]


@pytest.mark.parametrize(("hidden", "path"), [("1024", "the kernels"), ("2048", "torch's own path")])
def test_what_auto_takes(capsys: pytest.CaptureFixture[str], hidden: str, path: str) -> None:
    arguments = ("--cell", "lstm", "--hidden", hidden, "--batch", "64", "--device", "h200", "--steps", "64")
    _, out, _ = call(capsys, *arguments)
    told = json.loads(call(capsys, *arguments, "--json")[1])
    for name, one in told["auto"].items():
        assert one["path"] == path
        assert (one["persistent"] < one["torch"]) == (path == "the kernels")
        assert (
            f'backend="auto" takes {path} in {name}: {one["persistent"]:.2f} us per step on the kernels, '
            f"{one['torch']:.2f} on torch's own path (predicted)"
        ) in out
    needs = {mode: told["memory_bytes"][mode]["needed"] for mode in ("gates", "state", "checkpoint")}
    assert needs["gates"] < needs["state"], "of 64 steps, one chunk"
    assert f"at T = {told['memory_bytes']['steps']}, by what is kept" in out


# The clock


FIELDS = "device,dtype,cell,hidden,batch,pass,clock_us,model_us,line_1,share_1,line_2,share_2,line_3,share_3"
CLOCKED = "scan.py:1 a,0.5,cells.py:2 b,0.3,tuples.py:3 c,0.1"


@pytest.mark.parametrize(("times", "apart"), [(1.5, "+50%"), (1.1, "+10%"), (0.7, "-30%")])
def test_the_clock_beside_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: float, apart: str) -> None:
    found = plan_layer(Problem(CELLS["lstm"], 256, 16, 1, "bf16", named("h200")))
    model = found.forward.predicted
    row = f"h200,bf16,lstm,256,16,forward,{times * model:.4f},{model:.2f},{CLOCKED}"
    monkeypatch.setattr(plan_command, "CLOCK", tmp_path / "clock.csv")
    plan_command.CLOCK.write_text(f"{FIELDS}\n{row}\n")
    text = as_text(found, CELLS["lstm"], 8, "")
    (line,) = [line for line in text.splitlines() if "clock" in line]
    assert f"predicted by the clock of emulated code {times * model:.2f} us, {apart}; " in line
    assert "most in scan.py:1 a 50%, cells.py:2 b 30%, tuples.py:3 c 10%" in line
    assert ("NOTES.md" in line) == (apart != "+10%")
    assert text.index(line) < text.index("\nbackward\n")
    clock = plan_command.as_json(found, CELLS["lstm"], 8, "")["clock"]
    assert clock["forward"]["us"] == pytest.approx(times * model, abs=1e-4)
    assert clock["backward"] is None


@pytest.mark.parametrize(
    "other",
    [
        {"cell": "gru"}, {"hidden": 512}, {"batch": 17}, {"directions": 2}, {"dtype": "fp16"},
        {"hardware": named("h100")}, {"hardware": dataclasses.replace(named("h200"), exchange=2.0)},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_the_clock_says_nothing_of_another_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: dict[str, Any]
) -> None:
    """The last one is the same layer on the same device, planned with another constant."""
    asked = {"cell": "lstm", "hidden": 256, "batch": 16, "directions": 1, "dtype": "bf16", "hardware": named("h200")}
    row = "h200,bf16,lstm,256,16,forward,2.0,{:.2f}," + CLOCKED
    monkeypatch.setattr(plan_command, "CLOCK", tmp_path / "clock.csv")

    def text(asked: dict[str, Any]) -> str:
        cell = CELLS[asked["cell"]]
        return as_text(plan_layer(Problem(cell, *list(asked.values())[1:])), cell, 8, "")

    own = plan_layer(Problem(CELLS["lstm"], *list(asked.values())[1:]))
    plan_command.CLOCK.write_text(f"{FIELDS}\n{row.format(own.forward.predicted)}\n")
    assert "clock" in text(asked)
    assert "clock" not in text(asked | other)
    plan_command.CLOCK.unlink()  # as in an installation
    assert "clock" not in text(asked)


def test_the_clock_of_this_checkout_is_of_these_plans() -> None:
    for row in csv.DictReader(plan_command.CLOCK.read_text().splitlines()):
        sizes = int(row["hidden"]), int(row["batch"]), 1
        found = plan_layer(Problem(CELLS[row["cell"]], *sizes, row["dtype"], named(row["device"])))
        assert plan_command.clocked(found, row["pass"]), row
