"""Study pretraining data poisoning on your own language models, exactly and auditably."""
