"""What a sweep shows: doses that suffice, how they grow, and how sure that is."""
