"""Golden files: what training computed, and folders that were written, before names and files of the package moved.

``python tests/helpers/golden.py`` writes ``tests/golden`` anew. The files in the repository are from the last commit
with the old names, so they also test that folders written then are still read.
"""

import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import torch

from antransformer.cli import main
from antransformer.interop.register import register_when_imported

GOLDEN = Path(__file__).parent.parent / "golden"
ARCHITECTURES = ("angpt", "ngpt", "gpt+", "gpt", "ln-scaling", "dyt")
MODEL = ["--preset=pico", "--model.width=32", "--model.head-dim=16", "--model.context=32"]
RUN = ["--batch-tokens=128", "--eval-tokens=512", "--shuffle=argsort", "--beta2=0.95", *MODEL]


def text(documents: int = 60) -> str:
    """Documents of random words, drawn with a seed."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 6))) for _ in range(200)]
    return "<|endoftext|>".join(" ".join(draw.choices(words, k=80)) for _ in range(documents))


def run(*arguments: object) -> None:
    """One verb, which must succeed."""
    status = main([str(argument) for argument in arguments])
    assert status == 0, arguments


def losses(data: Path, architecture: str, optimizer: str, precision: str) -> list[float]:
    """Training losses of ten steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = ["--tokens=1280", "--log-every=1", f"--architecture={architecture}", f"--precision={precision}"]
        run("train", "--data", data, "--out", out, f"--optimizer={optimizer}", *options, *RUN)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def processor_probe() -> list[str]:
    """Sums whose last bits depend on the processor. Golden values are exact only where these are equal."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=draw) for _ in range(2))
    products = [(a @ b).double().sum(), (a.bfloat16() @ b.bfloat16()).double().sum(), a.exp().double().sum()]
    return [float(value).hex() for value in products]


def logits_of(exported: Path) -> list[float]:
    """Logits of an exported folder for a fixed sequence, first 20 ids of the last position."""
    register_when_imported()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        logits = model(torch.arange(24)[None] % 256).logits
    return logits[0, -1, :20].tolist()


def compare(data: Path, out: str) -> None:
    """A comparison of two budgets and two seeds."""
    effort = ["--seeds=2", "--budgets", 1280, 2560, "--lr-trials=1", "--tuning-trials=1", "--workers=1"]
    run("compare", "--data", data, "--out", out, "--recipe=paper", "--precision=float32", *effort, *RUN)


def write() -> None:
    """All golden files."""
    torch.set_num_threads(1)
    os.chdir(GOLDEN)  # so that no file names a folder of the machine
    for name in ("data", "run", "exported", "comparison", "sweep"):
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
    Path("words.txt").write_text(text())
    run("prepare", "words.txt", "--out", "data", "--val-fraction", "0.1")
    Path("words.txt").unlink()
    data = Path("data")
    golden = {
        "processor": processor_probe(),
        "losses": {
            f"{architecture} {optimizer} {precision}": losses(data, architecture, optimizer, precision)
            for architecture in ARCHITECTURES
            for optimizer in ("adam", "muon")
            for precision in ("float32", "bfloat16")
        },
    }
    # Stands for a run that was stopped half-way: its last checkpoint is removed, so that resuming repeats ten steps.
    steps = ["--checkpoint-every=10", "--eval-every=10", "--log-every=5"]
    run("train", "--data", data, "--out", "run", "--tokens=2560", *steps, *RUN)
    shutil.rmtree(Path("run", "checkpoints") / "step-00000020")
    lines = [json.loads(line) for line in Path("run", "metrics.jsonl").read_text().splitlines()]
    golden["resumed"] = {str(line["step"]): line["loss"] for line in lines if line["step"] > 10}
    golden["resumed"]["val_loss"] = lines[-1]["val_loss"]
    run("export", "--checkpoint", "run", "--out", "exported")
    golden["logits"] = logits_of(GOLDEN / "exported")
    compare(data, "comparison")
    grid = ["--sizes", "pico", "--widths", 32, "--lrs", "1e-3", "1e-2", "2e-2", "--tokens", 1280, "--batch-tokens", 128]
    fixed = ["--eval-tokens=512", "--model.head-dim=16", "--model.context=32", "--workers=1"]
    run("sweep", "--data", data, "--out", "sweep", *grid, *fixed)
    for path in list(GOLDEN.rglob("*")):  # what the tests do not read
        if path.suffix in (".png", ".html") or path.name == ".lock":
            path.unlink()
    for path in GOLDEN.glob("*/runs/*/checkpoints"):
        shutil.rmtree(path)
    (GOLDEN / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    write()
