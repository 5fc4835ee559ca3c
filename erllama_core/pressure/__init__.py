"""Memory pressure: sources are read, and memory is given back before the system takes it."""
