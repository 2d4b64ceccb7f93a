"""The runners of the race: each does the same work on the same numbers, with gradients to the same tensors.

An arm makes a ``Runner`` of a case, or raises ``Skip`` with the reason. Rivals are used through their public functions
where they are importable; none is needed.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import persistrnn
from bench.report.results import Case
from persistrnn import autograd
from persistrnn.kernels.cells import CELLS

TORCH = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
OURS = {"lstm": persistrnn.LSTM, "gru": persistrnn.GRU}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


class Skip(Exception):
    """This arm does not run this case; the text says why."""


@dataclass(frozen=True)
class Runner:
    """One arm on one case. ``forward(x)`` gives the output in the arm's own dtype; ``leaves`` are its parameters, in
    torch.nn's names and order; ``path`` says which kernels ran, once they have."""

    forward: Callable[[Tensor], Tensor]
    leaves: dict[str, Tensor]
    dtype: str
    path: Callable[[], str]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """float32 products, of RNNs and of matrices, in tf32 for "tf32" and in full for anything else."""
    rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = rnn.fp32_precision, matmul.fp32_precision  # type: ignore[attr-defined]
    wanted = "tf32" if dtype == "tf32" else "ieee"
    rnn.fp32_precision = matmul.fp32_precision = wanted  # type: ignore[attr-defined]
    try:
        yield
    finally:
        rnn.fp32_precision, matmul.fp32_precision = before  # type: ignore[attr-defined]


