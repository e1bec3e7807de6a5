"""transformers' own model tests on the exported classes.

They are in transformers' source and not in its wheel. To run them, unpack the sdist of the installed version, which has
only the files directly in ``tests``. The repository at the tag of the version has the tests of generation too.

    pip install parameterized
    pip download --no-binary :all: --no-deps transformers==VERSION
    export ANTRANSFORMER_TRANSFORMERS_SOURCE=FOLDER
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import antransformer

TESTS = Path(__file__).parent.parent
NOT_OURS = {
    # past_key_values is the name of the cache before transformers 5.24, so both names are accepted without a warning.
    "test_bc_cache_name_forward",
    # Compares logits in bfloat16 to 2^-7, and ours are larger than 1. test_fine_tuning.py compares them in float32.
    "test_sdpa_padding_matches_padding_free_with_position_ids",
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["angpt", "ngpt", "gpt+", "dyt"])
def test_the_model_tests_of_transformers_pass(tmp_path, architecture):
    source = os.environ.get("ANTRANSFORMER_TRANSFORMERS_SOURCE")
    if source is None:
        pytest.skip("ANTRANSFORMER_TRANSFORMERS_SOURCE is not set")
    (tmp_path / "empty.ini").touch()
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-c", tmp_path / "empty.ini", "--rootdir", tmp_path, "--junit-xml", tmp_path / "results.xml"]
    path = os.pathsep.join([str(Path(antransformer.__file__).parent.parent), source, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ARCHITECTURE": architecture, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    suite = TESTS / "helpers/transformers_suite.py"
    run = subprocess.run([*command, suite], capture_output=True, text=True, env=environment, cwd=tmp_path)
    cases = list(ET.parse(tmp_path / "results.xml").iter("testcase"))
    failed = {case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None}
    skipped = sum(case.find("skipped") is not None for case in cases)
    assert failed <= NOT_OURS, run.stdout[-10_000:]
    assert len(cases) - skipped > 90
