"""Compile the modules that the program loads: at run time the image's files can't be written.

Compiling all modules would take three times the space. The bytecode does not depend on the dates of
the source files, which are all the same in the image.
"""

import py_compile
import sys
from importlib import import_module

MODULES = [
    "jetson_ft.runs.pipeline", "jetson_ft.runs.supervisor", "jetson_ft.runs.job_process",
    "jetson_ft.chat.server", "jetson_ft.inside.views",
    "jetson_ft.webui.page", "jetson_ft.webui.api", "jetson_ft.cli.follow",
    "bitsandbytes", "datasets", "peft", "uvicorn",
    "transformers.models.llama.modeling_llama", "transformers.models.phi.modeling_phi",
]  # fmt: skip

for name in MODULES:
    import_module(name)
files = {str(getattr(module, "__file__", "")) for module in list(sys.modules.values())}
files = {file for file in files if file.startswith("/opt/") and file.endswith(".py")}
for file in files:
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(file, doraise=True, invalidation_mode=mode)
print(f"bytecode of {len(files)} modules")
