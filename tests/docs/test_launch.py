"""The launch files: they parse, and what they call the package with is what it takes."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from antransformer.cli import make_parser

LAUNCH = Path(__file__).parent.parent.parent / "examples/launch"
CALLS = ["train --config plan.yaml --data data/mine --out runs/angpt", "train --out runs/angpt --resume"]


def ran(script, folder, resuming):
    """What srun or torchrun is called with by a script, in a folder with or without the run."""
    (folder / "bin").mkdir()
    for name in ("srun", "torchrun"):
        program = folder / "bin" / name
        program.write_text(f'#!/usr/bin/env bash\nprintf "%q " {name} "$@"\n')
        program.chmod(0o755)
    hosts = folder / "bin/scontrol"
    hosts.write_text("#!/usr/bin/env bash\nprintf 'first\\nsecond\\n'\n")
    hosts.chmod(0o755)
    if resuming:
        (folder / "runs/angpt").mkdir(parents=True)
        (folder / "runs/angpt/config.yaml").touch()
    slurm = {"SLURM_JOB_NODELIST": "node[1-4]", "SLURM_NNODES": "4", "SLURM_JOB_ID": "17"}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", script], cwd=folder, env={**os.environ, **slurm, "PATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def job():
    """The Service and the Job."""
    return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def scripts():
    (container,) = job()[1]["spec"]["template"]["spec"]["containers"]
    return {"slurm": (LAUNCH / "slurm.sbatch").read_text(), "kubernetes": container["args"][0]}


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
@pytest.mark.parametrize("resuming", [False, True])
def test_a_launch_file_calls_the_package_as_it_wants_to_be(name, resuming, tmp_path):
    words = ran(scripts()[name], tmp_path, resuming)
    words = words[words.index("torchrun") + 1 :]
    started = get_args_parser().parse_args(words)  # torchrun's own
    assert (started.nnodes, started.nproc_per_node, started.rdzv_backend) == ("4", "8", "c10d")
    assert started.module and started.training_script == "antransformer"
    assert " ".join(started.training_script_args) == CALLS[resuming]
    _, unknown = make_parser("train").parse_known_args(started.training_script_args)
    assert not unknown


def test_there_is_time_to_write_a_checkpoint():
    """More than the 30 seconds of Kubernetes and of torchrun, and torchrun's ends before the other."""
    assert subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"]).returncode == 0
    text = scripts()["slurm"]
    slurm = int(re.search(r"^#SBATCH --signal=TERM@(\d+)$", text, re.M)[1])
    pod = job()[1]["spec"]["template"]["spec"]
    of_slurm = int(re.search(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+) ", text, re.M)[1])
    (of_pod,) = pod["containers"][0]["env"]
    assert of_pod["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    assert 30 < of_slurm < slurm and 30 < int(of_pod["value"]) < pod["terminationGracePeriodSeconds"]
    assert "#SBATCH --requeue\n" in text


def test_pods_meet_at_the_name_that_the_service_gives():
    service, work = job()
    pod = work["spec"]["template"]["spec"]
    assert work["spec"]["completions"] == work["spec"]["parallelism"] == 4
    name = f"{work['metadata']['name']}-0.{pod['subdomain']}"
    assert (
        pod["subdomain"] == service["metadata"]["name"]
        and f"--rdzv-endpoint={name}:" in pod["containers"][0]["args"][0]
    )
    assert service["spec"]["selector"] == {"job-name": work["metadata"]["name"]}
