"""What a person types and sees: one file a command; the only place that prints or exits."""
