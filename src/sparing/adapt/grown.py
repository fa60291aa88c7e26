"""Grown models: experts of domains beside a model that stays to the last bit, and the verbs that take them apart and join them.

The root is the model without them. Where it is dense, its feed-forwards become the shared experts of mixtures in which a token uses one
routed expert: number 0, which is zero and does nothing, or a domain's. Where it is a mixture, domains' experts stand behind its own, and
one that is chosen takes the place of the weakest. Sigmoid scores do not depend on each other, and selection biases are no part of a gate's
weight: an expert that is not chosen changes nothing. Each domain has one expert in each layer. Domains stand in the order of their names,
so in whatever order they were grown or merged, the bytes are the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from sparing.account.history import descend, inherit, lineage
from sparing.account.ledger import Ancestor
from sparing.account.meter import metered
from sparing.account.receipt import read_state
from sparing.base.config import Config, GrowthConfig, ModelConfig, UserError
from sparing.base.config_file import nearest, read_config, write_config
from sparing.base.config_limits import DOMAIN, checked
from sparing.base.files import DamagedError, from_json, link_or_copy, new_folder, write_atomic
from sparing.base.layers import SELECTION_BIAS, is_matrix, mixtures, shapes
from sparing.base.origin import inherit_origin
from sparing.base.run import RunFolder, StoredTensors, stream_tensors, tensors_header, verify_folder, weights_sha256, write_folder

PARTS = ("gate.weight", f"gate.{SELECTION_BIAS}", "experts.gate_up_proj", "experts.down_proj")
"""Tensors of a mixture that have a row, or a matrix, for each expert."""
ASLEEP = -1e4
"""Selection bias of an expert that no token may choose."""
SHARES = range(4, 17)
"""A domain's expert is as wide as a dense feed-forward divided by the first of these that leaves whole groups of WIDTH."""
WIDTH = 8
PACK, ABOUT = "pack.safetensors", "pack.json"
FORMAT = 1
LONGEST_NAME = 255
"""Characters, of a run that a pack comes from."""
WAKES = "wakes"
"""state/wakes.json: text -> layer -> {expert: share of that text's tokens that wake it}."""
OLD = "old text"
"""The name there of what the root could already."""
SHAPE = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group", "scoring_func",
         "selection_bias", "norm_topk_prob", "routed_scaling_factor")  # fmt: skip
"""What a dense root says of experts, which it does not have."""


@dataclass(frozen=True)
class Pack:
    """The experts of one domain."""

    domain: str
    tensors: Mapping[str, Tensor]
    """PARTS of each of the decoder's mixtures by their names in the model, of one expert: (1, ...)."""


# shapes


def root_model(model: ModelConfig, growth: GrowthConfig) -> ModelConfig:
    """The shape of the root of a grown model."""
    if growth.dense:
        return replace(model, num_dense_layers=model.num_layers, **{name: getattr(ModelConfig(), name) for name in SHAPE})
    return replace(model, n_routed_experts=model.n_routed_experts - len(growth.domains))


