"""packsaddle certify-script."""

import sys
from contextlib import nullcontext
from importlib import import_module
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from packsaddle.cli.certify import check_numbers
from packsaddle.cli.console import is_first
from packsaddle.comm.launch import process_group, under_launcher
from packsaddle.errors import ConfigError

_WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys under which scripts keep weights


def certify_script(
    function: Annotated[str, tyro.conf.Positional],
    checkpoint: Annotated[Path, tyro.conf.Positional],
    epsilon: float | None = None,
    hessian_lipschitz: float | None = None,
    failure_probability: float = 1e-3,
    max_hvps: int = 200,
    hvp: Literal["auto", "double-backward", "differences"] = "auto",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Certify a checkpoint of any script: is it a saddle, second-order stationary, or undecided.

    The function, found from the present folder, takes nothing and returns a model, a loss of (model, batch), and the
    batches, which can be read again. Under torchrun every worker calls it, and returns its own.

    Examples:
        packsaddle certify-script train:problem checkpoint.pt
        packsaddle certify-script train:problem checkpoint.pt --epsilon 0.01 --hvp differences --json

    Args:
        function: module:function.
        checkpoint: A file by torch.save: the model's state_dict, or a dict that has it as "model", "state_dict" or
            "model_state_dict".
        epsilon: The gradient's threshold; the curvature's is -sqrt(rho epsilon). By default the gradient's norm at the
            point: then the curvature decides.
        hessian_lipschitz: rho. By default measured along the direction found.
        failure_probability: Of the lower bound on the smallest eigenvalue.
        max_hvps: Hessian-vector products at most.
        hvp: How they are taken; auto takes differences of gradients where there is no double backward.
        seed: Of the random start.
        json: Print one JSON document instead.
    """
    positive = {"epsilon": epsilon, "hessian-lipschitz": hessian_lipschitz}
    check_numbers(positive, failure_probability, {"max-hvps": max_hvps})
    with process_group() if under_launcher() else nullcontext():
        certificate = _certify(
            function, checkpoint, epsilon, hessian_lipschitz, failure_probability, max_hvps, hvp, seed
        )
    if is_first():
        print(dumps(certificate.to_dict(), indent=2, allow_nan=False) if json else certificate)


def _certify(
    function: str,
    checkpoint: Path,
    epsilon: float | None,
    rho: float | None,
    probability: float,
    max_hvps: int,
    hvp: Literal["auto", "double-backward", "differences"],
    seed: int,
) -> Any:
    from packsaddle.curvature.certify import certify
    from packsaddle.numerics.seeds import Stream, generator

    model, loss_fn, batches = _problem(function)
    _load(model, checkpoint)
    try:
        return certify(
            model,
            loss_fn,
            batches,
            epsilon=epsilon,
            hessian_lipschitz=rho,
            failure_probability=probability,
            max_hvps=max_hvps,
            hvp=hvp,
            generator=generator(seed, 1, Stream.CERTIFY),
        )
    except ValueError as error:  # what certify says of the model, the loss and the batches
        raise ConfigError(f"{function}: {error}") from None


def _problem(function: str) -> tuple[Any, Any, Any]:
    """Return the function's model, loss and batches. Raises ConfigError if it is absent, fails or returns others."""
    module, colon, name = function.partition(":")
    if not (module and colon and name.isidentifier()):
        raise ConfigError(f"the function must be given as module:function, got {function!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(import_module(module), name, None)
    except Exception as error:  # a script raises whatever it likes
        raise ConfigError(f"{module} cannot be imported: {_first_line(error)}") from None
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ConfigError(f"{module} has no function {name!r}")
    try:
        returned = found()
    except Exception as error:
        raise ConfigError(f"{function} failed: {_first_line(error)}") from None
    if not (isinstance(returned, tuple) and len(returned) == 3 and callable(returned[1])):
        raise ConfigError(f"{function} must return a model, a loss function and batches, got {type(returned).__name__}")
    model, loss_fn, batches = returned
    return model, loss_fn, batches


def _load(model: Any, checkpoint: Path) -> None:
    import torch

    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"checkpoint {checkpoint} does not exist") from None
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise ConfigError(f"checkpoint {checkpoint} cannot be read: {_first_line(error)}") from None
    if isinstance(weights, dict):
        weights = next((weights[key] for key in _WRAPPERS if isinstance(weights.get(key), dict)), weights)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"{checkpoint} does not hold the weights of this model: {reason}") from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
