"""The demo: its loops against torch's own arithmetic, the numbers in its sentences, and its two pages."""

import re
from pathlib import Path

import pytest
import torch
from commandline import command, refused

from lab.demo import saddle, slow_link
from lab.tasks.images import load_images
from lab.tasks.models import autoencoder
from lab.tasks.sharding import Batches, shard
from packsaddle.compressors import Identity


@pytest.mark.slow
@pytest.mark.process
def test_demo_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's whole path in some seconds; its runs at full length are `make demo`."""
    out = tmp_path / "demo"
    assert command("lab", "demo", "--epochs", "0.5", "--text-epochs", "0.05", "--out", out) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in ("saddle.html", "slow-link.html"):
        page = (out / name).read_text()
        assert page.count("<svg") == 2
        assert "$" not in page
        assert not re.search(r"https?://(?!www.w3.org)", page)  # no network
        # The same sentences, and the same numbers, as in the terminal.
        for text in re.findall(r"<(?:li|td|p class=\"result\")>(.*?)</", page):
            assert text.replace("&#x27;", "'") in printed
    refused(capsys, "already exists", "lab", "demo", "--out", out)
    refused(capsys, "--epochs must be positive", "lab", "demo", "--epochs", "0")


def link_run(name: slow_link.Name, loss: float, megabytes: float, computing: float) -> slow_link.Run:
    return slow_link.Run(slow_link.Method(name, 1.0, 0), 100, 1000, loss, megabytes, computing)


def test_the_slow_link_page_has_one_number_for_each_run() -> None:
    """Computing, and then the bytes over the link; one machine alone sends nothing, in the table as in the chart."""
    runs = [
        link_run("one machine alone", 2.2, 0.0, 8.0),
        link_run("dense training", 2.0, 250.0, 10.0),
        link_run("local updates", 2.1, 2.5, 10.0),
    ]
    story = slow_link.story(runs)
    assert [list(row[2:]) for row in story.rows] == [
        ["0.0", "8", "8", "8"],
        ["250.0", "210", "50", "20"],
        ["2.5", "12", "10", "10"],
    ]
    assert "17.5 times as fast" in story.result
    assert "100 times fewer bytes" in story.result
    assert "waited for 200 of 210 seconds" in story.happened[1]
    assert "did not pay" in slow_link.story([*runs[:2], link_run("local updates", 2.3, 2.5, 10.0)]).result


def test_dense_training_sends_a_ring_all_reduce_of_its_gradients_in_each_step() -> None:
    alone, dense = (slow_link.train(m, lambda _: None) for m in slow_link.methods(0.01, 0)[:2])
    assert alone.megabytes == 0.0
    # In a ring of two workers each sends as many bytes as the vector has.
    assert dense.megabytes * 1e6 == pytest.approx(4 * dense.parameters * dense.steps, rel=1e-3)
    assert alone.steps == dense.steps


def test_uncompressed_runs_train_as_torch_does_on_both_workers_batches() -> None:
    method = saddle.Method("uncompressed", Identity(), 0.0, 1.0, 0)
    found = saddle.train(method, lambda _: None)

    # The twin: torch's SGD on the mean loss of the two workers' batches.
    images = load_images("digits", train=True)
    shards = [shard(images, "iid", worker=w, workers=2, seed=0) for w in range(2)]
    batches = [Batches(mine, saddle.BATCH, worker=w, seed=0) for w, mine in enumerate(shards)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = autoencoder(images.shape, (256, 128, 64, 32, 10))
    optimizer, losses = torch.optim.SGD(model.parameters(), saddle.LR), []
    for step in range(46):
        optimizer.zero_grad()
        of_each = [saddle.reconstruction(model, images.pixels(worker[step])) for worker in batches]
        (sum(of_each) / 2).backward()  # type: ignore[union-attr]
        optimizer.step()
        losses.append(of_each[0].item())
    assert found.epochs == [0.5, 1.0]
    assert found.losses == pytest.approx([sum(losses[:23]) / 23, sum(losses[23:]) / 23], rel=1e-3)
    assert found.left is None


def test_the_plateau_is_the_best_constant() -> None:
    images = load_images("digits", train=True)
    pixels = images.pixels(torch.arange(len(images)))
    assert float((pixels - pixels.mean(0)).square().mean()) == pytest.approx(saddle.PLATEAU, rel=0.01)
