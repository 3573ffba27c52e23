"""Token ids through the model, as generators: prefill and generate."""
