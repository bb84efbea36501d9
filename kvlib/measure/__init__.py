"""Measurements: time, memory, phases, rooflines, quality, retrieval, capacity."""
