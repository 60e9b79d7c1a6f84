"""The report's page, figures and CSVs over seeds: what they show, and that nothing in them runs or loads."""

import base64
import csv
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from packsaddle.errors import MissingExtraError
from packsaddle.messages import printable
from packsaddle.runs.report import write_report
from packsaddle.runs.report.curves import curve, read_curves
from packsaddle.runs.report.page import for_plotly, for_script
from packsaddle.runs.report.settings import estimate, settings
from packsaddle.runs.run_folder import RunFolder, make_new, read_runs

NASTY = "</script><script>alert(1)</script><a href='https://evil.example/'>x</a>\u2028%{x} $a_b$ \"quoted\""
STEPS = range(10, 60, 10)


def make_run(folder: Path, label: str, seed: int, *, done: bool = True, **lines: list[float]) -> dict[str, list[float]]:
    """Write a run; returns its losses and gradient norms, or those given."""
    rng = np.random.default_rng(seed)
    values = {"loss": rng.random(len(STEPS)).tolist(), "grad_norm": rng.random(len(STEPS)).tolist()} | lines
    run = RunFolder(folder)
    make_new(run.path)
    run.write_json("config.json", {"label": label, "seed": seed, "plateau": 0.1})
    run.write_json("environment.json", {"torch": "2", "command": f"packsaddle run {label}"})
    for i, step in enumerate(STEPS):
        moved = {"payload": step * 1000, "sent": step * 1000 + seed, "received": 0, "seconds": step + seed / 2}
        run.append("metrics.jsonl", {"step": step, "epoch": step / 10, "resets": 0, **moved, **measured(values, i)})
    if done:
        run.write_json("summary.json", {"final_loss": values["loss"][-1], "compression": 40.0 + seed})
    return values


def measured(values: dict[str, list[float]], i: int) -> dict[str, float]:
    """Quantities of the i-th line; NaN is not measured, as tests are on some lines only."""
    return {name: v[i] for name, v in values.items() if not (name.startswith("test") and math.isnan(v[i]))}


@pytest.mark.slow
def test_pictures_of_certified_points_are_in_the_page(tmp_path: Path) -> None:
    """Those that `packsaddle certify` has written, whole and by name; a folder of another kind is left alone."""
    make_run(tmp_path / "run", "a", 0)
    for name, data in (("certificate", b"one"), ("certificate-2", b"two"), ("certificate-of-birth", b"three")):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "certificate.png").write_bytes(data)
        if name != "certificate-of-birth":
            (tmp_path / "run" / name / "certificates.json").write_text("{}")
    page = Page(write_report(read_runs([tmp_path / "run"]), tmp_path / "report").read_text())
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == ["a: certificate/certificate.png", "a: certificate-2/certificate.png"]
    prefix = "data:image/png;base64,"
    assert [base64.b64decode((image["src"] or "").removeprefix(prefix)) for image in images] == [b"one", b"two"]


class Page(HTMLParser):
    """What a browser would take from a page: tags, attributes, and the texts of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script draws."""
        content: dict[str, Any] = json.loads(self.scripts[0])
        return content


Compared = tuple[Path, dict[str, dict[str, list[float]]]]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """The folder of a report of three seeds, a lone seed with a nasty label and tests along two runs; their numbers."""
    folder = tmp_path_factory.mktemp("compared")
    tests = {"test_loss": [math.nan, 0.5, math.nan, math.nan, 0.25], "test_accuracy": [math.nan, 0.5, *[math.nan] * 3]}
    made = {
        "a0": make_run(folder / "runs" / "a" / "seed-0", "three", 0, **tests),
        "a1": make_run(folder / "runs" / "a" / "seed-1", "three", 1, **tests),
        "a2": make_run(folder / "runs" / "a" / "seed-2", "three", 2, done=False),
        "b0": make_run(folder / "runs" / "b" / "seed-0", NASTY, 0, grad_norm=[0.0] * 5),
    }
    write_report(read_runs([folder]), folder / "report")
    return folder, made


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.xdist_group("compared")
def test_curves_and_settings_equal_numpy(compared: Compared) -> None:
    folder, made = compared
    rows = [r for r in rows_of(folder / "report" / "curves.csv") if r["setting"] == "three"]
    losses = np.array([made[name]["loss"] for name in ("a0", "a1", "a2")])
    six = 1e-5  # the CSV has six digits
    for column, expected in (
        ("loss_mean", losses.mean(0)),
        ("loss_low", np.quantile(losses, 0.1, axis=0)),
        ("loss_high", np.quantile(losses, 0.9, axis=0)),
        ("megabytes", [(step * 1000 + 1) / 1e6 for step in STEPS]),
        ("seconds", [step + 0.5 for step in STEPS]),
    ):
        assert [float(r[column]) for r in rows] == pytest.approx(list(expected), rel=six), column
    assert [r["test_loss_mean"] for r in rows] == ["", "0.5", "", "", "0.25"]
    first, lone = rows_of(folder / "report" / "settings.csv")
    half = stats.t.ppf(0.975, 2) * losses[:, -1].std(ddof=1) / math.sqrt(3)
    found = [float(first[f"final_loss{end}"]) for end in ("", "_low", "_high")]
    assert found == pytest.approx([losses[:, -1].mean() + shift for shift in (0, -half, half)])
    assert (first["seeds"], first["unfinished"], first["compression"]) == ("3", "1", "40.5")
    assert (lone["seeds"], lone["final_loss_low"], lone["setting"]) == ("1", "", printable(NASTY))
    assert len(rows_of(folder / "report" / "table.csv")) == 4


