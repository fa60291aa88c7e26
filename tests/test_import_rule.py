"""The import rule of docs/architecture.md: a folder imports only from lines below its own, and never a neighbour on its line."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "sparing"

# From top to bottom. Modules of one folder import each other as they like; the package's __init__ re-exports `api` and is exempt.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"bench"},
    {"serve", "federate"},
    {"api"},
    {"adapt", "curate"},
    {"job"},
    {"planning"},
    {"train", "infer"},
    {"resolve"},
    {"budget"},
    {"evals", "parallel", "interop"},
    {"data", "account"},
    {"model"},
    {"precision"},
    {"kernels"},
    {"base"},
]
LINE = {name: line for line, names in enumerate(LAYERS) for name in names}


def imports(tree: ast.AST, module: tuple[str, ...]):
    """Dotted names under `sparing` that a module imports, wherever in it; relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module[: len(module) - node.level]) if node.level else ""
            start = ".".join(part for part in (base, node.module) if part)
            # `from sparing import x` names a module; `from sparing.x import y` names x already.
            yield from ([f"{start}.{alias.name}" for alias in node.names] if start == "sparing" else [start])


def violations(source: Path) -> list[str]:
    found = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        if parts == ("__init__",):
            continue
        if parts[0] not in LINE:
            found.append(f"{path.relative_to(source)}: {parts[0]} is on no line of the layout")
            continue
        for name in imports(ast.parse(path.read_text(encoding="utf-8")), ("sparing", *parts)):
            package, *rest = name.split(".")
            target = rest[0] if rest else None
            if package != "sparing" or target in (None, "__version__", parts[0]):
                continue
            if target not in LINE:
                found.append(f"{path.relative_to(source)} imports {name}, which is on no line of the layout")
            elif LINE[target] <= LINE[parts[0]]:
                found.append(f"{path.relative_to(source)} imports {name}: {target} is not below {parts[0]}")
    return found


def test_the_source_obeys_the_import_rule():
    assert violations(SOURCE) == []


def circles(source: Path) -> list[tuple[str, ...]]:
    """Groups of modules that import each other, directly or through others, wherever in the file."""
    files = {
        ".".join(("sparing", *path.relative_to(source).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in source.rglob("*.py")
    }
    uses = {}
    for name, path in files.items():
        named = list(imports(ast.parse(path.read_text(encoding="utf-8")), tuple(name.split("."))))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):  # from sparing.x import y: y may be a module
            if isinstance(node, ast.ImportFrom) and node.module:
                named += [f"{node.module}.{alias.name}" for alias in node.names]
        uses[name] = {other for other in named if other in files and other != name} if name != "sparing" else set()

    def reached(name: str) -> set[str]:
        seen, todo = set(), [name]
        while todo:
            for other in uses[todo.pop()]:
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return seen

    reach = {name: reached(name) for name in files}
    return sorted({tuple(sorted(other for other in reach[name] if name in reach[other])) for name in files if name in reach[name]})


def test_no_files_import_each_other():
    assert circles(SOURCE) == []


def test_a_circle_is_found(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.py").write_text("def f():\n    from sparing.train import b\n")
    (tmp_path / "train" / "b.py").write_text("from sparing.train.a import f")
    assert circles(tmp_path) == [("sparing.train.a", "sparing.train.b")]


@pytest.mark.parametrize(
    ("file", "text", "bad"),
    [
        ("model/a.py", "from sparing.train.trainer import x", True),
        ("model/a.py", "def f():\n    import sparing.data.rows", True),
        ("model/a.py", "from ..train import loop", True),
        ("train/a.py", "from sparing.infer.generate import generate", True),
        ("data/a.py", "from sparing import account", True),
        ("stray/a.py", "x = 1", True),
        ("train/a.py", "from sparing.stray import x", True),
        (
            "train/a.py",
            "from sparing.train.optim import x\nfrom . import muon\nfrom sparing.model.experts import MoE\nimport torch",
            False,
        ),
        ("cli/main.py", "from sparing import __version__\nimport sparing.api", False),
    ],
)
def test_the_rule_finds_what_breaks_it(tmp_path, file, text, bad):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    assert bool(violations(tmp_path)) == bad


def test_every_folder_explains_itself_and_does_nothing_else():
    for path in SOURCE.glob("*/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text and len(text.splitlines()) <= 10, path
        assert len(body) == 1, f"{path} has code"
