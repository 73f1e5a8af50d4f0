"""Write docs/models.md's list of architectures that are packed, and of those that aren't.

Needs some 20 seconds; tests/kernels/test_attention_architectures.py fails if the list is wrong.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

import packing_verdicts  # noqa: E402
import tiny_architectures  # noqa: E402
import transformers  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)


def main() -> None:
    """Try every architecture and write the page."""
    page, begin, end = packing_verdicts.PAGE, packing_verdicts.BEGIN, packing_verdicts.END
    verdicts = {
        kind: packing_verdicts.packing_verdict(tiny_architectures.tiny_model(kind))
        for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if kind not in tiny_architectures.NOT_BUILT
    }
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    made = packing_verdicts.write_verdicts(transformers.__version__, verdicts)
    page.write_text(before + begin + made + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
