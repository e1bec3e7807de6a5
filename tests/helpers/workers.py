"""Runs of experiments in this process, without the seconds that a worker process needs to import torch."""

import contextlib
import json
import threading

import pytest

from antransformer.runs import worker
from antransformer.runs.queue import RunQueue
from antransformer.training import trainer


class FinishedProcess:
    """A worker process that has exited: its output, and no errors."""

    stderr = ()

    def __init__(self, status, stdout):
        self.status, self.stdout = status, stdout

    def wait(self):
        return self.status

    def terminate(self):
        pass


class NoSignals(contextlib.nullcontext):
    """Replaces ``StopSignals`` in the queue's threads, since only the main thread may handle signals."""

    received = None

    def __enter__(self):
        return self


@contextlib.contextmanager
def workers_in_process():
    """Let run queues train in their own threads, one run at a time. Worker processes: runs/test_queue.py."""
    one_at_a_time = threading.Lock()  # runs share torch's global generator

    def start(queue, folder, device):
        lines = []
        with one_at_a_time, pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker, "send", lambda **message: lines.append(json.dumps(message)))
            patch.setattr(worker, "stop_with_parent", lambda: None)
            patch.setattr(trainer, "StopSignals", NoSignals)
            return FinishedProcess(worker.main([str(folder), queue.dataset.name, device, "1", "1"]), lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunQueue, "_start_worker", start)
        yield
