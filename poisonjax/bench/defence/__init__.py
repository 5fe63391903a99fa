"""`poisonjax bench defence`: what detectors find of poison in clean text, and what of it is left over."""
