"""The paper: its settings, its tables of results, and its tables with our runs in them."""
