"""The trainer of a configured run on one worker, which is a process or simulated: setup, loop, evaluation, counters."""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.runs.batched import BatchedGradients
from lab.runs.config import Config
from lab.runs.progress import live, megabytes
from lab.runs.run_checkpoints import FINAL_WEIGHTS, NEVER, CheckpointPolicy, RunCheckpoints, StopAndSaveVote
from lab.runs.run_checks import Inspector, NoiseCheck, StepSizeCheck, noise_warning
from lab.runs.run_folder import RunFolder
from lab.runs.training import CompressedTraining, LocalTraining, Training
from lab.tasks.images import load_data
from lab.tasks.models import Task, average_buffers, connect, make_task
from lab.tasks.sharding import Calendar, deal, shard
from packsaddle.checkpoint.files import CheckpointError
from packsaddle.checkpoint.save_load import Checkpoint
from packsaddle.comm.communicator import Communicator, check_agreement
from packsaddle.comm.group import Group, Solo, resolve
from packsaddle.comm.launching import local_device
from packsaddle.comm.ledger import Bytes, Ledger
from packsaddle.comm.simulation import FusedGroup, SimulatedGroup
from packsaddle.curvature.narrow_convolutions import has_narrow_convolutions
from packsaddle.errors import config_errors
from packsaddle.feedback.escape import Escape
from packsaddle.feedback.guard import NonFiniteError
from packsaddle.numerics.devices import device_of_doubles
from packsaddle.numerics.seeds import Stream, mix


@dataclass
class RunCounters:
    """One worker's counters. Only `step` and `since` are always identical on all workers."""

    step: int = 0  # number of steps done
    since: int = 0  # `step` at the last line of metrics
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))  # sums of losses, gradient norms
    final: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))  # sum of the last epoch's losses
    line: dict[str, Any] = field(default_factory=dict)  # the latest line of metrics; the last step always writes a line
    elapsed: float = 0.0  # seconds of the run at the last checkpoint
    left_out: int = 0  # skipped steps, without a loss, since the last line of metrics
    in_final: int = 0  # number of losses in `final`
    tested: float = 0.0  # seconds spent on tests along the run
    saved: float = 0.0  # seconds spent on saving checkpoints
    noise: dict[str, Any] | None = None  # result of the last noise check (see `run_checks`)

    def add(self, measured: Tensor, *, taken: bool, last: bool) -> None:
        """Add a step's loss and gradient norm, float64[2]. If `taken` is False, the step is only counted as skipped.

        `last` is True in the last epoch, whose mean loss is the final loss.
        """
        if not taken:
            self.left_out += 1
            return
        self.sums += measured
        if last:
            self.final += measured[0]
            self.in_final += 1

    def totals(self) -> Tensor:
        return torch.cat([self.sums, self.sums.new_tensor([self.step - self.since - self.left_out])])

    def begin_line(self) -> None:
        self.sums, self.since, self.left_out = torch.zeros_like(self.sums), self.step, 0

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not isinstance(v, Tensor)}

    def load_state_dict(self, state: Mapping[str, Any], sums: Tensor, final: Tensor) -> None:
        """Restore all fields: `sums` and `final` from these tensors, the rest from the result of `state_dict`."""
        vars(self).update(state)
        self.sums, self.final = sums.clone(), final.clone()


EVAL_BATCH = 512  # examples per batch in tests
_NOT_TRAINING = ("start", "metrics", "buffers", "guard")  # purposes whose bytes are not counted as gradients


