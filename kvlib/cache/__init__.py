"""Caches: what is kept, how it is stored, which layer's store a layer reads."""
