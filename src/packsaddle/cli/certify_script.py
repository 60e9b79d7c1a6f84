"""The command `packsaddle certify-script`, which decides if a checkpoint of a user's training script is a saddle or a
second-order stationary point."""

from contextlib import nullcontext
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Any

from packsaddle.cli.console import is_first
from packsaddle.cli.flags import grouped
from packsaddle.cli.own_function import call
from packsaddle.comm.launching import process_group, under_launcher
from packsaddle.curvature.options import Search
from packsaddle.errors import ConfigError, check_positive, config_errors, require
from packsaddle.messages import first_line
from packsaddle.numerics.seeds import Stream, generator

_WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys of a checkpoint under which scripts store the weights
# Prefixes that torch.compile and DistributedDataParallel add to parameter names. The first prefix is listed twice,
# since a model may be wrapped by both in either order.
_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")


@grouped(
    {
        "": "epsilon hessian_lipschitz out json",
        "search": "max_hvps tolerance failure_probability hvp sample seconds always memory_limit seed",
    }
)
def certify_script(
    function: str,
    checkpoint: Path,
    /,
    epsilon: float | None = None,
    hessian_lipschitz: float | None = None,
    search: Search = Search(),  # noqa: B008 -- immutable
    out: Path | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Certify a checkpoint of your own training script.

    The verdict is saddle, second-order stationary, gradient too large, or undecided. Without --epsilon the verdict is
    on the curvature alone. FUNCTION is imported from the current folder and called without arguments. It returns a
    model, a loss function of (model, batch), and the batches as an iterable that can be iterated repeatedly. Under
    torchrun every worker calls it and returns its own batches.

    Examples:
        packsaddle certify-script train:problem checkpoint.pt
        packsaddle certify-script train:problem checkpoint.pt --epsilon 0.01 --hvp differences --json
        packsaddle certify-script train:problem checkpoint.pt --tolerance 0.01 --out certificate
        torchrun --nproc-per-node 2 -m packsaddle.cli certify-script train:problem checkpoint.pt

    Args:
        function: The function, as MODULE:FUNCTION.
        checkpoint: A file written by torch.save: a state_dict, or a dict with one under "model", "state_dict" or
            "model_state_dict". The state_dict may also be that of the model wrapped by torch.compile or
            DistributedDataParallel.
        epsilon: Threshold for the gradient norm; the threshold for the curvature is -sqrt(rho epsilon). Without it
            there is no verdict on stationarity.
        hessian_lipschitz: rho, the Lipschitz constant of the Hessian. By default it is measured along the escape
            direction.
        out: New folder for the certificate, its directions, and a plot of the loss along them; by default none.
        seed: Seed of the random start vector.
        json: Print one JSON document.
    """
    from packsaddle.cli.findings import write
    from packsaddle.cli.folders import new_folder

    # Validate the input before the long computation.
    with config_errors("--"):
        check_positive(epsilon=epsilon, hessian_lipschitz=hessian_lipschitz)
    if out is not None:
        require("matplotlib", "plot", "the certificate's picture")
    search = replace(search, generator=generator(seed, 1, Stream.CERTIFY))
    options = {"epsilon": epsilon, "hessian_lipschitz": hessian_lipschitz, "search": search, "progress": not json}
    with (
        new_folder(out) if out is not None and is_first() else nullcontext(),
        process_group() if under_launcher() else nullcontext(),
    ):
        found = _certify(function, checkpoint, options)
    if is_first():
        print(dumps(found.to_dict(), indent=2, allow_nan=False) if json else found)
        if out is not None:
            # Write the files after printing the results, so that the results are not lost if the disk is full.
            write(found, out)
            if not json:
                print(f"certificate: {out}")


def _certify(function: str, checkpoint: Path, options: dict[str, Any]) -> Any:
    from packsaddle.cli.findings import finding
    from packsaddle.curvature.mean_loss import trainable

    # Make the model, loss and batches, and load the checkpoint.
    problem = call(function)
    if not (isinstance(problem, tuple) and len(problem) == 3 and callable(problem[1])):
        raise ConfigError(f"{function} must return a model, a loss function and batches, got {type(problem).__name__}")
    model, given, batches = problem
    try:
        trainable(model)
    except (TypeError, ValueError) as error:  # invalid model
        raise ConfigError(f"{function}: {error}") from None
    _load(model, checkpoint)

    def loss_fn(model: Any, batch: Any) -> Any:
        try:
            return given(model, batch)
        except Exception as error:
            raise ConfigError(f"the loss function of {function} failed: {first_line(error)}") from None

    # Compute the certificate and the loss profiles.
    try:
        return finding(checkpoint, model, loss_fn, batches, **options)
    except ValueError as error:  # invalid loss or batches
        raise ConfigError(f"{function}: {error}") from None


def _load(model: Any, checkpoint: Path) -> None:
    from packsaddle.cli.findings import read_weights

    weights = read_weights(checkpoint)
    model = getattr(model, "_orig_mod", model)  # load weights into the module inside a compiled model
    if isinstance(weights, dict):
        own = model.state_dict().keys()
        weights = next((weights[key] for key in _WRAPPERS if isinstance(weights.get(key), dict)), weights)
        for prefix in _PREFIXES:
            wrapped = all(isinstance(name, str) and name.startswith(prefix) for name in weights)
            if wrapped and weights.keys() != own:
                weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"{checkpoint} does not hold the weights of this model: {reason}") from None
