"""The README's numbers are those of the tables that are kept beside it."""

import csv
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_artefacts import AUDITS, RESULTS, audited

import persistrnn
from bench.report import results, tables
from persistrnn.kernels.cells import BUILT_IN, CELLS, library
from persistrnn.kernels.inspect import picture, plan_command
from persistrnn.kernels.planner.hardware import named
from persistrnn.kernels.planner.plan import PlanError, plan_layer
from persistrnn.kernels.planner.problem import Problem

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BENCH = (ROOT / "bench" / "README.md").read_text()
SHOWN = ("kernel", "H", "B", "slices", "spills", "in_registers", "in_shared", "streamed", "resident")


def test_first_lines_run_on_a_cpu(tmp_path):
    """The very block, with no GPU to be seen."""
    block = re.search(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[1]
    assert len([line for line in block.splitlines() if line]) <= 7
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    path, first, *others = done.stdout.splitlines()
    assert path == "torch"
    assert "steps 256, float32 on cpu" in first
    assert any(line.startswith("path: torch") for line in others)


def test_own_cell_runs_on_a_cpu():
    """The second block, after the first one's first lines."""
    first, second = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len([line for line in second.splitlines() if line]) <= 10
    names: dict[str, Any] = {}
    exec("\n".join(first.splitlines()[:3]) + "\n" + second, names)
    layer = re.search(r"`(persistrnn\.Recurrent\(.*?\))`", README)[1]
    y, _ = eval(layer, names)(names["torch"].randn(2, 3, 128))
    assert y.shape == (2, 3, 256)
    assert "params: slope" in persistrnn.check_cell(names["scaled"])


def test_audit_table_is_made_from_the_results():
    rows = audited("audit-newest.csv")
    section = BENCH.split("## The audit")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if re.match(r"\| (lstm|gru) (forward|backward) \|", line)]
    assert len(lines) >= 6
    for line in lines:
        cells = dict(zip(SHOWN, (c.strip().replace(",", "") for c in line.strip("|").split("|")), strict=True))
        cells["resident"] = str(float(cells["resident"].rstrip("%")))
        wanted = {"dtype": "bf16", "arch": "sm_90", "D": "1"} | cells
        assert any(all(row[k] == v for k, v in wanted.items()) for row in rows), line


def test_audit_counts_are_those_of_the_results():
    newest, oldest = map(audited, AUDITS)
    assert f"{len(newest)} kernels on {newest[0]['triton']}, the same on {oldest[0]['triton']}" in README
    assert len(newest) == len(oldest)


def test_race_table_is_made_from_the_results():
    """From the newest file that was measured on a GPU; before there is one, from the rehearsal, which has no speeds."""
    found = [results.load(path) for path in RESULTS.glob("*.json")]
    newest = max(found, key=lambda one: (not one.provenance.rehearsal, one.provenance.date))
    assert tables.markdown(newest) in README


def test_plan_that_is_shown_wins():
    """By the model, without and with gradients; its picture is small."""
    command = re.search(r"`persistrnn plan (--cell .*?)`", README)[1].split()
    given = plan_command.parser().parse_args(command)
    cell, hardware = CELLS[given.cell], named(given.device)
    problem = Problem(cell, given.hidden, given.batch, given.directions, given.dtype, hardware)
    expected = plan_command.expected(problem)
    assert all(one.persistent < one.torch for one in expected.values())
    training = expected["training"]
    assert f"training: {training.persistent:.2f} us, on torch's own path {training.torch:.2f})" in README
    drawing = RESULTS / f"plan-{given.cell}-{given.hidden}.svg"
    assert drawing.stat().st_size < 60_000
    assert drawing.read_text() == picture.svg(plan_layer(problem))


def test_largest_hidden_sizes_are_those_of_the_plan():
    for cell, largest in (("lstm", 23_166), ("gru", 26_750)):
        assert f"{largest:,} ({cell.upper()}" in README
        with pytest.raises(PlanError, match=f"up to {largest};"):
            plan_layer(Problem(CELLS[cell], largest + 1, 16, 1, "bf16", named("h200")))
        assert plan_layer(Problem(CELLS[cell], largest, 16, 1, "bf16", named("h200"))).hidden == largest


def test_table_of_cells_is_what_is_derived():
    """Lines of each step, what it keeps, and the part of W_hh that the plan keeps on chip in both passes."""
    head, _, counts, resident = (
        [c.strip() for c in line.strip("|").split("|")[1:]]
        for line in README[README.index("| cell, paper |") :].splitlines()[:4]
    )
    assert len(head) == len(BUILT_IN) - 1, "the RNN's two nonlinearities are one column"
    for name, of, count, share in zip([n for n in BUILT_IN if n != "rnn_relu"], head, counts, resident, strict=True):
        body = inspect.getsource(getattr(library, name)).split('"""')[2].strip().splitlines()
        assert count == f"{len(body)}; {CELLS[name].saved}", name
        plan = plan_layer(Problem(CELLS[name], 1024, 16, 1, "bf16", named("h200")))
        assert share == f"{min(plan.forward.shares.resident, plan.backward.shares.resident):.0%}", name
        assert hasattr(persistrnn, of.split("`")[1])


def test_every_feature_names_its_tests():
    features = README[README.index("## What it does") : README.index("## What is known")]
    rows = [line for line in features.splitlines() if line.startswith("|") and "test_" in line]
    assert len(rows) == 7
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert named, row
        assert all(list((ROOT / "tests").rglob(f"{name}.py")) for name in named), row


def test_counted_table_is_made_from_the_results():
    with (RESULTS / "rivals.csv").open(newline="") as file:
        counted = {(row["library"], row["cell"], row["H"]): row for row in csv.DictReader(file)}
    for cell in ("lstm", "gru"):
        ours, theirs = (
            "; ".join(f"{int(row[f'{way}_read']):,}, {row[f'{way}_launches']}" for way in ("forward", "backward"))
            for row in (counted[library, cell, "512"] for library in ("persistrnn", "torchrl"))
        )
        assert f"| {cell.upper()}, H=512 | {ours} | {theirs} |" in README
    assert f"TorchRL {counted['torchrl', 'lstm', '512']['version']} |" in README


MODULES = [path for room in ("persistrnn", "kernels", "bench", "tests") for path in (ROOT / room).rglob("*.py")]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", "bench/NOTES.md"])
def test_files_that_a_page_names_are_there(page):
    text, modules = (ROOT / page).read_text(), [f"/{path.relative_to(ROOT)}" for path in MODULES]
    linked = re.findall(r"\]\((?!http)([^)#\s]+)", text)
    assert [target for target in linked if not (ROOT / page).parent.joinpath(target).exists()] == []
    named = re.findall(r"`([\w./]+\.py)`", text)
    assert [name for name in named if not any(module.endswith(f"/{name}") for module in modules)] == []


def test_the_map_has_every_module_of_the_library():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    names = set(re.findall(r"\w+", page[page.index("## The map") : page.index("## Words")]))
    library = [path for path in MODULES if path.relative_to(ROOT).parts[0] in ("persistrnn", "kernels")]
    assert {path.stem for path in library if "profiling" not in path.parts} - {"__init__"} - names == set()


def test_make_check_names_tests_that_exist():
    told = subprocess.run(["make", "-n", "check"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"tests/\w+/\w+\.py", told))
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []
