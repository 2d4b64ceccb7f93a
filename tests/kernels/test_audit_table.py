"""The audit's command: which kernels it reads, how it resumes, what it prints and keeps."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from persistrnn.kernels.cells import BUILT_IN, STAGED
from persistrnn.kernels.inspect import audit_command as audit_table
from persistrnn.kernels.inspect.audit import Case, Row

pytestmark = pytest.mark.audit

BENCH = Path(__file__).parents[2] / "bench"
TABLES = [*BENCH.glob("workloads/*.csv"), BENCH / "audit.csv"]


def row(**changed) -> Row:
    return Row(**({"kernel": "gru forward", "dtype": "bf16", "H": 64, "B": 16, "D": 1, "arch": "sm_90",
                   "triton": "3.9.0"} | changed))  # fmt: skip


def line(key: str, row: Row) -> str:
    return json.dumps({"key": key, "row": dataclasses.asdict(row)}) + "\n"


def test_shapes_with_the_same_kernel_are_one_case():
    asked = [Case("lstm", way, "bf16", 512, "sm_90", batch) for batch in (9, 10, 16, 100) for way in (False, True)]
    found = audit_table.cases(asked)
    assert {c.backward for c in found.values()} == {False, True}
    assert {c.batch for c in found.values()} == {9, 100}, "the first of its class"


def test_workloads_are_read():
    found = [case for path in TABLES for case in audit_table.table_cases(path, ["bf16"], ["sm_90"])]
    shapes = {(c.cell, c.hidden, c.batch, c.directions) for c in found if not c.layers > 1}
    assert {("lstm", 4096, 128, 1), ("gru", 2816, 32, 1), ("lstm", 1024, 8, 2)} < shapes, "the last one bidirectional"
    assert {case.cell for case in found} == {*BUILT_IN, *STAGED}


def test_a_table_may_say_how(tmp_path):
    """The whole of its columns; where one is empty, what the command was given."""
    (tmp_path / "audit.csv").write_text(
        "cell,hidden,batch,bidirectional,pipeline,weights,marks,chunked,dtypes,archs\n"
        "lstm,512,16,,4,,1,,,\n"
        "gru,64,1,1,,int8,,1,fp16 bf16,sm_80\n"
    )
    pipeline = ("lstm", False, "tf32", 512, "sm_90", 16, 1, 4, True, False, "")
    eight = ("gru", False, "fp16", 64, "sm_80", 1, 2, 1, False, True, "int8")
    asked = [dataclasses.astuple(case) for case in audit_table.table_cases(tmp_path / "audit.csv", ["tf32"], ["sm_90"])]
    assert asked == [pipeline, ("lstm", True, *pipeline[2:]), eight, ("gru", False, "bf16", *eight[3:])]


def test_a_compiler_that_gives_up_is_a_failed_row(monkeypatch):
    def give_up(case):
        raise RuntimeError("out of\n luck") from ValueError("the cause")

    monkeypatch.setattr(audit_table, "audit", give_up)
    found = audit_table.attempt(Case("lstm", True, "bf16", 64, "sm_90", 3))
    assert (found.kernel, found.B, found.failures) == ("lstm backward", 3, "ValueError: the cause")


def test_green_rows_of_this_version_are_kept(tmp_path):
    path = tmp_path / "audit.jsonl"
    other = json.dumps({"key": "d", "row": dataclasses.asdict(row()) | {"surplus": 1}}) + "\n"
    path.write_text(line("a", row()) + line("c", row(failures="7 spill instructions")) + other + line("b", row())[:-20])
    assert audit_table.kept(path) == {"a": row()}


def test_a_failure_is_the_exit_status(monkeypatch, capsys, tmp_path):
    rows = [row(H=512), row(failures="7 spill instructions"), row(H=128), row(H=40000, refused="hidden_size=40000 ...")]
    output = tmp_path / "new" / "audit.csv"
    arguments = ["--hidden", "64", "--output", str(output)]
    monkeypatch.setattr(audit_table, "run", lambda *_: rows)
    assert audit_table.main(arguments) == 1
    head, good, bad, _, refused, total = capsys.readouterr().out.splitlines()
    assert (head.split()[0], head.split()[-1]) == ("kernel", "result")
    assert good.split()[:6] == ["gru", "forward", "bf16", "512", "16", "1"]
    assert good.endswith("ok")
    assert bad.endswith("FAILED: 7 spill instructions")
    assert refused.endswith("refused by the plan")
    assert total == "2 ok, 1 refused by the plan, 1 failed"
    written = output.read_bytes()
    rows.reverse()
    assert audit_table.main([*arguments, "--failures"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 4, "good rows are not shown"
    assert output.read_bytes() == written, "of any order"
    rows[:] = rows[1:2]
    assert audit_table.main(arguments) == 0
    assert output.read_text().splitlines()[1].startswith("gru forward,bf16,128,"), "replaced"


def test_command_prints_the_table_and_resumes(tmp_path, capsys):
    resume, output = tmp_path / "runs" / "audit.jsonl", tmp_path / "results" / "audit.csv"
    call = ["--cells", "gru", "--hidden", "64", "--dtypes", "bf16", "--arch", "sm_90", "--jobs", "1", "--resume"]
    call += [str(resume), "--output", str(output)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "persistrnn", "audit", *call]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    head, *rows, total = done.stdout.splitlines()
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
    assert audit_table.main(call) == 0
    assert capsys.readouterr().out.count("12345") == 2
    assert len(resume.read_text().splitlines()) == 2, "nothing was added"

    # Rows of another kernel are not believed, and what is compiled is found again below a line that was not finished.
    resume.write_text(json.dumps(changed[0]) + "\n" + json.dumps(changed[1])[:-20])
    assert audit_table.main([*call, "--failures"]) == 0
    assert capsys.readouterr().out == "2 ok, 0 refused by the plan, 0 failed\n"
    assert len(audit_table.kept(resume)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dtypes fp8", "'fp8' (choose from"),
        ("--hidden many", "argument --hidden: 'many' given, allowed: an integer from 1"),
        ("--jobs 0", "argument --jobs: '0' given, allowed: an integer from 1"),
        ("--workloads missing.csv", "--workloads: [Errno 2] No such file or directory: 'missing.csv'"),
        ("--workloads shapes.csv", "integer from 1 to 2147483647); allowed: columns cell, hidden and batch, the last"),
        ("--workloads notes.txt", "notes.txt has the row {'kernel of truth': 'lstm'} ('cell'); allowed: columns"),
        (
            "--workloads others.csv",
            "others.csv has the row {'cell': 'lstm', 'hidden': '4', 'batch': '1', 'dtypes': 'fp8'} ('fp8')",
        ),
        ("--workloads a.csv --hidden 4", "not allowed with argument"),
        ("--resume new --output new", "--output and --resume are two files, got 'new' for both"),
        ("--resume notes.txt", "--resume: 'notes.txt' given, and it is another kind of file; allowed: a new one"),
        ("--output notes.txt", "--output: 'notes.txt' given, and it is another kind of file; allowed: a new one"),
        ("--output shapes.csv", "--output: 'shapes.csv' given, and it is another kind of file; allowed: a new one"),
        ("--resume .", "argument --resume: '.' given, and it cannot be written (Is a directory)"),
        ("--output notes.txt/below", "'notes.txt/below' given, and it cannot be written (File exists)"),
        ("--resume /proc/new/audit", "it cannot be written (No such file or directory)"),  # not even by root
    ],
)
def test_bad_arguments_are_refused(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(audit_table, "run", lambda *_: pytest.fail("the arguments were not checked first"))
    files = {"shapes.csv": "cell,hidden,batch\nlstm,4,0\n", "others.csv": "cell,hidden,batch,dtypes\nlstm,4,1,fp8\n"}
    files |= {"notes.txt": "kernel of truth\nlstm\n"}
    for name, text in files.items():
        Path(name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        audit_table.main(arguments.split())
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "usage: persistrnn audit" in err
    assert {name: Path(name).read_text() for name in files} == files
