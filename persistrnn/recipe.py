"""What is done to a layer's recurrence beside its cell: noise in training, where a sequence and the weights begin."""

from __future__ import annotations

import ast
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from persistrnn import masks
from persistrnn.kernels.cells import CELLS, derived
from persistrnn.kernels.cells.variants import variant
from persistrnn.tracing import constant


class Recipe(NamedTuple):
    """How a layer of any cell is regularised and begins; `recipe=` of every layer, and its attribute.

        persistrnn.LSTM(64, 512, recipe=persistrnn.Recipe(zoneout=(0.05, 0.5), weight_drop=0.5))

    All noise is drawn anew at each call in training, from torch's generator of the input's device, and with the same
    seed it is the same on every path and in every memory mode. The masks of zoneout and of recurrent_dropout are a
    function of that seed (`persistrnn.masks`): none is kept for the backward, a chunk of time has its own, one byte per
    unit and step. (Of a cell with extras of its own they are drawn for all steps, in its dtype.) In evaluation nothing
    is random.

    Args:
        zoneout: probability that a unit's state stays as it was before the step (Krueger et al. 2017), drawn for each
            step, row and unit: one number for h and, of a cell that has it, c; or a tuple of one for each state, h
            first, as (0.05, 0.5) of an LSTM. In evaluation each state is its expectation, p * old + (1 - p) * new. Of
            cells of more states a tuple is asked for: c, n and m of an sLSTM mean nothing one without the others, so
            that it is (p, 0, 0, 0) there
        recurrent_dropout: probability that h's unit is hidden from the step's matrix product, the others scaled by
            1 / (1 - p) (variational dropout of Gal and Ghahramani 2016, one mask for all gates): one mask for each row
            of the batch, at all steps of a call. What the layer gives out, and what a cell reads of h by itself, is h
        weight_drop: probability of a zero in W_hh, the others scaled by 1 / (1 - p) (DropConnect of Wan et al. 2013 on
            the recurrent weights, Merity et al. 2018): one mask for all rows and steps of a call
        learned_state: whether the states that a sequence begins from where no hx is given, and an episode where no
            reset_state is, are parameters, zeros at first: h0 (and c0, by the states' names) [L*D, H]
        forget_bias: what the bias of the gate f is at first, in bias_ih; in bias_hh it is 0 then (Gers et al. 2000,
            Jozefowicz et al. 2015: 1). None: drawn as all others. Of an MGU, whose f is what is replaced, a negative
            one remembers

    None of them changes a parameter's name, but learned_state adds some: torch.nn's state_dict is loaded into such a
    layer with strict=False. zoneout and recurrent_dropout are cells of their own, derived from the layer's: on the
    kernels with all that the cell has, and beside them step by step. Not with projections.
    """

    zoneout: float | tuple[float, ...] = 0.0
    recurrent_dropout: float = 0.0
    weight_drop: float = 0.0
    learned_state: bool = False
    forget_bias: float | None = None


PLAIN = Recipe()


def text_of(recipe: Recipe) -> str:
    """What a layer keeps of a recipe: torch.compile makes variables of numbers, and a constant of this."""
    zoneout, dropout, drop, learned, bias = recipe
    zoneout = tuple(map(float, zoneout)) if isinstance(zoneout, tuple) else float(zoneout)
    return repr((zoneout, float(dropout), float(drop), learned, None if bias is None else float(bias)))


_read: dict[str, Recipe] = {}


@constant
def recipe_of(text: str) -> Recipe:
    """The recipe of ``text_of``."""
    if text not in _read:
        _read[text] = Recipe(*ast.literal_eval(text))
    return _read[text]


