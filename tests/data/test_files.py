import os

import pytest

from sparing.base.config import UserError
from sparing.data.files import absolute, find_files, fingerprint, kind_of
from sparing.data.sources import documents


def names(files, root):
    return [os.path.relpath(file.path, root) for file in files]


@pytest.fixture
def tree(tmp_path):
    for name in ("b.txt", "a.md", "sub/deep/c.py", ".hidden", ".git/config", "photo.png", "sub/x.pyc"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def test_a_folder_is_walked_sorted_without_hidden_files_and_binaries(tree):
    assert names(find_files([str(tree)]), tree) == ["a.md", "b.txt", os.path.join("sub", "deep", "c.py")]


def test_a_file_that_is_named_is_taken_whatever_it_is(tree):
    assert names(find_files([str(tree / ".hidden"), str(tree / "photo.png")]), tree) == [".hidden", "photo.png"]


def test_globs_and_overlaps_and_order(tree):
    both = find_files([str(tree / "**" / "*.py"), str(tree / "?.*")])
    assert names(both, tree) == ["a.md", "b.txt", os.path.join("sub", "deep", "c.py")]
    assert find_files([str(tree / "b.txt"), str(tree)]) == find_files([str(tree), str(tree / "b.txt")])


def test_brackets_in_a_name_that_exists_are_no_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert names(find_files([str(tmp_path / "a[1].txt")]), tmp_path) == ["a[1].txt"]


def test_missing_paths_name_the_nearest_one(tree):
    with pytest.raises(UserError, match=r"no such file or folder: .*b\.text.*did you mean .*b\.txt"):
        find_files([str(tree / "b.text")])
    with pytest.raises(UserError, match=rf"nearest existing folder is {tree}"):
        find_files([str(tree / "zzz" / "yyy" / "qqq")])
    with pytest.raises(UserError, match="no file matches"):
        find_files([str(tree / "*.parquet")])
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match="no files of text in the folder"):
        find_files([str(tree / "empty")])
    with pytest.raises(UserError, match="neither a file nor a folder"):
        find_files(["/dev/null"])


def test_symbolic_link_cycles_end(tree):
    (tree / "sub" / "loop").symlink_to(tree)
    assert len(find_files([str(tree)])) == 3


def test_default_corpus_is_the_standard_library():
    files = [file.path.replace(os.sep, "/") for file in find_files(())]
    assert any(path.endswith("/json/decoder.py") for path in files)
    assert all(path.endswith(".py") and "/site-packages/" not in path and "__pycache__" not in path for path in files)


def test_fingerprint_sees_contents_change_and_settings(tree):
    before = fingerprint(find_files([str(tree)]), 1)
    assert before == fingerprint(find_files([str(tree)]), 1) != fingerprint(find_files([str(tree)]), 2)
    (tree / "b.txt").write_text("longer than before")
    after = fingerprint(find_files([str(tree)]), 1)
    assert after != before
    os.utime(tree / "b.txt", ns=(5, 5))
    assert fingerprint(find_files([str(tree)]), 1) != after


def test_what_sparing_wrote_is_left_out(tree, monkeypatch):
    """Run folders, one that has no configuration yet included, and the workspace; named literally they count."""
    for run, mark in (("run", "config.toml"), ("sub/begun", ".lock")):
        for folder in ("state", "weights"):
            (tree / run / folder).mkdir(parents=True)
        for name in (mark, "metrics.jsonl", "state/summary.json"):
            (tree / run / name).write_text("{}")
    (tree / "home/data").mkdir(parents=True)
    (tree / "home/data/held_out.jsonl").write_text("{}")
    monkeypatch.setenv("SPARING_HOME", str(tree / "home"))
    texts = ["a.md", "b.txt", os.path.join("sub", "deep", "c.py")]
    monkeypatch.chdir(tree)
    for pattern in (".", "**/*", "*", str(tree), str(tree / "**" / "*")):
        found = names(find_files([pattern]), tree)
        assert [name for name in found if not name.endswith((".png", ".pyc"))] == texts, pattern
    assert names(find_files(["run/metrics.jsonl", "run/*.jsonl"]), tree) == [os.path.join("run", "metrics.jsonl")]
    with pytest.raises(UserError, match=r"no files of text in the folder run .*run folders"):
        find_files(["run"])
    (tree / "sub/deep/state").mkdir()
    (tree / "sub/deep/weights").mkdir()
    assert names(find_files(["."]), tree) == texts, "two folders of these names make no run"


