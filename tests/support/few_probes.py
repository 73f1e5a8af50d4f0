"""A few of the general questions in place of all, in processes whose tests are not about them.

On a small model they take half of a run's time, on a quantized one most of it.
"""

from __future__ import annotations

from pathlib import Path

# For `workbench.change_children`: in workers, and in the command `eval`.
IN_CHILDREN = f"""
import sys

if {{"jetson_ft.runs.worker", "eval"}} & {{*sys.orig_argv}}:
    sys.path.append({str(Path(__file__).parent)!r})
    from few_probes import answer_few_probes

    answer_few_probes()
"""


def answer_few_probes() -> None:
    """Leave each eighth probe in this process: choices and replies, in both languages."""
    from jetson_ft.inference import probes

    few = probes.load_probes()[::8]
    probes.load_probes = lambda: few