def grown_model(root: ModelConfig, domains: int, width: int | None = None) -> ModelConfig:
    """The shape of a root with the experts of so many domains. width: of an expert of a dense root; None: derived.

    Raises UserError for a root that cannot grow."""
    if mixtures(root):
        if root.scoring_func != "sigmoid" or not root.selection_bias or root.n_group > 1:
            has = f"{root.scoring_func} scores, {'' if root.selection_bias else 'no '}selection biases, {root.n_group} groups"
            needs = "scores that do not depend on each other: sigmoid scores, selection biases, one group"
            raise UserError(f"grow needs routers with {needs}; this mixture has {has}")
        if width not in (None, root.moe_intermediate_size):
            raise UserError(f"growth.width {width}: the experts of this mixture are {root.moe_intermediate_size} wide")
        return replace(root, n_routed_experts=root.n_routed_experts + domains)
    whole = root.intermediate_size
    width = width or next((whole // parts for parts in SHARES if not whole % (parts * WIDTH)), whole)
    if whole % width:
        raise UserError(f"growth.width {width} must divide intermediate_size, {whole}")
    return replace(
        root, num_dense_layers=0, n_routed_experts=1 + domains, num_experts_per_tok=1, n_shared_experts=whole // width,
        moe_intermediate_size=width, n_group=1, topk_group=1, scoring_func="sigmoid", selection_bias=True, norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )  # fmt: skip


def own_names(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a pack's tensors by name."""
    own = {f"model.layers.{layer.index}.mlp.{part}" for layer in mixtures(model) if not layer.mtp for part in PARTS}
    return {name: (1, *shape[1:]) for name, shape in shapes(model).items() if name in own}


def layout(model: ModelConfig, stored: str = "float32") -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each stored tensor; norms and routers are float32 in any case."""
    kind = getattr(torch, stored)
    return {name: (kind if is_matrix(name, len(shape)) else torch.float32, shape) for name, shape in shapes(model).items()}


# tensors


class Joined(Mapping[str, Tensor]):
    """The weights of a grown model, float32, each made when it is asked for."""

    def __init__(self, root: Mapping[str, Tensor], growth: GrowthConfig, model: ModelConfig, packs: Iterable[Pack]):
        """packs: of `growth.domains`, in any order."""
        self.root, self.growth, self.shapes = root, growth, shapes(model)
        by_name = {pack.domain: pack for pack in packs}
        self.packs = [by_name[name] for name in growth.domains]
        self.rows = {f"model.layers.{layer.index}.mlp.{part}": layer.mtp for layer in mixtures(model) for part in PARTS}

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.rows:
            return self.root[name.replace(".mlp.shared_experts.", ".mlp.") if self.growth.dense else name].float()
        shape = (1, *self.shapes[name][1:])
        own = torch.zeros(shape) if self.growth.dense else self.root[name].float()
        asleep = torch.full(shape, ASLEEP if name.endswith(SELECTION_BIAS) else 0.0)  # no domain is known to modules that draft
        return torch.cat([own, *(asleep if self.rows[name] else pack.tensors[name] for pack in self.packs)])


class Root(Mapping[str, Tensor]):
    """The weights of a grown model's root, float32."""

    def __init__(self, grown: Mapping[str, Tensor], growth: GrowthConfig, model: ModelConfig):
        self.grown, self.growth, self.shapes = grown, growth, shapes(root_model(model, growth))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if not self.growth.dense:
            return self.grown[name][: self.shapes[name][0]]  # of routers and experts without the domains', which are the last
        return self.grown[name.replace(".mlp.", ".mlp.shared_experts.")]


def pack_of(grown: Mapping[str, Tensor], growth: GrowthConfig, model: ModelConfig, domain: str) -> Pack:
    """The experts of one of a grown model's domains."""
    number = model.n_routed_experts - len(growth.domains) + growth.domains.index(domain)
    return Pack(domain, {name: grown[name][number : number + 1].float() for name in own_names(model)})


# runs


@dataclass(frozen=True)
class Grown:
    """A run taken apart: its root, and the experts of its domains. Of a run that has none, a root alone."""

    run: RunFolder
    config: Config
    growth: GrowthConfig
    """Of the run; of one that was not grown, what `grow` would begin with."""
    root: Mapping[str, Tensor]
    model: ModelConfig
    """Of the root."""
    packs: tuple[Pack, ...]

    @classmethod
    def open(cls, path: str | Path) -> Grown:
        """Raises UserError for a run that cannot grow because of how its weights are kept, and for a damaged one."""
        run = RunFolder.open(path)
        config = checked(read_config(run.config_file))
        if config.adapter is not None:
            raise UserError(f"{run} is an adapter: make a run with weights of its own first: sparing merge {run} --out RUN")
        if not run.weights_file.exists():
            raise UserError(f"{run} has no weights yet")
        try:
            tensors = StoredTensors(run.weights_file)
            if config.growth is None:
                growth = GrowthConfig(root_sha256=weights_sha256(run), stored=_stored(run, config.model), dense=not mixtures(config.model))
                return cls(run, config, growth, tensors, config.model, ())
        except DamagedError as error:
            raise UserError(f"{run} has no usable weights: {error}") from None
        growth, model = config.growth, config.model
        packs = tuple(pack_of(tensors, growth, model, domain) for domain in growth.domains)
        return cls(run, config, growth, Root(tensors, growth, model), root_model(model, growth), packs)

    @property
    def width(self) -> int | None:
        """Of an expert, where domains are there already."""
        return self.config.model.moe_intermediate_size if self.packs else None

    def having(self, domain: str) -> Pack:
        """Raises UserError where the run has no such domain."""
        names = [pack.domain for pack in self.packs]
        if not names:
            raise UserError(f"{self.run} has no domains: nothing was grown in it")
        if domain not in names:
            raise UserError(f"--domain {domain}: {self.run} has {', '.join(names)}; nearest: {nearest(domain, names)}")
        return self.packs[names.index(domain)]

    def with_packs(self, packs: Iterable[Pack], domain: str = "") -> tuple[ModelConfig, GrowthConfig, Joined]:
        """The root with these domains: its shape, its [growth] section, its weights. domain: the one that is to learn."""
        packs = sorted(packs, key=lambda pack: pack.domain)
        width = packs[0].tensors[next(iter(packs[0].tensors)).partition(".mlp.")[0] + ".mlp.experts.down_proj"].shape[-1]
        model = grown_model(self.model, len(packs), width)
        growth = replace(self.growth, domains=tuple(pack.domain for pack in packs), domain=domain)
        return model, growth, Joined(self.root, growth, model, packs)


def _stored(run: RunFolder, model: ModelConfig) -> str:
    """What a root's matrices are stored in. Raises UserError where its file could not be made again byte for byte."""
    with open(run.weights_file, "rb") as file:
        begins = file.read(1 << 20)
    for kind in ("float32", "bfloat16"):
        header = tensors_header(layout(model, kind))
        if begins.startswith(header[: len(begins)]):
            return kind
    raise UserError(f"{run} keeps its weights in another form than float32 or bfloat16: import it with --dtype float32, and grow that")


def make(
    verb: str,
    grown: Grown,
    out: str,
    started: float | None,
    model: ModelConfig,
    growth: GrowthConfig | None,
    tensors: Mapping[str, Tensor],
    kind: str = "float32",
    expected: str | None = None,
    ancestors: Sequence[Ancestor] = (),
) -> str:
    """A run folder with these weights and what else the run has; -> their SHA-256, which must be `expected`, if that is there. ancestors:
    that it has besides those of the run. Raises UserError; then nothing stays."""
    run = RunFolder.create(out)
    with run.making(), metered(verb, run, verb, started):
        kinds = layout(model, kind)
        written = stream_tensors(run.weights_file, kinds, ((name, tensors[name].to(dtype)) for name, (dtype, _) in kinds.items()))
        if expected not in (None, written["sha256"]):
            raise UserError(f"{grown.run} does not give back the weights that it was grown from: its old tensors have changed")
        for file in (grown.run.tokenizer_file, grown.run.model_card_file, *grown.run.beside(model.mtp_depth > 0)):
            if file.exists():
                link_or_copy(file, run.path / file.name)
        inherit(run, grown.run, {"retire": "retired", "slice": "sliced", "merge": "merged"}[verb])
        descend(run, ancestors)
        inherit_origin(run, grown.run)
        plain = Config()
        rows = replace(plain.train, seq_len=grown.config.train.seq_len)
        config = replace(plain, model=model, train=rows, growth=growth, tokens=grown.config.tokens)
        if growth is not None and (wakes := read_state(grown.run, WAKES, dict)):
            of_domains = {text: by_layer for text, by_layer in wakes.items() if text in growth.domains}
            write_atomic(run.state / f"{WAKES}.json", json.dumps(of_domains, indent=1))
        write_atomic(run.config_file, write_config(config))
    return written["sha256"]


def without(verb: str, grown: Grown, packs: list[Pack], out: str, started: float | None) -> dict:
    """Make a run with these packs alone; with none, the root, byte for byte. -> what `retire` says."""
    if packs:
        model, growth, tensors = grown.with_packs(packs)
        digest = make(verb, grown, out, started, model, growth, tensors)
    else:
        digest = make(verb, grown, out, started, grown.model, None, grown.root, grown.growth.stored, grown.growth.root_sha256)
    return {"out": out, "domains": [pack.domain for pack in packs], "weights_sha256": digest, "base": grown.growth.root_sha256}


def retire(run: str, domain: str, out: str, started: float | None = None) -> dict:
    """Make a run without one domain; without the last one, of the root's weights byte for byte.

    -> {"out", "domains": those left, "weights_sha256", "base": the root's}. Raises UserError."""
    grown = Grown.open(run)
    gone = grown.having(domain)
    return without("retire", grown, [pack for pack in grown.packs if pack is not gone], out, started)


def pack(run: str, domain: str, out: str) -> dict:
    """Write the folder `out` with what was grown for one domain, bound to its root by hash. -> {"out", "domain", "base", "bytes"}.

    Raises UserError."""
    grown = Grown.open(run)
    own, folder = grown.having(domain), new_folder(out, "--out")
    wakes = (read_state(grown.run, WAKES, dict) or {}).get(domain)
    about = {"format": FORMAT, "domain": domain, "base": grown.growth.root_sha256, "wakes": wakes}
    about["ancestors"] = list(map(asdict, lineage(grown.run, f"grew {domain}")))
    write_folder(folder, {PACK: own.tensors, ABOUT: json.dumps(about, indent=1)})
    return {"out": out, "domain": domain, "base": grown.growth.root_sha256, "bytes": (folder / PACK).stat().st_size}


def is_pack(path: str | Path) -> bool:
    return (Path(path) / ABOUT).is_file()


def read_pack(path: str | Path, grown: Grown) -> tuple[Pack, dict | None, list[Ancestor]]:
    """-> (a pack for the root of `grown`, what its domain wakes, the runs that it comes from). Raises UserError for one of another root,
    and for a damaged one."""
    folder = Path(path)
    if not is_pack(folder):
        raise UserError(f"{path} is no pack: `sparing pack RUN --domain NAME --out PACK` makes one")
    try:
        verify_folder(folder)
        about = from_json((folder / ABOUT).read_text())
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise DamagedError("it is of another version")
        domain, wakes = about.get("domain"), about.get("wakes")
        if not isinstance(domain, str) or not DOMAIN.fullmatch(domain):
            raise DamagedError(f"{ABOUT} names no domain")
        if about.get("base") != grown.growth.root_sha256:
            raise UserError(f"{path} was grown beside other weights than {grown.run} has: those were {str(about.get('base'))[:12]}...")
        tensors = StoredTensors(folder / PACK)
        own = {name: tensors[name] for name in tensors}
        width = next((len(tensor[0, 0]) for name, tensor in own.items() if name.endswith("experts.down_proj") and tensor.ndim == 3), 0)
        expected = own_names(grown_model(grown.model, 1, width or None))
        if {name: tuple(tensor.shape) for name, tensor in own.items()} != expected:
            raise DamagedError(f"{PACK} does not have the tensors of a domain")
        if wrong := next((name for name, tensor in own.items() if tensor.dtype != torch.float32 or not tensor.isfinite().all()), None):
            raise DamagedError(f"{wrong} is not of finite float32 numbers")
        ancestors = [_ancestor(row) for row in about.get("ancestors", [])]
    except (DamagedError, OSError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no usable pack: {error}") from None
    return Pack(domain, own), wakes if isinstance(wakes, dict) else None, ancestors


def _ancestor(row: dict) -> Ancestor:
    """Raises DamagedError and TypeError for what is none."""
    found = Ancestor(**row)
    for field in fields(found):
        value = getattr(found, field.name)
        if field.type == "str":
            good = isinstance(value, str) and value.isprintable() and len(value) <= LONGEST_NAME
        else:
            whole = type(value) is int
            good = (whole or (type(value) is float and field.type == "float")) and 0 <= value < (1 << 63 if whole else math.inf)
        if not good:
            raise DamagedError(f"{ABOUT} does not say what a run that it comes from has cost ({field.name})")
    return found


def merge(base: str, paths: list[str], out: str, started: float | None = None) -> dict:
    """Join domains that were grown beside one base, wherever that was; in any order, the bytes are the same.

    base: the root, or a run grown from it, whose domains stay. -> as `retire`. Raises UserError."""
    grown = Grown.open(base)
    packs, wakes, ancestors = list(grown.packs), {}, []
    for path in paths:
        own, woken, runs = read_pack(path, grown)
        if any(own.domain == other.domain for other in packs):
            raise UserError(f"{path}: the domain {own.domain} is there already")
        packs.append(own)
        wakes |= {own.domain: woken} if woken else {}
        ancestors += runs
    if len(widths := {next(t.shape[-1] for name, t in one.tensors.items() if name.endswith("down_proj")) for one in packs}) > 1:
        raise UserError(f"experts of {' and '.join(map(str, sorted(widths)))} numbers' width cannot stand beside each other: grow with one")
    model, growth, tensors = grown.with_packs(packs)
    digest = make("merge", grown, out, started, model, growth, tensors, ancestors=ancestors)
    if wakes:
        run = RunFolder(out)
        write_atomic(run.state / f"{WAKES}.json", json.dumps((read_state(run, WAKES, dict) or {}) | wakes, indent=1))
    return {"out": out, "domains": list(growth.domains), "weights_sha256": digest, "base": growth.root_sha256}
