"""Ranks of a distributed job that are forks of the test process, which has torch imported already."""

import contextlib
import os
import signal
import time
import traceback
import warnings
from types import SimpleNamespace

import torch.distributed as dist


def fork(action, *arguments):
    """Run an action in a fork of this process, whose exit status is the result; return the process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads; the child needs none of them
        child = os.fork()
    if child:
        return child
    status = 99
    try:
        status = action(*arguments)
    finally:
        os._exit(status)


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork_ranks(processes, folder, action, *arguments, seconds=300):
    """Run an action on every rank of one node, as torchrun does, and return its exit status and output."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [folder / f"{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr")]
    ranks = [fork(run_rank, rank, processes, store.port, logs, action, *arguments) for rank in range(processes)]
    running, statuses, deadline = set(ranks), [], time.monotonic() + seconds
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.discard(pid)
                statuses.append(os.waitstatus_to_exitcode(status))
        if any(statuses) and running:
            deadline = min(deadline, time.monotonic() + 10)  # a failed rank leaves others waiting for it
        if time.monotonic() > deadline:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    output, errors = (log.read_text() for log in logs)
    return SimpleNamespace(returncode=next(filter(None, statuses), 0), stdout=output, stderr=errors)


def run_rank(rank, processes, port, logs, action, *arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
    with (
        logs[0].open("a") as output,
        logs[1].open("a") as errors,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            return action(*arguments) or 0
        except SystemExit as exit:
            return exit.code
        except BaseException:
            traceback.print_exc()
            return 1