class Trainer:
    """The training of a configured run on one worker. Construction and `run` are collective.

    With `batched` the gradients of all simulated workers are computed in one pass (see `lab.runs.batched`).
    """

    def __init__(self, config: Config, data_dir: Path | None, download: bool, batched: bool = False) -> None:
        self.config = config
        self.group = resolve(None)
        self.device = device_of_doubles(local_device())  # losses are summed in float64
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.data = load_data(config.data, data_dir, train=True, download=download)
        self.test_data = load_data(config.data, data_dir, train=False, download=download)
        found = {"training examples": len(self.data), "test examples": len(self.test_data)}
        with config_errors():  # an error on one worker is raised on all, since workers may read different files
            check_agreement(Communicator(self.group, Ledger()), found, self.device)
        rank, size = self.group.rank, self.group.size
        # The ranks of the workers in this process: all of them in a fused simulation, and otherwise a single one.
        self.members = range(size) if isinstance(self.group, FusedGroup) else range(rank, rank + 1)
        self.history = [(0, size)]
        self._plan()
        start = mix(config.seed, int(Stream.INIT)) >> 33
        shape, parts = self.data.shape, len(self.members)
        task = make_task(config.model, shape, self.data.classes, start, parts).to(self.device, self.dtype)
        # Convolutions on a CPU are 25% faster in channels_last, but gradients of narrow ones are wrong in it.
        layout = torch.contiguous_format if has_narrow_convolutions(task) else torch.channels_last
        self.task: Task = task.to(memory_format=layout)  # type: ignore[call-overload]
        calendar = self.calendar
        self.training = self._training()
        connect(self.task, self.training.channel)
        self.batched = None
        if batched:
            assert isinstance(self.group, SimulatedGroup)
            self.batched = BatchedGradients(self.task, self.group, self._batch, self.training.channel, self._autocast)
        self.inspector = None
        if config.certify is not None:
            self.inspector = Inspector(config, self.task, self.data, self.shards, calendar.steps, calendar.per_epoch)
        self.step_size_check = StepSizeCheck(config, self.task, self.training.waits(), self.data, self.shards)
        self.noise_check = NoiseCheck(config, self.task, self.data, size)
        self.warnings: list[str] = []
        self.inspected = 0.0  # seconds spent on checks along the run
        self.tally = RunCounters()

    def _training(self) -> Training:
        kind = CompressedTraining if self.config.local is None else LocalTraining
        return kind(self.config, self.task, self.calendar, self._escape())

    def _plan(self) -> None:
        """Set shards, batches and the calendar of epochs from `self.history`, the numbers of workers so far."""
        config, (_, size) = self.config, self.history[-1]
        how, seed = config.data.shard, config.seed
        self.shards = [shard(self.data, how, worker=w, workers=size, seed=seed) for w in self.members]
        self.batches = deal(self.data, how, config.batch_size, seed=seed, history=self.history, workers=self.members)
        self.calendar = Calendar.of(self.history, len(self.data), config.batch_size, config.epochs)

    def _batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.data.batch(index, self.device, self.dtype)

    def _loss(self, index: Tensor) -> Tensor:
        with self._autocast():
            loss: Tensor = self.task(*self._batch(index))
        return loss

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _own_group(self) -> Group:
        """Return the group of the processes that write files. A fused simulation is a single process."""
        return Solo() if isinstance(self.group, FusedGroup) else self.group

    def _escape(self) -> Escape | None:
        rule = self.config.escape
        if rule is None:
            return None

        def objective() -> Tensor:
            sample = torch.cat([mine[: rule.examples] for mine in self.shards])
            self.task.eval()
            losses = [self._loss(i) * len(i) for i in torch.split(sample, EVAL_BATCH)]
            self.task.train()
            return torch.stack(losses).sum() / len(sample)

        return Escape(rule.interval, rule.radius, objective, compare=rule.compare, every=rule.every)

    # Training

    def run(self, folder: RunFolder, *, quiet: bool, saving: CheckpointPolicy = NEVER, count: str = "") -> bool:
        """Train, recording a line of metrics every `log_every` steps, then evaluate and summarize.

        `count`: shown before the run's name on the terminal, such as "run 2 of 4, ". Returns False if the run was
        stopped by SIGTERM, after saving a checkpoint. Raises CheckpointError if one cannot be written or restored.
        """
        quiet = quiet or self.group.rank != 0
        tally = self.tally
        parts = {"model": self.task, **self.training.parts()}
        checkpoints = RunCheckpoints(folder, saving, parts, self._own_group())
        if saving.resume:
            notes = checkpoints.resume(self._restore)
            if not quiet:
                where = f"continues from step {tally.step} of {self.calendar.steps}" if tally.step else "begins"
                print("\n".join([*notes, f"{folder.path}: {where}"]), flush=True)

        # Workers vote on saving and stopping, so that all of them save and stop at the same step.
        steps, first = self.calendar.steps, tally.step
        vote = StopAndSaveVote(saving, self.calendar.per_epoch, self.group.rank, self.group.size, first)
        begin, text = time.perf_counter() - tally.elapsed, "starting"
        with live(f"{count}{self.config.label or folder.path.name}", steps, quiet=quiet, first=first) as report:
            for step in range(first, steps):
                self._check(step, folder, quiet=quiet)
                try:
                    measured = self._step(step, vote.scalars(step))
                    if step + 1 == steps:
                        self.training.finish()
                except NonFiniteError as error:
                    raise self._with_resume_hint(error, checkpoints) from error

                # Count the step. The recorded seconds exclude checks, tests and saving.
                tally.add(measured, taken=self.training.took, last=step >= steps - self.calendar.per_epoch)
                tally.step = step + 1
                if (step + 1) % self.config.log_every == 0 or step + 1 == steps:
                    seconds = time.perf_counter() - begin - self.inspected - tally.tested - tally.saved
                    tally.line = line = self._log(folder, seconds)
                    moved = megabytes(line["sent"] if self.group.size > 1 else line["payload"])
                    text = f"loss {line['loss']:.4f}  gradient {line['grad_norm']:.1e}  {moved}"
                report(step + 1, text)
                if step + 1 < steps:
                    save, stop = vote.decide(step + 1, self.training.scalars)
                    if save:
                        tally.elapsed = time.perf_counter() - begin
                        vote.saved(step + 1, self._save(checkpoints))
                    if stop:
                        checkpoints.record_stop(tally.step, steps, quiet=quiet)
                        return False
            self._check(steps, folder, quiet=quiet)

        # Remove the checkpoints last, since a run without a summary can be resumed from them.
        self._finish(folder, tally)
        checkpoints.remove()
        return True

    def _restore(self, found: Checkpoint) -> None:
        """Restore counters and history from a checkpoint; recompute shards if the number of workers changed."""
        self.tally.load_state_dict(found.extra["tally"], found.extra["sums"], found.extra["final"])
        self.inspected, self.warnings = found.extra["inspected"], found.extra["warnings"]
        history = [(step, workers) for step, workers in found.extra["history"]]
        size = self.group.size
        self.history = history if history[-1][1] == size else [*history, (found.step, size)]
        if len(self.history) == 1:
            return
        if self.config.certify is not None:
            raise CheckpointError(
                f"a run with [certify] cannot continue with {size} workers: it started with {history[-1][1]}, "
                f"and its certificates are scheduled for that number"
            )
        self._plan()
        self.training.replan(self.calendar)

    def _save(self, checkpoints: RunCheckpoints) -> float:
        tally = self.tally
        extra: dict[str, Any] = {"tally": tally.state_dict(), "history": [list(pair) for pair in self.history]}
        extra |= {"warnings": self.warnings, "inspected": self.inspected, "sums": tally.sums, "final": tally.final}
        seconds = checkpoints.save(tally.step, extra)
        tally.saved += seconds
        return seconds

    def _with_resume_hint(self, error: NonFiniteError, checkpoints: RunCheckpoints) -> NonFiniteError:
        """Save a checkpoint after too many skipped steps, and return `error` with the command that resumes the run."""
        if not checkpoints.policy.on:
            return error
        self.training.front.reset_skip_streak()  # a resumed run may again skip max_skipped steps
        self._save(checkpoints)
        hint = f"; to resume: {checkpoints.policy.hint}" if checkpoints.policy.hint else ""
        return NonFiniteError(f"{error} A checkpoint of step {self.tally.step} is kept{hint}")

    def _log(self, folder: RunFolder, seconds: float) -> dict[str, Any]:
        tally = self.tally
        line = self._line(tally.step, self._means(tally.totals()), seconds)
        if self._test_due(tally.step, tally.since):
            before = time.perf_counter()
            with self.training.at_anchor():
                line |= self._test()
            tally.tested += time.perf_counter() - before
        if self.group.rank == 0:
            folder.append("metrics.jsonl", line)
        tally.begin_line()
        return line

    def _check(self, step: int, folder: RunFolder, *, quiet: bool) -> None:
        """Do the checks that are due before step `step`, or at the end; collective.

        They are certificates, the stability of the step size, and the size of the noise.
        """
        begin, steps, per_epoch = time.perf_counter(), self.calendar.steps, self.calendar.per_epoch
        if self.inspector is not None and self.inspector.due(step):
            with self.training.at_anchor():
                self.inspector.inspect(step, folder)

        # Rank 0 warns of an unstable step size, and at the start of a run of too much noise.
        if self.group.rank == 0 and step < steps and self.step_size_check.due(step, self.calendar):
            self._warn(self.step_size_check.warning(step), quiet=quiet)
        if self.group.rank == 0 and self.noise_check.due(step, steps, per_epoch):
            found = self.tally.noise = self.noise_check.measurements(step, self.batches[0], self.training.walk())
            if step == 0:
                self._warn(noise_warning(found, by_round=self.config.local is not None), quiet=quiet)
        self.inspected += time.perf_counter() - begin

    def _warn(self, text: str | None, *, quiet: bool) -> None:
        if text and text not in self.warnings:
            self.warnings.append(text)
            if not quiet:
                print(f"warning: {text}", file=sys.stderr, flush=True)

    def _step(self, step: int, scalars: Tensor | None) -> Tensor:
        """Do step `step`, whose exchange also averages `scalars` over workers.

        Returns this worker's loss and gradient norm, float64[2].
        """
        return self._step_on(torch.cat([batches[step] for batches in self.batches]), scalars)

    def _step_on(self, index: Tensor, scalars: Tensor | None) -> Tensor:
        def closure() -> Tensor:
            if self.batched is not None:
                return self.batched.evaluate(index)
            self.task.zero_grad()
            loss = self._loss(index)
            torch.autograd.backward(loss)
            return loss.detach()

        return self.training.step(closure, scalars).to("cpu", torch.float64)

    def _test_due(self, steps: int, since: int) -> bool:
        if self.config.test_every is None:
            return False
        every = self.config.test_every * self.calendar.per_epoch
        return self.calendar.position(steps) // every > self.calendar.position(since) // every

    def _line(self, steps: int, means: Tensor, seconds: float) -> dict[str, Any]:
        purposes = self.training.moved()  # bytes by purpose; the purpose "start" is not counted, as it is sent once
        moved = sum((b for name, b in purposes.items() if name != "start"), Bytes())
        return {
            "step": steps,
            "epoch": self.calendar.epoch(steps),
            "loss": float(means[0]),
            "grad_norm": float(means[1]),
            **asdict(moved),
            "seconds": seconds,
            "rounds": self.training.rounds,
            "resets": len(self.training.front.resets),
            "skipped": self.training.front.skipped,
            **self.training.contraction(),
        }

    # Evaluation

    def _finish(self, folder: RunFolder, tally: RunCounters) -> None:
        """Save the final weights and states, then evaluate and summarize the run, which could fail."""
        final_loss = self._final_loss(tally)
        folder.save_tensors(f"checkpoint/worker-{self.group.rank}.pt", self.training.state_dict())
        with self.training.at_anchor():
            average_buffers(self.task, self.training.channel)
            if self.group.rank == 0:
                weights = {k: v.clone() for k, v in self.task.network.state_dict().items()}
                folder.save_tensors(FINAL_WEIGHTS, weights)
            test = self._test()

        # Rank 0 summarizes the run. Its compression is the bytes of float32 gradients over the bytes of the messages of
        # the training exchanges.
        if self.group.rank == 0:
            summary, moved, front = self.training.summary(), self.training.moved(), self.training.front
            dense = self.tally.step * summary["parameters"] * 4
            training = sum(b.payload for name, b in moved.items() if name not in _NOT_TRAINING)
            folder.write_json(
                "summary.json",
                {
                    "label": self.config.label or folder.path.name,
                    "workers": self.group.size,
                    "steps": self.calendar.steps,
                    "final_loss": final_loss,
                    **test,
                    **summary,
                    "rounds": self.training.rounds,
                    **asdict(sum(moved.values(), Bytes())),
                    "bytes_by_purpose": {name: asdict(b) for name, b in moved.items()},
                    "compression": dense / training if training else math.inf,
                    "seconds": self.tally.line["seconds"],
                    "resets": [asdict(reset) for reset in front.resets],
                    "skipped": front.skipped,
                    "noise": self.tally.noise,
                    "warnings": self.warnings,
                },
            )
        self._own_group().all_reduce(torch.zeros(1))  # a barrier: the run is done on all workers

    def _final_loss(self, tally: RunCounters) -> float:
        return self._means(torch.cat([tally.final, tally.final.new_tensor([tally.in_final])])).item()

    def _means(self, totals: Tensor) -> Tensor:
        """Return means over workers: the sum of `totals[:-1]` over the sum of the counts `totals[-1]`; collective.

        The means are NaN if the sum of the counts is 0.
        """
        means = self.training.channel.mean(totals, "metrics")
        return means[:-1] / means[-1]

    @torch.no_grad()
    def _test(self) -> dict[str, float]:
        """Return the mean test loss and, for classifiers, the accuracy; collective. Each worker evaluates a part."""
        average_buffers(self.task, self.training.channel)
        totals = torch.zeros(3, dtype=torch.float64)  # sum of losses, number of correct predictions, number of examples
        self.task.eval()
        mine = torch.cat([torch.arange(len(self.test_data))[w :: self.group.size] for w in self.members])
        for index in torch.split(mine, EVAL_BATCH) if len(mine) else ():  # there may be fewer examples than workers
            batch = self.test_data.batch(index, self.device, self.dtype)
            correct = float(self.task.correct(*batch)) if self.task.classifies else 0.0
            totals += torch.tensor([float(self.task(*batch)) * len(index), correct, len(index)], dtype=torch.float64)
        self.task.train()
        loss, correct, examples = self.training.channel.mean(totals, "metrics").tolist()
        return {"test_loss": loss / examples, **({"test_accuracy": correct / examples} if self.task.classifies else {})}
