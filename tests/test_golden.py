"""Golden losses: tools/golden.py has the runs, tests/golden/ their numbers.

Where the program's numbers are meant to change, `make golden SAVE=1` stores the new ones. Files of other keys are then computed again on
such a machine, or deleted."""

import copy
import json
import warnings
from pathlib import Path

import pytest
from tools import golden

import sparing

SOURCE = Path(sparing.__file__).resolve().parent.parent


def complaints(wrong: dict[str, str]) -> str:
    return "\n".join(f"{name}: {words}" for name, words in wrong.items() if words)


def test_losses_and_weights_are_those_stored(request):
    result = golden.compute(SOURCE)
    same_key, wrong = golden.judged(result, golden.stored())
    how = "bit for bit" if same_key else "within a tolerance: no golden losses are stored for this machine"
    request.node.user_properties.append(("compared", how))
    if not same_key:
        warnings.warn(f"compared {how} (key {json.dumps(result['key'])}); `make golden SAVE=1` stores them", stacklevel=1)
    assert not complaints(wrong), f"compared {how}; `make golden REV=COMMIT` compares with a commit's on this machine\n{complaints(wrong)}"


@pytest.fixture
def known() -> list[dict]:
    return golden.stored()


def test_with_the_key_one_bit_is_too_much(known):
    for change in ("loss", "weights", "bpb"):
        result = copy.deepcopy(known[0])
        run = result["runs"]["mtp"]
        if change == "loss":
            run["loss"][7] = run["loss"][7] * (1 + 1e-15)
        else:
            run[change] = "another"
        same_key, wrong = golden.judged(result, known)
        assert same_key and list(filter(None, wrong.values())) == [wrong["mtp"]] and change in wrong["mtp"]


@pytest.mark.parametrize(
    ("run", "series", "step", "factor", "found"),
    [
        ("dense, float32", "loss", 1, 1 + 1e-5, False),
        ("dense, float32", "loss", 1, 1 + 1e-4, True),
        ("dense, float32", "loss", 19, 1 + 1e-4, False),
        ("mixture", "loss", 1, 1 + 1e-4, False),
        ("mixture", "loss", 1, 1 + 1e-3, True),
        ("mixture", "loss", 19, 0.99, True),
        ("mixture", "grad_norm", 0, 0.99, True),
        ("mtp", "mtp_loss", 19, 0.99, True),
        ("mixture", "loss", 3, float("nan"), True),
    ],
)
def test_without_the_key_there_is_a_tolerance(known, run, series, step, factor, found):
    result = copy.deepcopy(known[0])
    result["key"]["processor"] = "another"
    result["runs"][run][series][step] *= factor
    result["runs"][run]["weights"] = "another"
    same_key, wrong = golden.judged(result, known)
    assert not same_key and [name for name in wrong if wrong[name]] == [run] * found


def test_a_resumed_run_must_equal_the_undisturbed_one_on_any_machine(known):
    result = copy.deepcopy(known[0])
    result["key"]["processor"] = "another"
    result["runs"]["few bits, resumed"]["weights"] = "another"
    assert complaints(golden.judged(result, known)[1]).startswith("few bits, resumed: weights: another, not ")


@pytest.mark.parametrize("change", ["failed", "not stored", "not logged"])
@pytest.mark.parametrize("processor", ["the same", "another"])
def test_what_cannot_be_compared_is_wrong(known, change, processor):
    result = copy.deepcopy(known[0])
    if processor == "another":
        result["key"]["processor"] = processor
    if change == "failed":
        result["runs"]["mtp"] = {"error": "UserError: no such field"}
    elif change == "not logged":
        del result["runs"]["mtp"]["mtp_loss"]
    else:
        for other in known:
            del other["runs"]["mtp"]
    assert complaints(golden.judged(result, known)[1]).startswith("mtp: ")


def test_the_stored_runs_are_the_ones_there_are(known):
    for result in known:
        assert list(result["runs"]) == list(golden.RUNS)
        assert all(len(run["loss"]) == golden.STEPS for run in result["runs"].values())
