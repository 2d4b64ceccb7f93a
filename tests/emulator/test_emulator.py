"""What the emulator says of wrong programs, and what it changes."""

import re

import emulated as cases
import pytest
import torch

import persistrnn
from emulator import EmulatorError
from persistrnn.kernels import launch
from persistrnn.kernels.device.exchange import Exchange

pytestmark = pytest.mark.emulator


@pytest.mark.parametrize(
    ("pattern", "by", "message"),
    [
        (r"(ld\.global\.cg[.\w]*\s+[^\[]*\[ ?%rd\d+ \+ )0( \])", r"\g<1>1048576\2", "outside of every tensor; nearest"),
        (r"(st\.global\.b16 \[%rd\d+)(\])", r"\g<1>+1\2", "misaligned"),
        (r"(ldmatrix[^;]*\[%r\d+)[^\]]*\]", r"\1+1048576]", "shared access of 16 bytes"),
        (r"st\.shared\S*\s[^;]*;", "", "which nobody wrote"),
        (r"ldmatrix", "ldmatrices", "ldmatrices.*does not know"),
        (r"add\.f32", "add.sat.f32", "add.sat.f32.*a modifier that the emulator does not know: sat"),
    ],
)
def test_a_wrong_access_is_told(emulated, forced, pattern, by, message):
    def mutate(ptx):
        return cases.replaced(pattern, by)(ptx) if "scan_forward" in ptx else ptx

    emulated("sm_90", mutate=mutate)
    forced(homes="shared")
    layer = persistrnn.LSTM(4, 24, backend="persistent", dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(EmulatorError, match=message):
        layer(torch.randn(3, 3, 4, dtype=torch.bfloat16))


RING = {"homes": "stream", "units": 32, "batch_tile": 32, "streamed_k_block": 32, "ring": 3}


@pytest.mark.parametrize("arch", cases.ARCHITECTURES)
def test_a_copy_is_there_when_its_threads_have_waited(emulated, forced, arch):
    """And not before: without the waits the kernel multiplies what nobody can know."""
    layer = persistrnn.LSTM(4, 104, backend="persistent", dtype=torch.bfloat16)
    x, found = torch.randn(3, 19, 4, dtype=torch.bfloat16), []
    for by in (r"\g<0>", "cp.async.wait_group 99;"):
        session = emulated(arch, mutate=cases.replaced(r"cp\.async\.wait_group\s+\d+;", by))
        forced(**RING)
        with torch.no_grad():
            found.append(layer(x)[0])
        assert session.reports
    assert found[0].isfinite().all()
    assert found[1].isnan().any()


def test_a_copy_over_what_others_still_read_is_told(emulated, forced):
    def mutate(ptx):
        return ptx.replace("bar.sync", "// bar.sync") if "scan_forward" in ptx else ptx

    emulated("sm_80", mutate=mutate)
    forced(**RING)
    layer = persistrnn.LSTM(4, 104, backend="persistent", dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(EmulatorError, match=r"cp\.async\.cg\S* is not ordered after the read"):
        layer(torch.randn(3, 19, 4, dtype=torch.bfloat16))


def test_wgmma_reads_copies_behind_a_proxy_fence(emulated, forced):
    """Behind the kernel's own where Triton has none, as 3.6.0; without either it is told."""
    layer = persistrnn.LSTM(4, 104, backend="persistent", dtype=torch.bfloat16)
    x = torch.randn(3, 19, 4, dtype=torch.bfloat16)
    of_triton = r"fence\.proxy\.async\.shared::cta;(?! mov)"
    emulated("sm_90", mutate=lambda ptx: re.sub(of_triton, "", ptx))
    forced(**RING)
    with torch.no_grad():
        layer(x)
        emulated("sm_90", mutate=lambda ptx: ptx.replace("fence.proxy.async.shared::cta;", ""))
        forced(**RING)
        with pytest.raises(EmulatorError, match="with no proxy fence between"):
            layer(x)


def test_the_interpreter_is_not_meant(emulated):
    emulated("sm_90")
    assert not launch.INTERPRETED
    assert launch.exchange_for(torch.device("cpu")) == Exchange()
