"""What a model makes of long text: recall by length and depth, and perplexity by position."""
