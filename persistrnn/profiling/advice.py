"""What to do about a profile, in words that follow from its numbers: each rule is a function, and silent where its
numbers say nothing. Predicted numbers are called so."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..decide import MODES
from .page import MIB, number
from .record import GIB, NO_KERNELS, Point, Profile
from .subject import OURS, TORCH
from .trace import IDLE, INPUT_GEMM, RECOMPUTE, WEIGHT_GEMMS

FREE = 1.15  # times the step's time at which a larger batch is nearly free
FIXED_SHARE = 0.2
CLEARLY_LESS = 0.2  # more than the predictions may be wrong by
EQUAL = 0.05  # times that differ by less are equal


def advice(profile: Profile) -> list[str]:
    """A few sentences each, the most general first."""
    return [words for rule in RULES for words in rule(profile)]


def untraced(profile: Profile) -> Iterator[str]:
    """A GPU whose kernels torch's profiler could not see."""
    points = [point for point in profile.points if point.untraced == NO_KERNELS]
    if points:
        steps = ", ".join(dict.fromkeys(f"{point.steps:,}" for point in points))
        yield (
            f"The profiler saw no kernels at T = {steps}: where the time goes is not known, and host time does not "
            "stand for it. CUPTI is held by another profiler (nsys, ncu, DCGM: end it), or not allowed to this user "
            "(ask for NVreg_RestrictProfilingToAdminUsers=0); then profile again."
        )


def compared(profile: Profile) -> Iterator[str]:
    """Both arms at the longest T that both have."""
    first, *others = ({point.steps: point for point in profile.of(arm)} for arm in profile.arms)
    second = others[0] if others else {}
    both = first.keys() & second.keys()
    if not both:
        return
    ours, theirs = first[max(both)], second[max(both)]
    ratio, less = theirs.seconds / ours.seconds, 1 - ours.peak / theirs.peak if ours.peak and theirs.peak else 0.0
    spread = max(ours.high / ours.low, theirs.high / theirs.low) - 1
    if abs(ratio - 1) <= max(EQUAL, spread):
        found = f"{ours.arm} and {theirs.arm} take the same time within the spread at T = {ours.steps:,}"
    else:
        faster, slower = (ours.arm, theirs.arm) if ratio > 1 else (theirs.arm, ours.arm)
        found = f"{faster} is {max(ratio, 1 / ratio):.2f} times as fast as {slower} at T = {ours.steps:,}"
    if abs(less) > EQUAL:
        found += f"; {ours.arm} needs {abs(less):.0%} {'less' if less > 0 else 'more'} memory per token"
    if {OURS, TORCH} == set(profile.arms) and "torch" in ours.path.split(", "):
        found += ". Both ran torch's own kernels: what differs is the load of the machine, or our Python around them"
    yield f"{found}."


def batch(profile: Profile) -> Iterator[str]:
    """Rows that a step has room for."""
    found = profile.outlook
    if found is None:
        return
    totals = {rows: sum(parts.values()) for rows, parts in found.batches.items()}
    now, parts = totals[found.batch], found.batches[found.batch]
    waits = (parts["synchronisation"] + parts["state"]) / now
    free = max((rows for rows, total in totals.items() if total <= FREE * now), default=found.batch)
    cheap = max((rows for rows, total in totals.items() if 2 * total / now <= rows / found.batch), default=found.batch)
    rows = free if free > found.batch else cheap
    if rows > found.batch:
        more, factor = totals[rows] / now, rows // found.batch
        gain = f"{rows} makes it {more:.2f} times as long, for {factor} times the rows."
        if rows == free:
            gain = f"{rows} is nearly free, {more:.2f} times the step for {factor} times the rows."
        yield (
            f"{waits:.0%} of the step is synchronisation and reading the state (barriers, and exchange between slices; "
            f"predicted for {found.device}): batch {found.batch} to {gain}"
        )


def dtype(profile: Profile) -> Iterator[str]:
    """Half precision."""
    found = profile.outlook
    if found is None or "bf16" not in found.dtypes or found.dtype in ("bf16", "fp16"):
        return
    before, after = found.dtypes[found.dtype], found.dtypes["bf16"]
    if before >= FREE * after:
        yield (
            f"In bf16 a step is predicted to take {after:.2f} us on {found.device}, in {found.dtype} {before:.2f}: "
            "autocast, or bfloat16 parameters."
        )


