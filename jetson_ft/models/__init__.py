"""Base models: their files, their dimensions without weights, and loading them.

Start at `files.resolve_model`, then `loading.load_model`; `catalog.model_dims` is for planning.
Adapters are in `jetson_ft.adapter`, changes to a loaded model's layers in `jetson_ft.kernels`.
"""
