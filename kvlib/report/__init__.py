"""Recorded rows, and the figures, tables and summary numbers drawn from them."""
