"""`sparing plan`: predicts what a recipe, data and a budget give, or finds the budget that reaches a target."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sparing.account.prices import home_rent
from sparing.base.config import Budget, UserError
from sparing.base.config_file import Wishes, nearest, read_recipe, write_config
from sparing.base.messages import say
from sparing.budget.cluster import plan_stages
from sparing.budget.flops import parameters
from sparing.budget.memory import serving_memory
from sparing.budget.predict import Corpus, PlannedRun, check, predict
from sparing.budget.units import format_budget, parse_budget, parse_size
from sparing.data.scan import CorpusFacts, scan
from sparing.planning.compare import alternatives
from sparing.planning.places import Given, Place, elsewhere, here, resolve_run, with_vocabulary
from sparing.planning.start import scored, with_start
from sparing.resolve import LADDER, Resolved, shaped

PLAN_FIELDS = {"data_bytes", "machine", "rent", "country"}
"""What [plan] of a recipe may say besides a cluster's fields (`budget.cluster`)."""
TOKENS_PER_PARAMETER = 20.0
"""For `--fits` without a budget: Hoffmann et al., arXiv 2203.15556 §3."""


def plan(
    recipe: str | None = None,
    data: list[str] | None = None,
    budget: str | None = None,
    target_bpb: float | None = None,
    fits: str | None = None,
    machine: str | None = None,
    compare: bool = False,
    wishes: dict | None = None,
    rent: str | None = None,
    country: str | None = None,
    start: list[str] | None = None,
) -> dict[str, Any]:
    """What a run would cost and reach: the keys of `plan --json`.

    recipe: a TOML file or a preset's name; data: as for `train`; one of budget ("20m", "$5"), target_bpb (the cheapest budget that reaches
    it), fits ("8GB": the best model that serves in it). machine: a name of the hardware table, default this machine. compare: alternatives,
    and what the budget should buy. start: runs (or imported models) to go on from: one, or, to compare, several beside a run from scratch;
    each is scored on held-out text now. Raises UserError for what cannot work, with the nearest budget or change that does.
    """
    read = read_recipe(recipe)
    section, wishes = read.plan, Wishes.of(read.wishes, wishes, {"data": {"paths": tuple(data)}} if data else {})
    for name in ("machine", "rent", "country"):
        if not isinstance(section.get(name, ""), str):
            raise UserError(f"[plan]: {name} = {section[name]!r} is not text")
    if type(section.get("data_bytes", 1)) not in (int, float) or not 0 < section.get("data_bytes", 1) < float("inf"):
        raise UserError(f"[plan]: data_bytes = {section['data_bytes']!r} is not a number above 0")
    if "layout" in section and not (data or budget or fits or target_bpb):
        config = wishes.config()
        return plan_stages(config.model, config.train.seq_len, config.train.batch_size, section, country)
    for name in section.keys() - PLAN_FIELDS - {"tokens", "layout", "stage", "hours", "hours_of", "usd_per_hour"}:
        raise UserError(f"[plan]: unknown key {name}; nearest: {nearest(name, PLAN_FIELDS)}")
    rent = rent or section.get("rent") or ("on_demand" if machine or section.get("machine") else home_rent())
    if rent not in ("own", "on_demand", "spot"):
        raise UserError(f"--rent {rent}: choose own, on_demand or spot")
    if sum(x is not None for x in (budget, target_bpb, fits)) > 1 and not (budget and fits):
        raise UserError("choose one of --budget, --target-bpb, --fits (--fits may go with --budget)")
    budget = budget or (None if target_bpb or fits else read.budget)
    if budget is None and target_bpb is None and fits is None:
        raise UserError("plan needs --budget, --target-bpb or --fits")
    if start and (fits or target_bpb or (len(start) > 1 and not compare)):
        raise UserError("--from goes with --budget: one run, or several with --compare")
    begun = [with_start(Wishes.of(wishes, {"start": {"run": run}})) for run in start or ()]  # told before any text is read
    corpus = _corpus(wishes, section)
    scores = [scored(one, corpus) for one in begun]
    name, country = machine or section.get("machine"), country or section.get("country")
    place = elsewhere(name, rent, country) if name else here(rent, country, say)
    wishes = with_vocabulary(wishes)

    if fits is not None:
        wishes, parsed = _that_serves(wishes, parse_size(fits), parse_budget(budget) if budget else None, corpus, place)
    elif target_bpb is not None:
        parsed = cheapest(wishes, target_bpb, corpus, place)
    else:
        parsed = parse_budget(budget)
    alone = begun and not compare
    run, resolved = resolve_run(begun[0] if alone else wishes, parsed, corpus, place, scores[0]["bpb"] if alone else None)
    check(run)
    result = shown(run, resolved, place)
    if scores:
        result["scored"] = scores
    if fits is not None:
        serves = serving_memory(run.config.model, run.config.train.seq_len)
        result["serving_bytes"] = {
            "value": serves,
            "low": serves,
            "high": serves,
            "source": "16-bit weights, one full context, the process",
        }
    if compare:
        result |= alternatives(wishes, parsed, corpus, place, list(zip(begun, scores, strict=True)))
    return result


