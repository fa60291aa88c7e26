"""What a folder says about its name and licence."""

import json

import pytest

from sparing.interop.hf_origin import folder_origin

NOTHING = {"name": "", "publisher": "", "licence": "", "url": ""}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"README.md": "# A model\nlicense: mit\n"}, {}),
        ({"README.md": "---\nlicense: apache-2.0\nbase_model:\n- org/small-1B\ntags:\n- x\n---\n# text\nlicense: mit\n"},
         {"licence": "apache-2.0"}),
        ({"README.md": '---\nlicense: other\nlicense_name: "llama3.2"\nlicense_link: LICENSE\n---\n', "LICENSE": "LLAMA 3.2 COMMUNITY"},
         {"licence": "llama3.2", "url": "LICENSE"}),
        ({"README.md": "---\nlicense: other\n---\n", "LICENSE": "\n# Some Model Licence\nYou may"}, {"licence": "Some Model Licence"}),
        ({"LICENSE": "                 Apache License\n           Version 2.0, January 2004\n"}, {"licence": "Apache-2.0"}),
        ({"LICENSE.txt": "MIT License\n\nCopyright"}, {"licence": "MIT"}),
        ({"COPYING": "GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007"}, {"licence": "GPL-3.0"}),
        ({"config.json": json.dumps({"_name_or_path": "org/model"})},
         {"publisher": "org", "name": "model", "url": "https://huggingface.co/org/model"}),
        ({"config.json": json.dumps({"_name_or_path": "/home/someone/checkpoints/model"})}, {}),
        ({"README.md": "---\nlicense: mit\n"}, {}),
    ],
)  # fmt: skip
def test_name_and_licence(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert folder_origin(tmp_path) == NOTHING | expected


def test_text_that_is_no_text(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---\n" * 100_000)
    (tmp_path / "LICENSE").mkdir()
    assert folder_origin(tmp_path) == NOTHING
