"""This machine: memory, processor, device, files, clocks."""
