"""Famous bugs of models: chapters 8 to 10."""
