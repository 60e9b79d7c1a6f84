"""The command `python -m lab certify`."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import chain, count
from json import dumps
from pathlib import Path
from typing import Any, Literal

from lab.runs.config import Config
from lab.runs.run_folder import read_runs
from packsaddle.cli.console import is_first
from packsaddle.cli.flags import Overrides, grouped
from packsaddle.comm.launching import under_launcher
from packsaddle.curvature.options import Search
from packsaddle.errors import ConfigError, check_counts, check_positive, config_errors, require

_SAMPLE = 512  # default number of training examples: about a minute for a small network on a CPU


@grouped(
    {
        "": "epsilon hessian_lipschitz examples out json",
        "point": "checkpoint iterates",
        "data": "batch_size data_dir workers seed",
        "search": "max_hvps tolerance failure_probability hvp double memory_limit",
    }
)
def certify(
    run: Path,
    /,
    checkpoint: str | None = None,
    iterates: bool = False,
    epsilon: float | None = None,
    hessian_lipschitz: float | None = None,
    search: Overrides[Search] = Overrides(),  # noqa: B008 -- immutable
    examples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    double: bool = False,
    data_dir: Path | None = None,
    workers: int = 1,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Certify a run's last point: saddle or second-order stationary.

    The verdict is "undecided" if the bounds on the curvature allow both. It needs --epsilon, or the run's
    certify.epsilon. Without epsilon the verdict is on the curvature alone: "not a minimum" if some is negative. The
    certificate is computed on a random sample of the training examples (--examples); it is printed, and written to a
    new folder with the extreme directions and a plot of the loss along them. Under torchrun its workers compute it.
    Search options default to the run's [certify], or to packsaddle.Search if the run has none.

    Examples:
        python -m lab certify runs/a
        python -m lab certify runs/a --epsilon 0.01 --examples all
        python -m lab certify runs/a --tolerance 0.01
        python -m lab certify runs/a --iterates --workers 2 --data-dir MNIST
        python -m lab certify runs/a --checkpoint other.pt --epsilon 0.01 --hessian-lipschitz 0.001 --json

    Args:
        run: The run folder.
        checkpoint: Weights to certify instead of the final ones: a file, or its name inside the run folder.
        iterates: Certify the points that the run saved at random steps (certify.iterates), and bound the fraction of
            all steps at stationary points.
        epsilon: Threshold of the gradient norm; the threshold of the curvature is -sqrt(rho epsilon). By default the
            run's certify.epsilon. Without either there is no verdict on stationarity.
        hessian_lipschitz: rho, the Lipschitz constant of the Hessian. By default the run's certify.hessian_lipschitz,
            else measured along the escape direction. The threshold for a saddle depends on it: set it when you compare
            points.
        examples: Size of the random sample of training examples, or "all"; by default 512, or all if there are fewer.
        batch_size: Examples per batch; by default 64, or 500 if all examples are used.
        double: Compute the Hessian-vector products in float64.
        data_dir: Folder of the dataset, as for the run (not needed for digits, nor for Python's own text).
        workers: Number of worker processes; under torchrun, the number that it started.
        seed: Seed of the sample and of the random start vector.
        out: New folder for the results; by default certificate/, certificate-2/, ... in the run folder.
        json: Print one JSON document.
    """
    from lab.runs.certification import Audit, certify_in_process_group, read_config
    from packsaddle.cli.findings import Questions, write
    from packsaddle.cli.folders import new_folder
    from packsaddle.curvature.certificate import Share

    with config_errors("--"):
        check_positive(epsilon=epsilon, hessian_lipschitz=hessian_lipschitz)
        check_counts(batch_size=batch_size, workers=workers)

    # Options that are not given are those of the run's [certify].
    config = read_config(run)
    options = Search()
    if config.certify is not None:
        epsilon = config.certify.epsilon if epsilon is None else epsilon
        hessian_lipschitz = config.certify.hessian_lipschitz if hessian_lipschitz is None else hessian_lipschitz
        options = config.certify

    # Validate the input and create the folder before the work.
    require("matplotlib", "lab", "the certificate's picture")
    drawn = _drawn(run, config) if iterates else []
    names = chain(["certificate"], (f"certificate-{n}" for n in count(2)))
    folder = out or next(run / name for name in names if not (run / name).exists())
    options, lr = replace(options, **search.values), config.sgd_lr()
    questions = Questions(epsilon, hessian_lipschitz, options, lr, seed, quiet=json)
    size, at_most = examples if isinstance(examples, int) else None, _SAMPLE if examples is None else None
    audit = Audit(run, _files(run, checkpoint, drawn), questions, size, at_most, batch_size, double, data_dir)
    with new_folder(folder) if is_first() else nullcontext():
        findings = certify_in_process_group(audit) if under_launcher() else audit.execute(workers)
    if is_first():
        document: dict[str, Any] = {"points": [finding.to_dict() for finding in findings]}
        share = None
        if drawn:
            verdicts = {f"iterates/{finding.file.name}": finding.certificate.verdict for finding in findings}
            share = Share.of([verdicts[name] for name in drawn])
            derived = {"at_least": share.at_least(), "all_fail": share.all_fail, "surprise": share.surprise}
            document["share"] = {**asdict(share), **derived}
        if json:
            print(dumps({**document, "folder": str(folder)}, indent=2, allow_nan=False))
        else:
            print("\n".join(map(str, [*findings, *([share] if share else [])])))
        write(findings, document, folder)  # after printing, so that a full disk does not lose the result
        if not json:
            print(f"certificate: {folder}")


def _files(run: Path, checkpoint: str | None, drawn: list[str]) -> tuple[Path, ...]:
    if drawn:
        if checkpoint is not None:
            raise ConfigError("--checkpoint and --iterates exclude each other")
        return tuple(run / name for name in dict.fromkeys(drawn))  # without duplicates
    if checkpoint is None:
        return (run / "checkpoint" / "model.pt",)
    inside = run / checkpoint
    return (inside if inside.is_file() else Path(checkpoint),)


def _drawn(run: Path, config: Config) -> list[str]:
    """Return the names of the files with the points that a run saved at random steps; a step drawn twice counts twice.

    Raises ConfigError if the run is unfinished or a file is missing, since the remaining points would be a biased
    sample.
    """
    from lab.runs.run_checks import drawn_names

    (found,) = read_runs([run])
    if found.summary is None:
        raise ConfigError(f"{run} has not finished, so its saved iterates are not a uniform sample")
    names = drawn_names(config, found.summary["steps"])
    if not names:
        raise ConfigError(
            f"{run} has no saved iterates; set certify.iterates = m in the configuration to save m of them"
        )
    for name in names:
        if not (run / name).is_file():
            raise ConfigError(f"{run}: iterate {name} is missing; without it the others are not a uniform sample")
    return names
