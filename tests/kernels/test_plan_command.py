"""``persistrnn plan``: text and JSON whose numbers add up, and an answer to every wrong argument. No GPU."""

import csv
import dataclasses
import itertools
import json
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
from persistrnn.kernels.planner.plan import DTYPES, plan_layer
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


def asked(cell: str = "lstm", hidden: int = 256, batch: int = 16, directions: int = 1, dtype: str = "bf16",
          hardware: Hardware = DEVICES["h200"]) -> Problem:  # fmt: skip
    return Problem(CELLS[cell], hidden, batch, directions, dtype, hardware)


def check(problem: Problem, text: str, facts: dict[str, Any]) -> None:
    """The numbers of text and JSON are those of the plan, and add up."""
    found, hidden = plan_layer(problem), problem.hidden
    # kept with "gates": y, the LSTM's c, and what the cell saves
    of = {"lstm": (4, 6, 2), "gru": (3, 5, 1), "rnn_tanh": (1, 1, 1), "rnn_relu": (1, 1, 1)}
    gates, kept, state = of[found.cell]
    assert facts["times"] == "predicted"
    for name, section in zip(PASSES, re.split(r"^(?:forward|backward)$", text, flags=re.M)[1:], strict=True):
        part = facts[name]
        shares, times = part["shares"], part["cost"]
        assert shares["registers"] + shares["shared"] + shares["streamed"] == shares["sum"]
        assert shares["sum"] == gates * hidden**2 * DTYPES[found.dtype]
        assert f"{shares['registers']:,} bytes in registers + {shares['shared']:,} in shared memory + " in section
        assert f"= {shares['sum']:,}, all {gates} x {hidden} x {hidden} x {problem.size} bytes of it; " in section
        resident = float(re.search(r"([\d.]+)% resident", section)[1])  # type: ignore[index]
        assert resident == pytest.approx(100 * (1 - shares["streamed"] / shares["sum"]), abs=0.1)
        for memory in ("shared_memory", "registers"):
            held = dict(part["multiprocessor"][memory])
            assert held.pop("whole") == sum(held.values())
            assert re.search(rf"{memory.replace('_', ' ')} +\[[^]]{{64}}\] {sum(held.values()):,} bytes\n", section)
        total = times.pop("total")
        assert sum(times.values()) == pytest.approx(total)
        assert all(f" {field} {us:.2f} " in section for field, us in times.items())
        assert facts["predicted_us"][name] == pytest.approx(total * part["rounds"])
        assert re.search(rf" = {total:.2f}, x {part['rounds']:,} rounds? = {total * part['rounds']:.2f}\n", section)
        assert f"floor of any plan {found.floor:.2f} us; torch's own path {facts['torch_us'][name]:.2f} us" in section
    assert "All times are predicted by the cost model, none is measured; so are the bytes." in text
    units = found.directions * hidden * DTYPES[found.dtype]
    assert f"  gates: {kept * units:,} bytes per step and row, and " in text
    assert f"  state: {state * units:,} bytes per step and row, and " in text


@pytest.mark.parametrize("table", ["deepbench", "flashrnn", "models"])
def test_every_workload_adds_up(table: str) -> None:
    shapes = rows(table)
    assert len(shapes) >= {"deepbench": 60, "flashrnn": 8, "models": 15}[table]
    for cell, hidden, batch, directions in shapes:
        problem = asked(cell, hidden, batch, directions)
        check(problem, as_text(problem, 1024, "for a test"), plan_command.as_json(problem, 1024, "for a test"))


@pytest.mark.parametrize(("device", "dtype"), [*zip(DEVICES, itertools.cycle(DTYPES), strict=False)])
def test_every_device_and_dtype(capsys: pytest.CaptureFixture[str], device: str, dtype: str) -> None:
    arguments = ("--cell", "lstm", "--hidden", "320", "--batch", "33", "--directions", "2", "--device", device)
    (_, out, err), (_, facts, _) = (call(capsys, *arguments, "--dtype", dtype, *more) for more in ((), ("--json",)))
    assert err == ""
    assert out.startswith(f"lstm H=320 B=33 D=2 {dtype} on {device} ")
    problem, read = asked("lstm", 320, 33, 2, dtype, named(device)), json.loads(facts)
    check(problem, out, json.loads(facts))
    assumed = sourced(named(device), "assumed")
    assert f"Assumed in the record of {device}: {', '.join(assumed)}.\n" in out
    assert (read["assumed"], read["device_from"]) == (assumed, "named by --device")

    def contains(whole: Any, part: Any) -> bool:
        if isinstance(part, dict):
            return all(key in whole and contains(whole[key], value) for key, value in part.items())
        return bool(whole == part)

    plan = json.loads(json.dumps(dataclasses.asdict(plan_layer(problem))))
    assert plan.pop("heads") == 1
    for name, of_some in itertools.product(PASSES, Tiling.OF_SOME_CELLS):  # which this cell has not
        del plan[name]["tiling"][of_some]
    assert contains(read, plan), "the whole of it"


