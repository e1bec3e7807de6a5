"""Registers our model classes with transformers lazily, when transformers is first imported.

transformers has no entry points for models of other packages, and it takes seconds to import. ``import antransformer``
therefore does not import it, but adds a finder to ``sys.meta_path``, which Python consults for each new module. The
finder registers the classes right after ``transformers/__init__.py`` has run. Later would be too late: while one of the
submodules is being loaded, others cannot be imported.
"""

import contextlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

LIBRARY = "transformers"


class Registration(MetaPathFinder):
    """Import hook that registers our models after transformers was loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of transformers with a wrapped loader, and None (let other finders decide) otherwise."""
        spec = PathFinder.find_spec(name, path, target) if name == LIBRARY else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            # A version too old for our models must still be importable by other programs.
            with contextlib.suppress(ImportError):
                register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register our configuration and model with transformers' Auto classes.

    Raises:
        ImportError: transformers is not installed or too old.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from antransformer.interop.configuration_antransformer import AntransformerConfig
    from antransformer.interop.modeling_antransformer import AntransformerForCausalLM, AntransformerModel

    AutoConfig.register(AntransformerConfig.model_type, AntransformerConfig, exist_ok=True)
    AutoModel.register(AntransformerConfig, AntransformerModel, exist_ok=True)
    AutoModelForCausalLM.register(AntransformerConfig, AntransformerForCausalLM, exist_ok=True)
    # save_pretrained then copies the code of the classes next to the weights.
    AntransformerConfig.register_for_auto_class()
    AntransformerModel.register_for_auto_class("AutoModel")
    AntransformerForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def register_when_imported() -> None:
    """Register the models now if transformers is loaded, and otherwise when it is imported."""
    if sys.modules.get(LIBRARY):
        with contextlib.suppress(ImportError):
            register()
    elif not any(isinstance(finder, Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, Registration())
