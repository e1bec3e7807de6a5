"""Test class for transformers' own model tests, run by ``tests/interop/test_transformers_suite.py`` in another process.

Needs transformers' source folder on the path. Its sdist has the common tests. The tests of exporters and of generation
are only in its repository.
"""

import importlib.util
import os
import sys
import types
import unittest
from dataclasses import asdict

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

# The tests know by these names which classes have a loss.
MODEL_MAPPING_NAMES["antransformer"] = "AntransformerModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["antransformer"] = "AntransformerForCausalLM"

for name, mixin in (("exporters.test_export", "ExportTesterMixin"), ("generation.test_utils", "GenerationTesterMixin")):
    folder = f"tests.{name.partition('.')[0]}"
    if importlib.util.find_spec(folder) is None:
        sys.modules[folder] = types.ModuleType(folder)
        sys.modules[f"tests.{name}"] = types.ModuleType(name)
        setattr(sys.modules[f"tests.{name}"], mixin, type(mixin, (), {}))

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin  # noqa: E402

from antransformer.interop.modeling_antransformer import (  # noqa: E402
    AntransformerConfig,
    AntransformerForCausalLM,
    AntransformerModel,
)
from antransformer.models import ModelConfig  # noqa: E402


class ModelTester:
    """Small model and batch under the names that the common tests read."""

    batch_size, seq_length, is_training, vocab_size = 13, 7, True, 99
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = 32, 2, 4, 128

    def get_config(self):
        sizes = {"vocab_size": self.vocab_size, "width": 32, "layers": 2, "head_dim": 8, "context": 512}
        model = ModelConfig(architecture=os.environ["ARCHITECTURE"], **sizes)
        return AntransformerConfig(**asdict(model), bos_token_id=1, eos_token_id=2, pad_token_id=0)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class Suite(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (AntransformerModel, AntransformerForCausalLM)

    def setUp(self):
        self.model_tester = ModelTester()
