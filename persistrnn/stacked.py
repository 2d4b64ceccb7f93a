"""Layers one above the other, each of its own size and cell: with residuals, in alternating directions, summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from persistrnn import rows, tracing
from persistrnn.functional import Input
from persistrnn.kernels.cells import CELLS
from persistrnn.options import Options, check_flag, check_name, check_options
from persistrnn.recurrent import RecurrentBase, check_layer

Merge = Literal["concat", "sum"]


class Stacked(nn.Module):
    """A stack of layers, each a layer of this library with its own cell, hidden size, heads and `Recipe`:

        persistrnn.Stacked([persistrnn.LSTM(64, 512), persistrnn.LSTM(512, 256), persistrnn.GRU(256, 256)])

    Args:
        layers: the layers from the lowest to the highest, each of which reads what the one below gives out; alike in
            batch_first
        residual: whether a layer's input is added to its output (He et al. 2016; Wu et al. 2016 in recurrent stacks).
            The lowest is left out where its sizes differ; all others have one size
        alternate: whether every second layer reads the sequence from its end (Zhou and Xu 2015; He et al. 2017):
            with lengths or a PackedSequence from each row's own end. Of layers of one direction
        dropout: probability of a zero in what a layer below the highest gives out, in training, before a residual
        merge: what becomes of the two directions of a bidirectional layer's output: "concat", D*H features, or "sum"
            (Graves et al. 2013 in deep stacks), H features

    Inputs: input as that of the lowest layer, a PackedSequence too; hx, a tuple of one state for each layer, in its
    form; None: what each begins from by itself. By keyword lengths, mask, resets, reset_state (as hx) and
    return_cell_states (every c of the highest layer), as for `LSTM`.

    Outputs: output of the highest layer, in the input's form, and the tuple of the final states, one for each layer; of
    one that reads from the end it is that after the first step. With return_cell_states also every c, its directions
    side by side.

    Attributes:
        layers: torch.nn.ModuleList; the names in the state_dict are layers.0.weight_ih_l0 and so on
        bidirectional: whether the whole sequence is needed

    Raises: TypeError and ValueError for layers that do not fit each other, and all that the layers raise.
    """

    holds_ours = True  # to tools that swap layers: its own are of this library

    def __init__(
        self,
        layers: Iterable[RecurrentBase],
        *,
        residual: bool = False,
        alternate: bool = False,
        dropout: float = 0.0,
        merge: Merge = "concat",
    ) -> None:
        super().__init__()
        given = list(layers)
        for layer in given:
            check_layer(layer)
        self.layers = nn.ModuleList(given)
        self.residual, self.alternate, self.dropout, self.merge = residual, alternate, dropout, merge
        self._check()

    def _check(self) -> None:
        layers = self.each()
        if not layers:
            raise ValueError("layers has one layer at least, got none; give [persistrnn.LSTM(...), ...]")
        check_flag("residual", self.residual)
        check_flag("alternate", self.alternate)
        check_options(Options(dropout=self.dropout))
        check_name("merge", self.merge, get_args(Merge))
        for k, layer in enumerate(layers):
            if layer.batch_first != layers[0].batch_first:
                raise ValueError(f"layers are alike in batch_first, got {[of.batch_first for of in layers]}")
            if names := CELLS[layer.cell].extras:
                raise ValueError(f"layer {k} takes {names[0]} at each call, which a stack has not; call it by itself")
            below = layers[0].input_size if k == 0 else self._features(layers[k - 1])
            if layer.input_size != below:
                raise ValueError(
                    f"layer {k} has input_size={layer.input_size}, and layer {k - 1} gives {below} features"
                    f"{' (merge=' + repr(self.merge) + ')' if layers[k - 1].bidirectional else ''}; make them equal"
                )
            if self.residual and k > 0 and self._features(layer) != below:
                raise ValueError(
                    f"residual=True adds the {below} features that layer {k} reads to the {self._features(layer)} that "
                    "it gives; make them equal, or leave residual out"
                )
            if self.alternate and layer.bidirectional:
                raise ValueError(
                    f"alternate=True is for layers of one direction, got layer {k} with bidirectional=True; leave one "
                    "of them out"
                )
        if self.merge == "sum" and not any(layer.bidirectional for layer in layers):
            raise ValueError('merge="sum" is of bidirectional layers, got none; leave it out')

    def each(self) -> list[RecurrentBase]:
        """The layers, from the lowest."""
        return list(self.layers)  # type: ignore[arg-type]

    def _features(self, layer: RecurrentBase) -> int:
        """What a layer gives out."""
        wide = layer.bidirectional and self.merge == "concat"
        return (layer.proj_size or layer.hidden_size) * (2 if wide else 1)

    @property
    def batch_first(self) -> bool:
        return self.each()[0].batch_first

    @property
    def bidirectional(self) -> bool:
        return (self.alternate and len(self.layers) > 1) or any(layer.bidirectional for layer in self.each())

    def states_by_layer(self, states: object, name: str = "hx") -> list[Any]:
        """The states of each layer, None without.

        Raises:
            TypeError, ValueError: not a tuple or list of one for each
        """
        if states is None:
            return [None] * len(self.layers)
        if not isinstance(states, (tuple, list)):
            raise TypeError(f"{name} of a stack is a tuple of one state for each layer, got {type(states).__name__}")
        if len(states) != len(self.layers):
            raise ValueError(f"{name} has one state for each of {len(self.layers)} layers, got {len(states)}")
        return list(states)

    def forward(
        self,
        input: Input,
        hx: Any = None,
        *by_position: Any,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Any = None,
        return_cell_states: bool = False,
    ) -> Any:
        if by_position:
            return Stacked.forward(self, input, hx, **tracing.by_name(by_position))
        if (proxy := tracing.proxy_in(input, hx, lengths, mask, resets, reset_state)) is not None:
            cuts = {"lengths": lengths, "mask": mask, "resets": resets, "reset_state": reset_state}
            return tracing.leaf(proxy, self, input, hx=hx, return_cell_states=return_cell_states, **cuts)
        self._check()
        check_flag("return_cell_states", return_cell_states)
        states, anew = self.states_by_layer(hx), self.states_by_layer(reset_state, "reset_state")
        x, finals, c = input, [], None
        ahead = {"lengths": lengths, "mask": mask, "resets": resets}
        turn: Callable[[Any], Any] | None = None
        back: dict[str, Any] = {}
        for k, layer in enumerate(self.each()):
            turned, highest = self.alternate and k % 2 == 1, k == len(self.layers) - 1
            if turned and turn is None:  # the lowest layer has checked what is given
                turn, back = self._turned(x, **ahead)
            of_layer = {name: t for name, t in (back if turned else ahead).items() if t is not None}
            if anew[k] is not None:
                of_layer["reset_state"] = anew[k]
            given = turn(x) if turned and turn is not None else x
            y, final, *every = layer(given, states[k], return_cell_states=highest and return_cell_states, **of_layer)
            if turned and turn is not None:
                y, every = turn(y), [turn(t) for t in every]
            if layer.bidirectional and self.merge == "sum":
                y = _changed(y, lambda t: t.unflatten(-1, (2, -1)).sum(-2))
            if not highest and self.training and self.dropout > 0:
                y = _changed(y, lambda t: F.dropout(t, self.dropout))
            if self.residual and layer.input_size == self._features(layer):
                if isinstance(x, PackedSequence):
                    y = y._replace(data=y.data + x.data)
                else:
                    y = y + self._running(x, lengths, mask)
            x, c = y, every[0] if every else None
            finals.append(final)
        return (x, tuple(finals), c) if return_cell_states else (x, tuple(finals))

    def _running(self, x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
        """x, zero where a row has no step: what is added there is nothing."""
        if lengths is None and mask is None:
            return x
        if mask is None:
            assert lengths is not None
            mask = self._within(x, lengths)
        return torch.where(mask.unsqueeze(-1), x, 0.0)

    def _within(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self._times(x) < lengths.unsqueeze(self._time(x))

    def _time(self, x: Tensor) -> int:
        return 1 if self.batch_first and x.dim() == 3 else 0

    def _times(self, x: Tensor) -> Tensor:
        """The steps, laid out as x without its features: [T, 1], [1, T] or, unbatched, [T]."""
        times = torch.arange(x.size(self._time(x)), device=x.device)
        return times if x.dim() == 2 else times.unsqueeze(1 - self._time(x))

    def _turned(self, x: Any, lengths: Any, mask: Any, resets: Any) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        """What turns a sequence round, from each row's own end, and back; and what cuts the turned one."""
        if isinstance(x, PackedSequence):
            order = rows.turned(x.batch_sizes).to(x.data.device)
            return lambda of: of._replace(data=of.data[order]), {}
        time = self._time(x)
        if lengths is None:

            def turn(of: Tensor) -> Tensor:
                return of.flip(time)
        else:
            inside = self._within(x, lengths)
            last = lengths.long().clamp(0, x.size(time)).unsqueeze(time) - 1
            place = torch.where(inside, last - self._times(x), self._times(x))

            def turn(of: Tensor) -> Tensor:
                # not take_along_dim, which makes constants of T and B where it is traced
                return of.gather(time, place if of.dim() == 2 else place.unsqueeze(-1).expand_as(of))

        if resets is not None:
            # An episode begins, seen from the end, at the step before the next one.
            begins = resets if lengths is None else resets & inside
            resets = begins.roll(-1, time) & (self._times(x) < x.size(time) - 1)
            resets = turn(resets)
        return turn, {"lengths": lengths, "mask": None if mask is None else turn(mask), "resets": resets}

    def step(self, input: Tensor, hx: Any = None) -> tuple[Tensor, tuple[Any, ...]]:
        """One time step, as `LSTM.step`: y_t [B, features] of x_t [B, I] ([features] of [I] unbatched), and the states
        after it, one for each layer.

        Raises:
            ValueError: a stack that needs the whole sequence
        """
        self._check()
        if self.bidirectional:
            raise ValueError(
                "a stack in which a layer reads from the end has no steps; call it with the sequence, or use layers of "
                "one direction and alternate=False"
            )
        y, finals = input, []
        for k, (layer, state) in enumerate(zip(self.each(), self.states_by_layer(hx), strict=True)):
            below = y
            y, final = layer.step(below, state)
            if k < len(self.layers) - 1 and self.training and self.dropout > 0:
                y = F.dropout(y, self.dropout)
            if self.residual and layer.input_size == self._features(layer):
                y = y + below
            finals.append(final)
        return y, tuple(finals)

    def extra_repr(self) -> str:
        defaults = {"residual": False, "alternate": False, "dropout": 0.0, "merge": "concat"}
        given = {name: getattr(self, name) for name in defaults}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value != defaults[name])


def _changed(sequence: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or the data of a PackedSequence, changed."""
    return sequence._replace(data=change(sequence.data)) if isinstance(sequence, PackedSequence) else change(sequence)
