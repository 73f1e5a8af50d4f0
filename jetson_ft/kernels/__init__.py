"""Faster and leaner versions of a model's layers, of attention over packed rows, and of the loss.

Start at `families` (what is replaced by what), then `fused_layers.fuse_layers`. Loading a model is
in `jetson_ft.models`; the loop that uses all this is in `jetson_ft.training`.
"""
