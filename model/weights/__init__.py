"""Loading: from checkpoint files into a model built on the meta device."""
