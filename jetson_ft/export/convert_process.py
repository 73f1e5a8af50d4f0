"""The process of a converter: `python -m jetson_ft.export.convert_process SCRIPT ARGUMENTS`.

It runs one of llama.cpp's converters with two changes: no code of a model is run, and the file
`TOKENS_FILE` in the model's folder overrides what the converter reads from the tokenizer's:
`{"add_bos": whether texts begin with the start token, "ends": {"eot": id, "eom": id},
"chat_template": Jinja text}`.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from jetson_ft.child_process import end_with_parent

TOKENS_FILE = "jetson_ft_tokens.json"


def main() -> None:
    """Run the converter."""
    end_with_parent()
    from transformers import AutoTokenizer

    del sys.argv[0]
    tree = Path(sys.argv[0]).parent
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    import gguf

    load, init = AutoTokenizer.from_pretrained, gguf.SpecialVocab.__init__

    def load_without_code(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "trust_remote_code": False})

    def init_with_tokens(self: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        init(self, path, *args, **kwargs)
        tokens = json.loads(Path(path, TOKENS_FILE).read_text(encoding="utf-8"))
        self.add_special_token["bos"] = tokens["add_bos"]
        self.special_token_ids.update(tokens["ends"])
        self.chat_template = tokens["chat_template"]

    AutoTokenizer.from_pretrained = load_without_code
    gguf.SpecialVocab.__init__ = init_with_tokens
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