@pytest.mark.slow
@pytest.mark.xdist_group("compared")
def test_the_page_shows_settings(compared: Compared) -> None:
    folder, made = compared
    text = (folder / "report" / "index.html").read_text()
    data = Page(text).data
    assert [chart["id"] for chart in data["charts"]] == ["loss", "grad_norm", "test_loss", "test_accuracy"]
    three, lone = data["charts"][0]["lines"]
    losses = np.array([made[name]["loss"] for name in ("a0", "a1", "a2")])
    assert three["mean"] == pytest.approx(losses.mean(0).tolist(), rel=1e-5)
    assert three["high"] == pytest.approx(np.quantile(losses, 0.9, axis=0).tolist(), rel=1e-5)
    assert (three["seeds"], three["epoch"]) == ([3] * 5, [1, 2, 3, 4, 5])
    assert "low" not in lone  # one seed has no band
    assert data["charts"][0]["levels"] == [0.1]
    assert data["charts"][2]["lines"][0]["epoch"] == [2, 5]
    half = estimate(losses[:, -1].tolist())
    assert half.high is not None
    assert f"<td>{half.mean:.4f} ± {half.high - half.mean:.4f}</td>" in text
    assert "three (1 of 3 unfinished)" in text
    assert '<pre class="wrap">packsaddle run three</pre>' in text
    for seed in (0, 1, 2):
        assert str(folder / "runs" / "a" / f"seed-{seed}") in text


@pytest.mark.slow
def test_rounds_are_an_axis_where_a_run_has_local_updates(tmp_path: Path) -> None:
    """Beside a run that has not counted them; others have no such choice."""
    for name in ("plain", "local"):
        make_run(tmp_path / name, name, 0)
    without = Page(write_report(read_runs([tmp_path / "plain"]), tmp_path / "first").read_text())
    assert list(without.data["axes"]) == ["epoch", "megabytes", "seconds", "step"]
    config = tmp_path / "local" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"local": {"every": 5}}))
    lines = (tmp_path / "local" / "metrics.jsonl").read_text().splitlines()
    counted = [json.dumps(json.loads(text) | {"rounds": 2 * (i + 1)}) for i, text in enumerate(lines)]
    (tmp_path / "local" / "metrics.jsonl").write_text("\n".join(counted) + "\n")
    both = read_runs([tmp_path / "plain", tmp_path / "local"])
    page = Page(write_report(both, tmp_path / "report").read_text())
    assert list(page.data["axes"]) == ["epoch", "megabytes", "rounds", "seconds", "step"]
    assert "rounds" in [attributes["value"] for tag, attributes in page.tags if attributes.get("name") == "x"]
    assert [line["rounds"] for line in page.data["charts"][0]["lines"]] == [[None] * 5, [2, 4, 6, 8, 10]]
    assert [r["rounds"] for r in rows_of(tmp_path / "report" / "curves.csv")] == [*[""] * 5, "2", "4", "6", "8", "10"]
    plain, local = read_curves(tmp_path / "report" / "curves.csv")
    assert all(map(math.isnan, plain.columns["rounds"]))
    assert local.along("rounds", "loss")[0] == [2, 4, 6, 8, 10]


