"""What to train and how much of it: a pure function from facts to advice, as a table of rules read from top to bottom.

The rules follow what is published; every threshold says where it comes from. None of them replaces a sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tunesmith.cluster.errors import ResourceError
from tunesmith.trainers.advise.room import Layout, Way, gib

Goal = Literal["knowledge", "ability", "format", "safety"]
Closeness = Literal["similar", "between", "different", "unknown"]

SIMILAR, DIFFERENT = 0.8, 1.2
"""Bits a byte of the base on the data. Between the two lie what general models reach zero-shot on the 22 kinds of text of the Pile: 0.72
(GPT-3 175B) and 0.80 (6.7B) at one end, 1.23 (GPT-2 124M) at the other (Gao et al. 2020, arXiv:2101.00027, table 2). Below, the base
predicts the data as a strong model predicts what it has seen; above, worse than a weak one predicts anything."""
SMALL_ROWS, SMALL_TOKENS = 1_000, 750_000
"""Data that can change how a model answers and hardly what it knows: the size of LIMA (Zhou et al. 2023, arXiv:2305.11206)."""
BITS_PER_TOKEN, BITS_PER_PARAMETER = 1.0, 2.0
"""What a token of fine-tuning data has to say, and what a trained parameter can hold. LoRA keeps up with full fine-tuning until the data
outgrow the adapter (Schulman et al. 2025, LoRA Without Regret, which reckons with these two; the second from Allen-Zhu & Li 2024,
arXiv:2404.05405)."""
RANKS = (8, 16, 32, 64, 128)
"""Considered for LoRA. More than the largest is past what most servers of adapters take."""
LOWEST, USUAL = 8, 16
MANY_TASKS = 2
"""From two tasks on, adapters share what whole models would each repeat."""
LORA_RATE, FULL_RATE = 2e-4, 2e-5
"""Peak learning rates. LoRA's best is about ten times that of full fine-tuning (Schulman et al. 2025)."""
FEW_EPOCHS, FEW_ROWS = 3, 52_000
"""Passes over answers when there are at most so many rows: Alpaca's numbers (Taori et al. 2023). Else, and over documents, one."""


@dataclass(frozen=True)
class Size:
    """What a base's geometry says."""

    parameters: int
    """All of them, a tied head counted once."""
    lora_per_rank: int
    """Parameters that LoRA on every linear layer but the head adds for each unit of rank: inputs + outputs."""


@dataclass(frozen=True)
class Facts:
    """All that the advice depends on."""

    objective: Literal["cpt", "sft"]
    """What the data can be trained with: documents have no answers to train."""
    goal: Goal
    tasks: int
    """Tasks that are to be trained on this base."""
    rows: int
    """Training rows."""
    trained_tokens: int
    """Of one pass over them."""
    bits_per_byte: float | None
    """The base's loss on the data; None when it could not be measured."""
    size: Size
    """Of the base."""
    gpus: int
    """On CPUs, workers."""
    gpu_gib: float
    """Memory of each."""
    gpu: str
    """Name of the GPU."""

    @property
    def closeness(self) -> Closeness:
        """Of the data to what the base was trained on."""
        if self.bits_per_byte is None:
            return "unknown"
        if self.bits_per_byte < SIMILAR:
            return "similar"
        return "different" if self.bits_per_byte > DIFFERENT else "between"

    @property
    def is_small(self) -> bool:
        return self.rows <= SMALL_ROWS and self.trained_tokens <= SMALL_TOKENS

    @property
    def is_large(self) -> bool:
        """Whether the data hold more than the largest adapter can."""
        return not self.is_small and self.trained_tokens * BITS_PER_TOKEN > self.capacity(RANKS[-1])

    def capacity(self, rank: int) -> float:
        """Bits that LoRA of this rank can hold."""
        return BITS_PER_PARAMETER * rank * self.size.lora_per_rank

    @property
    def fitting_rank(self) -> int:
        """The smallest rank, from the usual one up, that can hold the data; the largest when none can."""
        needed = self.trained_tokens * BITS_PER_TOKEN
        return next((rank for rank in RANKS if rank >= USUAL and self.capacity(rank) >= needed), RANKS[-1])


class Rule(NamedTuple):
    """When it holds, this much of the model should change, because."""

    name: str
    holds: Callable[[Facts], bool]
    way: Way
    rank: Callable[[Facts], int]
    why: Callable[[Facts], str]