def check_recipe(recipe: object, cell: str, bias: bool, proj_size: int) -> None:
    """What a constructor and a changed module refuse alike."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe is a persistrnn.Recipe, got {type(recipe).__name__}; give persistrnn.Recipe(...)")
    for name in ("recurrent_dropout", "weight_drop"):
        if not _is_number(value := getattr(recipe, name)) or not 0 <= value < 1:
            raise ValueError(f"{name} is the probability of a zero, a number in [0, 1), got {value!r}")
    _check_zoneout(recipe.zoneout, cell)
    if type(recipe.learned_state) is not bool:
        raise TypeError(f"learned_state should be of type bool, got {recipe.learned_state!r}; give True or False")
    if recipe.forget_bias is not None:
        gates = derived(cell).names.gates
        if not _is_number(recipe.forget_bias) or not math.isfinite(recipe.forget_bias):
            raise ValueError(f"forget_bias is a finite number or None, got {recipe.forget_bias!r}")
        if "f" not in gates or not bias:
            why = "bias=False" if "f" in gates else f"gates {', '.join(gates)} and no f"
            raise ValueError(
                f"forget_bias is the bias of a gate f, got {recipe.forget_bias!r} for a layer of {why}; leave it out"
            )
    what = "recurrent_dropout" if recipe.recurrent_dropout else "zoneout"
    noisy = any(rates(recipe, cell)) or recipe.recurrent_dropout
    if noisy and (CELLS[cell].products or CELLS[cell].means):
        raise ValueError(
            f"{what} is for cells of one stage, got {what}={getattr(recipe, what)!r} for {cell}, whose step has"
            " products or means between its parts; leave it out, or use weight_drop"
        )
    if proj_size and noisy:
        raise ValueError(
            f"{what} is not for a layer with projections, whose h is not its units', got {what}="
            f"{getattr(recipe, what)!r} and proj_size={proj_size}; leave one of them out, or use weight_drop"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_zoneout(zoneout: object, cell: str) -> None:
    given, states = zoneout if isinstance(zoneout, tuple) else (zoneout,), derived(cell).names.states
    if not all(_is_number(p) and 0 <= p <= 1 for p in given):
        raise ValueError(
            "zoneout is the probability that a unit keeps its state, a number in [0, 1] or a tuple of one for each "
            f"state, got {zoneout!r}"
        )
    form = f"({', '.join(states)})"
    if isinstance(zoneout, tuple) and len(zoneout) != len(states):
        raise ValueError(f"zoneout of this cell has a number for each of its states {form}, got {zoneout!r}")
    if len(given) < len(states) > 2 and given != (0,):
        raise ValueError(
            f"zoneout of a cell of {len(states)} states is a tuple {form}, as some of them may mean nothing one "
            f"without the others, got {zoneout!r}; give ({zoneout!r}{', 0' * (len(states) - 1)}) for h alone"
        )


def rates(recipe: Recipe, cell: str) -> tuple[float, ...]:
    """The zoneout of each state."""
    zoneout = recipe.zoneout
    return zoneout if isinstance(zoneout, tuple) else (zoneout,) * CELLS[cell].states


# ---- the weights ----------------------------------------------------------------------------------------------------


def recurrent_weight(weight_hh: Tensor, recipe: Recipe, training: bool) -> Tensor:
    """W_hh as a call multiplies by it."""
    if not training:
        return weight_hh
    if recipe.weight_drop > 0:
        weight_hh = F.dropout(weight_hh, recipe.weight_drop)
    return weight_hh / (1 - recipe.recurrent_dropout) if recipe.recurrent_dropout > 0 else weight_hh


@torch.no_grad()
def set_forget_bias(value: float, gates: Sequence[str], bias_ih: Tensor, bias_hh: Tensor) -> None:
    """So that the sum of both is that of the gate f."""
    units = bias_hh.size(0) // len(gates)
    first = gates.index("f") * units
    bias_ih[first : first + units] = value
    bias_hh[first : first + units] = 0.0


# ---- the recurrence -------------------------------------------------------------------------------------------------


def cell_of(cell: str, recipe: Recipe, training: bool) -> str:
    """The cell that a call runs."""
    zoneout, drops = rates(recipe, cell), hides(recipe, training)
    if not drops and not any(zoneout):
        return cell
    parts = tuple(float(p > 0) if training else float(p) for p in zoneout)
    return variant(cell, parts, training, drops)


def hides(recipe: Recipe, training: bool) -> bool:
    """Whether that cell's first state is what other units see of h, and h the second."""
    return bool(training and recipe.recurrent_dropout > 0)  # read, so that dynamo makes a constant of it


def new_keys(cell: str, recipe: Recipe, training: bool, rows: int, device: torch.device) -> Tensor | None:
    """Of the masks that ``cell_of`` reads, for layers times directions; None: it reads none."""
    zoneout = [p for p in rates(recipe, cell) if p > 0]
    if not training or not (zoneout or recipe.recurrent_dropout > 0):
        return None
    dropped = [recipe.recurrent_dropout] * (recipe.recurrent_dropout > 0)
    return masks.keys(device, rows, [*dropped, *zoneout], [True] * len(dropped) + [False] * len(zoneout))
