"""Which model, which text, and how the bundled models were made."""
