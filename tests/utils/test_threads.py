"""The number of CPU threads, which is that of the cores that other programs leave free, and how long they spin."""

import os
from collections.abc import Iterator

import psutil
import pytest
import torch

from mos_cli.utils import threads
from mos_cli.utils.threads import SPIN_VARIABLES, AdaptiveThreads, cpu_threads, limit_spinning


class Machine:
    """A machine with `cores` cores, of which the tested process uses `own` and others use `others`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
        self.cores, self.own, self.others, self.now, self.spent = cores, 0.0, 0.0, 0.0, 0.0
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(psutil, "cpu_percent", self.percent)
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(threads.time, "process_time", lambda: self.spent)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)), raising=False)

    def percent(self, percpu: bool) -> list[float]:
        return [100 * min(self.own + self.others, self.cores) / self.cores] * self.cores

    def threads_after(self, measure: AdaptiveThreads, seconds: float, own: float, others: float) -> int:
        """The number of threads that a measure chooses after so many seconds with this use of cores."""
        self.now, self.spent = self.now + seconds, self.spent + own * seconds
        self.own, self.others = own, others
        measure()
        return torch.get_num_threads()


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    with cpu_threads(4):
        yield


def test_as_many_threads_as_cores_are_free(monkeypatch) -> None:
    machine = Machine(monkeypatch, cores=4)
    measure = AdaptiveThreads()
    uses = [(1, 0), (4, 0), (3, 1), (3, 1), (2, 2), (1, 3), (0.5, 3.5), (1, 2), (2, 0), (4, 0)]
    assert [machine.threads_after(measure, 1.0, own, others) for own, others in uses] == [4, 4, 3, 3, 2, 1, 1, 2, 4, 4]


def test_two_processes_that_share_the_cores_end_with_half_of_them_each(monkeypatch) -> None:
    machine = Machine(monkeypatch, cores=4)
    measure = AdaptiveThreads()
    assert [machine.threads_after(measure, 1.0, own, 2) for own in (2, 2, 2)] == [2, 2, 2]


def test_what_uses_little_of_a_core_neither_takes_nor_gives_a_thread(monkeypatch) -> None:
    machine = Machine(monkeypatch, cores=4)
    measure = AdaptiveThreads()
    assert [machine.threads_after(measure, 1.0, 3, others) for others in (0.2, 0.6, 0.2, 0.05)] == [4, 3, 3, 4]


def test_never_more_threads_than_there_were(monkeypatch) -> None:
    machine = Machine(monkeypatch, cores=64)
    assert machine.threads_after(AdaptiveThreads(), 1.0, 1, 0) == 4


def test_short_times_are_not_judged(monkeypatch) -> None:
    machine = Machine(monkeypatch, cores=4)
    measure = AdaptiveThreads()
    assert [machine.threads_after(measure, 0.06, 1, 3) for _ in range(2)] == [4, 1]


def test_only_cores_that_the_process_may_use_count(monkeypatch) -> None:
    machine = Machine(monkeypatch, cores=8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {1, 3}, raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda percpu: [100, 50, 100, 50, 100, 100, 100, 100])
    assert machine.threads_after(AdaptiveThreads(), 1.0, 1, 0) == 2


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_that_the_user_has_set_stays(monkeypatch, name) -> None:
    machine = Machine(monkeypatch, cores=4)
    monkeypatch.setenv(name, "3")
    assert machine.threads_after(AdaptiveThreads(), 1.0, 1, 3) == 4


def spin_settings() -> dict[str, str | None]:
    limit_spinning()
    return {name: os.environ.get(name) for name in SPIN_VARIABLES}


def test_waiting_threads_spin_briefly_unless_the_user_says_otherwise(monkeypatch) -> None:
    for name in (*SPIN_VARIABLES, "OMP_WAIT_POLICY"):
        # Set first, so that the value is restored after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert spin_settings() == SPIN_VARIABLES
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert spin_settings()["GOMP_SPINCOUNT"] == "7"
    for name in SPIN_VARIABLES:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert set(spin_settings().values()) == {None}
