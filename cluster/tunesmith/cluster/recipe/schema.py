"""The recipe: every key a user may write, with its meaning, unit and the reason for its default.

Neither torch nor ray is imported here. The reference in docs/recipe.md is generated from these docstrings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)

from tunesmith.cluster.recipe.data import Data
from tunesmith.cluster.recipe.section import Fraction, Section
from tunesmith.cluster.recipe.tune import Tune


class Model(Section):
    """The base model."""

    base: Annotated[str, Field(min_length=1)]
    """A hub id, a folder, `run:NAME` (the artifact of an earlier run in the same output folder) or `builtin:NAME`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. None takes the default branch."""
    quantization: Literal["nf4", "int8"] | None = None
    """Holds the frozen base in fewer bits: `nf4` is 4-bit NormalFloat (QLoRA), `int8` is LLM.int8 (arXiv:2208.07339), for
    ZeRO 0 to 2. Needs the adaptation `lora`, or a type of `peft` that takes such layers."""
    attention: Literal["auto", "reference"] = "auto"
    """`auto` takes the fastest path that equals the reference; `reference` is the plain 4-D mask."""
    router_aux_loss_coef: Annotated[float, Field(ge=0.0)] | None = None
    """Weight of the load-balancing loss of a mixture-of-experts model. None takes the model's own."""


class Objective(Section):
    """What is minimised. `objective: sft` is short for `objective: {kind: sft}`."""

    kind: Literal["cpt", "sft"]
    """`cpt` continues pre-training on every token; `sft` trains the assistant's answers."""


class Full(Section):
    """Every weight may change."""

    kind: Literal["full"]
    """`full`."""


