"""`python -m jetson_ft.cli`."""

import os

from jetson_ft.child_process import PARENT_PROCESS, end_with_parent
from jetson_ft.cli.app import main

if __name__ == "__main__":  # processes that multiprocessing spawns import this module too
    if PARENT_PROCESS in os.environ:
        end_with_parent()
        del os.environ[PARENT_PROCESS]
    main()
