"""Every verb is a function of the package, which loads nothing heavy before it is called."""

import inspect
import subprocess
import sys

import pytest

import sparing
from sparing.base.config import UserError


def test_importing_and_looking_up_light_verbs_loads_no_torch():
    program = (
        "import sys, sparing; sparing.plan, sparing.serve, sparing.bench, sparing.train, sparing.receipt; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"


def test_all_verbs_are_there():
    for verb in "plan train sft resume evaluate generate export import_ fetch receipt report compare serve bench".split():
        assert callable(getattr(sparing, verb)) and verb in dir(sparing), verb
        if verb not in ("train", "serve", "bench"):
            assert inspect.isfunction(getattr(sparing, verb))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        sparing.trian  # noqa: B018


def test_folders_with_the_name_of_a_verb_can_be_called_and_stay_folders():
    import sparing.bench.figures
    import sparing.serve.settings
    import sparing.train.trainer

    assert sparing.train.trainer.Trainer and sparing.serve.settings.Settings and sparing.bench.figures.bench
    with pytest.raises(UserError, match="lets others on the network in"):
        sparing.serve("run", host="0.0.0.0")
    with pytest.raises(UserError, match="no figure 'tuned'"):
        sparing.bench("train", "tuned")
    with pytest.raises(UserError, match="not a number with a unit"):
        sparing.train([], "soon", "run")
