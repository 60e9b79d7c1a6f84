"""The anchor of the whole model, i.e. the parameters on which all workers last agreed. It is joined from the anchors of
the fragments, the parts of the model that are exchanged separately."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from packsaddle.local.fragment import Fragment, by_parameter


class WholeAnchor:
    """The anchor of the whole model, i.e. the parameters on which all workers last agreed. It joins the anchors of the
    `fragments`, the parts of the model that are exchanged separately. `names` are the names of all parameters, in the
    order in which the optimizers have them."""

    def __init__(self, fragments: Sequence[Fragment], names: Iterable[str]) -> None:
        self._fragments, self._names = fragments, list(names)
        # The `Trained` of each parameter, which records when the parameter was frozen, by the id of the parameter.
        self.trained = {id(each.parameter): each for part in fragments for each in part.trained}
        self._open = 0  # number of open `at_anchor` contexts, which may be nested

    @torch.no_grad()
    def set_from_parameters(self) -> None:
        for part in self._fragments:
            part.anchor.set_from_parameters()

    @property
    def parameters(self) -> list[Tensor]:
        return [each.parameter for each in self.trained.values()]

    def without_autocast(self) -> torch.autocast:
        """Return a context without autocast, in which the products of compressors would lose digits."""
        return torch.autocast(self.parameters[0].device.type, enabled=False)

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors of the anchor, on which all workers last agreed, by name of the parameter. The tensors are
        nn.Parameters, so that an outer optimizer can make its steps on them."""
        leaves = {n: a for part in self._fragments for n, a in zip(part.names, part.anchor.leaves, strict=True)}
        return {name: leaves[name] for name in self._names}

    def copy(self) -> dict[str, Tensor]:
        found = by_parameter(self._fragments, [part.anchor.flat for part in self._fragments])
        return {name: found[name].clone() for name in self._names}

    def joined(self, vectors: Iterable[Tensor]) -> Tensor:
        """Concatenate `vectors`, one for each fragment (part of the model), into one vector, float[d], in which
        parameters are in the order in which the optimizers have them."""
        found = by_parameter(self._fragments, vectors)
        return torch.cat([found[name].reshape(-1) for name in self._names])

    @torch.no_grad()
    def is_left(self) -> bool:
        """Return True if a parameter of this worker differs from the anchor, on which all workers last agreed. Returns
        False within `at_anchor`."""
        pairs = [(x, a) for f in self._fragments for x, a in zip(f.anchor.tensors(), f.anchor.views, strict=True)]
        return not self._open and any(not torch.equal(x, a.to(x.device, x.dtype)) for x, a in pairs)

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Context manager within which the parameters are set to the anchor, on which all workers last agreed."""
        before = [x.clone() for part in self._fragments for x in part.anchor.tensors()]
        with torch.no_grad():
            for part in self._fragments:
                part.anchor.set_parameters(part.anchor.views)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            xs = [x for part in self._fragments for x in part.anchor.tensors()]
            with torch.no_grad():
                for x, old in zip(xs, before, strict=True):
                    x.copy_(old)

    def check_closed(self, call: str) -> None:
        if self._open:
            raise RuntimeError(f"{call} within at_anchor(), which puts parameters back at its end")

    def wait(self) -> None:
        """Wait until the exchanges that run in the background have ended. Their results are not applied here, but at
        the steps at which they are due."""
        for part in self._fragments:
            if part.current is not None:
                part.current.close()

    def unapplied(self) -> list[Tensor]:
        """Wait until the exchanges that run in the background have ended, and return this worker's updates that the
        anchor does not include yet: one vector, float[n], for each fragment (part of the model)."""
        self.wait()
        return [part.unapplied() for part in self._fragments]
