"""Exported models in tools for adapters, quantization and new tokens."""

import copy
import logging
import shutil

import pytest
import torch
from torch import nn

import antransformer
from antransformer.bounds import norms
from antransformer.interop.import_hf import exported_name, import_folder
from antransformer.models import Decoder
from antransformer.models.registry import BUILT_IN
from antransformer.training import run_folder as runs
from antransformer.training.checkpointing import checkpoint
from helpers.exported import SIZES, exported, load, some_tokens
from helpers.golden import GOLDEN

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

LINEAR = ("qkv_proj", "out_proj", "up_proj", "gate_proj", "down_proj")


@pytest.fixture(scope="module", params=["angpt", "ngpt", "gpt+"])
def pair(request, tmp_path_factory):
    """Our model and its exported folder."""
    return exported(tmp_path_factory.mktemp("pair"), request.param)


def imported(source, out, model) -> Decoder:
    """Save a model with the tokenizer of an exported folder, import it, and return the imported model."""
    model.save_pretrained(out / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, out / "saved" / name)
    import_folder(out / "saved", out / "back")
    return checkpoint.restore(runs.open_checkpoint(out / "back")[0], torch.device("cpu"))


def fit(model, steps=5, lr=1e-2):
    """Train on one batch; return the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, tokens, losses = torch.optim.Adam(trained, lr=lr), some_tokens(length=24), []
    for _ in range(steps):
        loss = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def relative_error(logits, expected):
    return float((logits - expected).norm() / expected.norm())


# The modules


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(pair, attention):
    model = load(pair[1], attn_implementation=attention)
    first, second = some_tokens(batch=2, length=24)[:, None]
    positions = torch.cat([torch.arange(24), torch.arange(24)])[None]
    packed = model(torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(first).logits, model(second).logits], dim=1)
    assert relative_error(packed, apart) < 1e-5


@pytest.mark.parametrize("architecture", BUILT_IN)
def test_all_matrices_are_those_of_plain_linear_modules_and_of_the_embedding(tmp_path, architecture):
    model = load(exported(tmp_path, architecture)[1])
    linear = [module for module in model.modules() if type(module) is nn.Linear]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    assert len(linear) == 1 + SIZES["layers"] * len(LINEAR)
    assert {id(matrix) for matrix in matrices} == {id(module.weight) for module in (*linear, model.model.embedding)}


@torch.no_grad()
@pytest.mark.parametrize("architecture", BUILT_IN)
def test_the_base_model_computes_what_the_head_reads(tmp_path, architecture):
    folder, tokens = exported(tmp_path, architecture)[1], some_tokens()
    base, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(base).__name__ == "AntransformerModel" and not any(info.values())
    model = load(folder)
    assert torch.equal(model.logits(base(tokens).last_hidden_state), model(tokens).logits)


@torch.no_grad()
def test_a_folder_of_version_1_has_a_base_model_and_is_saved_as_version_2(tmp_path):
    old, tokens = GOLDEN / "exported", some_tokens(length=8)
    model = load(old)
    base, info = transformers.AutoModel.from_pretrained(old, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model.logits(base(tokens).last_hidden_state), model(tokens).logits)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    config = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert config["hidden_size"] == model.config.width and config["format_version"] == 2


# Adapters


def test_lora_in_all_linear_modules(pair, tmp_path):
    """An adapter computes the function of our model with W + (alpha / r) B A, before and after it is merged."""
    peft = pytest.importorskip("peft")
    ours, folder = pair
    tokens = some_tokens()
    config = peft.LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(folder), config).eval()
    torch.testing.assert_close(model(tokens).logits, load(folder)(tokens).logits, rtol=0, atol=0)  # B is zero
    losses = fit(model, lr=3e-2)
    assert losses[-1] < losses[0] - 0.1
    adapted, expected, found = model(tokens).logits, copy.deepcopy(ours), 0
    for name, weight in expected.named_parameters():
        if name.endswith(tuple(f"{name}.weight" for name in LINEAR)):
            lora = model.get_submodule(f"base_model.model.{exported_name(name, ()).removesuffix('.weight')}")
            weight.data += 8 / 4 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
            found += 1
    assert found == SIZES["layers"] * len(LINEAR)
    change = relative_error(adapted, ours(tokens))
    assert relative_error(adapted, expected(tokens)) < 1e-5 < 0.05 < change
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    assert torch.equal(again(tokens).logits, adapted)
    back = imported(folder, tmp_path, model.merge_and_unload())
    assert relative_error(back(tokens), expected(tokens)) < 1e-5


def test_lora_with_a_trained_embedding_and_head(pair):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv_proj"], modules_to_save=["embedding", "lm_head"], r=4)
    model = peft.get_peft_model(load(pair[1]), config)
    losses = fit(model)
    assert losses[-1] < losses[0] - 0.5
    assert model.merge_and_unload().bounds() == [] or len(model.bounds()) == 2 + SIZES["layers"] * len(LINEAR)


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens(pair, name):
    """Their shapes come from the names in config.json, and a prompt is equal to embeddings before the text."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(pair[1]), getattr(peft, name)(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    losses = fit(model, lr=3e-2)
    assert losses[-1] < losses[0] and sum(weight.requires_grad for weight in model.parameters()) == 1
    tokens = some_tokens(length=12)
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        if name == "PromptTuningConfig":
            base = model.get_base_model()
            embeddings = torch.cat([model.get_prompt(2), base.get_input_embeddings()(tokens)], dim=1)
            torch.testing.assert_close(logits, base(inputs_embeds=embeddings).logits)
        assert relative_error(logits[:, -12:], load(pair[1])(tokens).logits) > 1e-3