def test_heads(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--cell", "slstm", "--hidden", "64", "--device", "h200", "--heads")
    (status, text, _), (_, facts, _) = call(capsys, *given, "8"), call(capsys, *given, "8", "--json")
    read, problem = json.loads(facts), Problem(CELLS["slstm"], 8, 16, 1, "bf16", named("h200"), heads=8)
    assert status == 0
    assert text.startswith("slstm H=64 in 8 heads B=16 D=1 bf16 on h200 ")
    assert text.count("16 jobs (rows 0 to 15, 8 heads); ") == text.count("; no exchange\n") == 2
    assert read["heads"] == 8
    assert read["predicted_us"]["forward"] == plan_layer(problem).forward.predicted
    status, out, err = call(capsys, *given, "7")
    assert (status, out) == (2, "")
    assert "--heads: 7 given, which does not divide --hidden 64; allowed: its divisors" in err


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_weights_of_8_bits(capsys: pytest.CaptureFixture[str], weights: str) -> None:
    """Half the bytes, for inference alone; what has no such kernels is refused with the reason."""
    given = ("--cell", "lstm", "--hidden", "1024", "--device", "h200", "--weights", weights)
    (status, text, _), (_, facts, _) = call(capsys, *given), call(capsys, *given, "--json")
    read, problem = json.loads(facts), Problem(CELLS["lstm"], 1024, 16, 1, "bf16", named("h200"), weight_dtype=weights)
    assert status == 0
    assert text.startswith(f"lstm H=1024 B=16 D=1 bf16 with W_hh in {weights} on h200 ")
    assert f"= {4 * 1024**2:,}, all 4 x 1024 x 1024 x 1 bytes of it; " in text
    assert "backward" not in text
    assert read["weight_dtype"] == weights
    assert set(read["predicted_us"]) == {"forward"}
    assert read["predicted_us"]["forward"] == plan_layer(problem).forward.predicted
    for change, why in (
        (("--dtype", "tf32"), f"weight_dtype is int8 or fp8, with dtype fp16 or bf16, got {weights!r} with dtype tf32"),
        (("--cell", "layer_norm_gru"), f"layer_norm_gru has a second product or a mean within its step, .*{weights!r}"),
    ):
        status, out, err = call(capsys, *given, *change)
        assert (status, out) == (2, "")
        assert re.search(f"argument --weights: {why}", err)


def test_the_models_error_is_printed_where_there_are_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "measured over predicted" not in as_text(asked(), 1024, "a test")
    steps = [Step("lstm", 1024, 16, 1, "bf16", False, "persistent", us) for us in (2.0, 4.0, 9.0)]
    errors = tuple(Error(step, predicted=2.0) for step in steps)
    monkeypatch.setattr(plan_command.forecast, "errors", lambda cell, hardware: errors)
    sentence = (
        "Against 3 measured steps of the lstm on h200, measured over predicted is 1.00 to 4.50, in the middle 2.00."
    )
    assert sentence in as_text(asked(), 1024, "a test")


def test_measured_numbers_are_named(tmp_path: Path) -> None:
    provenance = dict.fromkeys(("device", "driver", "torch", "triton", "commit", "date", "command"), "x")
    (tmp_path / "h200.json").write_text(
        json.dumps({"provenance": provenance, "constants": {"exchange": 0.5}, "steps": []})
    )
    text = as_text(asked("gru", hardware=corrected(DEVICES["h200"], tmp_path)), 1024, "for a test")
    assert "Measured, in the record of h200: exchange.\n" in text + "\n"
    assert "Assumed in the record of h200: barrier, launch." in text


# The device


def test_it_plans_for_the_gpu_at_hand_or_says_that_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hardware(device: torch.device) -> Hardware:
        assert device == torch.device("cuda", 3)
        return live("NVIDIA H200 MIG 1g.18gb", "sm_90", 16, 232_448, 65_536, 8 << 20)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    none = "on h200 (sm_90, 132 multiprocessors; no GPU here: planned for h200; --device names another)"
    assert none in call(capsys, "--cell", "gru", "--hidden", "64")[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(launch, "hardware", hardware)
    found = "on NVIDIA H200 MIG 1g.18gb (sm_90, 16 multiprocessors; the GPU at hand)"
    assert found in call(capsys, "--cell", "gru", "--hidden", "512")[1]


# Errors

WRONG = [
    (("--device", "gtx1080"), "'gtx1080'", "mi300x"),
    (("--hidden", "0"), "'0'", "from 1 to"),
    (("--hidden", "12.5"), "'12.5'", "an integer"),
    (("--hidden", "\u00b2"), "'\u00b2'", "an integer"),
    (("--batch", "1" + "0" * 400), "'1000", "from 1 to"),
    (("--dtype", "float64"), "'float64'", "fp16"),
    (("--draw", "chip.png"), "'chip.png'", "ends in .svg"),
    (("--draw", "no/such/folder/chip.svg"), "'no/such/folder/chip.svg'", "folder that exists"),
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


@pytest.mark.parametrize(("name", "dtype"), [("half", "fp16"), ("torch.float16", "fp16"), ("BFLOAT16", "bf16")])
def test_torchs_names_of_dtypes_are_understood(capsys: pytest.CaptureFixture[str], name: str, dtype: str) -> None:
    assert f" {dtype} on h200" in call(capsys, *SMALL, "--dtype", name)[1]


def test_draws_beside_the_answer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = call(capsys, *SMALL, "--draw", str(tmp_path / "chip.svg"), "--json")
    assert (status, json.loads(out)["cell"]) == (0, "gru")
    assert (tmp_path / "chip.svg").read_text(encoding="utf-8") == picture.svg(plan_layer(asked("gru", 64)))


def test_layer_without_a_plan_is_an_error_and_draws_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    drawing = tmp_path / "chip.svg"
    status, out, err = call(capsys, *SMALL, "--hidden", "100000", "--draw", str(drawing))
    assert (status, out) == (1, "")
    assert err.startswith("persistrnn plan: hidden_size=100000: ")
    assert err.count("\n") == 1
    assert not drawing.exists()


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


@pytest.mark.parametrize(("hidden", "path"), [("1024", "the kernels"), ("4100", "torch's own path")])
def test_what_auto_takes(capsys: pytest.CaptureFixture[str], hidden: str, path: str) -> None:
    arguments = ("--cell", "lstm", "--hidden", hidden, "--batch", "64", "--device", "h200", "--steps", "64")
    _, out, _ = call(capsys, *arguments)
    facts = json.loads(call(capsys, *arguments, "--json")[1])
    for name, one in facts["auto"].items():
        assert one["path"] == path
        assert (one["persistent"] < one["torch"]) == (path == "the kernels")
        assert (
            f'backend="auto" takes {path} in {name}: {one["persistent"]:.2f} us per step on the kernels, '
            f"{one['torch']:.2f} on torch's own path (predicted)"
        ) in out
    needs = {mode: facts["memory_bytes"][mode]["needed"] for mode in ("gates", "state", "checkpoint")}
    assert needs["gates"] < needs["state"], "of 64 steps, one chunk"
    assert f"at T = {facts['memory_bytes']['steps']}, by what is kept" in out


# The clock


@pytest.mark.parametrize(("times", "apart"), [(1.5, "+50%"), (1.1, "+10%"), (0.7, "-30%")])
def test_the_clock_beside_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: float, apart: str) -> None:
    model = plan_layer(asked()).forward.predicted
    fields = "device,dtype,cell,hidden,batch,pass,clock_us,model_us,line_1,share_1,line_2,share_2,line_3,share_3"
    row = f"h200,bf16,lstm,256,16,forward,{times * model:.4f},{model:.2f},scan.py:1 a,0.5,b.py:2 b,0.3,c.py:3 c,0.1"
    monkeypatch.setattr(plan_command, "CLOCK", tmp_path / "clock.csv")
    plan_command.CLOCK.write_text(f"{fields}\n{row}\n")
    text = as_text(asked(), 8, "")
    (line,) = [line for line in text.splitlines() if "clock" in line]
    assert f"predicted by the clock of emulated code {times * model:.2f} us, {apart}; " in line
    assert "most in scan.py:1 a 50%, b.py:2 b 30%, c.py:3 c 10%" in line
    assert ("NOTES.md" in line) == (apart != "+10%")
    assert text.index(line) < text.index("\nbackward\n")
    clock = plan_command.as_json(asked(), 8, "")["clock"]
    assert clock["forward"]["us"] == pytest.approx(times * model, abs=1e-4)
    assert clock["backward"] is None
    # Nothing of another plan; the last one is the same layer on the same device, planned with another constant.
    others = {"cell": "gru"}, {"hidden": 512}, {"batch": 17}, {"directions": 2}, {"dtype": "fp16"}
    devices = {"hardware": named("h100")}, {"hardware": dataclasses.replace(named("h200"), exchange=2.0)}
    for other in (*others, *devices):
        assert "clock" not in as_text(asked(**other), 8, ""), other
    plan_command.CLOCK.unlink()  # as in an installation
    assert "clock" not in as_text(asked(), 8, "")


def test_the_clock_of_this_checkout_is_of_these_plans() -> None:
    for row in csv.DictReader(plan_command.CLOCK.read_text().splitlines()):
        problem = asked(row["cell"], int(row["hidden"]), int(row["batch"]), 1, row["dtype"], named(row["device"]))
        assert plan_command.clocked(problem, row["pass"]), row
