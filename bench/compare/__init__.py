"""erllama beside what people would use instead. Run as a folder: ``python bench/compare``."""
