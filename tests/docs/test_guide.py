import re
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import antransformer

ROOT = Path(__file__).parent.parent.parent
GUIDE = (ROOT / "docs/library.md").read_text()


def python_with(page, code):
    """The only Python block of a page that holds this line of code, or part of it."""
    (found,) = (
        block for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if code in block
    )
    return found


def block_after(steps):
    """Apply the first ``steps`` diffs to the guide's block and return it as a class, with the number of diffs."""
    lines = python_with(GUIDE, "class Block").splitlines()
    diffs = [textwrap.dedent(diff) for diff in re.findall(r" *```diff\n(.*?) *```", GUIDE, re.DOTALL)]
    for diff in diffs[:steps]:
        at = lines.index("        super().__init__()") + 1
        for line in diff.splitlines():
            mark, text = line[0], line[1:]
            if mark == "-":
                at = lines.index(text)
                del lines[at]
            else:
                lines.insert(at, text)
                at += 1
    scope = {"nn": nn, "F": F, "torch": torch, "antransformer": antransformer}
    exec("\n".join(lines), scope)
    return scope["Block"], len(diffs)


def test_the_readmes_model_and_loop_run_as_they_stand():
    scope = {}
    exec(python_with((ROOT / "README.md").read_text(), "antransformer.bind("), scope)
    bounds = antransformer.bounds.collect_bounds(scope["model"])
    assert len(bounds) == 2 + 4 * 7 and all(antransformer.bounds.norms(bound).max() <= 1 + 1e-6 for bound in bounds)
    assert scope["logits"].shape == (8, 256, 4096)
    assert antransformer.build(antransformer.ModelConfig.preset("nano")).loss


@pytest.mark.parametrize("steps", range(4))
def test_each_step_of_the_guide_runs(steps):
    torch.manual_seed(0)
    make, diffs = block_after(steps)
    assert diffs == 4
    x = antransformer.functional.normalize(torch.randn(200, 256))
    y = make(256)(x)
    assert y.shape == x.shape and y.isfinite().all()
    if steps == 3:
        assert y.norm(dim=-1).mean().item() == pytest.approx(1, abs=0.02)


def test_a_model_is_normalized_trained_and_made_plain_again():
    first, second = python_with(GUIDE, "antransformer.normalize_("), python_with(GUIDE, "def plain(")
    torch.manual_seed(0)

    def make():
        other = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))  # keeps its own parametrization
        made = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), other, nn.Linear(8, 20))
        made[3].weight = made[0].weight  # tied
        return made

    scope = {"torch": torch, "antransformer": antransformer, "model": make()}
    exec(first.split("\n", 1)[1] + second, scope)  # all but the loading
    model, tokens = scope["model"], torch.arange(20)
    model(tokens).square().sum().backward()
    scope["optimizer"].step()
    again = make()
    again.load_state_dict(scope["plain"](model))
    assert torch.equal(again(tokens), model(tokens))
    head = antransformer.normalize_(nn.Linear(8, 3))
    assert scope["plain"](head).keys() == {"weight", "bias"}
    assert torch.equal(scope["plain"](head)["weight"], head.weight)


def test_by_the_guides_rule_steps_turn_the_stream_as_far_at_four_times_the_width():
    code = python_with(GUIDE, "narrow / wide")

    def turned(wide, narrow):
        torch.manual_seed(0)
        config = antransformer.ModelConfig(architecture="angpt", vocab_size=257, width=wide, layers=2, context=32)
        model, tokens = antransformer.build(config), torch.randint(257, (16, 33))
        scope = {"torch": torch, "antransformer": antransformer, "model": model}
        exec(code, scope | {"lr": 1e-2, "narrow": narrow, "wide": wide}, scope)
        before = model.hidden(tokens[:, :-1]).detach()
        for _ in range(4):
            model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
            scope["optimizer"].step()
            scope["optimizer"].zero_grad()
        return float(torch.cosine_similarity(before, model.hidden(tokens[:, :-1]).detach(), dim=-1).arccos().mean())

    assert turned(256, narrow=64) == pytest.approx(turned(64, narrow=64), rel=0.1)
    assert turned(256, narrow=256) > 1.2 * turned(64, narrow=64)


def test_the_last_step_binds_and_the_short_form_is_the_same_map():
    torch.manual_seed(0)
    model = nn.Sequential(block_after(3)[0](64), antransformer.nn.Head(64, 3))
    *_, diff = re.findall(r"```diff\n(.*?) *```", GUIDE, re.DOTALL)
    lines = [line.strip()[1:] for line in diff.splitlines() if line.strip().startswith("+")]
    scope = {"torch": torch, "antransformer": antransformer, "model": model}
    exec("\n".join(lines), scope)
    for _ in range(3):
        model(antransformer.functional.normalize(torch.randn(50, 64))).square().sum().backward()
        scope["optimizer"].step()
    bounds = antransformer.bounds.collect_bounds(model)
    assert len(bounds) == 3 and all(antransformer.bounds.norms(bound).max() <= 1 + 1e-6 for bound in bounds)
    block, x = model[0], torch.randn(5, 64)
    short = antransformer.nn.MLP(64, gated=False, activation=F.gelu, std=1.0)
    short.up_proj.weight, short.down_proj.weight = block.up.weight, block.down.weight
    long = block.down(F.gelu(block.up(x) * block.root) * (block.nu / block.root))
    torch.testing.assert_close(short(x), long)


def test_the_functions_of_the_verbs_run_as_the_guide_says(corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    exec(python_with(GUIDE, "antransformer.load("), {"antransformer": antransformer})
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0].split()[0]) > 0 and "runs/small/checkpoints" in lines[0]
    assert lines[1].startswith("def ")
