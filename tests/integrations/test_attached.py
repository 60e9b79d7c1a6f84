"""The common part of the frameworks' callbacks, without the frameworks."""

from typing import ClassVar

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from packsaddle.integrations import WorkerState
from packsaddle.integrations.callbacks import Attached, attach_local_updates


class OfLocalUpdates(Attached):
    _makes: ClassVar[object] = packsaddle.LocalUpdates


@pytest.mark.parametrize(
    ("kind", "name", "accepted"), [(Attached, "every", "scope"), (OfLocalUpdates, "evry", "every")]
)
def test_an_unknown_argument_is_refused_at_construction(kind: type[Attached], name: str, accepted: str) -> None:
    kind(packsaddle.TopK(0.1), {accepted: 3})
    with pytest.raises(TypeError, match=f"{kind.__name__} has no argument '{name}'"):
        kind(packsaddle.TopK(0.1), {name: 3})


@pytest.mark.parametrize("name", ["optimizer", "model"])
def test_what_the_framework_has_is_refused_at_construction(name: str) -> None:
    with pytest.raises(TypeError, match=f"OfLocalUpdates takes {name} from the framework; several optimizers"):
        OfLocalUpdates(packsaddle.TopK(0.1), {name: []})


def test_paces_are_refused() -> None:
    model = torch.nn.Linear(64, 64)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters())]
    with (
        pytest.warns(UserWarning, match="there is one worker"),
        pytest.raises(ValueError, match='weight must not be "steps" in a framework'),
    ):
        attach_local_updates(model, model, optimizers, packsaddle.TopK(0.1), workers=packsaddle.Workers(weight="steps"))


def names_in_state(wrapped: bool) -> list[str]:
    model: torch.nn.Module = torch.nn.Linear(64, 64)
    local = packsaddle.LocalUpdates(torch.optim.AdamW(model.parameters()), every=4)
    own = WorkerState(local, DistributedDataParallel(model) if wrapped else model)
    return list(own.state_dict()["parts"]["model"])


@pytest.mark.process
def test_a_wrapped_model_has_the_names_of_the_model(tmp_path: object) -> None:
    """Accelerate wraps the model on several processes and not on one; both load each other's states."""
    from gloo import run_in_processes

    assert run_in_processes(names_in_state, 1, tmp_path, True) == [names_in_state(False)]  # type: ignore[arg-type]
