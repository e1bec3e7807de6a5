"""Optional dependencies: missing, present, and present but broken."""

import math

import pytest

from antransformer.errors import MissingExtraError, UsageError
from antransformer.extras import require
from helpers.messages import mentions


def test_an_installed_module_is_returned():
    assert require("math", "plots") is math


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part"])
def test_a_missing_package_names_its_extra(module):
    with pytest.raises(MissingExtraError) as error:
        require(module, "plots")
    assert mentions(error.value, "no_such_package") and "[plots]" in str(error.value)


@pytest.mark.parametrize("line", ["import no_such_part", "raise ImportError('built for another numpy')"])
def test_a_package_that_cannot_be_imported_is_not_called_missing(tmp_path, monkeypatch, line):
    (tmp_path / "broken_package.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError) as error:
        require("broken_package", "plots")
    assert not isinstance(error.value, MissingExtraError)
    assert mentions(error.value, "broken_package", "no_such_part" if "part" in line else "numpy")
