"""What a model does inside, computed for people: tokens, attention, the next token, numbers."""
