"""Training data: from what `data.train` names to token ids with segments.

In the order of use: `sources` (files of a name), `compression`, `encodings` and `readers` (rows of
a file), `layouts` and `formats` (messages of a row), `store` (rows of a source on disk) with its
`report`, `split` (rows of all sources, and those held out), `templates` (those that a recipe can
name), `chat_template` and `tokenize` (token ids), `lengths` (what planning needs). Batches are made
in `kernels.packing` and `training.batches`. Start with `prepare`, which runs all of it.
"""
