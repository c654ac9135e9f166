"""A run in several processes, as `accelerate launch` and `torchrun` start them: the jobs are divided among them.

The processes talk at the beginning and at the end, over gloo; between these each draws its own jobs.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

_Item = TypeVar("_Item")
LONGEST = timedelta(days=30)
"""How long a process waits for the others at the end of a run."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run: this one's number, and how many there are; one without a launcher."""

    number: int = 0
    count: int = 1
    state: Any = None
    """The PartialState of accelerate, where there are several."""

    @property
    def several(self) -> bool:
        return self.count > 1

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """The items that are this process's."""
        return items[self.number :: self.count]

    def agreed(self, value: _Item) -> _Item:
        """The value that the first process has."""
        if not self.several:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def total(self, value: int) -> int:
        """The sum over all processes, once all are here."""
        if not self.several:
            return value
        from accelerate.utils import gather_object

        return sum(gather_object([value]))

    @contextmanager
    def one_after_the_other(self) -> Iterator[None]:
        """The first process runs the block, then the others; none goes on before all are done."""
        if not self.several:
            yield
            return
        with self.state.main_process_first():
            yield
        self.state.wait_for_everyone()

    def device(self, requested: str) -> str:
        """The device of this process: of several GPUs its own."""
        if not self.several or requested not in ("auto", "cuda"):
            return requested
        from mos_cli.utils.devices import choose_device

        return "cpu" if choose_device(requested).type == "cpu" else f"cuda:{self.state.local_process_index}"


def join_processes() -> Processes:
    """The processes that a launcher started, this one among them."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or "RANK" not in os.environ:
        return Processes()
    from accelerate import PartialState

    # gloo also for GPUs: nothing but a few numbers is exchanged.
    state = PartialState(cpu=True, timeout=LONGEST)
    return Processes(state.process_index, state.num_processes, state)
