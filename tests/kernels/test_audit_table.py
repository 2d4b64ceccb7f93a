"""The audit's command: which kernels it reads, how it resumes, what it prints and keeps."""

import concurrent.futures
import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from persistrnn.kernels.inspect import audit_command as audit_table
from persistrnn.kernels.inspect.audit import Case, Row

pytestmark = pytest.mark.audit

WORKLOADS = Path(__file__).parents[2] / "bench" / "workloads"


def row(**changed) -> Row:
    return Row(**({"kernel": "gru forward", "dtype": "bf16", "H": 64, "B": 16, "D": 1, "arch": "sm_90",
                   "triton": "3.9.0"} | changed))  # fmt: skip


def test_shapes_with_the_same_kernel_are_one_case():
    shapes = [("lstm", 512, batch, 1) for batch in (9, 10, 16, 100)]
    found = audit_table.cases(shapes, ["bf16"], ["sm_90"])
    assert {c.backward for c in found.values()} == {False, True}
    assert {c.batch for c in found.values()} == {9, 100}, "the first of its class"
    assert len(audit_table.cases(shapes, ["bf16", "tf32"], ["sm_80", "sm_90"])) == 4 * len(found)


def test_workloads_are_read():
    shapes = {shape for path in WORKLOADS.glob("*.csv") for shape in audit_table.shapes_of(path)}
    assert ("lstm", 4096, 128, 1) in shapes
    assert ("gru", 2816, 32, 1) in shapes
    assert ("lstm", 1024, 8, 2) in shapes, "bidirectional"
    assert {cell for cell, *_ in shapes} == {"lstm", "gru"}


def test_a_table_without_the_columns_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("cell,size\nlstm,4\n")
    with pytest.raises(ValueError, match="has no column batch, hidden"):
        audit_table.shapes_of(path)


def test_a_compiler_that_gives_up_is_a_failed_row(monkeypatch):
    def give_up(case):
        raise RuntimeError("out of\n luck") from ValueError("the cause")

    monkeypatch.setattr(audit_table, "audit", give_up)
    found = audit_table.attempt(Case("lstm", True, "bf16", 64, "sm_90", 3))
    assert (found.kernel, found.B, found.failures) == ("lstm backward", 3, "ValueError: the cause")


def test_green_rows_are_kept_and_an_unfinished_line_is_not(tmp_path):
    path = tmp_path / "audit.jsonl"
    assert audit_table.kept(path) == {}
    entry = json.dumps({"key": "a", "row": dataclasses.asdict(row())})
    failed = json.dumps({"key": "c", "row": dataclasses.asdict(row(failures="7 spill instructions"))})
    path.write_text(entry + "\n" + failed + "\n" + entry.replace('"a"', '"b"')[:-20])
    assert audit_table.kept(path) == {"a": row()}


def test_table_shows_failures_and_refusals():
    rows = [row(), row(failures="7 spill instructions"), row(refused="hidden_size=40000 ...")]
    head, good, bad, refused = audit_table.table(rows).splitlines()
    assert head.split()[0] == "kernel"
    assert head.split()[-1] == "result"
    assert good.endswith("ok")
    assert bad.endswith("FAILED: 7 spill instructions")
    assert refused.endswith("refused by the plan")
    assert refused.split()[:7] == ["gru", "forward", "bf16", "64", "16", "1", "sm_90"]