@pytest.mark.xdist_group("compared")
def test_the_page_asks_for_nothing(compared: Compared) -> None:
    """No tag names an address; a policy forbids every request, and every script but the two of the page."""
    folder, _ = compared
    page = Page((folder / "report" / "index.html").read_text())
    loading = ("src", "href", "srcset", "data", "action", "poster", "background", "xlink:href")
    assert [(tag, a) for tag, attributes in page.tags for a in loading if a in attributes] == []
    assert {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base", "img"} == set()
    (policy,) = (a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    hashes = {"sha256-" + base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts[1:]}
    assert len(page.scripts) == 3
    assert set(re.findall(r"'(sha256-[^']*)'", policy)) == hashes
    # Scatter alone, which is plotly's default: outlines of maps, say, would be fetched.
    kinds = set(re.findall(r'\btype: "(\w+)"', page.scripts[2]))
    assert kinds == {"data", "line", "linear"}  # of error bars, of a shape, of an axis


@pytest.mark.xdist_group("compared")
def test_labels_are_harmless(compared: Compared) -> None:
    folder, _ = compared
    text = (folder / "report" / "index.html").read_text()
    assert "alert(1)</script>" not in text
    page = Page(text)
    assert not any(tag == "a" for tag, _ in page.tags)
    assert page.data["settings"][1]["label"] == printable(NASTY)  # for CSV, as it is
    assert page.data["settings"][1]["name"] == for_plotly(printable(NASTY))
    assert not set("<>\"'$") & set(for_plotly(NASTY))
    assert not set("<>&\u2028\u2029") & set(for_script({"a": NASTY + "\u2029"}))
    svg = (folder / "report" / "figure.svg").read_text()
    assert "<script" not in svg


def test_what_diverged_is_said(tmp_path: Path) -> None:
    nothing = {"loss": [0.2, 0.1, math.inf, math.nan, math.nan], "grad_norm": [0.1, math.inf, math.nan, math.nan, 0.0]}
    make_run(tmp_path / "runs" / "a" / "seed-0", "half", 0)
    make_run(tmp_path / "runs" / "a" / "seed-1", "half", 1, **nothing)
    make_run(tmp_path / "runs" / "b" / "seed-0", "all", 0, **{name: [math.nan] * 5 for name in nothing})
    text = write_report(read_runs([tmp_path]), tmp_path / "report").read_text()
    assert "<td>nan (not finite: 1 of 2)</td>" in text
    (half,) = Page(text).data["charts"][0]["lines"]
    assert half["step"] == [10, 20]
    assert [r["loss_mean"] for r in rows_of(tmp_path / "report" / "curves.csv") if r["setting"] == "half"][2] == "inf"


def test_bands_equal_numpy() -> None:
    """Within rounding: 1e-15 for numbers of order 1."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 10):
        values = rng.random(n)
        runs = [_one_line(seed, float(v)) for seed, v in enumerate(values)]
        (setting,) = settings(runs)
        found = curve(setting).columns
        assert found["loss_low"] == pytest.approx([np.quantile(values, 0.1)], abs=1e-15)
        assert found["loss_high"] == pytest.approx([np.quantile(values, 0.9)], abs=1e-15)


def _one_line(seed: int, loss: float) -> Any:
    from packsaddle.runs.run_folder import Run

    return Run(Path(f"seed-{seed}"), {"seed": seed}, {}, [{"step": 1, "epoch": 1.0, "loss": loss}], None, [])


@pytest.mark.slow
def test_many_settings(tmp_path: Path) -> None:
    """Beyond eight settings colours come again in another line style, on paper and on the page."""
    for i in range(12):
        make_run(tmp_path / "runs" / f"{i:02}" / "seed-0", f"_setting {i}", i)
    data = Page(write_report(read_runs([tmp_path]), tmp_path / "report").read_text()).data
    looks = [(s["colour"], s["dash"]) for s in data["settings"]]
    assert len(set(looks)) == 12
    assert looks[8] == (0, "dash")
    assert (tmp_path / "report" / "figure.svg").read_text().count("setting 11") >= 1


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "a", "a", 0)
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"needs plotly: pip install 'packsaddle\[plot\]'"):
        write_report(read_runs([tmp_path / "a"]), tmp_path / "report")
    assert not (tmp_path / "report").exists()
