"""The training loop of a configured run: the same for one process, torchrun's workers and a simulation."""

import math
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from packsaddle.keeping import CHECKPOINTS, NEVER, Kept
from packsaddle.ledger import Bytes
from packsaddle.noisecheck import warning
from packsaddle.norms import average_buffers
from packsaddle.preparation import EVAL_BATCH
from packsaddle.progress import live, megabytes
from packsaddle.rotation import remove_all
from packsaddle.runfolder import RunFolder
from packsaddle.saving import Saving, Wishes
from packsaddle.skips import NonFiniteError
from packsaddle.tally import Tally

_NOT_TRAINING = ("start", "metrics", "buffers", "guard")  # what bytes are for besides gradients


class Training(Kept):
    """One worker's side of a run. Construction loads data and model; `run` trains and writes the run folder."""

    def run(self, folder: RunFolder, *, quiet: bool, saving: Saving = NEVER) -> bool:
        """Train, recording a line of metrics every `log_every` steps, then evaluate and summarise.

        Returns False if the run was told to stop; it has saved a checkpoint then. Raises CheckpointError if one cannot
        be written, or gone on from.
        """
        quiet = quiet or self.group.rank != 0
        tally = self.tally
        if saving.resume:
            self._resume(folder, quiet=quiet)
        steps, first = self.calendar.steps, tally.step
        wishes = Wishes(saving, self.calendar.per_epoch, self.group.rank, self.group.size, first)
        begin, text = time.perf_counter() - tally.elapsed, "starting"
        with live(self.config.label or folder.path.name, steps, quiet=quiet) as report:
            for step in range(first, steps):
                self.inspector.look(step, folder)
                self._look_ahead(step, quiet=quiet)
                self._look_at_noise(step, quiet=quiet)
                skipped = self.optimizer.skipped
                try:
                    measured = self._step(step, wishes.scalars(step))
                except NonFiniteError as error:
                    raise self._given_up(error, folder, saving) from error
                taken = self.optimizer.skipped == skipped
                tally.add(measured, taken=taken, last=step >= steps - self.calendar.per_epoch)
                tally.step = step + 1
                if (step + 1) % self.config.log_every == 0 or step + 1 == steps:
                    seconds = time.perf_counter() - begin - self.inspector.seconds - tally.tested - tally.saved
                    tally.line = line = self._log(folder, seconds)
                    text = _describe(line, self.group.size)
                report(step + 1, text)
                if step + 1 < steps and self.optimizer.steps % self.config.local_steps == 0:
                    save, stop = wishes.heard(step + 1, self.optimizer.scalars)
                    if save:
                        tally.elapsed = time.perf_counter() - begin
                        wishes.saved(step + 1, self._save(folder))
                    if stop:
                        self._say_stopped(folder, saving, quiet=quiet)
                        return False
            self.inspector.look(steps, folder)
            self._look_at_noise(steps, quiet=quiet)
        self._finish(folder, tally)
        return True

    def _log(self, folder: RunFolder, seconds: float) -> dict[str, Any]:
        """Write a line of metrics and return it."""
        tally = self.tally
        means = self.optimizer.channel.mean(tally.means(), "metrics")
        line = self._line(tally.step, means, seconds)
        if self._test_due(tally.step, tally.since):
            before = time.perf_counter()
            line |= self._test()
            tally.tested += time.perf_counter() - before
        if self.group.rank == 0:
            folder.append("metrics.jsonl", line)
        tally.begin_line()
        return line

    def _look_ahead(self, step: int, *, quiet: bool) -> None:
        """Warn if the steps to come are past stability."""
        if self.group.rank == 0 and self.footing.due(step, self.calendar):
            before, said = time.perf_counter(), self.footing.warning(step)
            self.inspector.seconds += time.perf_counter() - before
            if said and said not in self.warnings:
                self._warn(said, quiet=quiet)

    def _look_at_noise(self, step: int, *, quiet: bool) -> None:
        """Measure the mini-batches' noise; warn at the start if the artificial noise is set to carry x too far."""
        if self.group.rank == 0 and self.noise_check.due(step, self.calendar.steps, self.calendar.per_epoch):
            before = time.perf_counter()
            found = self.noise_check.look(step, self.batches[0], self._noisy_steps())
            self.tally.noise = found
            self.inspector.seconds += time.perf_counter() - before
            if step == 0 and (said := warning(found)):
                self._warn(said, quiet=quiet)

    def _warn(self, text: str, *, quiet: bool) -> None:
        self.warnings.append(text)
        if not quiet:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def _step(self, step: int, scalars: Tensor | None) -> Tensor:
        """One step of the algorithm, `scalars` exchanged with it; returns this worker's loss and gradient norm,
        float64[2]."""
        index = torch.cat([batches[step] for batches in self.batches])

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self._loss(index)
            torch.autograd.backward(loss)
            return loss.detach()

        loss = self.optimizer.step(closure, scalars=scalars)
        gradients = [p.grad for p in self.task.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return torch.stack([loss, norm]).to("cpu", torch.float64)

    def _test_due(self, steps: int, since: int) -> bool:
        """Whether a test fell due since the last line of metrics."""
        if self.config.test_every is None:
            return False
        every = self.config.test_every * self.calendar.per_epoch
        return self.calendar.position(steps) // every > self.calendar.position(since) // every

    def _line(self, steps: int, means: Tensor, seconds: float) -> dict[str, Any]:
        purposes = self.optimizer.ledger.by_purpose  # the start is sent once, however long the run
        moved = sum((b for name, b in purposes.items() if name != "start"), Bytes())
        return {
            "step": steps,
            "epoch": self.calendar.epoch(steps),
            "loss": float(means[0]),
            "grad_norm": float(means[1]),
            **asdict(moved),
            "seconds": seconds,
            "resets": len(self.optimizer.resets),
            "skipped": self.optimizer.skipped,
            "mu": self.optimizer.monitor.whole,
            "mu_by_tensor": self.optimizer.monitor.by_tensor,
        }

    def _finish(self, folder: RunFolder, tally: Tally) -> None:
        """Save the checkpoint before anything that could still fail, then evaluate and summarise."""
        final = tally.final / max(1, min(self.calendar.steps, self.calendar.per_epoch) - tally.left_out_last)
        final_loss = self.optimizer.channel.mean(final, "metrics").item()
        average_buffers(self.task, self.optimizer.channel)
        folder.save_tensors(f"checkpoint/worker-{self.group.rank}.pt", self.optimizer.state_dict())
        if self.group.rank == 0:
            weights = {k: v.clone() for k, v in self.task.network.state_dict().items()}
            folder.save_tensors("checkpoint/model.pt", weights)
        test = self._test()
        if self.group.rank == 0:
            self._summarise(folder, test, final_loss)
        self._own_group().all_reduce(torch.zeros(1))  # the run is done, whoever ends now
        remove_all(folder.path / CHECKPOINTS)

    def _summarise(self, folder: RunFolder, test: dict[str, float], final_loss: float) -> None:
        opt, ledger = self.optimizer, self.optimizer.ledger
        dense = self.calendar.steps * opt.numel * 4
        training = sum(b.payload for name, b in ledger.by_purpose.items() if name not in _NOT_TRAINING)
        folder.write_json(
            "summary.json",
            {
                "label": self.config.label or folder.path.name,
                "workers": self.group.size,
                "steps": self.calendar.steps,
                "final_loss": final_loss,
                **test,
                "parameters": opt.numel,
                "compressed_parameters": opt.compressed_numel,
                "mu": opt.mu,
                "exchange": opt.choice.name,
                "exchange_reason": opt.choice.reason,
                **asdict(ledger.total),
                "bytes_by_purpose": {name: asdict(b) for name, b in ledger.by_purpose.items()},
                "compression": dense / training if training else math.inf,
                "seconds": self.tally.line["seconds"],
                "resets": [asdict(r) for r in opt.resets],
                "skipped": opt.skipped,
                "drifts": [asdict(d) for d in opt.drifts],
                "noise": self.tally.noise,
                "warnings": self.warnings,
            },
        )

    @torch.no_grad()
    def _test(self) -> dict[str, float]:
        """Mean test loss, and accuracy of a classifier; each worker takes its share of the test images."""
        average_buffers(self.task, self.optimizer.channel)
        totals = torch.zeros(3, dtype=torch.float64)  # loss, correct, examples
        self.task.eval()
        mine = torch.cat([torch.arange(len(self.test_data))[w :: self.group.size] for w in self.members])
        for index in torch.split(mine, EVAL_BATCH):
            batch = self.test_data.batch(index, self.device, self.dtype)
            correct = float(self.task.correct(*batch)) if self.task.classifies else 0.0
            totals += torch.tensor([float(self.task(*batch)) * len(index), correct, len(index)], dtype=torch.float64)
        self.task.train()
        loss, correct, examples = self.optimizer.channel.mean(totals, "metrics").tolist()
        return {"test_loss": loss / examples, **({"test_accuracy": correct / examples} if self.task.classifies else {})}


def _describe(line: dict[str, Any], workers: int) -> str:
    moved = line["sent"] if workers > 1 else line["payload"]
    return f"loss {line['loss']:.4f}  gradient {line['grad_norm']:.1e}  {megabytes(moved)}"
