"""The tables of README.md and docs/ from the JSON files of `results/study.py`."""


def fill() -> None:
    """Nothing yet."""
