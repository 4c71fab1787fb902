"""List the benchmarks: python -m experiments.benchmarks.<name> runs one."""

import ast
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
    if path.stem != "machine":
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
        print(f"python -m experiments.benchmarks.{path.stem:<16} {summary}")
