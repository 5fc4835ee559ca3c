"""Memory pressure: the built-in source."""
