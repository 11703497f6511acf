"""The re-ranking chain as data: the chain steps after the first stage, their constants, and how they were chosen.

`chain.json` lies beside a model. Its `steps` are applied in order, each to the lists of the one before; with no step
the first stage's order stays. `chosen_on` has the labels and figures that led to the choice, `calibration` the curve
that turns a distance of the chain's output into the probability of a match.
"""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor

from distributed_rerank.config.own import is_own, load_own, refuse_foreign
from distributed_rerank.errors import BadInput
from distributed_rerank.models.adapter import Adapter, load_adapter, save_adapter
from distributed_rerank.models.adapter import Kind as AdapterKind
from distributed_rerank.storage.files import write_json
from distributed_rerank.storage.manifests import check_paths
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.match_neighbourhood import Kind
from distributed_rerank.tensors.things import Combination

Rule = Literal["fuse", "replace"]
SCHEMA_VERSION = 2
"""Of chain.json. 1 had no version field, no neighbourhood and query_expansion steps, and another calibration."""


@dataclass(frozen=True)
class AdaptStep:
    """The search runs over embeddings mapped by the adapter in the model folder (`models.adapter`).

    `kind` and `floor` say how it was fitted.
    """

    kind: AdapterKind = "whiten"
    floor: float = 0.0

    def __post_init__(self) -> None:
        require(self.kind in get_args(AdapterKind), f"kind={self.kind!r} is unknown; known: {get_args(AdapterKind)}")
        require(self.floor >= 0, f"floor={self.floor} must not be negative")


@dataclass(frozen=True)
class PairwiseStep:
    """Re-orders the first `top_n` by the pairwise model's logits.

    fuse: weight * distance + logit / temperature; replace: by the logit alone, OML's rule (weight and temperature are
    not used). The candidates behind the first `top_n` keep their places, and so do the first `pinned` (fuse only): with
    1, CMC@1 is that of the search.
    """

    top_n: int
    rule: Rule = "fuse"
    weight: float = 1.0
    temperature: float = 1.0
    pinned: int = 0

    def __post_init__(self) -> None:
        require(self.rule in get_args(Rule), f"rule={self.rule!r} is unknown; known are {get_args(Rule)}")
        require(self.top_n >= 2, f"top_n={self.top_n} re-ranks nothing; give at least 2")
        require(self.weight >= 0, f"weight={self.weight} is negative; distances count positively or not at all")
        require(self.temperature > 0, f"temperature={self.temperature} must be positive")
        require(self.pinned >= 0, f"pinned={self.pinned} must not be negative")
        require(self.rule == "fuse" or not self.pinned, f"pinned={self.pinned} has no effect with rule=replace")


@dataclass(frozen=True)
class KReciprocalStep:
    """k-reciprocal neighbours (Zhong et al. 2017): (1 - weight) * Jaccard distance + weight * distance."""

    k1: int = 20
    k2: int = 6
    weight: float = 0.3

    def __post_init__(self) -> None:
        require(self.k1 >= 1, f"k1={self.k1} must be at least 1")
        require(1 <= self.k2 <= self.k1, f"k2={self.k2} must lie between 1 and k1={self.k1}")
        require(0 <= self.weight <= 1, f"weight={self.weight} must lie between 0 and 1")


@dataclass(frozen=True)
class NeighbourhoodStep:
    """Two items are near where their neighbourhoods overlap; each neighbour counts with its probability of a match.

    (1 - weight) * Jaccard distance + weight * (1 - p) with p = sigmoid(intercept - slope * distance), with the distance
    of the chain step before. kind: reciprocal neighbours, or directly the first k1. The first `pinned` candidates stay
    where they are: with 1, CMC@1 is that of the chain step before.
    """

    slope: float
    intercept: float
    kind: Kind = "direct"
    k1: int = 20
    k2: int = 3
    weight: float = 0.3
    pinned: int = 0

    def __post_init__(self) -> None:
        require(self.kind in get_args(Kind), f"kind={self.kind!r} is unknown; known are {get_args(Kind)}")
        require(self.slope >= 0, f"slope={self.slope} is negative; a larger distance is no likelier match")
        require(self.k1 >= 1, f"k1={self.k1} must be at least 1")
        require(1 <= self.k2 <= self.k1, f"k2={self.k2} must lie between 1 and k1={self.k1}")
        require(0 <= self.weight <= 1, f"weight={self.weight} must lie between 0 and 1")
        require(self.pinned >= 0, f"pinned={self.pinned} must not be negative")


