"""The command line, `jetson-ft`: one module a group of commands, each with what it prints.

No logic of training lives here: each command calls a function that the page and the Python API
call too. `app.py` puts the commands together; start reading there. Results go to stdout, errors to
stderr. `import jetson_ft.cli` loads no torch and no pydantic, so that `--help` is instant: commands
import what they need when they run.
"""

from jetson_ft.cli.app import main

__all__ = ["main"]
