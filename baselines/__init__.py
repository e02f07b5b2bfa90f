"""One runnable file for every compared method. `diff` two of them: what differs is the method."""
