"""The results file: what is written is read again, no speed without correctness, and every other file is refused."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
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


@pytest.mark.parametrize("oks", [(False,), (True, False), (False, True)])
def test_one_red_check_is_enough_to_refuse_a_speed(oks: tuple[bool, ...]) -> None:
    found = empty()
    for ok in oks:
        found.add(Check(CASE, "persistrnn", ok, 0.5, ""))
    assert not found.correct(CASE, "persistrnn")
    with pytest.raises(ValueError, match="no green check"):
        found.add(timing(CASE))
    found.add(skipped(CASE, "persistrnn", "its check is red"))


def test_equal_work_in_another_suite_is_the_same_case() -> None:
    found = add(empty(), timing(CASE))
    other = case(suite="another", name="other")
    assert found.correct(other, "persistrnn")
    assert found.timing(other, "persistrnn") == timing(CASE)
    with pytest.raises(ValueError, match="already; one run, one number"):
        found.add(timing(other))


@pytest.mark.parametrize("field", ["cell", "input", "hidden", "layers", "bidirectional", "batch", "steps"])
def test_other_work_is_another_case(field: str) -> None:
    value = {"cell": "gru", "bidirectional": True}.get(field, 77)
    assert case(**{field: value}).key != CASE.key


@pytest.mark.parametrize(("microseconds", "steps"), [(0.0, 100), (5.0, 0)])
def test_time_of_nothing_is_refused(microseconds: float, steps: int) -> None:
    with pytest.raises(ValueError, match="allowed: more than 0, or the reason in 'skipped'"):
        add(empty(), timing(case(steps=steps), microseconds=microseconds))


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


@pytest.mark.parametrize("keys", [keys for keys, _ in nodes(raw())], ids=lambda keys: place(keys) or "all")
def test_wrong_value_is_refused_with_its_place(keys: tuple[Any, ...], tmp_path: Path) -> None:
    (now,) = (value for k, value in nodes(raw()) if k == keys)
    path = tmp_path / "results.json"
    values, allowed = WRONG[type(now)]
    choices = {"arm": ARMS, "dtype": DTYPES, "marks": MARKS, "mode": MODES}
    if keys and keys[-1] in choices and ("case" in keys or keys[-1] == "arm"):
        allowed = ", ".join(choices[keys[-1]])
    for value in values:
        path.write_text(json.dumps(changed(keys, value)))
        with pytest.raises(ValueError, match="allowed: ") as caught:
            load(path)
        assert f"{path}{place(keys)} is " in str(caught.value)
        assert repr(str(value)[:200]) in str(caught.value)
        assert f"allowed: {allowed}" in str(caught.value)


OBJECTS = [keys for keys, value in nodes(raw()) if isinstance(value, dict)]


@pytest.mark.parametrize("keys", OBJECTS, ids=lambda keys: place(keys) or "all")
def test_missing_and_unknown_keys_are_refused(keys: tuple[Any, ...], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    (now,) = (value for k, value in nodes(raw()) if k == keys)
    gone = now.keys() - {"marks"}  # older files have none
    for other in [now | {"colour": "red"}, *({k: v for k, v in now.items() if k != name} for name in gone)]:
        path.write_text(json.dumps(changed(keys, other)))
        with pytest.raises(ValueError, match="allowed: exactly ") as caught:
            load(path)
        assert f"the list of keys of {path}{place(keys)} is " in str(caught.value)
        assert ", ".join(now) in str(caught.value)


def test_files_from_before_marks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    everything().save(path)
    path.write_text(path.read_text().replace(',\n    "marks": ""', "").replace(',\n     "marks": ""', ""))
    assert "marks" not in path.read_text()
    assert load(path) == everything()


def test_marks_are_other_work() -> None:
    keys = {replace(CASE, marks=marks).key for marks in MARKS}
    assert len(keys) == len(MARKS)
    assert CASE.key in keys


@pytest.mark.parametrize(
    ("keys", "allowed"),
    [
        (("timings", 1, "case", "marks"), MARKS),
        (("timings", 0, "case", "dtype"), DTYPES),
        (("checks", 1, "case", "mode"), MODES),
        (("tuning", 0, "case", "dtype"), DTYPES),
        (("timings", 1, "arm"), ARMS),
        (("checks", 0, "arm"), ARMS),
    ],
)
def test_unknown_name_is_refused_with_the_known_ones(
    keys: tuple[Any, ...], allowed: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(changed(keys, "fp63")))
    with pytest.raises(ValueError, match="'fp63'") as caught:
        load(path)
    assert str(caught.value) == f"{path}{place(keys)} is 'fp63', allowed: {', '.join(allowed)}"


def test_rules_hold_for_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    red = raw()
    red["checks"][1]["ok"] = False
    twice = raw()
    twice["timings"].append(copy.deepcopy(twice["timings"][0]))
    for document, where, message in (
        (red, "timings[1]", "no speed without correctness"),
        (twice, "timings[3]", "one run, one number"),
        (changed(("timings", 0, "microseconds"), 0), "timings[0]", "allowed: more than 0"),
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
    for one in getattr(everything(), kind):
        text = line(one)
        assert text.count("\n") == 1
        assert text.endswith("\n")
        assert entry(text) == one
        for cut in range(0, len(text) - 2, 7):
            with pytest.raises(ValueError, match=r"allowed: |line 1 column"):
                entry(text[:cut])


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("[]", "an object with the entry under the name of its kind"),
        ('{"Stress": {}, "Micro": {}}', "an object with the entry"),
        ('{"Provenance": {}}', "Check, Timing, Micro, Stress, Tuning"),
        ('{"Stress": {"name": "x"}}', "exactly name, ok, seconds, message"),
    ],
)
def test_other_lines_are_refused(text: str, allowed: str) -> None:
    with pytest.raises(ValueError, match="allowed: ") as caught:
        entry(text)
    assert allowed in str(caught.value)
