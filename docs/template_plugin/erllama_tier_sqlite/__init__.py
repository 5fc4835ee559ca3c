"""A cache tier in an SQLite database: ``sqlite``."""
