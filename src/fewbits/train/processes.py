"""Several processes that train one model, on one machine or on many.

`torchrun` and `accelerate launch` start the same command several times and tell each process by its environment how
many there are and which of them it is. The Trainer then shares the windows out among them and averages gradients. What
remains is told here: the *main* process, number 0, alone writes and prints, and whatever decides how training goes on
(the time, Ctrl-C, a loss that is no number) is agreed on, because a process that stops by itself leaves the others
waiting for its gradients.

Where accelerate is told to shard (FSDP), each process keeps a share of every block's parameters and borrows the rest
while it runs the block. The packed arrays of a frozen base are made parameters for it, so the base is shared out too.

Everything here also works for a single process, where it does nothing. What is agreed on goes over gloo, on the CPU,
so that no accelerator waits for it.
"""

from __future__ import annotations

import atexit
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fewbits.errors import ElsewhereError, UnsupportedError
from fewbits.nn import PackedWeight, QuantizedEmbedding, QuantizedLinear

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a process waits for another one: the main one may have to quantize a large model first."""
REST = 0.5
"""Seconds that gloo's threads get at the end."""
LAYERS = (QuantizedEmbedding, QuantizedLinear)
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher says besides how many processes there are."""


def join(device: str) -> None:
    """Let the processes that a launcher started know one another, until they end; each has an accelerator of its own.

    Raises UnsupportedError where the environment speaks of several processes and not of how they meet.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        return
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise UnsupportedError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start the processes with "
            "torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
    else:
        # accelerate would number the device, and torch.load, which reads saved states, knows no cpu:0.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        distributed.init_process_group("gloo", timeout=PATIENCE)
    atexit.register(_part)


def _part() -> None:
    """Leave the others, and let gloo's threads come to rest.

    They let go of a tensor some time after whoever waited for it has gone on, and take the interpreter's lock for it;
    once the interpreter ends, taking its lock aborts the process. Destroying the group would end the threads, but
    DTensor's caches keep a group that has sharded anything.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(REST)


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the one that writes and prints."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def largest(*values: float) -> tuple[float, ...]:
    """The largest that any process has, of each value; every process must ask."""
    if count() == 1:
        return values
    found = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return tuple(found.tolist())


def require_well(well: bool = True) -> None:
    """Tell the others whether all is well here; raises ElsewhereError where it is, and is not in another process."""
    (ill,) = largest(float(not well))
    if ill and well:
        raise ElsewhereError("another process of this training failed, and says why; this one stops with it")


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block, and then the others do; if one fails, all stop."""
    if not is_main():
        require_well()
    try:
        yield
    except BaseException:
        require_well(False)
        raise
    if is_main():
        require_well()
    require_well()


def from_main(value: T | None) -> T:
    """What the main process has, which is not None; it is pickled."""
    found = [value]
    if count() > 1:
        distributed.broadcast_object_list(found, src=0)
    return cast(T, found[0])


def require_shared(path: Path) -> None:
    """Raises UnsupportedError in a process that does not see what the main one has made."""
    if not path.exists():
        raise UnsupportedError(
            f"{path}: made by the main process, but not there for process {distributed.get_rank()}; give an output "
            "on a file system that all machines share"
        )


def sharded() -> bool:
    """Whether parameters are to be shared out among the processes (`accelerate launch --use_fsdp`)."""
    return count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def require_shardable(device: str) -> None:
    """Raises UnsupportedError where accelerate would not shard, or only what has one floating-point type."""
    if not sharded():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UnsupportedError(
            f"FSDP version {os.environ.get('FSDP_VERSION', '1')} joins all parameters of a block to one of one type, "
            "which packed weights have not: add --fsdp_version 2"
        )
    if torch.device(device).type == "cpu":
        raise UnsupportedError(
            "device cpu: accelerate shards on accelerators only, and would keep all of the model in each process "
            "instead; leave --use_fsdp out"
        )


def share_out(model: nn.Module) -> None:
    """Let FSDP share out what is packed, and let all processes begin with the main one's numbers.

    A table that embedding and output layer have in common stays whole in each: FSDP would have it in two groups.
    """
    users = Counter(id(module.store) for module in model.modules() if isinstance(module, LAYERS))
    for module in list(model.modules()):
        if isinstance(module, PackedWeight) and users[id(module)] == 1:
            module.as_parameters()
    for parameter in model.parameters():
        if parameter.requires_grad:
            distributed.broadcast(parameter.data, src=0)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name, whole; every process must ask."""
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in found.items()}


def own_share(parameter: Tensor) -> Tensor:
    """What this process has of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def spare_frozen(model: nn.Module) -> None:
    """Keep the wrapper that averages gradients from sending what every process has read from the same file."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
