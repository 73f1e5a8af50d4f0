"""Training data: from what `data.train` names to token ids with segments.

In the order of use: `sources` (files of a name), `encodings` and `readers` (rows of a file),
`formats` (messages of a row), `store` (rows on disk, held-out split), `templates` (those that a
recipe can name), `chat_template` and `tokenize` (token ids), `lengths` (what planning needs).
Batches are made in `kernels.packing` and `training.batches`. Start with `prepare`, which runs all
of it.
"""
