"""One command in several processes of this machine."""

import sys

import pytest
import torch

from mos_cli.cli.processes import check_processes
from mos_cli.errors import UsageError


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_processes(2)
    with pytest.raises(UsageError, match=r"--processes 3: this machine has 2 GPUs"):
        check_processes(3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_processes(3)


def test_several_processes_are_refused_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UsageError, match="--processes 2 is not supported on Windows"):
        check_processes(2)
