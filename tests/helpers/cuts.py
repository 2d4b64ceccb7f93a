"""What lengths and resets mean, by torch.nn alone: each episode of each row is a sequence of its own.

An episode goes on from the initial state where the row begins (in reverse: where it ends), else from the reset state.
"""

import itertools
from dataclasses import dataclass

import accuracy
import torch
from pairs import CELLS, as_hx, tensors
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One stack, one input, and how its rows are cut."""

    cell: str
    dtype: str
    hidden: int
    batch: int
    steps: int
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    lengths: bool = False
    resets: bool = False
    state: bool = False
    reset_state: bool = False


def episodes(case: Case, lengths: Tensor | None, resets: Tensor | None, row: int) -> list[tuple[int, int]]:
    end = case.steps if lengths is None else int(lengths[row])
    starts = [] if resets is None else [t for t in range(1, end) if resets[t, row]]
    edges = [0, *starts, end]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def by_pieces(module: torch.nn.Module, case: Case, leaves: dict[str, Tensor], lengths, resets) -> list[Tensor]:
    """[y, h_n] or [y, h_n, c_n] of torch.nn's ``module``, row by row and episode by episode."""
    D = 2 if case.bidirectional else 1
    names = "hc"[: CELLS[case.cell].states]
    widths = {"h": case.proj or case.hidden, "c": case.hidden}

    def given(kind: str, name: str, row: int) -> Tensor:
        found = leaves.get(f"{kind}_{name}")
        shape = (case.layers, D, widths[name])
        return leaves["x"].new_zeros(shape) if found is None else found[:, row].unflatten(0, shape[:2])

    columns, finals = [], []
    for row in range(case.batch):
        parts = [leaves["x"].new_zeros(0, D * widths["h"])]
        final = {n: [given("initial", n, row)[:, d] for d in range(D)] for n in names}
        pieces = episodes(case, lengths, resets, row)
        for number, (a, b) in enumerate(pieces):
            # At the first step a reset replaces the initial state of the forward direction.
            fresh = number == 0 and not (resets is not None and bool(resets[0, row]))
            kinds = ["initial" if fresh else "reset", "initial" if number == len(pieces) - 1 else "reset"][:D]
            states = {
                n: torch.stack([given(kind, n, row)[:, d] for d, kind in enumerate(kinds)], 1).flatten(0, 1)
                for n in names
            }
            hx = as_hx(states[n].unsqueeze(1) for n in names)
            y, *out = tensors(module(leaves["x"][a:b, row : row + 1], hx))
            parts.append(y[:, 0])
            for n, s in zip(names, out, strict=True):
                ends = s[:, 0].unflatten(0, (case.layers, D))
                final[n][0] = ends[:, 0]  # of the last episode
                if D == 2 and number == 0:
                    final[n][1] = ends[:, 1]  # the reverse direction ends with the first one
        column = torch.cat(parts)
        columns.append(torch.nn.functional.pad(column, (0, 0, 0, case.steps - column.shape[0])))
        finals.append([torch.stack(final[n], 1).flatten(0, 1) for n in names])
    return [torch.stack(columns, 1), *(torch.stack(s, 1) for s in zip(*finals, strict=True))]


def ours(module: torch.nn.Module, case: Case, leaves: dict[str, Tensor], lengths, resets) -> list[Tensor]:
    initial, reset = (as_hx(t for name, t in leaves.items() if name.startswith(kind)) for kind in ("initial", "reset"))
    return tensors(module(leaves["x"], initial, lengths=lengths, resets=resets, reset_state=reset))


def run(case: Case, seed: int, backend: str = "persistent", device: str = "cpu") -> tuple[dict[str, Tensor], ...]:
    """(ours, truth, witness): outputs and gradients by name, as ``accuracy.run``."""
    dtype = accuracy.DTYPES.get(case.dtype, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    D, features = 2 if case.bidirectional else 1, case.proj or case.hidden
    options = {"num_layers": case.layers, "bidirectional": case.bidirectional}
    options |= {"proj_size": case.proj} if case.proj else {}
    torch.manual_seed(seed)
    ours_class, torch_class = accuracy.MODULES[case.cell]
    modules = [
        ours_class(5, case.hidden, **options, dtype=dtype, device=device, backend=backend),
        torch_class(5, case.hidden, **options, dtype=torch.float64),
        torch_class(5, case.hidden, **options, dtype=dtype, device=device),
    ]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    lengths = resets = None
    if case.lengths:
        lengths = torch.randint(0, case.steps + 1, (case.batch,), generator=generator)
        lengths[:2] = torch.tensor([0, case.steps])[: case.batch]
    if case.resets:
        resets = torch.rand(case.steps, case.batch, generator=generator) < 0.4
    rows = case.layers * D

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    given = {"x": numbers(case.steps, case.batch, 5)}
    for kind, there in (("initial", case.state), ("reset", case.reset_state)):
        if there:
            given[f"{kind}_h"] = numbers(rows, case.batch, features)
            if CELLS[case.cell].states > 1:
                given[f"{kind}_c"] = numbers(rows, case.batch, case.hidden)
    cotangents = {
        "y": numbers(case.steps, case.batch, D * features),
        "h_n": numbers(rows, case.batch, features),
        "c_n": numbers(rows, case.batch, case.hidden),
    }
    results = []
    for call, module in zip((ours, by_pieces, by_pieces), modules, strict=True):
        like = next(module.parameters())
        leaves = {n: t.to(like.device, like.dtype).requires_grad_() for n, t in given.items()}
        cut = [t if t is None or call is by_pieces else t.to(like.device) for t in (lengths, resets)]
        with torch.backends.mkldnn.flags(enabled=False):
            outputs = dict(zip(cotangents, call(module, case, leaves, *cut), strict=False))
            inputs = leaves | dict(module.named_parameters())
            grads = torch.autograd.grad(
                list(outputs.values()),
                list(inputs.values()),
                [cotangents[n].to(like.device, like.dtype) for n in outputs],
                allow_unused=True,
                materialize_grads=True,
            )
        found = outputs | {f"d {n}": g for n, g in zip(inputs, grads, strict=True)}
        results.append({n: t.detach().to("cpu", torch.float64) for n, t in found.items()})
    return tuple(results)
