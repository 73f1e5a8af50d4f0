"""Text from a model: replies, metrics of replies, and base against adapter on held-out rows.

Here: `generate` (greedy replies in batches, one reply as a stream, the sampling settings),
`metrics` (of finished replies), `compare` (both sides of an evaluation). Not here: conversations
(`jetson_ft.chat`) and the loss itself (`jetson_ft.kernels.lm_head_loss`).
Start reading at `generate.generate_replies`.
"""
