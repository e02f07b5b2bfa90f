"""Public models: their weights and vocabularies, without the libraries they come from."""
