"""Detection of custom functions in the autograd graph of a loss: subclasses of `torch.autograd.Function`, in Python or
C++.

The second derivatives of a custom function may be wrong without an error. Fused losses, for example, compute their
gradient in the forward pass, and their backward returns this tensor. It is a constant for autograd, so double backward
omits the function's Hessian.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

_GENERATED = ("torch._library.", "torch._functorch.")  # modules of torch that have wrappers of users' custom functions


def custom_functions(loss: Tensor) -> set[str]:
    """Return the names of the custom functions in the autograd graph of `loss`, i.e. of all functions that torch does
    not define."""
    return {name for node in graph_nodes([loss]) if (name := _custom_name(node)) is not None}


def graph_nodes(outputs: Iterable[Tensor | None]) -> Iterator[Any]:
    waiting: list[Any] = [t.grad_fn for t in outputs if t is not None and t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        waiting += new


def _custom_name(node: Any) -> str | None:
    if not isinstance(node, BackwardCFunction):
        return str(node.name()) if "CppNode" in node.name() else None
    function = node._forward_cls  # type: ignore[attr-defined]
    module = f"{function.__module__}."
    is_torchs = module.startswith("torch.") and not module.startswith(_GENERATED)
    return None if is_torchs else str(function.__name__)