def test_absolute_paths_name_the_same_files_from_anywhere(tree, monkeypatch):
    (tree / "[odd]").mkdir()
    (tree / "[odd]/x.txt").write_text("x")
    monkeypatch.chdir(tree / "[odd]")
    monkeypatch.setenv("HOME", str(tree))
    paths = [absolute(path) for path in ("x.txt", "?.txt", "../sub", "~/a.md", str(tree / "b.txt"))]
    before = find_files(["x.txt", "?.txt", "../sub", "~/a.md", str(tree / "b.txt")])
    monkeypatch.chdir("/")
    assert find_files(paths) == before and len(before) == 4 and all(map(os.path.isabs, paths))


def test_kinds():
    assert [kind_of(path) for path in ("/a/b.jsonl.gz", "x.PY", "notes", "dump.zst", "a.b/c")] == ["jsonl", "py", "text", "text", "text"]


def test_globs_do_not_follow_loops_of_links(tree):
    for name in ("one", "two", "three"):
        (tree / name).symlink_to(tree)
        (tree / "sub" / name).symlink_to(tree)
    found = [os.path.relpath(file.path, tree) for file in find_files([str(tree / "**")])]
    assert {os.path.relpath(file.path, tree) for file in find_files([str(tree)])} <= set(found)
    assert not any(name.split(os.sep)[0] in ("one", "two", "three") for name in found)
    assert [os.path.relpath(file.path, tree) for file in find_files([str(tree / "**" / "*.txt")])] == ["b.txt"]


def test_gitignore_is_respected_and_licences_are_noted(tmp_path):
    files = {
        "repo/.gitignore": "build/\n*.log\n!keep.log\n/only-here.txt\n",
        "repo/LICENSE": "MIT License\n\nCopyright (c) 2024 Somebody\n",
        "repo/a.py": "a = 1\n",
        "repo/x.log": "x",
        "repo/keep.log": "kept",
        "repo/only-here.txt": "x",
        "repo/sub/only-here.txt": "kept",
        "repo/build/b.py": "b = 1\n",
        "repo/sub/.gitignore": "*.py\n!*.log\n",
        "repo/sub/c.py": "c = 1\n",
        "repo/sub/d.log": "kept",
        "repo/vendor/COPYING": "Some terms that nobody knows\n",
        "repo/vendor/e.py": "e = 1\n",
        "other/f.py": "f = 1\n",
        "spdx/LICENSE.txt": "SPDX-License-Identifier: GPL-2.0-or-later\n",
        "spdx/g.py": "g = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {os.path.relpath(file.path, tmp_path).replace(os.sep, "/"): file.licence for file in find_files([str(tmp_path)])}
    assert found == {
        "other/f.py": "",
        "repo/LICENSE": "MIT",
        "repo/a.py": "MIT",
        "repo/keep.log": "MIT",
        "repo/sub/d.log": "MIT",
        "repo/sub/only-here.txt": "MIT",
        "repo/vendor/COPYING": "COPYING",
        "repo/vendor/e.py": "COPYING",
        "spdx/LICENSE.txt": "GPL-2.0-or-later",
        "spdx/g.py": "GPL-2.0-or-later",
    }
    (document,) = (document for document in documents([str(tmp_path / "spdx")]) if document.source.endswith("g.py"))
    assert document.meta == {"format": "py", "licence": "GPL-2.0-or-later"}
    assert find_files([str(tmp_path / "repo" / "build")])[0].path.endswith("b.py")  # what is named is read
