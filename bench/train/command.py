"""The command of a training program: trains, resumes, compares, or uses the trained model."""

import signal
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from bench import UsageError
from bench.train import checkpoint, ranks
from bench.train.comparison import compare
from bench.train.layers import path
from bench.train.loop import Run, begin, look, measure, train
from bench.train.options import flag, parser, split
from bench.train.ranks import say
from bench.train.workload import Workload


def single(program: type[Workload], job: Namespace, given: dict[str, Any]) -> None:
    """Trains, gives the finishing touches, measures on held-out data."""
    run = begin(program, look(program, job.output, job.resume, job.overwrite), given, job.output)
    if run.quality is None:
        say(run.workload.summary)
        say(run.explanation())
        train(run, job.output, job.save_seconds)
        with run.using() as model:
            ranks.by_first(lambda: run.workload.finish(model, job, job.output))
        measure(run, job.output)
    assert run.quality is not None
    metrics = zip(run.quality, run.workload.metrics, strict=True)
    say(
        f"{run.step:,} steps, {run.speed:,.0f} {run.workload.unit}/s, {run.memory * 1024:,.0f} MiB, "
        f"path {path(run.model)}: {', '.join(f'{value:.4f} {metric}' for value, metric in metrics)}. "
        f"This run is finished, its checkpoint is in {job.output}; without --resume a new one begins."
    )


def use(program: type[Workload], job: Namespace, given: dict[str, Any]) -> None:
    """What a program does with its trained model; no step is taken, and nothing written."""
    content = look(program, job.output, resume=True)
    assert content is not None
    run = Run(program(program.settings_type.resumed(content["settings"], given)))
    run.load(content, to_train=False)
    with run.using() as model:
        ranks.by_first(lambda: run.workload.use(model, job))


def main(program: type[Workload], arguments: Sequence[str] | None = None) -> int:
    """Runs a training program. Returns the exit status: 0, or 128 plus the number of the signal that stopped it (2:
    bad usage). Under torchrun each process trains on its rows of every batch, and rank 0 shows and writes."""
    made = parser(program.settings_type, program.name, program.description)
    shared = vars(made.parse_args([]))
    program.add_options(made.add_argument_group("this program"))
    job, given = split(program.settings_type, made.parse_args(arguments))
    using = bool(program.using and getattr(job, program.using))
    needed = flag(program.using) if using else "--resume" if job.resume else None
    own = {name: value for name, value in vars(job).items() if name not in shared and value != made.get_default(name)}
    try:
        if using and (job.resume or job.overwrite or job.compare):
            raise UsageError(
                f"{needed} given with --resume, --overwrite or --compare: it trains nothing; leave one of them out"
            )
        if job.compare and own:
            raise UsageError(
                f"{', '.join(map(flag, own))} given with --compare, which shows curves, quality and cost, and nothing "
                "that these act on: leave one of them out"
            )
        program.check_options(job)
        with ranks.connected():
            if needed and not ranks.by_first(lambda: checkpoint.exists(job.output)):
                raise UsageError(f"{needed} given, but {job.output} holds no checkpoint: train first, or name --output")
            if using:
                use(program, job, given)
            else:
                with checkpoint.held(job.output):
                    (compare if job.compare else single)(program, job, given)
    except UsageError as error:
        if ranks.rank():  # rank 0 says it
            return 2
        made.error(str(error))
    except torch.OutOfMemoryError as error:
        made.error(f"the GPU's memory is full ({error}): take a smaller --batch or --sequence, or --save checkpoint")
    except KeyboardInterrupt as stop:  # without a number outside the training loop, where Ctrl-C stops at once
        number = signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
        compared = " --compare torch" if job.compare else ""
        say(f"{number.name}: every step taken is saved. Go on with --resume --output {job.output}{compared}")
        return 128 + number
    return 0
