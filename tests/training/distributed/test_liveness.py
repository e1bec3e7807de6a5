"""Which ranks are reported as missing after a failed collective."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from antransformer.errors import MachineError
from antransformer.training.distributed import liveness
from antransformer.training.distributed.liveness import RankMonitor


@pytest.fixture
def monitors(monkeypatch):
    """Monitors of twelve ranks in one store; ranks that do not answer count as dead."""
    monkeypatch.setattr(liveness, "ANSWER_TIMEOUT", 0.5)
    store = dist.HashStore()
    return [RankMonitor(store, rank, 12) for rank in range(12)]


def errors_of(monitors):
    """Return the error of each of these ranks, which answer at the same time."""
    with ThreadPoolExecutor(len(monitors)) as pool:
        return list(pool.map(lambda monitor: monitor.missing_ranks_error(), monitors))


def test_the_lowest_healthy_rank_names_the_missing_ones(monitors):
    first, *others = errors_of(monitors[1:11])
    assert isinstance(first, MachineError) and all(isinstance(error, SystemExit) for error in others)
    for fact in (f"rank 0 (process {os.getpid()} on {socket.gethostname()})", "rank 11 ", "--timeout"):
        assert fact in str(first)
    assert "rank 1 " not in str(first)


def test_a_long_list_of_missing_ranks_is_cut(monitors):
    (error,) = errors_of(monitors[11:])
    assert str(error).count("rank ") == liveness.MAX_NAMED_RANKS and " 3 " in str(error)


def test_a_rank_with_an_error_of_its_own_is_not_missing(monitors):
    monitors[0].report_exit()
    assert all(isinstance(error, SystemExit) for error in errors_of(monitors[1:]))


def test_a_slow_rank_is_not_missing(monitors):
    first, *others = errors_of(monitors)
    assert isinstance(first, MachineError) and "--timeout" in str(first) and "rank " not in str(first)
    assert all(isinstance(error, SystemExit) and error.code == 1 for error in others)
