"""What a published checkpoint says beside its weights: tokenizer, chat template, generation, images."""