def foresee(run: PlannedRun) -> dict[str, Any]:
    """The prediction for a run that is about to tokenise, `start_s` after its beginning: `plan --json`'s keys, and the size and kind of its
    corpus."""
    return {**predict(run), "budget": format_budget(run.config.budget), "kind": run.law.kind, "train_bytes": run.corpus.train_bytes}


def _corpus(wishes: Wishes, section: dict) -> CorpusFacts | Given:
    if "data_bytes" in section and not wishes.value("data.paths"):
        return Given(section["data_bytes"])
    from sparing.data.progress import Bars

    with Bars() as bars:
        return scan(wishes.config().data, progress=bars)


def shown(run: PlannedRun, resolved: Resolved, place: Place) -> dict[str, Any]:
    """A prediction with what was decided and why."""
    return {
        **predict(run),
        "machine": place.label,
        "budget": format_budget(run.config.budget),
        "kind": run.law.kind,
        "config": {name: section for name, section in asdict(resolved.config).items() if section is not None},
        "reasons": resolved.reasons,
        "recipe": write_config(resolved.config, resolved.reasons),
    }


# inverse questions


def cheapest(wishes: Wishes, target: float, corpus: Corpus, place: Place) -> Budget:
    """The shortest time budget that reaches `target` bits per byte. Raises UserError where none does, naming what can be reached."""
    if not 0 < target < 20:
        raise UserError(f"--target-bpb {target}: bits per byte lie between 0 and 8 or so")

    def reached(seconds: float) -> float:
        run, _ = resolve_run(wishes, Budget(seconds, "s"), corpus, place)
        return predict(run)["bpb"]["value"]

    low, high = 10.0, 10 * 365 * 86400.0
    if (best := min(reached(high), reached(30 * 86400.0))) > target:
        raise UserError(f"--target-bpb {target}: not reachable on {place.label} with these data; nearest: {best + 0.005:.2f}")
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if reached(middle) <= target else (middle, high)
    for _ in range(40):  # a budget below what starting takes is no answer
        run, _ = resolve_run(wishes, Budget(high, "s"), corpus, place)
        try:
            check(run)
            break
        except UserError:
            high *= 1.25
    return Budget(float(f"{high:.3g}"), "s")


def _that_serves(wishes: Wishes, size: int, budget: Budget | None, corpus: Corpus, place: Place) -> tuple[Wishes, Budget]:
    """(wishes with the largest model of the ladder that serves in `size` bytes, and which the budget can feed; its budget)."""
    seq_len = wishes.value("train.seq_len") or (1024 if place.machine.gpus else 512)
    vocab = wishes.value("model.vocab_size") or 32768
    models = [shaped(shape, vocab, seq_len, moe=True) for shape in LADDER]
    fitting = [c for c in models if serving_memory(c, seq_len) <= size]
    if not fitting:
        least = serving_memory(models[0], seq_len)
        raise UserError(f"--fits {size / 1e6:.0f}MB: the smallest model serves in {least / 1e6:.0f}MB")
    if budget is not None:
        run, _ = resolve_run(wishes, budget, corpus, place)
        if serving_memory(run.config.model, seq_len) <= size:
            return wishes, budget  # what the budget buys fits anyway
    model = fitting[-1]
    if budget is None:
        budget = Budget(float(f"{TOKENS_PER_PARAMETER * parameters(model).active:.2g}"), "tok")
    return Wishes.of({"model": vars(model)}, wishes), budget
