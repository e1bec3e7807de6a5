"""Any file content is read or refused in one line; nothing else is touched, nothing is executed.

A few hundred cases, always the same, run with the other tests; ``make fuzz`` runs 10,000 new ones.
"""

import bz2
import contextlib
import copy
import faulthandler
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from antransformer.cli import main
from antransformer.comparison import statistics
from antransformer.comparison.summary import summary
from antransformer.data import Dataset, ShuffledWindows, Tokenizer, byte_tokenizer, readers, stdlib
from antransformer.data.mixture import PERIOD, quotas
from antransformer.data.mixture_spec import format_mixture, parse_mixture, parse_stage
from antransformer.errors import AntransformerError, ConfigError
from antransformer.inference import generate
from antransformer.interop import local_tasks as task_data
from antransformer.interop.import_hf import import_folder, read_config
from antransformer.interop.model_card import card
from antransformer.lock import lock
from antransformer.results.comparison import Results
from antransformer.scaling.law_files import SHIPPED, predict, read_laws
from antransformer.training import launch
from antransformer.training.checkpointing import checkpoint
from antransformer.training.checkpointing.sharded_safetensors import SHARDING_KEY, TensorFiles
from antransformer.training.config import TrainConfig, resolve_config
from antransformer.training.config_files import read_yaml
from antransformer.training.defaults import parameter_count
from antransformer.training.metrics import MetricsLog, read_metrics
from antransformer.training.optimizer import make_optimizer
from antransformer.training.run_folder import open_checkpoint, resumed_config
from antransformer.training.trainer import Trainer
from helpers.experiments import experiment, variant

CASES = int(os.environ.get("ANTRANSFORMER_FUZZ_CASES", "300"))
SHARES = 12  # tests with an equal share of the cases
SECONDS = 30  # no case is near it; what takes longer hangs
TINY = {"width": 32, "layers": 1, "context": 16, "head_dim": 32}
DEEP = 100_000  # far past any parser's recursion


def fuzz(*strategies):
    """Run a test on its share of the cases."""
    few = CASES <= 1000
    options = settings(
        max_examples=math.ceil(CASES / SHARES),
        derandomize=few,
        database=None,  # it would be in the current folder, which is watched
        deadline=None,
        phases=[Phase.generate],  # a case is small as it is, and shrinking one that hangs takes hours
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: options(given(*strategies)(test))


# Where it happens: ROOT/case is the folder that a case may change, all else in ROOT must stay as it is.


class Hang(BaseException):
    """Not an Exception, so that nothing takes it for an error of a library."""


def raise_hang(*_):
    raise Hang(f"still busy after {SECONDS} s")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    (root / "outside").mkdir()
    (root / "outside/keep.txt").write_text("not yours")
    (root / "cwd").mkdir()
    return root


def snapshot(root):
    """All files, folders and links outside of the case's folder, with their content."""
    return {
        path: path.read_bytes() if path.is_file() else str(path.lstat().st_mode)
        for path in sorted(root.rglob("*"))
        if path.relative_to(root).parts[0] != "case"
    }


@contextlib.contextmanager
def case(root):
    """An empty folder to work in; nothing outside it may change."""
    folder, back = root / "case", Path.cwd()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    before = snapshot(root)
    handler = signal.signal(signal.SIGALRM, raise_hang)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True, file=sys.__stderr__)  # where no Python code runs
    os.chdir(root / "cwd")
    try:
        yield folder
    finally:
        os.chdir(back)
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert snapshot(root) == before


@contextlib.contextmanager
def one_line():
    """Success, or an error of ours in one line."""
    try:
        yield
    except AntransformerError as error:
        assert str(error) and "\n" not in str(error)


def command(*words):
    """Run a verb: 0 and no complaint, or 1 or 2 and one line."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=how) for how in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    err.seek(0)
    complaint = err.read()
    assert status in (0, 1, 2)
    assert complaint.count("\n") == bool(status), complaint
    assert not status or complaint.startswith("antransformer: error: ")


# What is put into files


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


PICKLE = pickle.dumps(Touch("../outside/unpickled"))
STRINGS = [
    "",
    "\0",
    "\ud800",
    "a\nb\rc\x85d",
    "../outside/keep.txt",
    "../../outside/keep.txt",
    "/etc/passwd",
    "..",
    "x" * 5000,
    "9" * 5000,
    "0x" + "f" * 5000,
    "nan",
    "1e999",
    "$(touch ../outside/shell)",
    "__import__('os').system('touch ../outside/evaluated')",
    "(a+)+$",
    "\U0001f600",
]
NUMBERS = [0, 1, 2, 3, -1, 16, 32, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 10**30, -(10**30)]
FLOATS = [0.5, -0.0, 1e-320, 1e38, 1e308, -1e308, math.inf, -math.inf, math.nan]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(FLOATS),
    st.sampled_from(STRINGS),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
NEST = "\ufdd0nest"  # becomes deep nesting in the text


def places(content):
    """Every place in nested lists and dictionaries, as (container, key)."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from places(value)


