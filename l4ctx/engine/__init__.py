"""Running token ids through the model, as generators: prefill and decode."""