# Quantization


def int8_dynamic(folder):
    with pytest.warns(DeprecationWarning):
        return torch.ao.quantization.quantize_dynamic(load(folder), {nn.Linear}, dtype=torch.qint8)


def torchao_weights(folder):
    torchao = pytest.importorskip("torchao.quantization")
    model = load(folder)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def torchao_dynamic(folder):
    torchao = pytest.importorskip("torchao.quantization")
    config = transformers.TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig())
    return load(folder, quantization_config=config)


def bitsandbytes(folder, **options):
    pytest.importorskip("bitsandbytes")
    return load(folder, quantization_config=transformers.BitsAndBytesConfig(**options))


@torch.no_grad()
@pytest.mark.parametrize("pair", ["angpt", "ngpt"], indirect=True)
@pytest.mark.filterwarnings("ignore")  # of the libraries, about their own future
@pytest.mark.parametrize(
    ("quantize", "bound"),
    [
        (int8_dynamic, 0.05),  # one scale for each matrix
        (torchao_weights, 0.015),
        (torchao_dynamic, 0.006),
        (lambda folder: bitsandbytes(folder, load_in_8bit=True), 0.006),
        (lambda folder: bitsandbytes(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.05),
    ],
    ids=["torch.ao", "torchao-weights", "torchao-dynamic", "bitsandbytes-8", "bitsandbytes-4"],
)
def test_quantized_models_compute_nearly_the_same(pair, quantize, bound):
    ours, folder = pair
    model, tokens = quantize(folder), some_tokens()
    matrices = [model.get_submodule(f"model.blocks.0.{name}") for name in ("attention.qkv_proj", "mlp.down_proj")]
    for module in matrices:
        weight = module.weight() if callable(module.weight) else module.weight
        assert type(module) is not nn.Linear or type(weight) is not nn.Parameter
    assert 1e-5 < relative_error(model(tokens).logits.float(), ours(tokens)) < bound
    assert model.generate(tokens[:, :8], max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 11)


# New tokens


@torch.no_grad()
def test_new_ids_share_the_one_scale_of_the_logits(tmp_path):
    ours, folder = exported(tmp_path, model={"logit_scale": "scalar"})
    model, tokens = load(folder), some_tokens()
    torch.testing.assert_close(model(tokens).logits, ours(tokens), rtol=1e-5, atol=1e-5)
    model.resize_token_embeddings(272)
    back = imported(folder, tmp_path, model)
    assert back.config.logit_scale == "scalar" and back.logit_scale() == ours.logit_scale()
    torch.testing.assert_close(back(tokens)[..., :257], ours(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_added_token_is_generated(tmp_path):
    """The export suppresses ids that its tokenizer does not have, and added tokens get these ids."""
    model = load(exported(tmp_path, model={"vocab_size": 260})[1])
    assert model.generation_config.suppress_tokens == [257, 258, 259]
    model.resize_token_embeddings(270)
    model.get_output_embeddings().weight.zero_()
    hidden = model.model(torch.tensor([[97]])).last_hidden_state[0, -1]
    model.get_output_embeddings().weight[258] = hidden
    new = model.generate(torch.tensor([[97]]), max_new_tokens=1, do_sample=False)[0, -1]
    assert new == 258


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [True, False])
def test_new_rows_of_embedding_head_and_logit_scale(pair, tmp_path, mean, dtype):
    folder, tokens = pair[1], some_tokens()
    model = load(folder, dtype=dtype)
    before = model(tokens).logits
    embedding = model.resize_token_embeddings(270, pad_to_multiple_of=16, mean_resizing=mean)
    assert embedding is model.get_input_embeddings() and len(embedding.weight) == model.config.vocab_size == 272
    logits = model(tokens, labels=tokens).logits
    assert torch.equal(logits[..., :257], before) and logits.shape[-1] == len(model.lm_head.weight) == 272
    if model.logit_scale is not None:
        torch.testing.assert_close(model.logit_scale()[257:], torch.ones(15, dtype=dtype))
    for weight in (embedding.weight, model.lm_head.weight):
        new, old = weight[257:].float(), weight[:257].float()
        expected = old.mean(0).norm() if mean else torch.tensor(1.0)
        torch.testing.assert_close(new.norm(dim=1).mean(), expected, rtol=0.1, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    back = imported(folder, tmp_path, model)
    assert back.config.vocab_size == 272 and torch.equal(back.lm_head.weight, model.lm_head.weight.float())
    assert torch.equal(load(tmp_path / "saved")(tokens).logits, logits)
    model.resize_token_embeddings(200)
    low = tokens % 200
    assert torch.equal(model(low).logits, load(folder, dtype=dtype)(low).logits[..., :200])


# Further training of all weights


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("architecture", ["angpt", "ngpt"])
def test_a_fine_tuned_export_is_imported_in_its_bounds(tmp_path, caplog, architecture, bound):
    folder = exported(tmp_path, architecture)[1]
    model, tokens = load(folder), some_tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    if bound:
        antransformer.bind(model, optimizer)
    for _ in range(7):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with caplog.at_level(logging.WARNING):
        back = imported(folder, tmp_path, model)
    assert bool(caplog.records) != bound
    excess = torch.cat([norms(item).flatten() for item in back.bounds()]) - 1
    assert (excess.max() < 1e-5) == bound
    torch.testing.assert_close(back(tokens), model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForCausalLM"])
def test_a_model_inside_another_module_is_bound(tmp_path, auto):
    model = getattr(transformers, auto).from_pretrained(exported(tmp_path)[1])
    outer = nn.ModuleDict({"model": model, "value": antransformer.nn.Head(SIZES["width"], 1)})
    optimizer = torch.optim.SGD(outer.parameters(), lr=1.0)
    antransformer.bind(outer, optimizer)
    sum(parameter.square().sum() for parameter in outer.parameters()).backward()
    for parameter in outer.parameters():
        parameter.grad.neg_()
    optimizer.step()
    matrices = [parameter for parameter in outer.parameters() if parameter.ndim == 2]
    assert len(matrices) == len(model.bounds()) + 1 > 5 * SIZES["layers"]
    assert max(matrix.norm(dim=1).max() for matrix in matrices) < 1 + 1e-5
