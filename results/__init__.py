"""Studies: scripts that make every number of README.md and docs/, and these numbers as JSON."""
