"""Documents and a question to token ids, with what lies where."""
