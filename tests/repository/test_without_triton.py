"""Without Triton torch's own path serves, and an import error of our own is not taken for its absence."""

import os
import subprocess
import sys

NO_TRITON = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import persistrnn, torch
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
persistrnn.check()
for kind in (persistrnn.LSTM, persistrnn.GRU):
    layer = kind(5, 10)
    y, _ = layer(torch.randn(2, 3, 5))
    y.sum().backward()
    assert layer.last_path == "torch", layer.last_path
    assert layer.weight_hh_l0.grad is not None
print(persistrnn.explain(layer, 3, 2))
layer = persistrnn.LSTM(5, 10, backend="persistent")
print(persistrnn.explain(layer, 3, 2))
try:
    layer(torch.randn(2, 3, 5))
except RuntimeError as error:
    print(error)
"""
BROKEN = """
import sys, torch
sys.modules["persistrnn.kernels.device.tiles"] = None
import persistrnn
try:
    persistrnn.LSTM(5, 10, backend="persistent")(torch.zeros(2, 3, 5))
except ImportError as error:
    print(error.name)
"""


def printed(code: str) -> str:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_triton_torchs_own_path_serves() -> None:
    text = printed(NO_TRITON)
    assert text.count("Triton cannot be imported here; install triton >= 3.6 (Linux), or use backend='torch'.") == 2
    assert "path: torch" in text


def test_an_import_error_of_our_own_is_not_taken_for_a_missing_triton() -> None:
    assert printed(BROKEN).strip() == "persistrnn.kernels.device.tiles"
