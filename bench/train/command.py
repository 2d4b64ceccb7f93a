"""The command of a training program: trains, resumes, compares, or uses the trained model."""

import os
import signal
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bench import UsageError
from bench.train import checkpoint, comparison, layers, ranks
from bench.train.loop import BASELINE, Run, begin, look, train
from bench.train.options import flag, parser, split
from bench.train.ranks import say
from bench.train.workload import Workload


def run_all(program: type[Workload], job: Namespace, given: dict[str, Any]) -> None:
    """Trains, gives the finishing touches, measures on held-out data. With --compare the same again by torch.nn from
    the same weights, into a folder in job.output. In Triton's interpreter nothing but the steps, for the rest would
    take hours."""
    interpreted, kind = os.environ.get("TRITON_INTERPRET") == "1", program.settings_type
    folders, resume = [job.output], [job.resume]
    if job.compare:
        folders.append(job.output / BASELINE)
        # Interrupted before the second began, there is none of it to resume.
        resume.append(job.resume and ranks.by_first(lambda: checkpoint.exists(folders[1])))
    found = [look(program, *each, job.overwrite) for each in zip(folders, resume, strict=True)]
    if job.compare:
        comparison.check(kind.resumed(found[0]["settings"], given) if found[0] else kind.complete(given))
    runs: list[Run] = []
    paths = []
    for folder in folders:
        run = begin(program, found.pop(0), given, folder)
        if run.quality is None:
            say(f"{run.workload.summary}\n{run.explanation()}")
            train(run, folder, job.save_seconds)
            if not interpreted:
                run.finish(job, folder)
        runs.append(run)
        paths.append(layers.path(run.model))
        given = asdict(replace(run.settings, backend="torch.nn", save="gates"))
        del run.model, run.network, run.optimizer  # their memory shall not count as the other's
    if job.compare:
        say(comparison.curves([run.losses for run in runs], runs[0].workload.loss_unit))
    say(comparison.summary(runs, paths))
    say(f"This run is finished, its checkpoint is in {job.output}; without --resume a new one begins.")


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
    program.add_options(made.add_argument_group("this program"))
    job, given = split(program.settings_type, made.parse_args(arguments))
    using = bool(program.using and getattr(job, program.using))
    needed = flag(program.using) if using else "--resume" if job.resume else None
    try:
        if using and (job.resume or job.overwrite or job.compare):
            raise UsageError(
                f"{needed} given with --resume, --overwrite or --compare: it trains nothing; leave one of them out"
            )
        program.check_options(job)
        with ranks.connected():
            if needed and not ranks.by_first(lambda: checkpoint.exists(job.output)):
                raise UsageError(f"{needed} given, but {job.output} holds no checkpoint: train first, or name --output")
            if using:
                use(program, job, given)
            else:
                with checkpoint.held(job.output):
                    run_all(program, job, given)
    except (UsageError, OSError, ModuleNotFoundError) as error:
        if ranks.rank():  # rank 0 says it
            return 2
        text = str(error)
        if isinstance(error, OSError):
            text = (
                f"{error.filename or job.output} cannot be read or written ({error.strerror}): change its permissions, "
            )
            text += "make room, or name another; a checkpoint that was there before is kept"
        if isinstance(error, ModuleNotFoundError):  # of an extra, which has the program's name
            text = f"{error.name} is not installed: pip install 'persistrnn[{program.name}]'"
        made.error(text)
    except torch.OutOfMemoryError as error:
        made.error(f"the GPU's memory is full ({error}): take a smaller --batch or --sequence, or --save checkpoint")
    except KeyboardInterrupt as stop:  # without a number outside the training loop, where Ctrl-C stops at once
        number = signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
        compared = " --compare torch" if job.compare else ""
        say(f"{number.name}: every step taken is saved. Go on with --resume --output {job.output}{compared}")
        return 128 + number
    return 0
