"""The results file: what is written is read again, no speed without correctness, and every other file is refused."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from synthetic import CASE, add, case, everything, skipped, timing
from synthetic import results as empty

from bench.report.results import ARMS, DTYPES, MARKS, MODES, Check, Results, Stress, entry, line, load

# Round trip


@pytest.mark.parametrize("make", [everything, empty])
def test_what_is_saved_is_loaded(make: Callable[[], Results], tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "that is new" / "results.json"
    make().save(path)
    assert load(path) == make()
    assert [p.name for p in path.parent.iterdir()] == ["results.json"], "nothing unfinished is left"


def test_integers_are_read_where_a_float_is_meant(tmp_path: Path) -> None:
    document = raw()
    document["stress"][0]["seconds"] = 2
    (tmp_path / "r.json").write_text(json.dumps(document))
    (found,) = load(tmp_path / "r.json").stress
    assert found == Stress("wakes up", True, 2.0, "it did")
    assert isinstance(found.seconds, float)


def test_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    everything().save(path)
    broken = everything()
    broken.stress.append(Stress("x", True, 1.0, object()))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        broken.save(path)
    assert load(path) == everything()


# Rules


def test_speed_needs_a_green_check_of_its_case_and_arm() -> None:
    found = empty()
    found.add(Check(CASE, "torch", True, 0.5, ""))
    found.add(Check(case(hidden=512), "persistrnn", True, 0.5, ""))
    found.add(Check(case(mode="training"), "persistrnn", True, 0.5, ""))
    with pytest.raises(ValueError, match="no speed without correctness: persistrnn has no green check of 'forward"):
        found.add(timing(CASE))
    found.add(Check(CASE, "persistrnn", True, 0.5, ""))
    found.add(timing(CASE))
    assert found.timing(CASE, "persistrnn") == timing(CASE)
    assert found.timing(CASE, "torch") is None
    found.add(Check(CASE, "torch", False, 0.5, ""))
    with pytest.raises(ValueError, match="no green check"):
        found.add(timing(CASE, "torch"))  # one red check is enough
    found.add(skipped(CASE, "torch", "its check is red"))


def test_equal_work_in_another_suite_is_the_same_case() -> None:
    found = add(empty(), timing(CASE))
    other = case(suite="another", name="other")
    assert found.correct(other, "persistrnn")
    assert found.timing(other, "persistrnn") == timing(CASE)
    with pytest.raises(ValueError, match="already; one run, one number"):
        found.add(timing(other))


@pytest.mark.parametrize("field", ["cell", "input", "hidden", "layers", "bidirectional", "batch", "steps", "marks"])
def test_other_work_is_another_case(field: str) -> None:
    value = {"cell": "gru", "bidirectional": True, "marks": "resets"}.get(field, 77)
    assert case(**{field: value}).key != CASE.key


# Malformed files


def raw() -> Any:
    """As JSON has it, every list with an entry."""
    return json.loads(json.dumps(asdict(everything())))


def nodes(node: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value in the document, with the way to it."""
    yield keys, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from nodes(child, (*keys, key))


def place(keys: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)


def changed(keys: tuple[Any, ...], value: Any) -> Any:
    document = raw()
    if not keys:
        return value
    at = document
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return document


WRONG: dict[type, tuple[list[Any], str]] = {
    str: ([3, None, ["a"], {}], "a text"),
    bool: ([1, 0, "true", None], "true or false"),
    int: ([-1, 1.5, True, "7", None, 2**63, 10**400], "an integer from 0 to 2**63 - 1"),
    float: ([-0.5, True, "7", None, float("nan"), float("inf"), 10**400], "a finite number from 0 on"),
    list: ([{}, "a", 3, None], "a list"),
    dict: ([[], "a", 3, None], "an object with"),
}
CHOICES = {"arm": ARMS, "dtype": DTYPES, "marks": MARKS, "mode": MODES}


@pytest.mark.parametrize("part", ["provenance", "checks", "timings", "micro", "stress", "tuning"])
def test_wrong_values_and_keys_are_refused_with_their_place(part: str, tmp_path: Path) -> None:
    """Everywhere in the file."""
    path = tmp_path / "results.json"

    def refused(document: Any, *words: str) -> None:
        path.write_text(json.dumps(document))
        with pytest.raises(ValueError, match="allowed: ") as caught:
            load(path)
        assert [some for some in words if some not in str(caught.value)] == []

    for keys, now in nodes(raw()):
        if keys and keys[0] != part:
            continue
        where = f"{path}{place(keys)}"
        values, allowed = WRONG[type(now)]
        if keys and keys[-1] in CHOICES and ("case" in keys or keys[-1] == "arm"):
            values, allowed = ["fp63", *values], ", ".join(CHOICES[keys[-1]])
        for value in values:
            refused(changed(keys, value), f"{where} is {str(value)[:200]!r}", f"allowed: {allowed}")
        if isinstance(now, dict):
            gone = now.keys() - {"marks"}  # older files have none
            for other in [now | {"colour": "red"}, *({k: v for k, v in now.items() if k != name} for name in gone)]:
                refused(changed(keys, other), f"the list of keys of {where} is ", f"exactly {', '.join(now)}")


def test_files_from_before_marks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    everything().save(path)
    path.write_text(path.read_text().replace(',\n    "marks": ""', "").replace(',\n     "marks": ""', ""))
    assert "marks" not in path.read_text()
    assert load(path) == everything()


def test_rules_hold_for_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    red = raw()
    red["checks"][1]["ok"] = False
    twice = raw()
    twice["timings"].append(copy.deepcopy(twice["timings"][0]))
    for document, where, message in (
        (red, "timings[1]", "no speed without correctness"),
        (twice, "timings[3]", "one run, one number"),
        (changed(("timings", 0, "microseconds"), 0), "timings[0]", "allowed: more than 0, or the reason in 'skipped'"),
    ):
        path.write_text(json.dumps(document))
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: {where}: ")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"suite,name\n", b"\xff\xfe{}", b"[" * 200_000, b'{"checks": ' + b"1" * 5000 + b"}"],
    ids=["empty", "cut off", "a table", "no UTF-8", "nested", "long number"],
)
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not JSON") as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: not JSON (")


@pytest.mark.parametrize("kind", ["checks", "timings", "micro", "stress", "tuning"])
def test_an_entry_by_itself_is_a_line(kind: str) -> None:
    """And half a line is none."""
    for one in getattr(everything(), kind):
        text = line(one)
        assert (text.count("\n"), text[-1]) == (1, "\n")
        assert entry(text) == one
        for cut in range(0, len(text) - 2, 7):
            with pytest.raises(ValueError, match=r"allowed: |line 1 column"):
                entry(text[:cut])
    for other, allowed in (
        ("[]", "an object with the entry under the name of its kind"),
        ('{"Provenance": {}}', "Check, Timing, Micro, Stress, Tuning"),
        ('{"Stress": {"name": "x"}}', "exactly name, ok, seconds, message"),
    ):
        with pytest.raises(ValueError, match=f"allowed: {allowed}"):
            entry(other)
