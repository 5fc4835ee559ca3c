"""A cache tier in Redis or Valkey: ``redis``."""
