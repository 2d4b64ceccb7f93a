"""What lengths and resets mean, by torch.nn alone: each episode of each row is a sequence of its own.

An episode goes on from the initial state where the row begins (in reverse: where it ends), else from the reset state.
"""

import itertools

import torch
from pairs import CELLS, as_hx, tensors
from torch import Tensor


def episodes(steps: int, lengths: Tensor | None, resets: Tensor | None, row: int) -> list[tuple[int, int]]:
    end = steps if lengths is None else int(lengths[row])
    starts = [] if resets is None else [t for t in range(1, end) if resets[t, row]]
    edges = [0, *starts, end]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def by_pieces(module: torch.nn.RNNBase, leaves: dict[str, Tensor], lengths, resets) -> list[Tensor]:
    """[y, h_n] or [y, h_n, c_n] of torch.nn's ``module``, row by row and episode by episode. leaves: x, and the states
    h0, c0, reset_h0, reset_c0 of which there are some; the others are zero."""
    layers, D = module.num_layers, 2 if module.bidirectional else 1
    names = "hc"[: CELLS[module.mode.lower()].states]
    widths = {"h": module.proj_size or module.hidden_size, "c": module.hidden_size}
    steps, batch = leaves["x"].shape[:2]

    def given(kind: str, name: str, row: int) -> Tensor:
        found = leaves.get(f"{kind}{name}0")
        shape = (layers, D, widths[name])
        return leaves["x"].new_zeros(shape) if found is None else found[:, row].unflatten(0, shape[:2])

    columns, finals = [], []
    for row in range(batch):
        parts = [leaves["x"].new_zeros(0, D * widths["h"])]
        final = {n: [given("", n, row)[:, d] for d in range(D)] for n in names}
        pieces = episodes(steps, lengths, resets, row)
        for number, (a, b) in enumerate(pieces):
            # At the first step a reset replaces the initial state of the forward direction.
            fresh = number == 0 and not (resets is not None and bool(resets[0, row]))
            kinds = ["" if fresh else "reset_", "" if number == len(pieces) - 1 else "reset_"][:D]
            states = {
                n: torch.stack([given(kind, n, row)[:, d] for d, kind in enumerate(kinds)], 1).flatten(0, 1)
                for n in names
            }
            hx = as_hx(states[n].unsqueeze(1) for n in names)
            y, *out = tensors(module(leaves["x"][a:b, row : row + 1], hx))
            parts.append(y[:, 0])
            for n, s in zip(names, out, strict=True):
                ends = s[:, 0].unflatten(0, (layers, D))
                final[n][0] = ends[:, 0]  # of the last episode
                if D == 2 and number == 0:
                    final[n][1] = ends[:, 1]  # the reverse direction ends with the first one
        column = torch.cat(parts)
        columns.append(torch.nn.functional.pad(column, (0, 0, 0, steps - column.shape[0])))
        finals.append([torch.stack(final[n], 1).flatten(0, 1) for n in names])
    return [torch.stack(columns, 1), *(torch.stack(s, 1) for s in zip(*finals, strict=True))]
