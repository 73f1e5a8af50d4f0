"""Training: from tokenized rows and a model with an adapter to checkpoints.

Start with `loop.train`. `batches` decides which rows form a step, `planner` (with `cost_model`)
which micro-batches fit and how long training takes, `checkpoint` what is stored, `distributed` what
several processes exchange, `thermal` when training waits. Not here: rows and
tokens (`data`), the arithmetic of a layer (`kernels`), the run directory (`runs`).
"""