@st.composite
def edited(draw, content):
    """Nested data with one to three of its places changed, doubled or gone."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(content))
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        how = draw(st.sampled_from(["replace"] * 4 + ["delete", "move", "add", "nest"]))
        if how == "replace":
            container[key] = draw(values)
        elif how == "nest":
            container[key] = NEST
        elif how == "move":
            other, at = draw(st.sampled_from(found))
            container[key] = copy.deepcopy(other[at])
        elif how == "delete":
            del container[key]
        elif isinstance(container, dict):
            container[draw(st.sampled_from(STRINGS) | st.text(max_size=5))] = draw(values)
        else:
            container.insert(key, draw(values))
    return content


def to_json(content):
    return json.dumps(content).replace(json.dumps(NEST), "[" * DEEP + "]" * DEEP).encode()


def to_yaml(content):
    return yaml.safe_dump(content, sort_keys=False).replace(json.dumps(NEST), "[" * 5000 + "]" * 5000).encode()


ODD_BYTES = [b"\xef\xbb\xbf", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\x1f\x8b", b"\n", b'"', b"{", b"[", PICKLE]


@st.composite
def damaged(draw, content):
    """Bytes of which some are gone, changed or new; half of the time all is as it was."""
    how = draw(st.sampled_from(["keep"] * 5 + ["cut", "flip", "insert", "first", "other"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "cut":
        return content[:at]
    if how == "flip" and content:
        return content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
    if how == "insert":
        return content[:at] + draw(st.sampled_from(ODD_BYTES)) + content[at:]
    if how == "first":
        return draw(st.sampled_from(ODD_BYTES)) + content
    if how == "other":
        return draw(st.binary(max_size=64) | st.sampled_from([b"", PICKLE, b"null", b"[]", b"{}"]))
    return content


def json_files(content):
    """A JSON file like this one, but not quite."""
    same = st.just(to_json(content))
    twice = edited(content).map(lambda other: to_json(content)[:-1] + b"," + to_json(other)[1:])  # duplicate keys
    return (edited(content).map(to_json) | twice | same).flatmap(damaged)


KINDS = ["link", "loop", "folder", "nothing", "pipe", "copy"]
strange = st.none() | st.none() | st.none() | st.sampled_from(KINDS)  # what takes the place of a file


def put(path, content, kind=None):
    """Write a file, or put something else in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        path.unlink()
    if kind is None:
        path.write_bytes(content)
    elif kind == "link":
        path.symlink_to(Path.cwd().parent / "outside/keep.txt")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "copy":
        elsewhere = path.with_name(f"{path.name}.elsewhere")
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)


# Whole folders to begin with

TEXTS = ["to be or not to be, " * 12 + str(number) for number in range(6)]


@pytest.fixture(scope="module")
def whole(root):
    """A prepared data folder, a run of two steps on it, and an exported model, all tiny."""
    folder = root / "whole"
    folder.mkdir()
    (folder / "train.txt").write_text("<|endoftext|>".join(TEXTS))
    (folder / "val.txt").write_text(TEXTS[0])
    words = ["prepare", folder / "train.txt", "--val-inputs", folder / "val.txt", "--out", folder / "data"]
    sizes = [f"--model.{name.replace('_', '-')}={size}" for name, size in TINY.items()]
    command(*words)
    train = ["--data", folder / "data", "--batch-tokens=32", "--tokens=64", "--eval-tokens=32", "--log-every=1"]
    command("train", "--out", folder / "run", "--checkpoint-every=1", *train, *sizes)
    command("train", "--out", folder / "run-averaged", "--ema=0.5", "--checkpoint-every=1", *train, *sizes)
    step = next(iter(sorted((folder / "run/checkpoints").iterdir())))
    shutil.copytree(folder / "run", folder / "run-of-two")
    share(folder / "run-of-two/checkpoints" / "step-00000002")
    (folder / "exported").mkdir()
    shutil.copy(step / "model.safetensors", folder / "exported")
    shutil.copy(folder / "data/tokenizer.json", folder / "exported")
    model = json.loads((step / "state.json").read_text())["model"]
    (folder / "exported/config.json").write_text(json.dumps({"model_type": "antransformer", **model}))
    return folder


