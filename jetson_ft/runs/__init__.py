"""Runs: their directory, their processes, their reports.

`store` defines the run directory; `manager` launches, resumes and stops runs. A run's processes are
`supervisor`, `launcher` (of several processes) and `worker`, which executes `pipeline`; `processes`
has what they share. `forecast` predicts a run, `monitor` follows one, `evaluate` and `report`
measure its result.

The training loop is in `jetson_ft.training`, the kinds of events in `jetson_ft.events`. Start with
`store`, then `manager`.
"""
