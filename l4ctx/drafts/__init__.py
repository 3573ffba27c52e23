"""Drafts of an answer's next tokens: what followed the same words before, in the text or in the answer itself."""
