"""nanoGPT's recipe: its size, its schedule, its text, and one worker with local updates, which is one without."""

from pathlib import Path

import pytest
import torch

from lab.bench.nanogpt import GPT, METHODS, RATE, ROWS, Text, make, rate_at, rows, table, train


def text() -> Text:
    rng = torch.Generator().manual_seed(0)
    return Text(torch.randint(65, (2000,), generator=rng), torch.randint(65, (200,), generator=rng), 65)


def test_the_recipe() -> None:
    """0.80 million parameters without the positions, as nanoGPT prints; a tenth of the rate at the end."""
    net = GPT(65, 0)
    assert sum(p.numel() for p in net.parameters()) - net.places.weight.numel() == 795_904
    assert rate_at(0, 100, 2000) == pytest.approx(RATE / 101)
    assert rate_at(100, 100, 2000) == pytest.approx(RATE)
    assert rate_at(2000, 100, 2000) == pytest.approx(RATE / 10)
    assert len(text().last) == 3


def test_one_worker_with_local_updates_is_one_without() -> None:
    dense, _ = train(text(), METHODS["dense"], 1, 0, steps=3)
    local, sent = train(text(), METHODS["local, no mean momentum"], 1, 0, steps=3)
    assert local == pytest.approx(dense, rel=1e-5)
    assert sent == 0


def test_another_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("to be")
    with pytest.raises(ValueError, match=r"input.txt must be tinyshakespeare, with the SHA-256 86c4e6aa"):
        Text.read(tmp_path / "input.txt")


def test_a_row_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("lab.bench.nanogpt.train", lambda *given: (made.append(given), (1.5, 2_000_000))[1])
    for seed in (0, 1, 0):
        make(tmp_path / "runs.csv", text(), "local", 2, seed)
    assert len(made) == 2 * 2  # on two workers
    assert table(rows(tmp_path / "runs.csv")).endswith("| 2 | local | 1.500 | 1.500 to 1.500, 2 | 2 |")


def test_the_card_has_the_table_of_the_rows() -> None:
    card = (ROWS.parent / "README.md").read_text()
    assert table(rows(ROWS)) in card
    losses = {(row["workers"], row["method"]): f"{float(row['loss']):.3f}" for row in rows(ROWS)}
    claims = {
        "loss is {}, that of dense": losses["2", "local"],
        "both workers {}, and": losses["2", "dense"],
        "alone {}.": losses["1", "dense"],
        "the loss is {}. Lengthening": losses["2", "local, no mean momentum"],
        "lowers it to {}.": losses["2", "local, agreement"],
        "dense training has {}, local": losses["4", "dense"],
        "local updates {}, and with agreement": losses["4", "local"],
        "with agreement {}.": losses["4", "local, agreement"],
    }
    text = " ".join(card.split())
    assert [claim.format(loss) for claim, loss in claims.items() if claim.format(loss) not in text] == []
