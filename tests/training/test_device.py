"""Choice of the device, and the number of threads on a CPU."""

import os
import subprocess
import sys

import pytest
import torch

from antransformer.errors import ConfigError
from antransformer.training.device import choose_device
from helpers.messages import mentions


def test_bfloat16_products_are_right_under_a_thread_limit():
    code = (
        "import torch; from antransformer.training.device import choose_device; choose_device('cpu');"
        "a = torch.ones(256, 256, dtype=torch.bfloat16); print((a @ a).unique().tolist(), torch.get_num_threads())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_THREAD_LIMIT": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == "[256.0] 1"


def test_missing_device_is_refused():
    assert choose_device("cpu").type == "cpu"
    for name in ("tpu", "meta", "cuda:7" if torch.cuda.device_count() < 8 else "xla"):
        with pytest.raises(ConfigError) as error:
            choose_device(name)
        assert mentions(error.value, name)


@pytest.mark.parametrize(
    ("name", "parts"), [("auto", (4, 2, "--nproc-per-node")), ("cuda", (4, 2)), ("cuda:1", ("cuda:1", 4))]
)
def test_fewer_devices_than_processes_are_refused(monkeypatch, name, parts):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError) as error:
        choose_device(name, local_rank=3, local_size=4)
    assert mentions(error.value, *parts)
    assert choose_device("cpu", local_rank=3, local_size=4) == torch.device("cpu")