@dataclass(frozen=True)
class QueryExpansionStep:
    """Alpha query expansion with database augmentation inside the lists, which keep their candidates.

    Every embedding becomes the normalised sum of itself and the first k of its list with weights p ** alpha; the new
    distance is (1 - weight) * (distance of the expanded embeddings / its scale) + weight * (1 - p), with p and `pinned`
    as in `NeighbourhoodStep`.
    """

    slope: float
    intercept: float
    k: int = 10
    alpha: float = 1.0
    weight: float = 0.5
    pinned: int = 0

    def __post_init__(self) -> None:
        require(self.slope >= 0, f"slope={self.slope} is negative; a larger distance is no likelier match")
        require(self.k >= 1, f"k={self.k} must be at least 1")
        require(self.alpha >= 0, f"alpha={self.alpha} must not be negative")
        require(0 <= self.weight <= 1, f"weight={self.weight} must lie between 0 and 1")
        require(self.pinned >= 0, f"pinned={self.pinned} must not be negative")


@dataclass(frozen=True)
class AlphaQEStep:
    """Alpha query expansion (Radenovic et al. 2018) with the same expansion of the gallery (DBA), and a new search.

    New candidates come in, and the distances of the chain steps before are lost.
    """

    k: int = 5
    alpha: float = 3.0

    def __post_init__(self) -> None:
        require(self.k >= 1, f"k={self.k} must be at least 1")
        require(self.alpha >= 0, f"alpha={self.alpha} must not be negative")


@runtime_checkable
class OwnStep(Protocol):
    """A chain step of the user's: a frozen dataclass of numbers and words whose `apply` re-orders the lists."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def apply(
        self,
        lists: CandidateLists,
        embeddings: Float[Tensor, "item dim"] | None,
        gallery: Int64[Tensor, " gallery"] | None,
    ) -> CandidateLists:
        """Lists of the same candidates in another order, distances ascending (`chain.apply.apply` has the words)."""
        ...


ProbabilityStep = NeighbourhoodStep | QueryExpansionStep
ChainStep = AdaptStep | PairwiseStep | KReciprocalStep | AlphaQEStep | ProbabilityStep | OwnStep
KINDS: dict[str, type[ChainStep]] = {
    "adapt": AdaptStep,
    "pairwise": PairwiseStep,
    "k_reciprocal": KReciprocalStep,
    "neighbourhood": NeighbourhoodStep,
    "query_expansion": QueryExpansionStep,
    "alpha_qe": AlphaQEStep,
}


@dataclass(frozen=True)
class Chain:
    """Chain steps after the first stage; none = its order stays."""

    steps: tuple[ChainStep, ...] = ()
    chosen_on: dict[str, Any] = field(default_factory=dict)
    """Labels, queries and figures of the choice; {} = given by hand."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """The curve from a distance of the output to the probability of a match, and its error; {} = nothing fitted."""
    adapter: Adapter | None = field(default=None, compare=False, repr=False)
    """The map of the step `adapt`."""
    views: Combination = "best"
    """How the photos of one thing are combined (`tensors.things`), where the catalogue says what they show."""

    def __post_init__(self) -> None:
        kinds = [type(step) for step in self.steps]
        require(AdaptStep not in kinds[1:], "the step adapt comes first: the search runs over what it maps")
        require(kinds.count(PairwiseStep) <= 1, "a chain has at most one pairwise step")
        is_first = PairwiseStep not in kinds[1 + (AdaptStep in kinds) :]
        require(is_first, "the pairwise step comes first: its logits belong to the first stage's lists")

    @property
    def adapt(self) -> AdaptStep | None:
        """The step that maps embeddings before the search, or None."""
        return next((step for step in self.steps if isinstance(step, AdaptStep)), None)

    @property
    def before_search(self) -> tuple[ChainStep, ...]:
        """The chain steps before the search."""
        return tuple(step for step in self.steps if isinstance(step, AdaptStep))

    def identity(self) -> dict[str, Any]:
        """All that decides what the chain does, for a fingerprint."""
        steps = [{"step": kind_of(step), **asdict(step)} for step in self.steps]
        views = {} if self.views == "best" else {"views": self.views}
        return {"steps": steps, "adapter": None if self.adapter is None else self.adapter.digest(), **views}

    @property
    def pairwise(self) -> PairwiseStep | None:
        """The pairwise step, or None: then no pair needs a logit."""
        return next((step for step in self.steps if isinstance(step, PairwiseStep)), None)

    @property
    def neighbourhood(self) -> tuple[ChainStep, ...]:
        """The chain steps that look at the lists of the neighbours as well."""
        return tuple(step for step in self.steps if not isinstance(step, PairwiseStep | AdaptStep))

    @property
    def is_inductive(self) -> bool:
        """Whether a query's answer needs the query and the gallery alone, and no other query."""
        return all(map(is_inductive, self.steps))

    @property
    def evidence_text(self) -> str:
        """What is to be said of the labels that the chain was chosen on; "" where all is as usual."""
        return self.chosen_on.get("evidence", {}).get("text", "")

    @property
    def is_judged_as_one(self) -> bool:
        """Whether its steps were judged as one, and taken."""
        return bool(self.chosen_on.get("together", {}).get("taken"))

    def describe(self) -> str:
        """The chain steps in one line, for a log and a report."""
        return " -> ".join(["first stage", *(describe_step(step) for step in self.steps)])