@dataclass(frozen=True)
class Advice:
    """What to write into the recipe, and why."""

    rule: str
    """Name of the rule that decided."""
    objective: str
    way: Way
    """`qlora` is LoRA on a base in 4 bits."""
    rank: int | None
    """None when every weight is trained."""
    layout: Layout
    """How it is placed on the fleet."""
    learning_rate: float
    epochs: int
    reasons: list[str]
    """Sentences."""
    cautions: list[str]
    """Sentences about what the advice cannot mend."""
    considered: list[Layout]
    """The layouts that were simulated, the wished one first; the last is the advised one."""


RULES = (
    Rule(
        "many tasks on one base",
        lambda f: f.tasks >= MANY_TASKS,
        "lora",
        lambda f: f.fitting_rank,
        lambda f: (
            f"{f.tasks} tasks share the base: an adapter of rank {f.fitting_rank} for each is {_gb(f, f.fitting_rank)}, where a whole "
            f"model for each would be {f.size.parameters * 2 / 1e9:,.3g} GB, and one server answers for all of them."
        ),
    ),
    Rule(
        "format or safety",
        lambda f: f.goal in ("format", "safety"),
        "lora",
        lambda f: LOWEST,
        lambda f: (
            f"The goal is {f.goal}: how the model answers, not what it knows. A low rank ({LOWEST}) is enough for that, and what is "
            "not trained is not forgotten (Biderman et al. 2024, LoRA Learns Less and Forgets Less)."
        ),
    ),
    Rule(
        "small and similar",
        lambda f: f.is_small and f.closeness == "similar",
        "lora",
        lambda f: LOWEST,
        lambda f: (
            f"{_data(f)} are few, and the base predicts them well ({_closeness(f)}): training the head or the last few layers would do. "
            f"Recipes cannot name these yet, so this one takes the nearest that exists: LoRA of the lowest rank ({LOWEST})."
        ),
    ),
    Rule(
        "small and different",
        lambda f: f.is_small and f.closeness == "different",
        "lora",
        lambda f: USUAL,
        lambda f: (
            f"{_data(f)} are few for text that the base predicts badly ({_closeness(f)}): every weight would learn them by heart. "
            f"LoRA of rank {USUAL} keeps most of the base as it is."
        ),
    ),
    Rule(
        "large and different",
        lambda f: f.is_large and f.closeness == "different",
        "full",
        lambda f: RANKS[-1],
        lambda f: f"{_outgrown(f)}, and the base predicts them badly ({_closeness(f)}): every weight is needed.",
    ),
    Rule(
        "large, for knowledge",
        lambda f: f.is_large and f.goal == "knowledge" and f.closeness != "similar",
        "full",
        lambda f: RANKS[-1],
        lambda f: (
            f"{_outgrown(f)}, and the goal is knowledge, of which an adapter takes up less ({_closeness(f)}): train every weight."
        ),
    ),
    Rule(
        "large",
        lambda f: f.is_large,
        "lora",
        lambda f: RANKS[-1],
        lambda f: (
            f"{_outgrown(f)}, but nothing says that the base knows little of them ({_closeness(f)}): begin with that "
            "rank, and train every weight if the held-out loss is still falling at the end."
        ),
    ),
    Rule(
        "most tasks",
        lambda f: True,
        "lora",
        lambda f: f.fitting_rank,
        lambda f: (
            f"LoRA learns as well as full fine-tuning as long as the adapter can hold the data: {_data(f)} hold about "
            f"{f.trained_tokens * BITS_PER_TOKEN / 1e6:,.3g} Mbit, rank {f.fitting_rank} holds {f.capacity(f.fitting_rank) / 1e6:,.3g} Mbit "
            f"({_closeness(f)})."
        ),
    ),
)


def recommend(facts: Facts, layouts: Callable[[Way, int], Iterable[Layout]]) -> Advice:
    """The advice of the first rule that holds, changed to what the fleet's memory can hold.

    Args:
        layouts: the layouts of an adaptation of some rank, the fastest first.

    Raises:
        ResourceError: not even a base in 4 bits fits.
    """
    rule = next(rule for rule in RULES if rule.holds(facts))
    rank, reasons, considered = rule.rank(facts), [rule.why(facts)], []
    for way in WAYS[WAYS.index(rule.way) :]:
        mine: list[Layout] = []
        for layout in layouts(way, rank):
            mine.append(layout)
            considered.append(layout)
            if layout.fits:
                return _advice(facts, rule, rank, reasons + _spared(mine, facts), considered)
        takes = gib(min(layout.gib for layout in mine))
        reasons.append(
            f"{NAMES[way]} does not fit: it takes at least {takes} of each {facts.gpu}, which has {gib(facts.gpu_gib)}."
            f"{INSTEAD[way]}"
        )
    least = min(considered, key=lambda layout: layout.gib)
    raise ResourceError(
        f"no adaptation of {facts.size.parameters / 1e9:,.3g} billion parameters fits:\n"
        + "\n".join(f"  {reason}" for reason in reasons[1:]),
        f"Name a smaller base, shorter rows (data.max_length), or a fleet of GPUs with at least {gib(least.gib)}, or of more of "
        "them: ZeRO-3 shares out LoRA's base in 16 bits.",
    )


