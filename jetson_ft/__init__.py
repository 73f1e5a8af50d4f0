"""Fine-tune language models with LoRA and QLoRA on NVIDIA Jetson boards and on laptops.

    from jetson_ft import Recipe, finetune, load_chat

`import jetson_ft` loads nothing heavy; docs/api.md shows what these three do.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jetson_ft.api import finetune, load_chat
    from jetson_ft.recipe import Recipe

__all__ = ["Recipe", "finetune", "load_chat"]
__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

if not TYPE_CHECKING:  # for a type checker any name would exist

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(
            import_module("jetson_ft.recipe" if name == "Recipe" else "jetson_ft.api"), name
        )
