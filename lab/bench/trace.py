"""The files through which a step and a round of local updates run: `python -m lab.bench.trace`.

Two workers train a small network by LocalUpdates with its defaults. While worker 0 makes an inner step, each
call of a Python function of packsaddle is recorded. A hop is a call from one file of packsaddle to another. Frames of
torch between the two are skipped, and calls from the training script are not counted. The script prints the number of
files, of hops, and of lines in these files, for a step without an exchange and for a step that ends a round.
"""

import argparse
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

import packsaddle
from packsaddle.comm import launch, process_group

ROOT = str(Path(packsaddle.__file__).parent)


@dataclass
class Trace:
    """The calls of Python functions of packsaddle in one thread, within `with trace:`."""

    files: Counter[str] = field(default_factory=Counter)  # calls by file
    hops: Counter[tuple[str, str]] = field(default_factory=Counter)  # calls by the caller's file and the called file
    _script: FrameType | None = None  # the frame of the `with` statement

    def __enter__(self) -> "Trace":
        self._script = sys._getframe(1)
        sys.setprofile(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self._script = None

    def _record(self, frame: FrameType, event: str, _: object) -> None:
        here = frame.f_code.co_filename
        if event != "call" or not here.startswith(ROOT):
            return
        self.files[here] += 1
        caller = frame.f_back
        while caller and caller is not self._script and not caller.f_code.co_filename.startswith(ROOT):
            caller = caller.f_back
        if caller and caller is not self._script and caller.f_code.co_filename != here:
            self.hops[caller.f_code.co_filename, here] += 1

    @property
    def lines(self) -> int:
        return sum(len(Path(name).read_text().splitlines()) for name in self.files)


def trace_step(steps: int) -> Trace:
    """Train this worker for `steps` inner steps, and return the trace of the last step. Use it in a process that
    `launch` has started."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
    model, trace = torch.nn.Sequential(*layers[:-1]), Trace()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with process_group(None), packsaddle.LocalUpdates(optimizer, model=model):
        data = torch.randn(64, 64, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
        for step in range(steps):
            optimizer.zero_grad()
            (model(data) - data).square().mean().backward()
            with trace if step == steps - 1 else nullcontext():
                optimizer.step()
    return trace


def traces() -> dict[str, Trace]:
    """Return worker 0's trace of the third step, which exchanges nothing, and of the 16th, which ends the second
    round."""
    names = {"step without an exchange": 3, "step that ends a round": 16}
    return {name: launch(trace_step, (steps,), 2) for name, steps in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="print each file and the number of its calls")
    args = parser.parse_args()
    for name, trace in traces().items():
        print(f"{name}: {len(trace.files)} files, {sum(trace.hops.values())} hops, {trace.lines:,} lines in the files")
        if args.files:
            for file, calls in trace.files.most_common():
                print(f"  {calls:4}  {Path(file).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
