"""The README's numbers are those of the tables that are kept beside it."""

import csv
import re
from pathlib import Path

from persistrnn import report, results

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BENCH = (ROOT / "bench" / "README.md").read_text()
RESULTS = ROOT / "bench" / "results"
SHOWN = ("kernel", "H", "B", "slices", "registers", "spills", "in_registers", "in_shared", "streamed", "resident")


def audited(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


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
    for name in ("audit-newest.csv", "audit-oldest.csv"):
        rows = audited(name)
        green = sum(not row["failures"] and not row["refused"] for row in rows)
        assert f"{green:,} of {len(rows):,} rows on {rows[0]['triton']}" in README


def test_race_table_is_made_from_the_results():
    """From the newest file that was measured on a GPU; before there is one, from the rehearsal, which has no speeds."""
    found = [results.load(path) for path in RESULTS.glob("*.json")]
    newest = max(found, key=lambda one: (not one.provenance.rehearsal, one.provenance.date))
    assert report.markdown(newest) in README


def test_readme_keeps_its_size():
    assert 60 <= len(README.splitlines()) <= 90


def test_every_feature_names_its_tests():
    features = README[README.index("## What it does") : README.index("## What is known")]
    rows = [line for line in features.splitlines() if line.startswith("|") and "test_" in line]
    assert len(rows) == 12
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert named, row
        assert all((ROOT / "tests" / f"{name}.py").exists() for name in named), row
