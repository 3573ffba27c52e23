"""The machine: memory, processor, devices, files, timing."""
