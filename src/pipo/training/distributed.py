"""Several processes as one run: what the main one does for all, sharded weights, and whether what was asked for is what runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pipo.errors import ConfigError, PipoError, TrainingError
from pipo.model.modeling import PipoForCausalLM
from pipo.training.config import RunSettings

Result = TypeVar("Result")


def num_processes() -> int:
    """Processes of this run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_index() -> int:
    """This process's number; 0 is the main one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes files and talks to people."""
    return process_index() == 0


def on_main(action: Callable[[], Result]) -> Result:
    """What `action` gives in the main process, in every process; the error that it raises there is raised in every one."""
    if num_processes() == 1:
        return action()
    said: list[Any] = [None, None]
    failure: BaseException | None = None
    if is_main():
        try:
            said[0] = action()
        except Exception as error:  # noqa: BLE001 (raised below, once the others know)
            failure = error
            said[1] = str(error) if isinstance(error, PipoError) else repr(error)
    distributed.broadcast_object_list(said)
    if failure is not None:
        raise failure
    if said[1] is not None:
        raise TrainingError(f"the main process failed: {said[1]}")
    result: Result = said[0]
    return result


def gather_objects(value: Result) -> list[Result]:
    """Every process's `value`, in the order of processes, in every process."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    distributed.all_gather_object(values, value)
    return values


def add_ranks(values: Tensor) -> Tensor:
    """The sum of every process's `values`."""
    if num_processes() == 1:
        return values.clone()
    total = values.clone()
    distributed.all_reduce(total)
    return total


def stop() -> None:
    """Leave the other processes, at the end of a run."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


# --- sharded weights ------------------------------------------------------------------------------------


def shard(model: PipoForCausalLM, device: torch.device) -> None:
    """Shard a model's weights in place (FSDP2): each decoder layer, the MTP block's too, is gathered when it runs.

    The rest is one group that stays whole from the start of a forward on: embedding and head are read at both its ends.

    Raises:
        ConfigError: a single process.
    """
    if not distributed.is_initialized():
        raise ConfigError("run.strategy: fsdp2 needs several processes; start them with torchrun --nproc-per-node N")
    # Nothing writes into a forward's output in place, which is what it warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (num_processes(),))
    for layer in (*model.model.layers, *model.mtp.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` has seen to a model."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. Every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(value: Tensor, target: Tensor) -> Tensor:
    """What this process holds of a whole `value` that lies as `target` does; every process has the same `value`."""
    value = value.to(target.device)
    if isinstance(target, DTensor):
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return value


# --- what runs ------------------------------------------------------------------------------------------


def check_device(run: RunSettings) -> bool:
    """Whether the run is one of the CPU.

    Raises:
        ConfigError: a GPU was asked for, and there is none.
    """
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device: cuda was asked for, and torch finds no GPU here")
    return run.device == "cpu" or not torch.cuda.is_available()


def check_strategy(run: RunSettings, wrapped: nn.Module) -> None:
    """Raise `ConfigError` where what trains is not what `run.strategy` asked for."""
    found = _strategy_of(wrapped)
    wanted = "single" if run.strategy == "ddp" and num_processes() == 1 else run.strategy
    if found != wanted:
        raise ConfigError(
            f"run.strategy: {run.strategy} was asked for on {num_processes()} processes, but {found} would run"
        )


def _strategy_of(wrapped: nn.Module) -> str:
    if isinstance(wrapped, DistributedDataParallel):
        return "ddp"
    if isinstance(wrapped, FSDPModule):
        sharded = all(isinstance(parameter, DTensor) for parameter in wrapped.parameters())
        return "fsdp2" if sharded else "fsdp2 of a part"
    if type(wrapped).__name__ == "DeepSpeedEngine":
        return f"zero{wrapped.zero_optimization_stage()}"  # type: ignore[operator]
    return "DataParallel" if isinstance(wrapped, nn.DataParallel) else "single"