def test_written_table_does_not_depend_on_the_order(tmp_path):
    rows = [row(H=h) for h in (64, 512, 128)]
    audit_table.write(rows, tmp_path / "a.csv")
    audit_table.write(rows[::-1], tmp_path / "new" / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "new" / "b.csv").read_bytes()
    with (tmp_path / "a.csv").open() as file:
        assert [r["H"] for r in csv.DictReader(file)] == ["64", "128", "512"]


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "persistrnn", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def test_command_prints_the_table_and_resumes(tmp_path):
    resume, output = tmp_path / "runs" / "audit.jsonl", tmp_path / "results" / "audit.csv"
    line = ["audit", "--cells", "gru", "--hidden", 64, "--dtypes", "bf16", "--arch", "sm_90", "--jobs", 1]
    line += ["--resume", resume, "--output", output]
    first = command(*line, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    head, *rows, total = first.stdout.splitlines()
    assert head.split()[:7] == ["kernel", "dtype", "H", "B", "D", "arch", "triton"]
    assert [r.split()[:4] for r in rows] == [["gru", p, "bf16", "64"] for p in ("forward", "backward")]
    assert all(r.endswith("ok") for r in rows)
    assert total == "2 ok, 0 refused by the plan, 0 failed"
    entries = resume.read_text()
    assert len(entries.splitlines()) == 2
    assert len(output.read_text().splitlines()) == 3

    # A second run compiles nothing: it shows the rows of the file, also where they are not what a compiler would say.
    changed = [json.loads(entry) for entry in entries.splitlines()]
    for entry in changed:
        entry["row"]["registers"] = 12_345
    resume.write_text("".join(json.dumps(entry) + "\n" for entry in changed))
    second = command(*line, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("12345") == 2
    assert len(resume.read_text().splitlines()) == 2, "nothing was added"

    # Rows of another kernel are not believed.
    changed[0]["key"] = "other"
    resume.write_text("".join(json.dumps(entry) + "\n" for entry in changed))
    third = command(*line, "--failures", cwd=tmp_path)
    assert third.returncode == 0, third.stderr
    assert third.stdout == "2 ok, 0 refused by the plan, 0 failed\n", "good rows are not shown"
    assert len(resume.read_text().splitlines()) == 3


def test_a_failure_is_the_exit_status(monkeypatch, capsys, tmp_path):
    rows = [row(), row(failures="7 spill instructions"), row(refused="too large")]
    monkeypatch.setattr(audit_table, "run", lambda *_: rows)
    output = tmp_path / "audit.csv"
    monkeypatch.setattr(sys, "argv", ["persistrnn", "--hidden", "64", "--output", str(output), "--failures"])
    assert audit_table.main() == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.endswith(("result", "7 spill instructions", "refused by the plan")) for line in out[:3]] == [True] * 3
    assert out[3:] == ["1 ok, 1 refused by the plan, 1 failed"]
    assert "7 spill instructions" in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "rnn"], "'rnn' (choose from"),
        (["--dtypes", "fp8"], "'fp8' (choose from"),
        (["--arch", "sm_70"], "'sm_70' (choose from"),
        (["--hidden", "many"], "invalid int value: 'many'"),
        (["--hidden", "64", "0"], "--hidden must be at least 1, got [64, 0]"),
        (["--batch", "-1"], "--batch must be at least 1, got [-1]"),
        (["--directions", "3"], "3 (choose from"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--workloads", "missing.csv"], "--workloads: [Errno 2] No such file or directory: 'missing.csv'"),
        (["--workloads", "a.csv", "--hidden", "4"], "give one of them"),
        (["--size", "64"], "unrecognized arguments: --size 64"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["persistrnn", *arguments])
    with pytest.raises(SystemExit) as stopped:
        audit_table.main()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "usage: persistrnn audit" in err


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        audit_table.main(list(map(str, arguments)))
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def nothing_compiles(monkeypatch):
    monkeypatch.setattr(audit_table, "run", lambda *_: pytest.fail("the files were not checked first"))


OTHERS = {
    "results.json": json.dumps({"provenance": {}, "checks": []}, indent=1),
    "one-line.json": json.dumps({"provenance": {}}),
    "list.json": "[]",
    "table.csv": "cell,hidden,batch\nlstm,4,4\n",
    "notes.txt": "kernel of truth\n",
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.usefixtures("nothing_compiles")
def test_files_of_another_kind_are_refused_and_left_alone(name, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(OTHERS[name])
    message = f"argument --resume: {str(path)!r} given, and its line 1 is no row of an audit; allowed: a new file"
    assert message in refused(capsys, "--resume", path)
    message = f"argument --output: {str(path)!r} given, and it is no table of an audit; allowed: a new file"
    assert message in refused(capsys, "--output", path)
    assert path.read_text() == OTHERS[name]
    assert [one.name for one in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("option", ["--resume", "--output"])
@pytest.mark.usefixtures("nothing_compiles")
def test_files_that_cannot_be_written_are_refused(option, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for given, why in {
        tmp_path: "Is a directory",
        tmp_path / "file" / "below": "Not a directory",
        tmp_path / ("a" * 300): "File name too long",
        Path("/proc/new/audit"): "No such file or directory",  # where not even root makes a file
    }.items():
        message = refused(capsys, option, given)
        assert f"argument {option}: {str(given)!r} given, and it cannot be written ({why}); allowed: a file" in message


@pytest.mark.usefixtures("nothing_compiles")
def test_one_file_cannot_be_both(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "are two files" in refused(capsys, "--resume", tmp_path / "audit", "--output", "audit")


@pytest.mark.parametrize("row", ["lstm,many,4", "lstm,4,0", "lstm,4", "gru,-1,4"])
@pytest.mark.usefixtures("nothing_compiles")
def test_a_row_without_sizes_is_refused(row, tmp_path, capsys):
    path = tmp_path / "shapes.csv"
    path.write_text(f"cell,hidden,batch\nrnn,0,0\n{row}\n")
    assert "allowed for hidden and batch: integers of at least 1" in refused(capsys, "--workloads", path)


def test_a_table_of_another_run_is_replaced_and_its_rows_go_on(monkeypatch, tmp_path, capsys):
    resume, output = tmp_path / "new" / "audit.jsonl", tmp_path / "audit.csv"
    audit_table.write([row(H=7)], output)
    monkeypatch.setattr(audit_table, "run", lambda *_: [row()])
    arguments = ["--hidden", "64", "--resume", str(resume), "--output", str(output)]
    assert audit_table.main(arguments) == 0
    assert output.read_text().splitlines()[1].startswith("gru forward,bf16,64,")
    assert not resume.parent.exists(), "checked, and nothing made"


def test_a_row_below_an_unfinished_line_is_found_again(monkeypatch, tmp_path):
    class Pool:
        def __init__(self, *_, **__):
            self.submit = lambda function, *given: done(function(*given))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    def done(value):
        future = concurrent.futures.Future()
        future.set_result(value)
        return future

    monkeypatch.setattr(audit_table.concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(audit_table, "attempt", lambda case: row(H=case.hidden))
    path, case = tmp_path / "audit.jsonl", Case("gru", False, "bf16", 64, "sm_90", 16)
    entry = json.dumps({"key": "a", "row": dataclasses.asdict(row())})
    path.write_text(entry[:-20])
    assert audit_table.run({"b": case}, 1, path) == [row()]
    assert audit_table.kept(path) == {"b": row()}


def test_rows_of_another_version_are_not_taken(tmp_path):
    path = tmp_path / "audit.jsonl"
    other = dataclasses.asdict(row()) | {"surplus": 1}
    path.write_text(json.dumps({"key": "a", "row": other}) + "\n")
    assert audit_table.kept(path) == {}