class Lora(Section):
    """Low-rank updates beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

    kind: Literal["lora"]
    """`lora`."""
    rank: PositiveInt = 16
    """Rank of each update."""
    lora_alpha: PositiveFloat = 32
    """The update is scaled by `lora_alpha / rank`."""
    lora_dropout: Fraction = 0.0
    """Dropout before the update. 0 keeps training deterministic and is the usual choice for large data."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear` (every linear layer but the head), a regular expression of full module names, or a list of name endings."""

    @field_validator("target_modules")
    @classmethod
    def _name_something(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("empty: name at least one module, or all-linear")
        return value


class Peft(Section):
    """Any adapter of the PEFT library, with PEFT's own settings. [Adaptations](adaptations.md) says which of them train."""

    kind: Literal["peft"]
    """`peft`."""
    config: dict[str, Any]
    """The settings of the type's PEFT config class, and `peft_type`, which chooses it:
    `{peft_type: BOFT, boft_block_size: 4, target_modules: [q_proj, v_proj]}`."""

    @field_validator("config")
    @classmethod
    def _name_a_type(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("peft_type"), str) or not value["peft_type"]:
            raise ValueError("peft_type is missing: it names one of PEFT's types, such as BOFT, IA3 or LOHA")
        return value

    @property
    def peft_type(self) -> str:
        """PEFT's name of the type, in its own upper case."""
        return self.config["peft_type"].upper()


Adapter = Lora | Peft
"""The adaptations that train weights beside a frozen base, and whose artifact is a PEFT folder."""


class EarlyStopping(Section):
    """Stops when the metric no longer improves."""

    metric: Literal["eval_loss"] = "eval_loss"
    """The watched metric."""
    patience: PositiveInt = 3
    """Evaluations without improvement before the run stops."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """Smallest decrease that counts as an improvement."""


class Train(Section):
    """How it is minimised."""

    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate. The default suits LoRA; full fine-tuning wants about a tenth of it."""
    epochs: PositiveFloat | None = None
    """Passes over the training rows. Give this or `max_steps`; 1 when neither is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps."""
    per_device_train_batch_size: Literal["auto"] | PositiveInt = 1
    """Rows a worker takes in one forward: packed rows of `data.max_length` tokens, or single examples without packing.
    `auto` is what trains most tokens a second of 1, 2, 4, 8 and 16 that fit; it changes the global batch."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward/backward passes of each worker before an optimizer step."""
    gradient_checkpointing: Literal["auto"] | bool = False
    """Recomputes activations in the backward pass: about a third more time for much less memory. `auto` does so when it
    does not fit otherwise."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); `adamw_8bit` holds its moments in blocks of 8-bit numbers
    (arXiv:2110.02861), 2 bytes a trained parameter instead of 8."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay, on matrices only."""
    adam_beta1: Fraction = 0.9
    """Decay of the first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the denominator of the update."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are clipped to this global norm; 0 does not clip."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up; cosine and linear end at 0."""
    warmup_ratio: Fraction | None = None
    """Share of all steps over which the learning rate rises to its peak. 0.03 when `warmup_steps` is not given either."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps over which the learning rate rises to its peak."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Number format of weights and activations while training. `auto` is bf16 on GPUs and fp32 on CPUs."""
    seed: int = 42
    """Seeds initialisation, the order of the data, packing and dropout."""
    eval_steps: PositiveInt | None = None
    """Optimizer steps between evaluations. None evaluates at the end of each epoch. Always also at the last step."""
    save_steps: PositiveInt = 100
    """Optimizer steps between checkpoints: the most that a crash can cost. Always also at the last step."""
    save_total_limit: PositiveInt = 2
    """Newest checkpoints kept; the best one is kept besides."""
    save_patience_s: Annotated[float, Field(ge=0)] = 120.0
    """Seconds that a write is tried again, at growing intervals, while storage is full or fails; then the run ends with what
    was saved before."""
    async_save: bool = False
    """Saves at `save_steps` in the background: training waits only until each worker has copied its part of the checkpoint
    into host memory, and goes on while that is written. The last step, a stop and a new best model are saved while it waits.
    A crash costs the time of writing more. The copy takes, in bytes a trained parameter, 12 shared among the workers and, but
    under ZeRO-3, the weights (2, in fp32 4) on the first worker; in fp32 without ZeRO all of 12 on the first worker."""
    early_stopping: EarlyStopping | None = None
    """Stops when the held-out loss no longer improves."""
    load_best_model_at_end: bool | None = None
    """Makes the artifact from the checkpoint with the lowest `eval_loss` instead of the last. None means: with early stopping."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts after lost workers that bring no new checkpoint before the run gives up."""

    @property
    def rows(self) -> int:
        """Rows a worker takes in one forward, once `auto` is settled."""
        assert isinstance(self.per_device_train_batch_size, int), "train.per_device_train_batch_size is still auto"
        return self.per_device_train_batch_size

    @model_validator(mode="after")
    def _one_length_and_one_warmup(self) -> Train:
        for first, second in (("epochs", "max_steps"), ("warmup_ratio", "warmup_steps")):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise ValueError(f"{first} and {second} are both given: keep one")
        return self


class Workers(Section):
    """How many workers an elastic run may have. [When things break](recovery.md#fewer-machines-and-more-again) says when their
    number changes."""

    min: PositiveInt
    """Fewest that it goes on with. While there is room for fewer it waits, as long as `cluster.wait_s` says."""
    max: PositiveInt
    """Most that it uses. A step has the rows of so many workers, however many there are: fewer take more passes for them."""

    @model_validator(mode="after")
    def _leave_a_choice(self) -> Workers:
        if self.min >= self.max:
            raise ValueError(
                f"min {self.min} is not less than max {self.max}; write `workers: {self.max}` for a fixed number"
            )
        return self


def _is_range(written: Any) -> str:
    return "[range]" if isinstance(written, dict | Workers) else "[number]"


class Cluster(Section):
    """Where it runs."""

    address: str | None = None
    """Address of a running Ray cluster (`auto`, or host:port). None takes RAY_ADDRESS, or starts Ray on this machine."""
    workers: Annotated[
        Annotated[PositiveInt, Tag("[number]")] | Annotated[Workers, Tag("[range]")], Discriminator(_is_range)
    ] = 1
    """Training processes, one per accelerator; the batch is sharded over them. `{min: 2, max: 8}` makes the run elastic: it
    goes on with fewer when machines are lost, and with more when there is room."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] | None = None
    """GPUs of each worker. None takes one if the cluster has any, else none."""
    cpus_per_worker: PositiveFloat | None = None
    """CPU cores of each worker. None shares this machine's cores among the workers."""
    memory_gib_per_worker: PositiveFloat | None = None
    """Host memory in GiB that each worker must be able to reserve. None reserves none."""
    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage: 1 shards optimizer state, 2 gradients too, 3 weights too. `auto` is 0 on
    one worker, else the fastest stage that fits."""
    zero3_persistence_threshold: Annotated[int, Field(ge=0)] = 100_000
    """Under ZeRO-3, parameters with fewer elements stay whole on every worker, which saves small messages."""
    offload: Literal["auto", "none", "cpu", "nvme"] = "none"
    """Where optimizer state (ZeRO 1-3) and weights (ZeRO-3) rest between uses. `nvme` needs ZeRO-3. `auto` is `cpu` when it
    does not fit otherwise."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk, for `offload: nvme`."""
    timeout_s: PositiveInt = 1800
    """Seconds a collective operation may wait for a worker before the attempt fails."""
    stall_s: PositiveFloat = 600.0
    """Seconds without a sign of life of a worker, or without any worker's getting on, after which the attempt counts as hung:
    the stacks of all workers go to log.txt, and it begins again from the last checkpoint. More than the longest single
    operation takes, such as writing one worker's part of a checkpoint."""
    wait_s: Annotated[float, Field(ge=0)] = 600.0
    """Seconds that a run which has lost machines waits for the cluster to have enough of them again."""
    grow_after_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds that there must be room for more workers before an elastic run saves and goes on with more: machines that come
    and go would only interrupt it."""

    @property
    def most_workers(self) -> int:
        """Workers that the global batch is for."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def fewest_workers(self) -> int:
        """Workers with which the run may begin."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while it runs."""
        return isinstance(self.workers, Workers)

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> Cluster:
        if self.offload == "nvme" and self.nvme_path is None:
            raise ValueError("offload: nvme needs nvme_path, a folder on a local NVMe disk")
        if self.offload == "nvme" and self.zero != 3:
            raise ValueError(f"offload: nvme needs zero: 3, not zero: {self.zero}")
        if self.offload == "cpu" and self.zero in (0, "auto"):
            raise ValueError(f"offload: cpu needs zero: 1, 2 or 3, not zero: {self.zero}")
        return self


class Eval(Section):
    """What is measured on held-out rows."""

    max_rows: PositiveInt | None = None
    """Most validation examples an evaluation reads. None reads all."""
    parity_rows: PositiveInt = 8
    """Held-out examples whose log-probabilities the parity receipt compares."""


class Output(Section):
    """Where it goes."""

    dir: Annotated[str, Field(min_length=1)] = "runs"
    """Folder of all runs; this one is written to `dir/name`. On a cluster of several nodes, a shared file system."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=lambda: ["tensorboard"])
    """Where metrics go besides metrics.jsonl."""


class Recipe(Section):
    """One run, from base model to artifact."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
    """Name of the run and of its folder: lower-case letters, digits, `.`, `_` and `-`, at most 63."""
    model: Model
    """The base model."""
    data: Data
    """What is trained on."""
    objective: Objective
    """What is minimised."""
    adaptation: Annotated[Full | Lora | Peft, Field(discriminator="kind")]
    """What may change. `adaptation: lora` is short for `adaptation: {kind: lora}`."""
    train: Train = Train()
    """How it is minimised."""
    cluster: Cluster = Cluster()
    """Where it runs."""
    eval: Eval = Eval()
    """What is measured."""
    output: Output = Output()
    """Where it goes."""
    tune: Tune | None = None
    """What `tunesmith sweep` searches."""

    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    def written_at(self, places: Mapping[str, str]) -> None:
        """Notes where each dotted key was written, as `file:line`."""
        self._places = dict(places)

    def where(self, key: str) -> str:
        """`file:line: ` of a key, to begin a message with; empty for a key that was not read from a file."""
        return f"{self._places[key]}: " if key in self._places else ""

    @field_validator("objective", "adaptation", mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _quantization_is_frozen(self) -> Recipe:
        quantization = self.model.quantization
        if quantization and not isinstance(self.adaptation, Adapter):
            raise ValueError(
                f"model.quantization: {quantization} freezes the base, so adaptation: {self.adaptation.kind} "
                "could change nothing; use adaptation: lora or peft"
            )
        if quantization == "int8" and self.cluster.zero == 3:
            raise ValueError(
                "model.quantization: int8 gains nothing from cluster.zero: 3, because every int8 layer keeps its codes whole "
                "beside the parameter that would be sharded; use zero: 2, or nf4"
            )
        return self

    @model_validator(mode="after")
    def _shards_that_can_be_cut_anew(self) -> Recipe:
        if not self.cluster.is_elastic:
            return self
        if self.cluster.offload not in ("none", "auto"):
            raise ValueError(
                f"cluster.workers: {{min, max}} does not go with cluster.offload: {self.cluster.offload}, whose checkpoints cannot "
                "be cut for another number of workers; use offload: none, or a fixed number of workers"
            )
        if self.train.optimizer == "adamw_8bit":
            raise ValueError(
                "cluster.workers: {min, max} does not go with train.optimizer: adamw_8bit, whose moments cannot be cut for another "
                "number of workers; use adamw, or a fixed number of workers"
            )
        if self.tune is not None:
            raise ValueError(
                "cluster.workers: {min, max} is for `tunesmith train`; the trials of a sweep take a fixed number"
            )
        return self

    @model_validator(mode="after")
    def _state_that_can_be_copied(self) -> Recipe:
        if self.train.async_save and self.cluster.offload == "nvme":
            raise ValueError(
                "train.async_save: true does not go with cluster.offload: nvme, whose files on disk the next step changes; use "
                "async_save: false, or offload: cpu"
            )
        if self.train.async_save and self.tune is not None:
            raise ValueError(
                "train.async_save: true is for `tunesmith train`; a trial of a sweep reports a step when its checkpoint is whole"
            )
        return self

    @model_validator(mode="after")
    def _one_place_for_the_moments(self) -> Recipe:
        if self.train.optimizer == "adamw_8bit" and self.cluster.offload != "none":
            raise ValueError(
                f"train.optimizer: adamw_8bit does not go with cluster.offload: {self.cluster.offload}, whose optimizer "
                "DeepSpeed runs on the CPU with moments of 32 bits; use one of the two"
            )
        return self
