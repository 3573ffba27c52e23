"""Office documents, emails and web pages as text."""
