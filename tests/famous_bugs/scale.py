"""Famous bugs of scale: chapters 11 to 13."""
