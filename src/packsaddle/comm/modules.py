"""A record of the modules in this process, to find the modules that contain a given parameter. A parameter itself has
no reference to its modules.

A module is recorded when it gets a parameter or submodule after `import packsaddle`. Deep copies and unpickled modules
are not recorded.
"""

from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as registration

from packsaddle.comm.group import Group, TorchGroup

_recorded: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()  # each recorded module, by its `id()`


def _record(module: nn.Module, name: str, member: object) -> None:
    _recorded[id(module)] = module


registration.register_module_parameter_registration_hook(_record)
registration.register_module_module_registration_hook(_record)


def recorded_modules() -> list[nn.Module]:
    return [module for found in _recorded.valuerefs() if (module := found()) is not None]


def is_averaged_by_ddp(parameters: Iterable[Tensor], group: Group) -> bool:
    """Return True if a DistributedDataParallel model without a communication hook averages gradients of some of these
    parameters over workers of `group`."""
    if not isinstance(group, TorchGroup) or group.size == 1:
        return False
    ours, workers = {id(p) for p in parameters}, set(group.ranks)
    models = [m for m in recorded_modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    # A model has no attribute _comm_hooks during its construction.
    averaging = [m for m in models if not getattr(m, "_comm_hooks", True)]
    shared = [m for m in averaging if len(workers.intersection(dist.get_process_group_ranks(m.process_group))) > 1]
    return any(id(p) in ours for model in shared for p in model.module.parameters())