def streamed(profile: Profile) -> Iterator[str]:
    """What of W_hh is not resident."""
    found = profile.outlook
    if found is not None and found.resident <= 0.995:
        weights = sum(one.parts["weights"] for one in found.passes.values()) / found.total
        yield (
            f"{1 - found.resident:.0%} of W_hh does not fit on {found.device} and is read again at each step, "
            f"{weights:.0%} of the step (predicted): a smaller hidden size, or a dtype of fewer bytes."
        )


# (phases, the least share of the time, what to do about it), of the first arm at its longest T.
SHARES = (
    (
        (INPUT_GEMM, WEIGHT_GEMMS),
        0.5,
        "{share:.0%} of the time is products over all steps at once, not the recurrence: they run at the device's full "
        "rate, and only a dtype of fewer bytes or smaller layers make them faster.",
    ),
    (
        (RECOMPUTE,),
        0.25,
        '{share:.0%} of the time is recomputing what was not kept: save="gates", where the memory suffices, keeps it.',
    ),
    (("optimizer",), 0.15, "{share:.0%} of the time is the optimizer: fused=True, or a step after several batches."),
    (
        (IDLE,),
        0.15,
        "The device is idle for {share:.0%} of the iteration, while the host launches the next kernels: longer "
        "sequences, a larger batch, torch.compile, or a CUDA graph.",
    ),
)


def shares(profile: Profile) -> Iterator[str]:
    """What takes much of the time."""
    for point in [point for point in profile.of(profile.arms[0]) if point.phases][-1:]:
        for names, least, text in SHARES:
            share = sum(point.phases[name].seconds for name in names if name in point.phases) / point.seconds
            if share >= least:
                yield text.format(share=share)


def fixed(profile: Profile) -> Iterator[str]:
    """What does not grow with T."""
    points = profile.of(profile.arms[0])
    if len(points) < 2:
        return
    first, last = points[0], points[-1]
    slope = (last.seconds - first.seconds) / (last.steps - first.steps)
    constant = first.seconds - slope * first.steps
    if slope > 0 and constant >= FIXED_SHARE * first.seconds:
        yield (
            f"{constant * 1e3:.3g} ms of an iteration do not grow with T, {constant / first.seconds:.0%} of it at "
            f"T = {first.steps:,} and {constant / last.seconds:.0%} at T = {last.steps:,}: longer sequences use them "
            "better."
        )


def memory(profile: Profile) -> Iterator[str]:
    """How long sequences can be."""
    arm = profile.arms[0]
    most = profile.longest(arm)
    if most:
        point = [point for point in profile.of(arm) if point.peak][-1]
        failed = [other for other in profile.points if other.arm == arm and other.failed]
        yield (
            f"{point.bytes_per_token / 1024:.3g} KiB per token: about T = {most:,} fits in "
            f"{profile.machine.memory / GIB:.1f} GiB (extrapolated from what was measured)"
            + _smaller_mode(point, profile.machine.kind)
            + (f". T = {failed[0].steps:,} did not fit." if failed else ".")
        )


def _smaller_mode(point: Point, kind: str) -> str:
    """The mode that is predicted to need the least memory, where that is clearly less."""
    known = ("persistent", "torch") if kind == "cpu" else ("persistent",)  # what cuDNN keeps is not known
    calls = [call for call in point.calls if call.save == "gates" and call.path in known]
    needs = {mode: sum(call.needed(mode) for call in calls) for mode in reversed(MODES)}  # of equals the last
    least = min(needs, key=lambda mode: needs[mode])
    if needs[least] > (1 - CLEARLY_LESS) * needs["gates"] or not calls:
        return ""
    now, then = (needs[mode] / MIB for mode in ("gates", least))
    return (
        f'; at T = {point.steps:,} save="{least}" is predicted to need {number(then)} MiB in the recurrent layers, '
        f'where save="gates" needs {number(now)}'
    )


RULES: tuple[Callable[[Profile], Iterator[str]], ...] = (
    untraced, compared, batch, dtype, streamed, shares, fixed, memory,
)  # fmt: skip
