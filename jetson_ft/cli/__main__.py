"""`python -m jetson_ft.cli`."""

from jetson_ft.cli.app import main

if __name__ == "__main__":  # processes that multiprocessing spawns import this module too
    main()