def require(is_right: bool, message: str) -> None:
    """Raises BadInput with the message where `is_right` is False."""
    if not is_right:
        raise BadInput(f"chain: {message}")


def is_inductive(step: ChainStep) -> bool:
    """Whether the chain step asks the gallery's lists alone. Reciprocal neighbours need the query in those lists."""
    is_reciprocal = isinstance(step, NeighbourhoodStep) and step.kind != "direct"
    return not (is_reciprocal or isinstance(step, KReciprocalStep))


def kind_of(step: ChainStep) -> str:
    """The name of the chain step in chain.json."""
    own = f"{type(step).__module__}:{type(step).__qualname__}"
    return next((name for name, kind in KINDS.items() if isinstance(step, kind)), own)


def describe_step(step: ChainStep) -> str:
    """One chain step with its constants, to four digits: `k_reciprocal(k1=20, k2=6, weight=0.3)`."""
    constants = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in asdict(step).items()}
    return f"{kind_of(step)}({', '.join(f'{name}={value}' for name, value in constants.items())})"


def write_chain(chain: Chain, folder: Path) -> None:
    """Write chain.json, and the adapter if there is one, into the folder, each atomically."""
    if chain.adapter is not None:
        save_adapter(chain.adapter, folder)
    content = {
        "schema_version": SCHEMA_VERSION,
        "steps": [{"step": kind_of(step), **asdict(step)} for step in chain.steps],
        "chosen_on": chain.chosen_on,
        "calibration": chain.calibration,
        **({} if chain.views == "best" else {"views": chain.views}),
    }
    write_json(folder / "chain.json", content)


def read_chain(path: Path) -> Chain:
    """The chain of a chain.json, or of the model folder that holds one.

    Raises BadInput naming what does not fit, and for a file of a finished folder that is gone or has changed.
    """
    path = path / "chain.json" if path.is_dir() else path
    check_paths([path])
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give a model folder or a chain.json")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is no JSON ({error}); write it anew") from error
    require(isinstance(content, dict), f"{path} holds no object")
    version = content.pop("schema_version", 1)
    require(
        version == SCHEMA_VERSION,
        f"{path} has schema_version {version}, this code reads {SCHEMA_VERSION}; train the model again, or give "
        f'--chain replace or a file with "schema_version": {SCHEMA_VERSION}',
    )
    unknown = set(content) - {"steps", "chosen_on", "calibration", "views"}
    require(not unknown, f"{path} has unknown keys {sorted(unknown)}; known are steps, chosen_on, calibration, views")
    views = content.get("views", "best")
    require(views in get_args(Combination), f"views={views!r} is unknown; known are {get_args(Combination)}")
    steps = tuple(step_from(entry) for entry in content.get("steps", []))
    chain = Chain(steps, content.get("chosen_on", {}), content.get("calibration", {}), views=views)
    return chain if chain.adapt is None else replace(chain, adapter=load_adapter(path.parent))


def own_kind(name: str) -> type[Any]:
    """The class of a chain step of the user's. Raises BadInput for other names, and for code that is not his own."""
    require(is_own(name), f"step {name!r} is unknown; known are {sorted(KINDS)}, or your own as package.module:Class")
    refuse_foreign(name, "chain.json")
    kind = load_own(name)
    is_right = isinstance(kind, type) and is_dataclass(kind) and callable(getattr(kind, "apply", None))
    require(is_right, f"step {name} must be a dataclass with a method apply(lists, embeddings, gallery)")
    return kind


def step_from(entry: dict[str, Any]) -> ChainStep:
    """One chain step from its entry in chain.json."""
    constants = dict(entry)
    name = constants.pop("step", None)
    kind = KINDS.get(str(name)) or own_kind(str(name))
    known = {f.name: f.type for f in fields(kind)}
    unknown = set(constants) - set(known)
    require(not unknown, f"step {name} has unknown constants {sorted(unknown)}; known are {sorted(known)}")
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in constants]
    require(not missing, f"step {name} lacks {', '.join(missing)}")
    for constant, value in constants.items():
        wanted = {int: (int,), float: (int, float)}.get(known[constant], (str,))
        is_right = isinstance(value, wanted) and not isinstance(value, bool)
        require(is_right, f"{constant}={value!r} of step {name} must be {known[constant]}")
        words = get_args(known[constant])
        require(not words or value in words, f"{constant}={value!r} is unknown; known are {words}")
        constants[constant] = float(value) if known[constant] is float else value
    return kind(**constants)
