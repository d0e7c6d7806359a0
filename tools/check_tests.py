"""Checks that no test is lost by its name and that none passes because it asserts nothing.

Every module-level function of a test_*.py that asserts must be collected by pytest (test_...), private, decorated or
used in tests/; every test must assert something, itself or through a function of tests/ that does.
"""

import ast
import sys
from pathlib import Path

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
ASSERTING = ("assert", "raises", "warns", "deprecated_call", "fail")
LONG = 400


def names(tree: ast.AST) -> set[str]:
    """Returns the last part of every name and attribute in `tree`."""
    nodes = list(ast.walk(tree))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def called(tree: ast.AST) -> set[str]:
    """Returns the last part of the name of everything that `tree` calls."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in functions}


def main(root: Path) -> int:
    trees = {path: ast.parse(path.read_text(), str(path)) for path in sorted(root.rglob("*.py"))}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, FUNCTION)]
    used = set().union(*(names(tree) for tree in trees.values()))
    direct = {f for f in functions if any(isinstance(node, ast.Assert) for node in ast.walk(f))}
    calls = {f: called(f) for f in functions}
    helpers: set[str] = set()

    def asserts(f: ast.AST) -> bool:
        return f in direct or any(n in helpers or n.lstrip("_").startswith(ASSERTING) for n in calls[f])

    while found := {f.name for f in functions if asserts(f)} - helpers:
        helpers |= found

    errors = []
    for path, tree in trees.items():
        if (lines := len(path.read_text().splitlines())) > LONG:
            print(f"{path}: warning: {lines} lines, over {LONG}: split it by subject")
        for f in ast.walk(tree) if path.name.startswith("test_") else ():
            if not isinstance(f, FUNCTION):
                continue
            if f.name.startswith("test_") and not asserts(f):
                errors.append(f"{path}:{f.lineno}: {f.name} asserts nothing")
            lost = f in tree.body and not f.name.startswith(("test_", "_")) and not f.decorator_list
            if lost and f.name not in used and asserts(f):
                errors.append(f"{path}:{f.lineno}: {f.name} asserts but never runs: call it test_{f.name} or use it")
    print("\n".join(errors) or f"{root}: {len(trees)} files, every test is collected and asserts")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "tests")))
