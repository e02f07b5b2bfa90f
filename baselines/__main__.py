"""`python -m baselines`: which methods there are. `python -m baselines WORD`: the nearest first."""
import ast
import sys
from pathlib import Path

from harness.arguments import nearest_first

found = {}
for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    if file.stem != "parts":
        found[file.stem] = ast.get_docstring(ast.parse(file.read_text())).split("\n")[0]
for name in nearest_first(" ".join(sys.argv[1:]), found):
    line = f"python -m baselines.{name:13}  # {found[name].split(' (')[0]}"
    print(line if len(line) <= 80 else line[:77] + "...")
