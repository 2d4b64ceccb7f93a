"""Programs that run under GSan, Triton's detector of data races in global memory: python gsan_runs.py NAME.

It traps in the kernel, so each program is a process of its own. It follows Triton's own operations only: the exchange
polls in a loop of Triton's here, and the protocol is the one that orders its reads behind its writes.
"""

import importlib.util
import sys

import torch
import triton
import triton.language as tl

from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.device.exchange import Exchange
from persistrnn.kernels.tensors import Weights

NOT_ENABLED = 77  # exit status


def missing() -> str | None:
    """Why there is no GSan here; None: there is."""
    try:
        found = importlib.util.find_spec("triton.experimental.gsan")
    except ModuleNotFoundError:
        found = None
    return None if found else f"Triton {triton.__version__} has no GSan (triton.experimental.gsan, from 3.9 on)"


@triton.jit
def unordered(buffer, found):
    """One program writes what the other one reads, and nothing orders the two."""
    if tl.program_id(0) == 0:
        tl.store(buffer, 1)
    else:
        tl.store(found, tl.load(buffer))


def race() -> None:
    buffer, found = (torch.zeros(32, dtype=torch.int32, device="cuda") for _ in range(2))
    unordered[(2,)](buffer, found)


def exchange() -> None:
    """Both passes, several slices; the second size splits its backward in two dimensions as well."""
    launch.exchange_for = lambda device: Exchange(protocol="counter", poll="atomic")
    for cell_name, hidden in (("lstm", 256), ("gru", 512), ("lstm", 1024)):
        cell, steps, batch = CELLS[cell_name], 6, 3

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.1

        initial, d_final = ([new(1, batch, hidden) for _ in range(cell.states)] for _ in range(2))
        weights = Weights(new(1, cell.gates * hidden, hidden), new(1, cell.gates * hidden))
        x_gates = new(steps, batch, 1, cell.gates * hidden)
        kept = launch.forward(cell, x_gates, weights, initial, "ieee", save=True)
        # Not through autograd, whose threads would take memory that GSan does not watch.
        launch.backward(cell, [new(steps, batch, 1, hidden)], d_final, weights.weight_hh, None, kept, "ieee")
        torch.cuda.synchronize()
        launch.check()


def main(name: str) -> int:
    from triton.experimental import gsan

    triton.knobs.compilation.instrumentation_mode = "gsan"
    try:
        pool = gsan.create_mem_pool()
        with torch.cuda.use_mem_pool(pool):
            torch.zeros(1, device="cuda")
    except Exception as error:  # no compiler for its allocator, say
        print(f"{type(error).__name__}: {error}")
        return NOT_ENABLED
    with torch.cuda.use_mem_pool(pool):
        {"race": race, "exchange": exchange}[name]()
        torch.cuda.synchronize()
    print("no race")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
