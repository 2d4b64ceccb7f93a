"""What the tests of compiled kernels share: precisions, cases, and defects of PTX.

A mutant takes the PTX of a kernel and breaks it. Most leave the numbers right under nearly every schedule, on a CPU as
on a GPU: it is the race detector that must see them.
"""

import re
from types import SimpleNamespace

import torch
from torch import Tensor

from persistrnn import reference

ARCHITECTURES = ("sm_80", "sm_90")


def scans(session) -> list[str]:
    """Names of the scans that were launched, in order."""
    return [report.kernel.name for report in session.reports if report.kernel.name.startswith(("scan", "staged"))]


def precise(monkeypatch, asked: str) -> None:
    """How float32 is multiplied in every RNN: "ieee" or "tf32"."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", asked)


# ---- tf32 ---------------------------------------------------------------------------------------------------------


def rounded(x: Tensor) -> Tensor:
    """To 10 bits of mantissa, to nearest, ties away from zero."""
    return ((x.float().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32).to(x.dtype)


class _Product(torch.autograd.Function):
    """x @ W^T of rounded operands, forward and backward; dW exact, for it is no part of the kernels."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return rounded(x) @ rounded(weight).T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return rounded(gradient) @ rounded(weight), gradient.T @ x


def with_rounded_operands(monkeypatch) -> None:
    """The reference multiplies as tf32 does with rounded operands."""
    linear = SimpleNamespace(linear=lambda x, weight, bias: _Product.apply(x, weight) + bias)
    monkeypatch.setattr(reference, "F", linear)


# ---- mutants ------------------------------------------------------------------------------------------------------


def replaced(pattern: str, by: str):
    """All occurrences of ``pattern``, of which there must be one."""

    def mutate(ptx: str) -> str:
        mutant, count = re.subn(pattern, by, ptx)
        assert count, f"nothing to break: {pattern}"
        return mutant

    return mutate


# Name -> (how to break the protocol, whether the numbers stay right: then the race detector alone can see it).
COUNTER = {
    "acquire is relaxed": (replaced(r"ld\.acquire\.gpu", "ld.relaxed.gpu"), True),
    "release is relaxed": (replaced(r"red\.release\.gpu", "red.relaxed.gpu"), True),
    "no barrier before the release": (
        replaced(r"(?s)bar\.sync\s+0;((?:(?!bar\.sync).)*?mov\.u32 thread)", r"\1"), True,
    ),
    "waits for one less": (replaced(r"(setp\.ge\.s32 reached, seen)", r"add.s32 seen, seen, 1;\n\1"), False),
    "does not wait": (replaced(r"setp\.ge\.s32 reached, seen, [^;]*;", "setp.eq.s32 reached, seen, seen;"), False),
    "announces twice": (replaced(r"(@first )(red\.[^;]*;)", r"\1\2 \1\2"), False),
}  # fmt: skip
_SECOND_LOADS = r"ld\.relaxed\.gpu\.global"
FLAGS = {
    "plain stores": (replaced(r"st\.relaxed\.gpu\.global", "st.global"), True),
    "plain first loads": (replaced(r"ld\.volatile\.global", "ld.global"), True),
    "plain second loads": (replaced(_SECOND_LOADS, "ld.global.cg"), True),
    # A word is stored whole, and loaded so: two halves, or two words at once, would tear.
    "words stored by halves": (
        replaced(
            r"@there st\.relaxed\.gpu\.global\.b32 \[(\S+)\], (\S+);",
            r".reg .b16 a, b; mov.b32 {a, b}, \2;"
            r" @there st.relaxed.gpu.global.b16 [\1], a; @there st.relaxed.gpu.global.b16 [\1+2], b;",
        ),
        False,  # and does, here
    ),
    "two words loaded at once": (
        replaced(
            r"(@\S+ )ld\.volatile\.global\.v2\.b32 \{ (\S+), (\S+) \}, \[ (\S+) \+ 0 \];",
            r"{ .reg .b64 both; \1ld.volatile.global.b64 both, [\4]; \1mov.b64 {\2, \3}, both; }",
        ),
        True,
    ),
    "no test": (replaced("@!missing bra done;", "bra done;"), False),
}
# Of one poller for all threads of a program.
NO_BARRIER = replaced(r"barrier\.red\.and\.pred reached, 0, reached;", "")
GROUPS = {  # of warps that multiply together
    "no proxy fence": replaced(r"fence\.proxy\.async[^;]*;", ""),
    "no wait for the products": replaced(r"wgmma\.wait_group\.sync\.aligned\s+0;", "wgmma.wait_group.sync.aligned 7;"),
}
