"""Proof of exposure: what a run says it trained on, against what config and token store say it must have."""
