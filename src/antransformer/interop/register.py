"""Makes transformers know our models as soon as somebody imports it, and not before.

transformers knows a model of another package once it is registered, has no entry points through which that could be
declared, and takes seconds to import. So ``import antransformer`` does not import it, but has itself told when somebody
does: Python asks the finders on ``sys.meta_path`` for each module that it has not loaded. Registering comes right after
transformers' own ``__init__``, which loads none of its parts; while one of these is being loaded, its neighbours could
not be imported.
"""

import contextlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

LIBRARY = "transformers"


class Registration(MetaPathFinder):
    """Finds transformers where it is, and registers our models after it was loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of transformers; None, which is no opinion, of anything else."""
        spec = PathFinder.find_spec(name, path, target) if name == LIBRARY else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            with contextlib.suppress(ImportError):  # too old for our models, and none of our business
                register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register our configuration and model with transformers' Auto classes.

    Raises:
        ImportError: transformers is not installed, or is too old for them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from antransformer.interop.configuration_antransformer import AntransformerConfig
    from antransformer.interop.modeling_antransformer import AntransformerForCausalLM

    AutoConfig.register(AntransformerConfig.model_type, AntransformerConfig, exist_ok=True)
    AutoModelForCausalLM.register(AntransformerConfig, AntransformerForCausalLM, exist_ok=True)
    # With these, save_pretrained writes the code beside the weights.
    AntransformerConfig.register_for_auto_class()
    AntransformerForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def register_when_imported() -> None:
    """Register now if transformers is loaded, else when it will be."""
    if sys.modules.get(LIBRARY):
        with contextlib.suppress(ImportError):
            register()
    elif not any(isinstance(finder, Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, Registration())
