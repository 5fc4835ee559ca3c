"""The cache: keys, index, tiers, and what moves state between them and a context."""
