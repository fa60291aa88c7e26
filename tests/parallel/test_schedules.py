"""How long ranks of a pipeline idle, by the lists of actions of torch's own schedules."""

import pytest

from sparing.parallel.pipeline import bubble
from sparing.parallel.schedules import CHUNKS, CLASSES, _orders, chunks_of, idle, in_flight, microbatches_of, runs, spans


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 2), (2, 7), (4, 4), (4, 16), (8, 32), (16, 60)])
def test_1f1b_idles_as_its_closed_form_says(stages, microbatches):
    closed_form = (stages - 1) / (microbatches + stages - 1)
    assert bubble("1f1b", stages, microbatches) == pytest.approx(closed_form) == idle("1f1b", stages, microbatches)


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 8), (8, 40)])
def test_two_chunks_a_rank_halve_the_bubble_and_the_v_shaped_ones_have_least(stages, microbatches):
    """Interleaved: arXiv 2104.04473 §2.2.2. ZB-V idles while the first micro-batch comes to the last rank, and no more: `stages` - 1 units
    (2401.10241 §6). DualPipeV with passes that are paired and not overlapped: (stages - 1) (F&B + B - 3W) = 2 (stages - 1) units (the
    table in its repository)."""
    found = {schedule: bubble(schedule, stages, microbatches) for schedule in CHUNKS}
    assert found == pytest.approx({schedule: idle(schedule, stages, microbatches) for schedule in CHUNKS})
    assert found["interleaved"] == pytest.approx((stages - 1) / (2 * microbatches + stages - 1))
    assert found["zbv"] < found["dualpipev"] < found["interleaved"] < found["1f1b"]


def test_layers_that_are_computed_again_make_the_bubble_of_v_shaped_schedules_larger():
    """Because what fills it, the weights' gradients, comes with the others then."""
    for schedule in CHUNKS:
        assert idle(schedule, 4, 8, recompute=True) == pytest.approx(bubble(schedule, 4, 8, recompute=True))
    assert min(CHUNKS, key=lambda schedule: idle(schedule, 4, 8, recompute=True)) == "interleaved"


def test_micro_batches_that_have_gone_forward_and_not_yet_back():
    for schedule in CHUNKS:
        for stages, microbatches in ((2, 4), (3, 12), (4, 8)):
            for place, order in enumerate(_orders(schedule, stages, microbatches)):
                there, most = 0, 0
                for _, kind, _ in (part for parts in order for part in parts):
                    there += {"F": 1, "B": -1, "W": -1}.get(kind, 0)
                    most = max(most, there)
                assert sum(in_flight(schedule, stages, microbatches, place)) == most, (schedule, stages, microbatches, place)


def test_what_can_run_is_what_torch_makes():
    for schedule in CLASSES:
        for stages in (2, 3, 4):
            for microbatches in range(1, 14):
                try:
                    bubble(schedule, stages, microbatches)
                    made = True
                except (ValueError, AssertionError):
                    made = False
                assert made >= runs(schedule, stages, microbatches), (schedule, stages, microbatches)
    assert not runs("1f1b", 4, 3) and not runs("dualpipev", 2, 3) and not runs("interleaved", 4, 9) and runs("interleaved", 4, 10)


def test_every_chunk_is_on_one_rank():
    for schedule in CLASSES:
        held = [chunk for position in range(3) for chunk in chunks_of(schedule, 3, position)]
        assert sorted(held) == list(range(3 * CHUNKS[schedule]))


def test_micro_batches_follow_from_the_rows():
    assert microbatches_of("1f1b", 2, 64) == 8 and microbatches_of("1f1b", 4, 12) == 12 and microbatches_of("zbv", 4, 12) == 12
    assert microbatches_of("1f1b", 4, 6) == 6 and microbatches_of("1f1b", 4, 3) is None and microbatches_of("dualpipev", 2, 6) == 6
    assert microbatches_of("1f1b", 2, 64, wished=30) == 32 and microbatches_of("interleaved", 4, 18, wished=6) == 6


@pytest.mark.parametrize(
    ("costs", "head", "chunks", "sizes"),
    [
        ([1, 1, 1, 1], 0.5, 2, [2, 2]),
        ([1, 1, 1, 1], 2, 2, [3, 1]),
        ([1, 1, 1], 9, 4, [1, 1, 1, 0]),
        ([5, 1, 1, 1, 1, 1], 1, 2, [1, 5]),
        ([1] * 8, 0, 4, [2, 2, 2, 2]),
    ],
)
def test_layers_are_cut_where_the_dearest_chunk_is_cheapest(costs, head, chunks, sizes):
    found = spans(costs, head, chunks)
    assert [len(span) for span in found] == sizes and [layer for span in found for layer in span] == list(range(len(costs)))


def test_too_few_layers():
    with pytest.raises(ValueError, match="3 layers make at most 4 chunks"):
        spans([1, 1, 1], 1, 5)
