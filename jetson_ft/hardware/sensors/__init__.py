"""Load, clock, memory, temperature and power of this machine. Start with `source`."""