def share(step):
    """Make of a checkpoint one that two processes wrote."""
    state = json.loads((step / "state.json").read_text())
    digests = {}
    for kind in ("model", "optimizer"):
        tensors = load_file(step / f"{kind}.safetensors")
        (step / f"{kind}.safetensors").unlink()
        for rank in (0, 1):
            parts = {name: value.chunk(2)[rank].clone() for name, value in tensors.items() if value.ndim == 2}
            begins = {name: [rank * len(tensors[name].chunk(2)[0]), 0] for name in parts}
            if rank == 0:  # it has what is no matrix
                parts = {**tensors, **parts}
                begins = {name: [0] * part.ndim for name, part in parts.items()}
            path = step / f"{kind}-0000{rank + 1}-of-00002.safetensors"
            header = {name: {"saved_offsets": begin} for name, begin in begins.items()}
            save_file(parts, path, {SHARDING_KEY: json.dumps(header)})
            digests[path.name] = checkpoint.sha256(path)
    (step / "state.json").write_text(json.dumps({**state, "sha256": digests}))
    checkpoint.restore(checkpoint.read(step), torch.device("cpu"))


class SmallTrainer(Trainer):
    """Trains what a test has time for."""

    def __init__(self, config, *arguments):
        passes = config.steps * config.batch_size / config.micro_batch_size
        if parameter_count(config.model) > 200_000 or config.tokens > 1000 or passes > 20 or config.compile:
            raise ConfigError("larger than a test")
        super().__init__(config, *arguments)


