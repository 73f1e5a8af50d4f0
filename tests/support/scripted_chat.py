"""A chat's process without a model: its answers depend on the question and the chosen model.

`SITE` as `sitecustomize` lets every Python process that would be `jetson_ft.chat.server` be this.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

SITE = f"""
import sys

if "jetson_ft.chat.server" in sys.orig_argv:
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import scripted_chat
    scripted_chat.main()
    sys.exit()
"""
CODE = "Here:\n\n```python\ndef f(x):\n    if x:\n        return 1\n```\n\n- **bold**\n- list"
HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">
<img src="http://evil.invalid/pixel.png"> ![remote](http://evil.invalid/markdown.png)
<div style="background: url(http://evil.invalid/style.png)">styled</div>
<iframe src="http://evil.invalid/frame"></iframe><video src="http://evil.invalid/v.mp4"></video>
<link rel="stylesheet" href="http://evil.invalid/a.css"><style>@import "http://evil.invalid/b.css";
body { display: none }</style><svg onload="window.hacked = 3"></svg>
[click](javascript:window.hacked=4) <a href="javascript:window.hacked=5">link</a>
<form action="http://evil.invalid/form"><button>send</button></form>
$$\\href{javascript:window.hacked=6}{x} \\includegraphics{http://evil.invalid/l.png}$$
#include <stdio.h>
the end"""
ANSWERS = {"code": CODE, "hostile": HOSTILE}


def main() -> None:
    """Answer requests until the input ends."""
    stop = threading.Event()
    name = ""

    def send(kind: str, **fields: object) -> None:
        print(json.dumps({"kind": kind, **fields}), flush=True)

    def generate(request: dict[str, Any], model: str) -> None:
        text, prefill = request["text"], request["prefill"]
        started, words, ended = time.monotonic(), 0, True
        stop.clear()
        if text == "slow":
            ended = False
            while not stop.wait(0.05):
                words += 1
                send("delta", text=f"{words} ")
        elif text == "long" and not prefill:
            words, ended = 3, False
            send("delta", text="the beginning")
        else:
            turns, examples = (len(request[key]) // 2 for key in ("turns", "examples"))
            plain = f"{model} answers {text!r} after {turns} turns and {examples} examples"
            send("delta", text=" and the end" if prefill else ANSWERS.get(text, plain))
            words = 9
        seconds = max(0.5, time.monotonic() - started)
        send("end", tokens=words, seconds=seconds, ended=ended, stopped=stop.is_set())

    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("action")
        if action == "load":
            name = request["name"]
            send("ready")
        elif action == "stop":
            stop.set()
        elif action == "examples":
            send("examples", pairs=[["1+1", "2"], ["2+2", "4"], ["3+3", "6"]])
        else:
            model = name if request["use_adapter"] else f"the base of {name}"
            threading.Thread(target=generate, args=(request, model), daemon=True).start()
