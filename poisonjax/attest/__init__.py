"""Provenance for others: a signed statement of what a run's checkpoints were made from, and how it is checked."""
