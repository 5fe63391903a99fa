"""Is a model poisoned, and by what trigger? Strings are put to it, and what it writes after them is looked at."""