def source(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """torch.nn's initial parameters of a case, in float32 on the CPU: every arm starts from these numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = TORCH[case.cell](case.input or case.hidden, case.hidden, case.layers, bidirectional=case.bidirectional)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def input_shape(case: Case) -> tuple[int, ...]:
    """[T, B, I], or with the input's product left out [T, B, G*H]."""
    return case.steps, case.batch, case.input or CELLS[case.cell].gates * case.hidden


def lengths(case: Case) -> Tensor:
    """int64 [B] on the CPU: from T of the first row down to half of it."""
    return case.steps - torch.arange(case.batch) * case.steps // (2 * case.batch)


def resets(case: Case) -> Tensor:
    """bool [T, B] on the CPU: in the middle of even rows, a quarter into odd ones."""
    found = torch.zeros(case.steps, case.batch, dtype=torch.bool)
    found[case.steps // 2, ::2] = True
    found[case.steps // 4, 1::2] = True
    return found


def packed(module: torch.nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """y of rows of several lengths, in descending order, by torch.nn; zeros past their ends."""
    y, _ = module(pack_padded_sequence(x, lengths))
    return pad_packed_sequence(y, total_length=len(x))[0]


def _module(module: torch.nn.Module, parameters: dict[str, Tensor], dtype: str, path: Callable[[], str],
            forward: Callable[[Tensor], Tensor] | None = None) -> Runner:  # fmt: skip
    module.load_state_dict(parameters)
    return Runner(forward or (lambda x: module(x)[0]), dict(module.named_parameters()), dtype, path)


def recurrent(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of one layer whose input's product is left out, b_ih with it."""
    return {name: parameters[f"{name}_l0"] for name in ("weight_hh", "bias_hh")}


def _leaves(parameters: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: p.to(device, dtype, copy=True).requires_grad_() for name, p in parameters.items()}


def persistent(case: Case, parameters: dict[str, Tensor], device: torch.device) -> Runner:
    """Our kernels, or an error: never torch's path by the back validate."""
    dtype = DTYPES[case.dtype]
    if case.input:
        options = {"bidirectional": case.bidirectional, "device": device, "dtype": dtype, "backend": "persistent"}
        module = OURS[case.cell](case.input, case.hidden, case.layers, **options)
        marks = {case.marks: MARKS[case.marks](case).to(device)} if case.marks else {}
        return _module(module, parameters, case.dtype, lambda: module.last_path, lambda x: module(x, **marks)[0])
    if case.layers > 1 or case.bidirectional:
        raise Skip("leaving the input's product out is for one layer of one direction")
    leaves = _leaves(recurrent(parameters), device, dtype)
    h0 = torch.zeros(1, case.batch, case.hidden, device=device, dtype=dtype)
    initial = [h0] * CELLS[case.cell].states
    asked = "tf32" if case.dtype == "tf32" else "ieee"

    def forward(x: Tensor) -> Tensor:
        weight, bias = (leaf[None] for leaf in leaves.values())
        return autograd.recurrent(case.cell, x.unsqueeze(2), weight, bias, initial, asked).y

    return Runner(forward, leaves, case.dtype, lambda: "persistent")


def torch_nn(case: Case, parameters: dict[str, Tensor], device: torch.device, dtype: str = "") -> Runner:
    """torch.nn in the case's dtype, or in ``dtype``, its weights packed once as cuDNN wants them."""
    dtype = dtype or case.dtype
    if not case.input:
        raise Skip("torch.nn cannot leave the input's product out")
    if case.marks == "resets":
        raise Skip("torch.nn has no resets")
    module = TORCH[case.cell](
        case.input, case.hidden, case.layers, bidirectional=case.bidirectional, device=device, dtype=DTYPES[dtype]
    )
    rows = lengths(case)
    forward = (lambda x: packed(module, x, rows)) if case.marks == "lengths" else None
    runner = _module(module, parameters, dtype, lambda: "torch", forward)
    module.flatten_parameters()
    return runner


MARKS = {"lengths": lengths, "resets": resets}


def _needs(name: str, what: str, case: Case) -> None:
    if case.marks:
        raise Skip(f"{case.marks} are raced against torch.nn only")
    if importlib.util.find_spec(name) is None:
        raise Skip(f"{what} is not installed")


def torchrl(case: Case, parameters: dict[str, Tensor], device: torch.device) -> Runner:
    """TorchRL's Triton recurrence, layer after layer, without resets; batch-first, so x and y are transposed views."""
    _needs("torchrl", "TorchRL", case)
    if case.bidirectional:
        raise Skip("TorchRL's Triton recurrence has one direction")
    if not case.input:
        raise Skip("TorchRL's Triton recurrence has the input's product inside")
    from torchrl.modules.tensordict_module import _rnn_triton as theirs

    run = {"lstm": theirs.lstm_triton, "gru": theirs.gru_triton}[case.cell]
    # It takes float32 tensors and casts the products' operands.
    leaves = _leaves(parameters, device, torch.float32)
    compute = torch.float32 if case.dtype in ("tf32", "fp32") else DTYPES[case.dtype]
    asked = "tf32" if case.dtype == "tf32" else "ieee"
    state = torch.zeros(case.batch, case.steps, case.hidden, device=device)
    resets = torch.zeros(case.batch, case.steps, dtype=torch.bool, device=device)
    states = (state, state) if case.cell == "lstm" else (state,)

    def forward(x: Tensor) -> Tensor:
        y = x.float().transpose(0, 1)
        for layer in range(case.layers):
            names = (f"{n}_l{layer}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            y = run(y, *states, *(leaves[n] for n in names), resets, compute, input_precision=asked)[0]
        return y.transpose(0, 1)

    return Runner(forward, leaves, case.dtype, lambda: "torchrl")


def flashrnn(case: Case, parameters: dict[str, Tensor], device: torch.device) -> Runner:
    """FlashRNN's fused CUDA LSTM with one head; the input's product by torch."""
    _needs("flashrnn", "FlashRNN", case)
    if case.cell != "lstm":
        raise Skip("FlashRNN's fused kernels have no GRU")
    if case.bidirectional:
        raise Skip("FlashRNN has one direction")
    if case.dtype != "bf16":
        raise Skip("FlashRNN's fused kernels compute in bfloat16")
    if not case.input and case.layers > 1:
        raise Skip("leaving the input's product out is for one layer")
    from flashrnn import flashrnn as run

    leaves = _leaves(parameters if case.input else recurrent(parameters), device, DTYPES[case.dtype])
    H = case.hidden

    def scan(gates: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shape = case.batch, case.steps, 4, 1, H
        states, _ = run(
            gates.reshape(shape), weight.view(4, 1, H, H), bias.view(4, 1, H), function="lstm", backend="cuda_fused"
        )
        return states[0, :, :, 0]  # of [states, B, T, heads, H]; state 0 is h

    def forward(x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        if not case.input:
            return scan(y, *leaves.values()).transpose(0, 1)
        for layer in range(case.layers):
            w, r, b, c = (leaves[f"{n}_l{layer}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            y = scan(F.linear(y, w), r, b + c)
        return y.transpose(0, 1)

    return Runner(forward, leaves, case.dtype, lambda: "flashrnn")


def xma(case: Case, parameters: dict[str, Tensor], device: torch.device) -> Runner:
    """XMA has no function of ours: its GRU multiplies r with h before the product, and there is no LSTM."""
    _needs("xma", "XMA", case)
    raise Skip("XMA has no LSTM" if case.cell == "lstm" else "XMA's GRU resets h before the product: another function")


ARMS: dict[str, Callable[[Case, dict[str, Tensor], torch.device], Runner]] = {
    "persistrnn": persistent,
    "torch": torch_nn,
    "torchrl": torchrl,
    "flashrnn": flashrnn,
    "xma": xma,
}