@pytest.fixture(scope="module", autouse=True)
def small(whole):
    """Settings can ask for a long run, and for the built-in corpus."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "Trainer", SmallTrainer)
        patch.setattr(stdlib, "ensure_default", lambda *_: whole / "data")
        yield


# Settings

SETTINGS = {
    "data": "../whole/data",
    "init": None,
    "preset": "pico",
    "tokens": 64,
    "batch_tokens": 32,
    "micro_batch_size": 2,
    "lr": 0.01,
    "warmup_fraction": 0.1,
    "schedule": "wsd",
    "decay_fraction": 0.2,
    "seed": 1,
    "max_skipped_steps": 2,
    "timeout": 60,
    "eval_tokens": "0.1K",
    "device": "cpu",
    "precision": "auto",
    "compile": False,
    "architecture": "gpt+",
    "model": {**TINY, "rotary_fraction": 0.5, "init_std": 0.1},
}
LAUGHS = ["&a0 [ha, ha]", *(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
MERGES = ["&m0 {lr: 1}", *(f"&m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 12))]
TAGS = [
    *("bool", "int", "float", "null", "str", "binary", "timestamp", "set", "omap", "pairs", "merge", "value"),
    *("python/object/apply:os.system", "python/object/new:os.system", "python/module:os", "python/tuple"),
]
ODD_YAML = [
    f"[{', '.join(LAUGHS)}]",
    f"[{', '.join(MERGES)}]",
    "&a [*a]",
    "&a {b: *a}",
    "*nowhere",
    "{<<: 1}",
    "{<<: [1]}",
    "{[1]: 2}",
    "{{}: 2}",
    "2001-01-01",
    "2001-99-99",
    "0x" + "f" * 5000,
    "0b" + "1" * 20_000,
    ":".join(["59"] * 300),
    ":".join(["59"] * 300) + ".5",
    "[touch ../outside/applied]",
    "{a: 1, a: 2}",
    '"\\uD800"',
    '"\\0"',
    "!<tag:yaml.org,2002:python/object/apply:os.system> [touch ../outside/applied]",
    "!unknown 1",
    "|\n  text",
    "%YAML 9.9",
    "\n---\n",
]
odd_yaml = st.sampled_from(ODD_YAML) | st.builds(
    "!!{} {}".format, st.sampled_from(TAGS), st.sampled_from([*ODD_YAML, "x", '""', "+", "-", "1", "[]", "{}", ":"])
)


@st.composite
def yaml_files(draw, content):
    """A YAML file like this one, but not quite."""
    if draw(st.booleans()):
        return draw(damaged(to_yaml(draw(edited(content)))))
    key = draw(st.sampled_from([*content, "model.width", "<<", "? [a]", "x"]))
    lines = [*to_yaml({name: content[name] for name in content if name != key}).decode().splitlines()]
    lines.insert(draw(st.integers(0, len(lines))), f"{key}: {draw(odd_yaml)}")
    return draw(damaged("\n".join(lines).encode("utf-8", "surrogatepass")))


@fuzz(st.data())
def test_settings(root, data):
    content = data.draw(yaml_files(SETTINGS))
    kind = data.draw(strange)
    with case(root) as folder:
        put(folder / "my.yaml", content, kind)
        command("train", "--config", folder / "my.yaml", "--out", folder / "run")


words = st.sampled_from(["web", "my books", "", ":", "0.8", "a:b", "~", "..", "it's", '"', "\\", "\x00", "x" * 300])
weights = st.sampled_from(["", "1", "0.7", "-1", "1e-9", "1e9", "1e400", "nan", "inf", "x", "1_0", "\u0661"])
mixtures = st.lists(st.builds("{}:{}".format, words, weights) | words | st.text(max_size=9), max_size=5)


@fuzz(mixtures, st.sampled_from([shlex.join, " ".join]))
def test_mixtures(root, parts, join):
    text = join(parts)
    with case(root), one_line():
        parsed = parse_mixture(text)
        assert len(parsed) == 1 or parse_mixture(format_mixture(parsed)) == parsed
        assert quotas([part.weight for part in parsed]).sum() == PERIOD
        share, second = parse_stage(text)
        assert 0 < share < 1 and second
    with case(root) as folder:
        content = {"data": parts, "data_from": f"0.5 {text}"}
        put(folder / "my.yaml", json.dumps(content).encode("utf-8", "surrogatepass"))
        command("train", "--config", folder / "my.yaml", "--out", folder / "run")


LAW = json.loads((SHIPPED / "paper.json").read_text())
SURFACE = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28, "points": 9, "error": 0.01}
SURFACE |= {"sizes": [1e6, 1e8], "tokens": [1e7, 1e9], "covariance": [[1e-4] * 5] * 5}


@fuzz(st.data())
def test_laws(root, data):
    content, kind = data.draw(json_files({**LAW, "angpt": {**LAW["angpt"], "surface": SURFACE}})), data.draw(strange)
    with case(root) as folder:
        put(folder / "laws.json", content, kind)
        with one_line():
            for laws in read_laws(folder / "laws.json").by_architecture.values():
                predict(laws, 1e7, 1e9)
                if laws.compute:
                    laws.best_size(1e18)


# Prepared data


@fuzz(st.data())
def test_data_folders(root, whole, data):
    meta = json.loads((whole / "data/meta.json").read_text())
    content = data.draw(json_files(meta))
    shard = data.draw(damaged((whole / "data/train-00000.bin").read_bytes()))
    kinds = [data.draw(strange) for _ in range(2)]
    with case(root) as folder:
        shutil.copytree(whole / "data", folder / "data")
        put(folder / "data/meta.json", content, kinds[0])
        put(folder / "data/train-00000.bin", shard, kinds[1])
        with one_line():
            dataset = Dataset.open(folder / "data")
            dataset.tokenizer()
            ShuffledWindows(dataset.split("train"), 16, seed=0).batch(0, 2)


# Runs and checkpoints


@st.composite
def tensor_files(draw, content):
    """A safetensors file like this one, but not quite."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    if "__metadata__" in header and draw(st.booleans()):  # JSON in JSON: where the parts begin
        begins = json.loads(header["__metadata__"][SHARDING_KEY])
        header["__metadata__"][SHARDING_KEY] = draw(json_files(begins)).decode(errors="replace")
        header = to_json(header)
    else:
        header = draw(json_files(header))
    length = draw(st.sampled_from([len(header)] * 8 + [0, len(header) // 2, 2**40, 2**64 - 1]))
    return draw(damaged(struct.pack("<Q", length) + header + content[8 + size :]))


@st.composite
def checkpoints(draw, folder):
    """The files of a checkpoint, whose manifest knows what became of the others, if it is sound itself."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    state = json.loads(files["state.json"])
    broken = draw(st.sampled_from(sorted(files)))
    if broken != "state.json":
        files[broken] = draw(tensor_files(files[broken]))
        state["sha256"][broken] = hashlib.sha256(files[broken]).hexdigest()
    files["state.json"] = draw(json_files(state)) if broken == "state.json" else to_json(state)
    return files


@fuzz(st.data())
def test_checkpoints(root, whole, data):
    run = whole / data.draw(st.sampled_from(["run", "run-of-two", "run-averaged"]))
    files = data.draw(checkpoints(run / "checkpoints/step-00000002"))
    name, kind = data.draw(st.sampled_from(sorted(files))), data.draw(strange)
    with case(root) as folder:
        shutil.copytree(run, folder / "run")
        newest = folder / "run/checkpoints/step-00000002"
        for file, content in files.items():
            put(newest / file, content, kind if file == name else None)
        with one_line():
            checkpoint.read(newest)
        with one_line():
            found, tokenizer = open_checkpoint(folder / "run", notify=lambda text: None)
            model = checkpoint.restore(found, torch.device("cpu"))
            if found.model.context <= 4096:
                list(generate(model, [[tokenizer.end_of_text]], max_new_tokens=2))
            config = TrainConfig(
                model=found.model,
                tokens=10**9,
                batch_tokens=found.model.context,
                micro_batch_size=1,
                lr=0.1,
                eval_every=1,
                checkpoint_every=1,
            )
            optimizer = make_optimizer(model, config)
            checkpoint.load_optimizer(found, model, optimizer)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            card(found, tokenizer, "name", "native", "float32", "checked")


@fuzz(st.data())
def test_resumed_runs(root, whole, data):
    name = data.draw(st.sampled_from(["config.yaml", "metrics.jsonl", "state.json", "tokenizer.json"]))
    step = data.draw(st.sampled_from(["step-00000001", "step-00000002"]))
    place = Path("checkpoints", step, name) if name == "state.json" else Path(name)
    if name == "config.yaml":
        content = data.draw(yaml_files(yaml.safe_load((whole / "run" / place).read_text())))
    elif name == "metrics.jsonl":
        content = data.draw(metric_files((whole / "run" / place).read_text()))
    else:
        content = data.draw(json_files(json.loads((whole / "run" / place).read_text())))
    kind = data.draw(strange)
    link = data.draw(st.sampled_from([None, "metrics.jsonl.partial", "checkpoints/.partial-step-00000002"]))
    with case(root) as folder:
        shutil.copytree(whole / "run", folder / "run")
        put(folder / "run" / place, content, kind)
        if step == "step-00000001":
            shutil.rmtree(folder / "run/checkpoints/step-00000002")
        if link:
            put(folder / "run" / link, b"", "link")
        command("train", "--out", folder / "run", "--resume")


@st.composite
def metric_files(draw, content):
    """A file of JSON lines like this one, but not quite."""
    lines = [json.loads(line) for line in content.splitlines()]
    return draw(damaged(b"\n".join(draw(edited(line).map(to_json) | st.just(to_json(line))) for line in lines)))


@fuzz(st.data())
def test_metrics(root, whole, data):
    content = data.draw(metric_files((whole / "run/metrics.jsonl").read_text()))
    kind = data.draw(strange)
    with case(root) as folder:
        shutil.copytree(whole / "run", folder / "run")
        put(folder / "run/metrics.jsonl", content, kind)
        found, tokenizer = open_checkpoint(folder / "run")
        with one_line():
            card(found, tokenizer, "name", "native", "float32", "checked")
        with contextlib.suppress(OSError):  # the command line says it in one line
            log = MetricsLog(folder / "run", 1)
            log.write({"step": 2})
            log.close()


# Text and tokenizers

BOMB = gzip.compress(b"0" * 2**25)


@st.composite
def compressed(draw, ending, content):
    """Compressed bytes, of which some are gone or changed."""
    if ending == ".zst":
        return draw(damaged(pytest.importorskip("zstandard").compress(content)))
    if ending == ".gz":
        return draw(damaged(gzip.compress(content, mtime=0)) | st.just(BOMB))
    library = {".bz2": bz2, ".xz": lzma}.get(ending)
    return draw(damaged(library.compress(content))) if library else content


@st.composite
def inputs(draw):
    """The name of a file and its bytes."""
    compression = draw(st.sampled_from(["", "", ".gz", ".zst", ".bz2", ".xz"]))
    base = draw(st.sampled_from([".txt", ".jsonl", ".json", ".ndjson", ".parquet", ".bin"]))
    if base == ".parquet":
        compression = ""
    ending = base + compression
    if base in (".txt", ".bin"):
        text = "<|endoftext|>".join([*TEXTS, *draw(st.lists(st.text(max_size=20), max_size=3))])
        return ending, draw(compressed(compression, draw(damaged(text.encode()))))
    lines = [{"text": text, "id": 1} for text in TEXTS]
    content = b"\n".join([draw(edited(line).map(to_json)) if draw(st.booleans()) else to_json(line) for line in lines])
    content = draw(compressed(compression, draw(damaged(content))))
    if ending == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        file = io.BytesIO()
        column = draw(st.sampled_from([TEXTS, [None, *TEXTS], [1, 2], [b"\xff"], [["a"]], [{"text": "a"}]]))
        if draw(st.booleans()) and column[0] in TEXTS:
            column = pyarrow.array(column).dictionary_encode()
        parquet.write_table(pyarrow.table({draw(st.sampled_from(["text", "text", "other"])): column}), file)
        content = draw(damaged(file.getvalue()))
    return ending, content


@fuzz(st.data())
def test_text(root, data):
    ending, content = data.draw(inputs())
    kind = data.draw(strange)
    held_out = data.draw(st.booleans())
    with case(root) as folder:
        put(folder / f"input{ending}", content, kind)
        (folder / "val.txt").write_text(TEXTS[0])
        words = ["--val-inputs", folder / "val.txt"] if held_out else ["--val-fraction", "0.5"]
        command("prepare", folder / f"input{ending}", "--out", folder / "data", *words)


@fuzz(st.data())
def test_token_files(root, data):
    ids = [*range(257)] * 20
    layout = data.draw(st.sampled_from(["llm.c", "megatron", "datatrove"]))
    ending, side, content, more = {
        "llm.c": (".bin", None, struct.pack("<iii1012x", 20240520, 1, len(ids)), b""),
        "megatron": (".bin", ".idx", b"", b"MMIDIDX\0\0" + struct.pack("<QBQQi", 1, 8, 1, 1, len(ids))),
        "datatrove": (".ds", ".ds.metadata", b"", f"byte|2\n{len(ids)}\n5 kT".encode()),
    }[layout]
    content, more = data.draw(damaged(content + struct.pack(f"<{len(ids)}H", *ids))), data.draw(damaged(more))
    kinds = [data.draw(strange) for _ in range(2)]
    with case(root) as folder:
        put(folder / f"input{ending}", content, kinds[0])
        if side:
            put(folder / f"input{side}", more, kinds[1])
        command("prepare", folder / f"input{ending}", "--tokenized", "--tokenizer", "byte", "--out", folder / "data")


def small_tokenizers():
    """A tokenizer.json of each model, with many of the other possible contents."""
    base = json.loads(byte_tokenizer().to_json())
    vocabulary = {"a": 0, "b": 1, "ab": 2, "[UNK]": 3, "##b": 4}
    models = [
        {"type": "BPE", "dropout": None, "unk_token": "[UNK]", "continuing_subword_prefix": None,
         "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
         "vocab": vocabulary, "merges": [["a", "b"]]},
        {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        {"type": "WordPiece", "vocab": vocabulary, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 100},
        {"type": "Unigram", "vocab": [["[UNK]", 0.0], ["a", -1.0], ["ab", -2.5]], "unk_id": 0, "byte_fallback": False},
    ]  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": "\\w+|\\s"}, "behavior": "Isolated", "invert": False}
    normalizers = [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
        {"type": "Prepend", "prepend": "a"},
        {"type": "Strip", "strip_left": True, "strip_right": False},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
         "lowercase": True},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "NFKC"},
    ]  # fmt: skip
    others = [
        base["pre_tokenizer"],
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
        {"type": "Sequence", "pretokenizers": [split, {"type": "Digits", "individual_digits": True}]},
        {"type": "FixedLength", "length": 3},
    ]
    decoders = [base["decoder"], {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True}]
    special = {**base["added_tokens"][0], "id": 5}
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "a"}  # fmt: skip
    for number, model in enumerate(models):
        normalizer = {"type": "Sequence", "normalizers": normalizers[number : number + 2]}
        yield {**base, "model": model, "normalizer": normalizer, "pre_tokenizer": others[number],
               "decoder": decoders[number % 2], "truncation": truncation, "padding": padding,
               "added_tokens": [special, {**special, "content": "b a", "id": 6, "lstrip": True}]}  # fmt: skip


TOKENIZERS = list(small_tokenizers())


@fuzz(st.data())
def test_tokenizers(root, data):
    content = data.draw(json_files(data.draw(st.sampled_from(TOKENIZERS))))
    kind = data.draw(strange)
    with case(root) as folder:
        put(folder / "tokenizer.json", content, kind)
        (folder / "text.txt").write_text("<|endoftext|>".join(TEXTS))
        with one_line():
            tokenizer = Tokenizer.load(folder / "tokenizer.json")
            for text in ("", "ab b a [UNK] 12 \0 \u00e9 <|endoftext|>", "a" * 50):
                tokenizer.decode(tokenizer.encode(text))
            tokenizer.decode([0, tokenizer.end_of_text, 2**31])
            tokenizer.save(folder / "again.json")
            assert Tokenizer.load(folder / "again.json").vocabulary() == tokenizer.vocabulary()
        words = ["--val-fraction", "0.5", "--tokenizer", folder / "tokenizer.json", "--out", folder / "data"]
        command("prepare", folder / "text.txt", *words)


# Exported models


@fuzz(st.data())
def test_exported_models(root, whole, data):
    names = ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"]
    name, kind = data.draw(st.sampled_from(names)), data.draw(strange)
    if name == "model.safetensors":
        content = data.draw(tensor_files((whole / "exported" / name).read_bytes()))
    elif name == "model.safetensors.index.json":
        weights = {f"block.{number}": "model.safetensors" for number in range(3)}
        content = data.draw(json_files({"metadata": {"total_size": 1}, "weight_map": weights}))
    else:
        content = data.draw(json_files(json.loads((whole / "exported" / name).read_text())))
    with case(root) as folder:
        shutil.copytree(whole / "exported", folder / "exported")
        put(folder / "exported" / name, content, kind)
        command("import", folder / "exported", "--out", folder / "run")


# Results of experiments, and sets to evaluate on


@fuzz(st.data())
def test_results(root, data):
    shape = {"budgets": (1000, 2000), "seeds": (1, 2)}
    results = experiment(variant("gpt+", 1.0, **shape), variant("angpt", 1.2, **shape), **shape)
    with case(root) as folder:
        results.save(folder)
        whole = json.loads((folder / "results.json").read_text())
    content, kind = data.draw(json_files(whole)), data.draw(strange)
    with case(root) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 20)
        put(folder / "results.json", content, kind)
        with one_line():
            summary(Results.load(folder))


ROWS = {
    "hellaswag": {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "1"},
    "arc_easy": {"question": {"stem": "a", "choices": [{"text": "b", "label": "A"}, {"text": "c", "label": "B"}]},
                 "answerKey": "B"},
    "arc_challenge": {"question": "a", "choices": ["b", "c"], "gold": 1},
    "piqa": {"goal": "a", "sol1": "b", "sol2": "c", "label": 0},
    "winogrande": {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "1"},
    "lambada_openai": {"text": "a b"},
    "blimp_island": {"sentence_good": "a", "sentence_bad": "b"},
    "wikitext": {"page": "\n = a = \n"},
}  # fmt: skip


@fuzz(st.data())
def test_evaluation_sets(root, data):
    task = data.draw(st.sampled_from(sorted(ROWS)))
    lines = [data.draw(edited(ROWS[task]).map(to_json)) if data.draw(st.booleans()) else to_json(ROWS[task])] * 2
    content, labels = data.draw(damaged(b"\n".join(lines))), data.draw(st.none() | damaged(b"1\n0"))
    kind = data.draw(strange)
    with case(root) as folder:
        put(folder / "set.jsonl", content, kind)
        if labels is not None:
            put(folder / "set-labels.lst", labels)
        with one_line():
            task_data.rows(task, folder / "set.jsonl")
        with one_line():
            task_data.documents(folder / "set.jsonl")


# What it found


def refusal(function, *arguments):
    """The one line of an error of ours."""
    with pytest.raises(AntransformerError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("bomb", ODD_YAML[:2], ids=["lists", "merges"])
def test_aliases_do_not_unfold(tmp_path, bomb):
    (tmp_path / "x.yaml").write_text(f"data: {bomb}")
    message = refusal(read_yaml, tmp_path / "x.yaml")
    assert "x.yaml" in message and "alias" in message
    (tmp_path / "x.yaml").write_text("lr: &rate 0.1\neps: *rate")
    assert read_yaml(tmp_path / "x.yaml") == {"lr": 0.1, "eps": 0.1}


@pytest.mark.parametrize("value", ["!!int ''", "!!float ''", "!!bool x"])
def test_scalars_that_belie_their_tag_are_not_valid(tmp_path, value):
    (tmp_path / "x.yaml").write_text(f"lr: {value}")
    message = refusal(read_yaml, tmp_path / "x.yaml")
    assert "x.yaml" in message and "YAML" in message


@pytest.mark.parametrize("key", ["lr", "tokens", "seed"])
def test_a_number_too_long_to_be_spelled_is_refused(key):
    message = refusal(resolve_config, {key: int("f" * 5000, 16)}, 300)
    assert re.search(rf"\b{key}\b", message) and len(message) < 200


@pytest.mark.parametrize(
    ("model", "vocab_size", "parts"),
    [
        ({"layers": 2**31 - 1}, 300, ["layers", "10,000", f"{2**31 - 1}"]),
        ({"width": 2**30}, 300, ["width", f"{2**30:,}", "mlp_ratio"]),
        ({"width": 2**30}, 2**31 - 1, ["width", f"{2**30:,}", "vocab_size", f"{2**31 - 1:,}"]),
        ({"mlp_ratio": 2**31 - 1, "width": 2**20}, 300, ["width", f"{2**20:,}", "mlp_ratio", f"{2**31 - 1:,}"]),
    ],
)
def test_sizes_without_measure_are_refused_at_once(model, vocab_size, parts):
    message = refusal(resolve_config, {"model": model}, vocab_size)
    assert all(re.search(rf"\b{part}\b", message) for part in parts), message


def test_deep_json_is_refused(tmp_path, whole):
    deep = "[" * DEEP
    for name, read in (("state.json", checkpoint.read), ("config.json", read_config), ("results.json", Results.load)):
        (tmp_path / name).write_text(deep)
        message = refusal(read, tmp_path)
        assert str(tmp_path) in message and name in message
    (tmp_path / "metrics.jsonl").write_text(f'{deep}\n{{"step": 1, "loss": "low"}}\n{{"step": 2, "loss": 1.5}}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 2, "loss": 1.5}]


def test_pipes_and_loops_are_not_waited_for(tmp_path):
    def tensors(path):
        return TensorFiles([path])

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "loop"):
        for read in (read_yaml, Tokenizer.load, tensors, task_data.documents):
            assert str(tmp_path / name) in refusal(read, tmp_path / name)


def test_tokenizers_that_panic_or_know_no_answer_are_refused(tmp_path):
    word, file = TOKENIZERS[1], tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**word, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}))
    assert str(file) in refusal(Tokenizer.load, file)
    vocabulary = {"a": 0}
    file.write_text(json.dumps({**word, "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"}}))
    tokenizer = Tokenizer.load(file)
    assert tokenizer.name in refusal(tokenizer.encode, "b")
    assert tokenizer.name in refusal(tokenizer.encode_batch, ["b"])


def test_weights_come_from_the_folder_only(whole, tmp_path):
    shutil.copytree(whole / "exported", tmp_path / "exported")
    shutil.move(tmp_path / "exported/model.safetensors", tmp_path)
    index = tmp_path / "exported/model.safetensors.index.json"
    for name in ("../model.safetensors", str(tmp_path / "model.safetensors"), "\0", "config.json"):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        complaint = refusal(import_folder, tmp_path / "exported", tmp_path / "run")
        assert str(index) in complaint and repr(name) in complaint


def test_a_config_that_belies_its_weights_takes_no_memory(whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    state = tmp_path / "run/checkpoints/step-00000002/state.json"
    state.write_text(state.read_text().replace('"width": 32', '"width": 1048576'))
    found, _ = open_checkpoint(tmp_path / "run")
    assert str(state.parent) in refusal(checkpoint.restore, found, torch.device("cpu"))


@pytest.mark.parametrize("change", ["nameless", "shapeless", "missing"])
def test_moments_that_are_none_are_refused(whole, tmp_path, change):
    shutil.copytree(whole / "run", tmp_path / "run")
    folder = tmp_path / "run/checkpoints/step-00000002"
    tensors = load_file(folder / "optimizer.safetensors")
    name = next(name for name in tensors if name.endswith(".exp_avg"))
    moment = tensors.pop(name)
    if change != "missing":
        tensors |= {"nameless": moment} if change == "nameless" else {name: torch.zeros(3)}
    save_file(tensors, folder / "optimizer.safetensors")
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["optimizer.safetensors"] = checkpoint.sha256(folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    words = ["train", "--out", str(tmp_path / "run"), "--resume"]
    assert main(words) == 2


@pytest.mark.parametrize(
    "extra", [{}, {"settings": []}, {"seconds": "long"}, {"seconds": 0.0}, {"skipped": 3}, {"skipped": -1}]
)
def test_a_checkpoint_that_says_nothing_of_its_run_is_not_resumed(whole, tmp_path, capsys, extra):
    shutil.copytree(whole / "run", tmp_path / "run")
    state = tmp_path / "run/checkpoints/step-00000002/state.json"
    content = json.loads(state.read_text())
    kept = {"data": content["extra"]["data"]} if not extra else content["extra"]
    state.write_text(json.dumps({**content, "extra": {**kept, **extra}}))
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 2
    message = capsys.readouterr().err
    assert str(state.parent) in message and "state.json" in message


def test_results_without_a_run_are_refused(tmp_path):
    shape = {"budgets": (1000, 2000), "seeds": (1, 2)}
    experiment(variant("gpt+", 1.0, **shape), variant("angpt", 1.2, **shape), **shape).save(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    for key, value in (
        ("seeds", [1, 3]),
        ("budgets", []),
        ("budgets", ["x"]),
        ("variants", content["variants"][:1]),
    ):
        (tmp_path / "results.json").write_text(json.dumps({**content, key: value}))
        assert str(tmp_path / "results.json") in refusal(Results.load, tmp_path)


def test_nothing_is_written_through_a_link(tmp_path):
    keep = tmp_path / "keep.txt"
    keep.write_text("not yours")
    (tmp_path / "run").mkdir()
    for name in (".lock", "metrics.jsonl.partial", "tokenizer.json", "metrics.jsonl"):
        (tmp_path / "run" / name).symlink_to(keep)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "run"))), lock(tmp_path / "run"):
        pass
    MetricsLog(tmp_path / "run", 1).close()
    byte_tokenizer().save(tmp_path / "run/tokenizer.json")
    assert keep.read_text() == "not yours"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_line_without_end_is_refused(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(readers, "LINE_BYTES", 1 << 20)
    (tmp_path / f"bomb{ending}").write_bytes(BOMB if ending == ".jsonl.gz" else gzip.decompress(BOMB))
    message = refusal(list, readers.read(tmp_path / f"bomb{ending}"))
    assert str(tmp_path / f"bomb{ending}") in message and "1 MiB" in message


def test_a_run_whose_config_has_no_model_is_not_resumed(whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "model": 8}))
    assert str(config) in refusal(resumed_config, tmp_path / "run", {})


def test_a_name_of_two_lines_makes_one_line(tmp_path):
    assert f"{tmp_path}/two lines" in refusal(Tokenizer.load, tmp_path / "two\nlines")
