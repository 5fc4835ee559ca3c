"""Breaks the whole on purpose, and counts what is right, lost and wrong afterwards.

``python -m torture``, or ``make torture``; docs/torture.md says what is done and what came of it.
"""
