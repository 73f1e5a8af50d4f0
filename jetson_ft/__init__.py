"""Fine-tune language models with LoRA and QLoRA on NVIDIA Jetson boards and on laptops."""

__version__ = "0.1.0"
