"""FLOPs by torch's own counter, exact: 2*T*B*G*H*(I + H) forward, twice that backward, and what runs again."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import persistrnn

ROOT = Path(__file__).resolve().parents[2]
T, B, INPUT, HIDDEN = 3, 2, 3, 4


def counted(layer: Any, x: torch.Tensor) -> tuple[int, int]:
    """Forward and backward."""
    with FlopCounterMode(display=False) as forward:
        y = layer(x)[0]
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def products(layer: Any) -> int:
    """Of one forward: with each matrix once per row and step."""
    return 2 * T * B * sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)


@pytest.mark.parametrize("make", [persistrnn.LSTM, persistrnn.GRU, persistrnn.RNN, persistrnn.MGU])
def test_on_torch_s_path(make: Any) -> None:
    layer, x = make(INPUT, HIDDEN, 2, bidirectional=True), torch.randn(T, B, INPUT, requires_grad=True)
    forward, backward = counted(layer, x)
    assert forward == products(layer)
    # ATen's loop, and ours, make no gradient of an initial state that wants none; oneDNN's LSTM does.
    spared = 0 if make is persistrnn.LSTM else 2 * B * sum(w[1].numel() for w in layer.all_weights)
    assert backward == 2 * forward - spared


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"heads": 2}], ids=str)
def test_on_the_kernels(options: dict[str, Any]) -> None:
    make = persistrnn.LSTM if options.get("heads") else persistrnn.GRU
    layer = make(INPUT, HIDDEN, backend="persistent", **options)
    x = torch.randn(T, B, INPUT, requires_grad=True)
    assert counted(layer, x) == (products(layer), 2 * products(layer))


@pytest.mark.interpreter
@pytest.mark.parametrize("save", ["state", "checkpoint"])
def test_in_chunks_what_runs_again_counts_again(save: Any) -> None:
    layer = persistrnn.PeepholeLSTM(INPUT, HIDDEN, backend="persistent", save=save)
    forward = products(layer)
    assert counted(layer, torch.randn(T, B, INPUT, requires_grad=True)) == (forward, 3 * forward)
    of_x = 2 * T * B * layer.weight_ih_l0.numel()
    assert counted(layer, torch.randn(T, B, INPUT)) == (forward, 3 * forward - of_x)


@pytest.mark.parametrize("make", [persistrnn.LSTM, persistrnn.MGU])
def test_of_an_exported_program(make: Any) -> None:
    layer, x = make(INPUT, HIDDEN), torch.randn(T, B, INPUT)
    program = torch.export.export(layer, (x,)).module()
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        program(x)
    assert forward.get_total_flops() == products(layer)


def test_the_counter_may_be_imported_afterwards() -> None:
    """And `import persistrnn` imports neither it nor Triton."""
    code = """
        import sys, persistrnn, torch
        assert not {"triton", "torch.utils.flop_counter"} & sys.modules.keys()
        from torch.utils.flop_counter import FlopCounterMode
        layer = persistrnn.LSTM(3, 4)
        with FlopCounterMode(display=False) as counter:
            layer(torch.ones(2, 2, 3))
        assert counter.get_total_flops() == 2 * 2 * 2 * 16 * 7, counter.get_total_flops()
        assert torch.ops.persistrnn.scan_forward in counter.flop_registry
        assert not any("persistrnn" in type(finder).__module__ for finder in sys.meta_path)
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


# ---- other people's counters ----------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.head = layer, torch.nn.Linear(HIDDEN, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0])


COUNTED = {
    "torch's path": lambda: persistrnn.GRU(INPUT, HIDDEN, 2),
    "chunks": lambda: persistrnn.LSTM(INPUT, HIDDEN, save="checkpoint"),
    "own operations": lambda: persistrnn.CoupledLSTM(INPUT, HIDDEN),
}


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", COUNTED)
def test_multiply_adds_of_fvcore(name: str) -> None:
    nn = pytest.importorskip("fvcore.nn")
    model = Model(COUNTED[name]())
    analysis = nn.FlopCountAnalysis(model, torch.randn(T, B, INPUT)).set_op_handle(**persistrnn.flops.fvcore_handles())
    assert analysis.total() == (products(model.layer) + products(model.head)) // 2
    assert not set(analysis.unsupported_ops()) & persistrnn.flops.fvcore_handles().keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COUNTED)
def test_multiply_adds_of_thop(name: str) -> None:
    thop = pytest.importorskip("thop")
    model = Model(COUNTED[name]())
    given = (torch.randn(T, B, INPUT),)
    found, _ = thop.profile(model, given, custom_ops=persistrnn.flops.thop_ops(), verbose=False)
    assert found == (products(model.layer) + products(model.head)) // 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COUNTED)
def test_multiply_adds_of_ptflops(name: str) -> None:
    ptflops = pytest.importorskip("ptflops")

    def counted_by_it(model: torch.nn.Module) -> int:
        return ptflops.get_model_complexity_info(
            model, (B, INPUT), backend="pytorch", as_strings=False, print_per_layer_stat=False, verbose=False,
            input_constructor=lambda _: {"x": torch.randn(T, B, INPUT)},
            custom_modules_hooks=persistrnn.flops.ptflops_hooks(),
        )[0]  # fmt: skip

    model = Model(COUNTED[name]())
    head = torch.nn.Sequential(model.head)
    bias = T * B * 2  # which ptflops counts in a Linear
    assert counted_by_it(model) == (products(model.layer) + products(head)) // 2 + bias


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", ["LSTM", "GRU", "RNN"])
def test_torchinfo_counts_as_it_does_torch_s(make: str) -> None:
    torchinfo = pytest.importorskip("torchinfo")
    found = [
        torchinfo.summary(Model(getattr(of, make)(INPUT, HIDDEN)), input_data=torch.randn(T, B, INPUT), verbose=0)
        for of in (persistrnn, torch.nn)
    ]
    assert found[0].total_mult_adds == found[1].total_mult_adds > 0