def _advice(facts: Facts, rule: Rule, rank: int, reasons: list[str], considered: list[Layout]) -> Advice:
    chosen = considered[-1]
    is_lora = chosen.way != "full"
    answers = facts.objective == "sft"
    return Advice(
        rule=rule.name,
        objective=facts.objective,
        way=chosen.way,
        rank=rank if is_lora else None,
        layout=chosen,
        learning_rate=LORA_RATE if is_lora else FULL_RATE,
        epochs=FEW_EPOCHS if answers and facts.rows <= FEW_ROWS else 1,
        reasons=reasons,
        cautions=_cautions(facts, is_lora),
        considered=considered,
    )


def _spared(tried: list[Layout], facts: Facts) -> list[str]:
    """Why the last layout and not a faster one before it."""
    chosen, found = tried[-1], []
    if chosen.zero == 3 and tried[0].zero != 3:
        found.append(
            f"Weights are shared out over {facts.gpus} GPUs (ZeRO-3): whole they take {gib(tried[0].gib)} of each."
        )
    if chosen.checkpointing and len(tried) > 1:
        found.append(
            f"Activations are computed twice (gradient checkpointing): kept, it would take {gib(tried[-2].gib)}."
        )
    return found


WAYS: tuple[Way, ...] = ("full", "lora", "qlora")
"""From the most memory to the least."""
NAMES: dict[Way, str] = {"full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
INSTEAD: dict[Way, str] = {
    "full": " LoRA of a high rank comes nearest to it.",
    "lora": " QLoRA holds the base in 4 bits, at a cost in time and hardly any in quality (Dettmers et al. 2023).",
    "qlora": "",
}


def _cautions(facts: Facts, is_lora: bool) -> list[str]:
    """What the user should know beside the recipe."""
    found = []
    if facts.closeness == "unknown":
        found.append("The base's loss on the data is unknown, so this advice goes by size and goal alone.")
    if facts.goal == "knowledge":
        found.append(
            "New facts stick badly unless they come in many wordings, and looking them up when asked often does better (Ovadia et al. "
            "2023, Fine-Tuning or Retrieval): measure against retrieval before paying for training."
        )
        if facts.objective == "sft":
            found.append("These are answers, not documents: they teach to answer like this more than what they say.")
    elif facts.objective == "cpt":
        found.append(
            f"These are documents, without questions and answers: for {facts.goal}, rows with prompts and completions do more."
        )
    if facts.goal == "safety":
        found.append(
            "Answers show what to say; what not to say is learned from preference pairs (DPO), which recipes cannot train yet. Mix in "
            "ordinary requests, or the model learns to refuse those too."
        )
    if facts.is_small and facts.closeness == "different":
        found.append("More data would help more than any setting here.")
    if facts.is_large and is_lora:
        found.append(f"{_outgrown(facts)}: it will learn more slowly than every weight would.")
    if not is_lora:
        found.append("Every weight may forget: watch a general test before and after, and mix in general text.")
    return found


def _data(facts: Facts) -> str:
    return f"{facts.rows:,} rows with {facts.trained_tokens:,} trained tokens"


def _closeness(facts: Facts) -> str:
    if facts.bits_per_byte is None:
        return "its loss on them is unknown"
    limit = {
        "similar": f"under {SIMILAR}",
        "between": f"between {SIMILAR} and {DIFFERENT}",
        "different": f"over {DIFFERENT}",
    }
    return f"{facts.bits_per_byte:.2f} bits a byte, {limit[facts.closeness]}"


def _outgrown(facts: Facts) -> str:
    return (
        f"{_data(facts)} hold about {facts.trained_tokens * BITS_PER_TOKEN / 1e6:,.3g} Mbit, more than the "
        f"{facts.capacity(RANKS[-1]) / 1e6:,.3g} Mbit that LoRA of rank {RANKS[-1]} can hold"
    )


def _gb(facts: Facts, rank: int) -> str:
    return f"{rank * facts.size.lora_per_rank * 2 / 1e9:,.2g} GB"
