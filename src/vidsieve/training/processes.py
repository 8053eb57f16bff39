"""One training process or several: they share prompts, add up gradients and decide together.

Several processes are launched by torchrun, which sets the environment; without it no process group is made.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from vidsieve.errors import TrainingError, VidsieveError

T = TypeVar("T")


def is_main() -> bool:
    """Return True if this process is the one that writes and prints, from torchrun's environment."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class Processes:
    """The processes of a run: this one's rank, 0 in the main process, and their number."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """True in the process that writes files and prints."""
        return self.rank == 0

    def check_share(self, prompts: int) -> None:
        """Raise TrainingError if the processes cannot share so many prompts evenly."""
        if prompts % self.count:
            raise TrainingError(
                f"prompts_per_step is {prompts}, which {self.count} processes cannot share evenly: choose a "
                f"multiple of {self.count}"
            )

    def share(self, numbers: range) -> range:
        """Return the prompts that this process takes: every `count`-th."""
        return numbers[self.rank :: self.count]

    def gather(self, items: list[T]) -> list[T]:
        """Return the items of all processes, in every process."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object(items)
        return gathered

    def in_order(self, items: list[T]) -> list[T]:
        """Return the results of every process's `share` in the order of the whole range, in every process."""
        if self.count == 1:
            return items
        parts: list[list[T]] = self.gather([items])
        return [parts[i % self.count][i // self.count] for i in range(sum(map(len, parts)))]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return each flag as True if any process has set it."""
        return tuple(map(any, zip(*self.gather([flags]), strict=True)))

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Raise a VidsieveError of the block in all processes, as a TrainingError in those that met none."""
        error: VidsieveError | None = None
        try:
            yield
        except VidsieveError as raised:
            error = raised
        texts = [text for text in self.gather([None if error is None else str(error)]) if text is not None]
        if error is not None:
            raise error
        if texts:
            raise TrainingError(texts[0])

    def together(self, work: Callable[[], T]) -> T:
        """Return the result of `work` in the main process; the others wait, and fail as it fails."""
        result: T | None = None
        with self.agreeing():
            if self.main:
                result = work()
        return self.gather([result])[0]  # type: ignore[return-value]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over the processes; one that none of them has stays None."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        wanted = [p for p in parameters if p.requires_grad]
        there = torch.tensor([float(p.grad is not None) for p in wanted], device=wanted[0].device)
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in wanted]
        total: Tensor = reduce(torch.cat([*flat, there]), reduction="sum")
        *parts, flags = torch.split(total, [*(p.numel() for p in wanted), len(wanted)])
        for p, part, flag in zip(wanted, parts, flags.tolist(), strict=True):
            p.grad = part.view_as(p).to(p.dtype) if flag else None


@contextmanager
def joined(device: Literal["cpu", "cuda"] | str = "cpu") -> Iterator[Processes]:
    """Yield the processes of this run; a process group is made, and destroyed, only if torchrun launched them."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield Processes()
        return
    from accelerate import Accelerator

    accelerator: Any = Accelerator(cpu=torch.device(device).type == "cpu")
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    try:
        yield processes
        accelerator.wait_for_everyone()
    finally:
        # Left to the interpreter's exit, gloo's threads sometimes abort the process after all work is done.
        accelerator.free_memory()
        gc.collect()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
