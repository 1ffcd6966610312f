"""Famous bugs of depth: chapters 5 to 7."""
