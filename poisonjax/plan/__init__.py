"""What a config would take on machines that aren't here."""
