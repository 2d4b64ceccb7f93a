"""The rivals' arms, against stand-ins in plain torch that have the rivals' call signatures: layouts, gate orders and
biases are right where the check of the race is green."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench.race import arms
from bench.race.arms import ARMS, Runner, Skip
from bench.race.correctness import Truth
from bench.report.results import Case

CPU = torch.device("cpu")
CASE = Case("suite", "name", "lstm", 5, 4, 1, False, 3, 6, "fp32", "training")


def lstm_triton(
    x: Tensor, hidden: Tensor, cell: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, is_init: Tensor,
    compute_dtype: torch.dtype = torch.float32, *, recompute: bool = False, input_precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """TorchRL's: batch first, the states before each step, products in ``compute_dtype``."""
    check_torchrl((x, hidden, cell, w_ih, w_hh, b_ih, b_hh), is_init, 4, input_precision)
    h, c, hs, cs = hidden[:, 0], cell[:, 0], [], []
    for t in range(x.shape[1]):
        start = is_init[:, t, None]
        h, c = torch.where(start, hidden[:, t], h), torch.where(start, cell[:, t], c)
        raw = product(x[:, t], w_ih, compute_dtype) + b_ih + product(h, w_hh, compute_dtype) + b_hh
        i, f, g, o = raw.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        hs.append(h)
        cs.append(c)
    return torch.stack(hs, 1), torch.stack(cs, 1), h, c


def gru_triton(
    x: Tensor, hidden: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, is_init: Tensor,
    compute_dtype: torch.dtype = torch.float32, *, recompute: bool = False, input_precision: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_torchrl((x, hidden, w_ih, w_hh, b_ih, b_hh), is_init, 3, input_precision)
    h, hs = hidden[:, 0], []
    for t in range(x.shape[1]):
        h = torch.where(is_init[:, t, None], hidden[:, t], h)
        r, z, n = (product(x[:, t], w_ih, compute_dtype) + b_ih).chunk(3, -1)
        hr, hz, hn = (product(h, w_hh, compute_dtype) + b_hh).chunk(3, -1)
        n = (n + (r + hr).sigmoid() * hn).tanh()
        z = (z + hz).sigmoid()
        h = (1 - z) * n + z * h
        hs.append(h)
    return torch.stack(hs, 1), h


def product(a: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return a.to(dtype).float() @ weight.to(dtype).float().T


def check_torchrl(tensors: tuple[Tensor, ...], is_init: Tensor, gates: int, precision: str | None) -> None:
    x, hidden, *others, w_ih, w_hh, b_ih, b_hh = tensors
    (B, T, width), H = x.shape, hidden.shape[-1]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    assert all(state.shape == (B, T, H) for state in (hidden, *others))
    assert (w_ih.shape, w_hh.shape, b_ih.shape) == ((gates * H, width), (gates * H, H), b_hh.shape)
    assert (is_init.shape, is_init.dtype) == ((B, T), torch.bool)
    assert precision in ("ieee", "tf32")


def flashrnn(
    Wx: Tensor, R: Tensor, b: Tensor, states: Tensor | None = None, function: str = "lstm", config: object = None,
    backend: str = "cuda_fused", dtype: str = "bfloat16",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FlashRNN's: batch first, a matrix per gate and head, all states of all steps."""
    B, T, G, heads, D = Wx.shape
    assert (R.shape, b.shape, G) == ((G, heads, D, D), (G, heads, D), 4)
    assert (function, backend, config, states) == ("lstm", "cuda_fused", None, None)
    assert {tensor.dtype for tensor in (Wx, R, b)} == {getattr(torch, dtype)}
    h = c = Wx.new_zeros(B, heads, D)
    found = []
    for t in range(T):
        i, f, z, o = (Wx[:, t] + torch.einsum("gndp,bnp->bgnd", R, h) + b).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        found.append(torch.stack([h, c]))
    return torch.stack(found, 2), found[-1][:, :, None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """installed(name, attribute=...): a module that can be imported."""

    def install(name: str, **attributes: object) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    return install


@pytest.fixture
def torchrl(installed: Callable[..., None]) -> None:
    installed("torchrl")
    installed("torchrl.modules")
    theirs = SimpleNamespace(lstm_triton=lstm_triton, gru_triton=gru_triton)
    installed("torchrl.modules.tensordict_module", _rnn_triton=theirs)


@pytest.fixture
def flash(installed: Callable[..., None]) -> None:
    installed("flashrnn", flashrnn=flashrnn)


def checked(arm: str, of: Case) -> Runner:
    """The arm, which is right, and which has the leaves of torch.nn's or, without the input's product, of ours."""
    truth = Truth(of, CPU)
    runner = ARMS[arm](of, truth.parameters, CPU)
    check = truth.check(arm, runner)
    assert check.ok, check.message
    assert [f"d {name}" for name in runner.leaves] == list(truth.true)[2:] or of.mode == "forward"
    assert runner.path() == arm
    for leaf in runner.leaves.values():
        assert leaf.is_leaf
        assert leaf.requires_grad
    return runner


@pytest.mark.usefixtures("torchrl")
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "tf32", "fp32"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_torchrl(cell: str, layers: int, dtype: str, mode: str) -> None:
    runner = checked("torchrl", replace(CASE, cell=cell, layers=layers, dtype=dtype, mode=mode))
    assert {leaf.dtype for leaf in runner.leaves.values()} == {torch.float32}
    assert runner.dtype == dtype


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(("input", "layers"), [(5, 1), (5, 2), (4, 1), (0, 1)])
def test_flashrnn(input: int, layers: int, mode: str) -> None:
    """Without the input's product one bias, and no W_ih: gradients to what the other arms have."""
    runner = checked("flashrnn", replace(CASE, input=input, layers=layers, dtype="bf16", mode=mode))
    assert {leaf.dtype for leaf in runner.leaves.values()} == {torch.bfloat16}
    assert input or list(runner.leaves) == ["weight_hh", "bias_hh"]


@pytest.mark.usefixtures("torchrl", "flash")
@pytest.mark.parametrize(
    ("arm", "changes", "reason"),
    [
        ("torchrl", {"bidirectional": True}, "one direction"),
        ("torchrl", {"input": 0}, "has the input's product inside"),
        ("flashrnn", {"cell": "gru"}, "have no GRU"),
        ("flashrnn", {"bidirectional": True}, "one direction"),
        ("flashrnn", {"dtype": "fp16"}, "compute in bfloat16"),
        ("flashrnn", {"input": 0, "layers": 2}, "is for one layer"),
        ("xma", {}, "XMA has no LSTM"),
        ("xma", {"cell": "gru"}, "XMA's GRU resets h before"),
    ],
)
def test_what_a_rival_does_not_run(
    arm: str, changes: dict[str, object], reason: str, installed: Callable[..., None]
) -> None:
    installed("xma")
    of = replace(CASE, **({"dtype": "bf16"} | changes))
    with pytest.raises(Skip, match=reason):
        ARMS[arm](of, arms.source(of), CPU)


@pytest.mark.parametrize(("arm", "what"), [("torchrl", "TorchRL"), ("flashrnn", "FlashRNN"), ("xma", "XMA")])
def test_a_rival_that_is_not_there(arm: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Skip, match=f"{what} is not installed"):
        ARMS[arm](replace(CASE, dtype="bf16"), {}, CPU)
