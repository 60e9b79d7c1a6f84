"""The scripts of examples/migrations, before and after, by real processes and with the real libraries."""

import contextlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
from forked_python import environment, torchrun
from nightly import nightly

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = EXAMPLES / "migrations"
LINE = re.compile(r"worker (\d): loss ([\d.]+), sent ([\d,]+) bytes, weights (\w+)")
PAIRS = ("torchft_diloco", "torchft_local_sgd", "accelerate_local_sgd", "torch_post_local_sgd")
EVERY = {"torchft_diloco": 20, "torchft_local_sgd": 20, "accelerate_local_sgd": 8, "torch_post_local_sgd": 8}
STEPS = 120
UNCOMPRESSED = ", compressor=packsaddle.Identity(), keep_unsent=False, mean_momentum=0"
pytestmark = [pytest.mark.process, pytest.mark.xdist_group("migrations")]  # each script run once


def needs(library: str, reason: str = "is not installed") -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} {reason}")


def outputs(commands: list[list[str]], *environments: dict[str, str]) -> str:
    """Run commands side by side and return what all of them printed; one that hangs is ended, with the others.

    They print to files: one that waits for another must not wait for the reader of a pipe as well.
    """
    with contextlib.ExitStack() as stack:
        files, started = [], []
        for words, given in zip(commands, environments, strict=True):
            files.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            words_to = {"stdout": files[-1], "stderr": subprocess.STDOUT}
            started.append(subprocess.Popen(words, env=environment(**given), **words_to))  # type: ignore[call-overload]
            stack.callback(started[-1].kill)  # no-op: it has ended
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in started:
                process.wait(timeout=200)
        codes = [process.poll() for process in started]
        for file in files:
            file.seek(0)
        printed = "".join(file.read() for file in files)
    assert codes == [0] * len(started), printed
    return printed


def workers_of(printed: str) -> tuple[float, int]:
    """Return the loss and the bytes that both workers said; their weights are equal."""
    found = sorted(LINE.findall(printed))
    assert [worker for worker, *_ in found] == ["0", "1"], printed
    assert len({weights for *_, weights in found}) == 1
    return float(found[0][1]), int(found[0][2].replace(",", ""))


@cache
def launched(script: Path) -> tuple[float, int]:
    """The loss and the bytes of two workers under one torchrun."""
    return workers_of(outputs([torchrun(script)], {}))


def under_torchft(script: Path) -> tuple[float, int]:
    """The same of two replica groups of one worker, as torchft's users start them."""
    from lab.bench import elastic

    with elastic.lighthouse(2) as address:
        places = [{"TORCHFT_LIGHTHOUSE": address, "REPLICA_GROUP_ID": str(i)} for i in range(2)]
        return workers_of(outputs([torchrun(script, workers=1)] * 2, *places))


def shorter(name: str, folder: Path) -> Path:
    """Write a script with half as many steps to a folder, and return it."""
    text = (SCRIPTS / name).read_text()
    assert text.count("240") == 1
    (folder / name).write_text(text.replace("240", str(STEPS)))
    shutil.copy(SCRIPTS / "task.py", folder)
    return folder / name


@pytest.mark.parametrize("name", [*map(nightly, PAIRS), "deepspeed_onebit_adam", nightly("torch_powersgd")])
def test_afterwards_it_trains_with_fewer_bytes(name: str, tmp_path: Path) -> None:
    if name.startswith("accelerate"):
        needs("accelerate")
    loss, sent = launched(shorter(f"{name}_after.py", tmp_path))
    assert loss < 3  # ln 64 = 4.16 at the start
    reduced = 4 * 32_992 * STEPS // EVERY.get(name, 1)
    assert sent < reduced / 4  # the flush is four fifths of what DiLoCo's script sends


@pytest.mark.parametrize("name", PAIRS)
def test_without_compression_it_is_what_was_replaced(name: str, tmp_path: Path) -> None:
    """The real library's loss, to rounding: the same inner steps, means, and outer optimizer.

    Without init_sync: with it torchft replaces the first change of all workers but one by that one's.
    """
    needs(name.partition("_")[0])
    before, after = (shorter(f"{name}_{when}.py", tmp_path) for when in ("before", "after"))
    exact, count = re.subn(r"every=EVERY", "every=EVERY" + UNCOMPRESSED, after.read_text())
    assert count == 1
    after.write_text(exact)
    before.write_text(before.read_text().replace("=2,\n", "=2,\n    init_sync=False,\n"))
    theirs = under_torchft(before) if name.startswith("torchft") else launched(before)
    ours = launched(after)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert theirs[0] < 3


def test_after_torchft_workers_are_elastic() -> None:
    """With a lighthouse the script trains as it does without, by torchft's Manager."""
    needs("torchft")
    elastic = under_torchft(SCRIPTS / "torchft_diloco_after.py")
    fixed = launched(SCRIPTS / "torchft_diloco_after.py")
    assert elastic[0] == pytest.approx(fixed[0], rel=0.2, abs=1e-3)


def test_deepspeeds_script() -> None:
    needs("deepspeed", "is not installed, and its 1-bit Adam runs on GPUs only")
    workers_of(outputs([["deepspeed", "--num_gpus", "2", str(SCRIPTS / "deepspeed_onebit_adam_before.py")]], {}))


@pytest.mark.nightly
def test_sites_are_workers_with_the_whole_batch() -> None:
    """Two sites of two processes train as two workers that compute each site's batch alone, and each process sends half
    of a worker's bytes."""
    line = re.compile(
        r"worker \d: loss [\d.]+ -> ([\d.]+), 24 steps, 4 exchanges, sent ([\d,]+) bytes, .*, weights (\w+)"
    )
    losses, sent = list[float](), list[float]()
    for processes, *more in ((1,), (2, "--fsdp")):
        script = EXAMPLES / "sites.py", "--processes", processes, "--steps", 24, *more
        found = line.findall(outputs([torchrun(*script, workers=2 * processes)], {}))
        assert len(found) == 2 * processes
        assert len({weights for *_, weights in found}) == 1
        losses.append(sum(float(loss) for loss, *_ in found) / len(found))
        sent.append(max(int(n.replace(",", "")) for _, n, _ in found))
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert sent[1] == pytest.approx(sent[0] / 2, rel=0.1)
