"""Finding poison in a corpus: scores of each document, a miner of triggers, thresholds, and a queue for people."""
