"""Choice of the device, and the number of threads on a CPU."""

import os
import subprocess
import sys

import pytest
import torch

from antransformer.cli import main
from antransformer.errors import ConfigError, DataError
from antransformer.training import launch, run_folder
from antransformer.training.compilation import use_cuda_graphs
from antransformer.training.config import resolve_config
from antransformer.training.device import (
    choose_device,
    choose_precision,
    is_out_of_memory,
    precision_note,
    resolve_auto,
)
from antransformer.training.distributed.parallel import DistributedContext
from helpers.commands import TEN_STEPS
from helpers.messages import mentions


def resolved(device, **settings):
    return resolve_auto(resolve_config(settings, 257), device)


def test_bfloat16_products_are_right_under_a_thread_limit():
    code = (
        "import torch; from antransformer.training.device import choose_device; choose_device('cpu');"
        "a = torch.ones(256, 256, dtype=torch.bfloat16); print((a @ a).unique().tolist(), torch.get_num_threads())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_THREAD_LIMIT": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == "[256.0] 1"


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        ("cuda", {}, True),
        ("cpu", {}, False),
        ("cuda", {"micro_batch_size": 1}, False),  # the next micro-batch would overwrite the gradients
        ("cuda", {"document_mask": True}, False),
        ("cuda", {"precision": "fp8", "model": {"head_dim": 16}}, False),
        ("cuda", {"preset": "0.5b"}, False),  # kernels are longer than their launch
    ],
)
def test_cuda_graphs_replay_short_steps_on_one_gpu(device, settings, expected):
    config = resolve_config(settings, 257)
    assert use_cuda_graphs(config, torch.device(device), config.micro_batch_size) == expected


def test_missing_device_is_refused():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError) as error:
        choose_device("gpu")
    assert mentions(error.value, "gpu", "cuda") and not mentions(error.value, "vulkan")
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


def test_every_rank_of_a_new_run_chooses_its_own_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(launch, "choose_device", lambda *arguments: chosen.append(arguments))

    def no_data(_name):
        raise DataError("none")

    with pytest.raises(DataError):
        launch.new_run({"data": "none"}, None, no_data, DistributedContext(3, 8, 1, 2))
    assert chosen == [("auto", 1, 2)]


def test_a_cuda_device_becomes_the_current_one(monkeypatch):
    chosen, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == choose_device("cuda", local_rank=1, local_size=2) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")] * 2
    choose_device("cpu")
    assert len(chosen) == 2


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "avx512_f": True}, "bfloat16"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16"),
        ({"architecture": "aarch64", "bf16": True}, "bfloat16"),
        ({"avx512_f": True, "amx_tile": True}, "float32"),
        ({"architecture": "aarch64", "neon": True}, "float32"),
    ],
)
def test_auto_takes_bfloat16_where_the_processor_multiplies_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolved("auto").precision == resolved("cpu").precision == expected
    assert resolved("mps").precision == "float32"
    for name in ("float32", "bfloat16", "fp8"):
        assert resolved("cpu", precision=name).precision == name


@pytest.mark.parametrize("names", [(), ("_is_avx512_bf16_supported",), ("_is_amx_tile_supported",)])
def test_auto_takes_bfloat16_on_a_cpu_with_torch_2_11(monkeypatch, names):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in names, raising=False)
    assert resolved("cpu").precision == ("bfloat16" if names else "float32")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_errors_of_exhausted_memory_are_known(text, expected):
    assert is_out_of_memory(RuntimeError(text)) is expected


def test_a_full_device_is_not_reported_as_missing(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nmore")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(ConfigError) as error:
        choose_device("cuda:0")
    assert mentions(error.value, "cuda:0", "CUDA out of memory") and "\n" not in str(error.value)


@pytest.mark.parametrize(("has_instructions", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_bfloat16_where_the_gpu_multiplies_it(monkeypatch, has_instructions, expected):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_instructions or including_emulation
    )
    assert resolved("cuda:1").precision == resolved("cuda").precision == expected


def test_a_slow_precision_has_a_note(monkeypatch):
    cpu = torch.device("cpu")
    for has_instructions in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has_instructions: {"avx512_bf16": has})
        assert precision_note("float32", cpu) == precision_note("auto", cpu) == ""
        assert ("bfloat16" in precision_note("bfloat16", cpu)) is not has_instructions
        assert "fp8" in precision_note("fp8", cpu)


def test_a_run_is_compiled_on_cuda_devices_unless_the_user_decides():
    assert [resolved(device).compile for device in ("auto", "cpu", "mps", "cuda", "cuda:1")] == [
        *[False] * 3,
        True,
        True,
    ]
    assert resolved("cpu", compile=True).compile and not resolved("cuda", compile=False).compile


def test_a_new_run_records_its_precision_and_an_old_one_keeps_its_own(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("antransformer.training.device.multiplies_bfloat16", lambda device: True)
    options = ["train", "--data", str(corpus), *TEN_STEPS[1:], "--device=cpu", "--out", str(tmp_path / "run")]
    assert main(options) == 0
    config = run_folder.saved_config(tmp_path / "run")
    assert config.precision == "bfloat16"
    assert choose_precision("auto", torch.device("cpu")) == torch.float32  # of a run folder of an earlier release
