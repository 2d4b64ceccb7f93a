"""The compile-time record: every unit and every index of K has one place. No GPU, no Triton."""

import dataclasses
import random
from collections import Counter

import pytest
from soundness import SHAPES, check_tiling, is_power_of_two, read_indices

from persistrnn.kernels.cells import Cell
from persistrnn.kernels.planner.hardware import DEVICES
from persistrnn.kernels.planner.problem import Problem
from persistrnn.kernels.planner.tiling import Choice, KBlock, Tiling, cut_bursts, cut_k, make_tiling

SIZES = (1, 2, 7, 8, 9, 16, 17, 100, 127, 128, 129, 320, 640, 1000, 1024, 1150, 1840, 2048, 2049, 3000, 4096)


def made(cell: Cell, hidden: int, choice: Choice, backward: bool, size: int = 2, directions: int = 1) -> Tiling:
    problem = Problem(cell, hidden, 16, directions, "bf16" if size == 2 else "fp32", DEVICES["h200"])
    return make_tiling(problem, choice, backward=backward)


def random_choice(random: random.Random, cell: Cell, hidden: int, backward: bool) -> Choice:
    """Any choice at all: homes of any size, full or empty, in tiles that need not divide them."""
    splits = random.choice((1, 2, 4, 8, 16))
    k = cell.gates * hidden
    homes = [random.choice((0, 16, random.randrange(k + 1), k, 2 * k)) for _ in range(2)]
    units = random.choice((8, 16, 32, 64, 128))
    if units >= hidden:
        units = max(16, 1 << (hidden - 1).bit_length())
    return Choice(
        units=units,
        k_parts=random.choice((1, 2, 4, 8)) if units < hidden else 1,
        batch_tile=random.choice((8, 16, 32)),
        subtiles=random.choice((1, 2, 4)),
        warps=random.choice((4, 8)),
        blocks=1,
        splits=splits,
        largest_k_block=random.choice((16, 64, 256, 512)),
        burst=random.choice((64, 512, 1024, 2048)),
        in_registers=homes[0],
        in_shared=homes[1],
        streamed_k_block=16 * splits * random.choice((1, 2, 4)),
    )


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("hidden", SIZES)
def test_any_choice_makes_a_sound_tiling(cell, backward, hidden):
    source = random.Random(hidden)
    for _ in range(30):
        choice = random_choice(source, SHAPES[cell], hidden, backward)
        size = source.choice((2, 4))
        t = made(SHAPES[cell], hidden, choice, backward, size)
        try:
            check_tiling(t, SHAPES[cell], backward, size)
            if choice.k_parts > 1:
                assert t.k_parts == choice.k_parts
            if choice.in_registers == choice.in_shared == 0 and t.slices > 1:
                assert t.k_blocks == (), "all of it is streamed"
            if t.slices > 1 and max(choice.in_registers, choice.in_shared) >= t.segments * t.depth:
                assert t.streamed == 0
        except AssertionError as error:
            raise AssertionError(f"{choice}: {error}") from error


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("hidden", [9, 72, 100, 129, 320])
def test_every_product_is_formed_once(cell, backward, hidden):
    """Index by index: the (row, index of K) pairs that all slices multiply are all of W_hh, each once, and the slice
    that owns a unit is the one that keeps the unit's rows of the sum."""
    gates = SHAPES[cell].gates
    source = random.Random(hidden)
    for _ in range(4):
        t = made(SHAPES[cell], hidden, random_choice(source, SHAPES[cell], hidden, backward), backward)
        rows: Counter[int] = Counter()
        for group in range(t.unit_groups):
            for pack, first in zip(t.packs, t.first_gates, strict=True):
                for m in range(pack * t.units_formed):
                    unit = group * t.units_formed + m % t.units_formed
                    if unit < hidden:
                        rows[(first + m // t.units_formed) * hidden + unit] += 1
            for row in range(t.k_parts):
                kept = range(group * t.units_formed + row * t.units, group * t.units_formed + (row + 1) * t.units)
                owned = range((group * t.k_parts + row) * t.units, (group * t.k_parts + row + 1) * t.units)
                assert kept == owned
        assert rows == Counter(range(hidden if backward else gates * hidden))
        k = Counter(i for first, last in read_indices(t) for i in range(first, last))
        assert k == Counter(range(gates * hidden if backward else hidden))


@pytest.mark.parametrize(("smallest", "largest"), [(16, 16), (16, 512), (128, 512), (128, 128), (32, 256)])
def test_chunks_cover_a_range_once(smallest, largest):
    for first, last in [*((0, n) for n in SIZES), (16, 320), (128, 1000), (1024, 1040), (640, 641)]:
        found = cut_k(3, first, last, smallest, largest)
        assert [k for c in found for k in range(c.start, c.start + c.length)] == list(range(first, last))
        assert all(c.segment == 3 and is_power_of_two(c.size) and smallest <= c.size <= largest for c in found)
        assert all(1 <= c.length <= c.size for c in found)
        assert sum(c.size for c in found) <= (last - first) * 4 / 3 + smallest, "little of it is padding"


def test_chunks_as_documented():
    assert [c.size for c in cut_k(0, 0, 320, 16, 512)] == [256, 64]
    assert [c.size for c in cut_k(0, 0, 768, 16, 512)] == [512, 256]
    assert cut_k(1, 8, 8, 16, 512) == ()
    assert cut_k(0, 0, 100, 16, 512) == (KBlock(0, 0, 128, 100),), "a quarter of padding for one tile less"


@pytest.mark.parametrize("kept", range(6))
@pytest.mark.parametrize("largest", [64, 128, 192, 1024])
def test_bursts_are_full_and_of_one_home(kept, largest):
    parts = cut_k(0, 0, 300, 16, 64)
    found = cut_bursts(parts, kept, largest)
    assert found[0] == 0
    assert list(found) == sorted(set(found))
    assert kept == 0 or kept >= len(parts) or kept in found
    for first, last in zip(found, (*found[1:], len(parts)), strict=True):
        loaded = sum(p.size for p in parts[first:last])
        assert loaded <= largest
        # A burst ends where the next tile has no room in it, or where another home begins.
        assert last in (kept, len(parts)) or loaded + parts[last].size > largest


def test_a_tile_larger_than_a_burst_is_one_of_its_own():
    parts = cut_k(0, 0, 1024, 16, 512)
    assert cut_bursts(parts, 0, 64) == (0, 1)
    assert cut_bursts((), 0, 64) == ()


def sliced(**changed: int) -> Choice:
    base = Choice(
        units=16, k_parts=1, batch_tile=16, subtiles=1, warps=8, blocks=1, splits=8, largest_k_block=512, burst=1024,
        in_registers=0, in_shared=1 << 20, streamed_k_block=128,
    )  # fmt: skip
    return dataclasses.replace(base, **changed)


@pytest.mark.parametrize(
    ("hidden", "size", "stride"),
    [(1024, 2, 1024), (1150, 2, 1152), (1001, 2, 1008), (1001, 4, 1004), (1150, 4, 1152), (100, 2, 104), (100, 4, 100)],
)
def test_rows_are_padded_to_16_bytes_where_some_are_streamed(hidden, size, stride):
    for backward in (False, True):
        assert made(SHAPES["lstm"], hidden, sliced(in_shared=64), backward, size).stride == stride
        kept = made(SHAPES["lstm"], hidden, sliced(), backward, size).stride
        assert kept == (stride if hidden * size % 4 else hidden)
        one = sliced(units=1 << (hidden - 1).bit_length())
        assert made(SHAPES["lstm"], hidden, one, backward, size).stride == hidden


def test_a_split_in_two_dimensions():
    """H=72 in 9 slices of 8 units, rounded up to 12 for 4 parts of K."""
    t = made(SHAPES["gru"], 72, sliced(units=8, k_parts=4), backward=True)
    assert (t.slices, t.k_parts, t.unit_groups, t.units_per_part, t.segments, t.depth) == (12, 4, 3, 24, 3, 24)
    assert (t.units_formed, t.m, t.outputs) == (32, 32, 1)
    assert t.ragged, "the last block is empty"
    assert t.counters_per_tile == 4 + 3
    assert not made(SHAPES["gru"], 96, sliced(units=8, k_parts=4), backward=True).ragged
    forward = made(SHAPES["gru"], 72, sliced(units=8, k_parts=4), backward=False)
    assert (forward.segments, forward.outputs, forward.m, forward.packs) == (1, 3, 96, (2, 1))
    assert made(SHAPES["lstm"], 72, sliced(units=8, k_parts=4), backward=False).packs == (4,)


def test_homes_are_filled_in_turn():
    t = made(SHAPES["lstm"], 1024, sliced(in_registers=256, in_shared=512), backward=False)
    assert sum(c.size for c in t.k_blocks[: t.in_registers]) == 256
    assert sum(c.size for c in t.k_blocks[t.in_registers :]) == 512
    assert (t.stream_start, t.streamed) == (768, 2)
    t = made(
        SHAPES["lstm"], 1024, sliced(k_parts=4, in_registers=512, in_shared=256, streamed_k_block=128), backward=True
    )
    assert (t.segments, t.depth, t.stream_start, t.streamed) == (4, 256, 192, 4), "from each gate the same"


@pytest.mark.parametrize(
    ("batch", "directions", "jobs"), [(1, 1, 1), (16, 1, 1), (17, 1, 1), (32, 2, 2), (33, 1, 2), (65, 2, 6)]
)
def test_jobs_are_batch_tiles_in_one_direction_each(batch, directions, jobs):
    assert made(SHAPES["lstm"], 256, sliced(subtiles=2), False, directions=directions).jobs(batch) == jobs


def test_a_pipeline_of_single_slices_is_refused():
    """It would wait forever: a layer of one slice announces nothing."""
    one = made(SHAPES["lstm"], 6, sliced(units=8), backward=False)
    assert one.slices == 1
    with pytest.raises(ValueError, match=r"2 layers has one slice of 8 units for H=6.* at least 2 slices are allowed"):
        dataclasses.replace(one, layers=2)
