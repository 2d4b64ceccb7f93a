"""Masks that are drawn and not kept: the generator, and that a part of a mask is that part of the whole."""

import pytest
import torch

from persistrnn import masks
from persistrnn.kernels import masks as kernel

T, B, H, D = 9, 3, 24, 2


# Of Random123, the authors' library: its file of known answers for philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_generator_is_philox(counter, key, answer):
    words = masks.philox(list(map(torch.tensor, counter)), *map(torch.tensor, key))
    assert " ".join(f"{int(word):08x}" for word in words) == answer


@pytest.fixture
def keys():
    torch.manual_seed(3)
    return masks.keys(torch.device("cpu"), 2 * D, [0.25, 0.75, 0.5], [False, False, True])


def whole(keys, steps=T, batch=B, units=H):
    return masks.drawn(keys.unflatten(0, (-1, D)), steps, batch, units)


def test_a_unit_is_masked_with_its_probability_and_none_like_another(keys):
    found = whole(keys, 400, 8, 16).float()
    assert set(found.unique().tolist()) == {0, 1}
    assert torch.equal(found[..., 2, :], found[:, :1, :, :, 2].expand_as(found[..., 2, :])), "the same at all steps"
    torch.testing.assert_close(
        found[..., :2, :].mean((0, 1, 2, 3, 5)), torch.tensor([0.25, 0.75]), rtol=0, atol=0.005
    )  # 204,800 draws: five standard deviations are 0.005
    sides = [found.movedim(k, 0).flatten(1) for k in range(6)]  # layers, steps, rows, directions, masks, units
    sides[1] = found[..., :2, :].movedim(1, 0).flatten(1)
    assert all(len(of.unique(dim=0)) == len(of) for of in sides)


def test_another_seed_is_another_mask(keys):
    torch.manual_seed(3)
    first, second = (masks.keys(torch.device("cpu"), 2 * D, [0.25], [False]) for _ in range(2))
    assert torch.equal(first[:, 0, masks.SEED], keys[:, 0, masks.SEED])
    assert not torch.equal(whole(first), whole(second))


def test_later_steps_are_those_of_the_whole(keys):
    later = whole(masks.later(keys.unflatten(0, (-1, D)), [4, 1]).flatten(0, 1), 3)
    for direction, first in enumerate((4, 1)):
        assert torch.equal(later[:, :, :, direction], whole(keys)[:, first : first + 3, :, direction])


@pytest.mark.parametrize("heads", [2, 6, 8])
def test_heads_have_their_units_of_the_whole(keys, heads):
    """Also where a head's units do not fill the words of a counter."""
    by_head = masks.by_head(keys, heads, H // heads).unflatten(0, (-1, D * heads))
    found = masks.drawn(by_head, T, B, H // heads).unflatten(3, (D, heads))
    assert torch.equal(found.movedim(4, -2).flatten(-2), whole(keys))


@pytest.mark.interpreter
@pytest.mark.parametrize("heads", [1, 3])
def test_the_kernel_draws_the_same(keys, heads):
    """Triton's Philox beside torch's operations."""
    given = masks.by_head(keys, heads, H // heads).unflatten(0, (-1, D * heads))
    given = masks.later(given, [2**32 - 3] * D * heads)  # the last steps that a counter can tell apart
    assert torch.equal(kernel.drawn(given, 3, B, H // heads), masks.drawn(given, 3, B, H // heads))


@pytest.mark.parametrize("units", [1, 6, 23])
def test_a_unit_does_not_ask_how_many_there_are(keys, units):
    assert torch.equal(whole(keys, units=units), whole(keys)[..., :units])
    assert torch.equal(whole(keys, batch=1), whole(keys)[:, :, :1])
