"""The modules of this process, since parameters have no reference to the modules that have them.

A module is recorded when it gets a parameter or submodule after `import packsaddle`. Deep copies and unpickled modules
are not recorded.
"""

from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parallel import DistributedDataParallel

from packsaddle.comm.group import Group, TorchGroup

_recorded: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()  # by id


def _record(module: nn.Module, name: str, member: object) -> None:
    _recorded[id(module)] = module


register_module_parameter_registration_hook(_record)
register_module_module_registration_hook(_record)


def recorded_modules() -> list[nn.Module]:
    return [module for found in _recorded.valuerefs() if (module := found()) is not None]


def is_averaged_by_ddp(parameters: Iterable[Tensor], group: Group) -> bool:
    """Return True if a DistributedDataParallel without a hook averages gradients of these parameters in the group."""
    if not isinstance(group, TorchGroup) or group.size == 1:
        return False
    ours, workers = {id(p) for p in parameters}, set(group.ranks)
    for model in recorded_modules():
        if isinstance(model, DistributedDataParallel) and not getattr(model, "_comm_hooks", True):
            same = workers.intersection(dist.get_process_group_ranks(model.process_group))
            if len(same) > 1 and any(id(p) in ours for p in model.module.parameters()):
                return True
    return False
