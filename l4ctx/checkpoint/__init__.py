"""The files beside a checkpoint's weights: tokenizer, chat template, generation config, image preprocessing."""
