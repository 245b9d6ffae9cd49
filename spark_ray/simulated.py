"""The simulated engine as an experiment names it: a machine that is not there, what disturbs it, what an arm takes from it.

The formula is `worker/simulated_law.py`. Defaults are those of a DGX Spark with a 120-billion-parameter model in 4 bits.
An arm differs by its own settings, as with every engine: `arms.docker.engine: {effect: {held: 3GiB}}`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from .spec import PositiveInt, SizeBytes, Spec

Share = Annotated[float, Field(ge=0, lt=1, strict=True)]
Positive = Annotated[float, Field(gt=0, lt=1e6, strict=True)]
Axis = Literal["max_batch_size", "max_num_tokens", "memory_fraction"]


def _identifier(name: str) -> str:
    if not name.isidentifier():
        raise ValueError(f"{name!r} is no name of a Python function")
    return name


class Bump(Spec):
    """A smooth hill in what the environment takes: nothing of it is in the law."""

    takes: SizeBytes = Field(description="memory taken at its centre")
    around: dict[Axis, Positive] = Field(
        min_length=1, description="its centre; an axis that is not named has no part in it"
    )
    width_doublings: Positive = Field(
        default=1.5, description="standard deviation along batch and tokens, in doublings"
    )
    width_fraction: Positive = Field(default=0.15, description="standard deviation along memory_fraction")


class Cliff(Spec):
    """Work space that an engine needs at once beyond a limit: a step, or the end of what is feasible."""

    axis: Axis = Field(description="along which it is")
    above: Positive = Field(description="largest value without it")
    takes: SizeBytes = Field(description="memory that the profiling pass needs beyond it")


class Effect(Spec):
    """What an arm's environment takes from the machine. A smaller one is a larger one of the other arm."""

    held: SizeBytes = Field(
        default="0B", validate_default=True, description="memory, whatever the configuration"
    )
    per_token: SizeBytes = Field(
        default="0B", validate_default=True, description="memory for each of max_num_tokens"
    )
    per_batch_doubling: SizeBytes = Field(
        default="0B", validate_default=True, description="memory for each doubling of max_batch_size"
    )
    interaction: SizeBytes = Field(
        default="0B",
        validate_default=True,
        description="memory for each doubling of max_batch_size, times doublings of max_num_tokens above 256",
    )
    share: Share = Field(default=0.0, description="share of the KV cache that the engine would get")
    page_cache: SizeBytes = Field(
        default="0B", validate_default=True, description="page cache that it fills: free only to memavailable"
    )
    bumps: tuple[Bump, ...] = Field(default=(), description="smooth hills, added")


class SimulatedPageCache(Spec):
    start: SizeBytes = Field(default="0B", validate_default=True, description="at the first trial")
    growth: SizeBytes = Field(default="0B", validate_default=True, description="with each trial")
    most: SizeBytes = Field(default="60GiB", validate_default=True, description="where growth ends")


class Noise(Spec):
    """What a trial finds that its configuration has no part in, as memory taken. A function of the seed: it can be repeated."""

    sd: SizeBytes = Field(
        default="300MiB", validate_default=True, description="standard deviation, each trial for itself"
    )
    shared_sd: SizeBytes = Field(
        default="0B", validate_default=True, description="standard deviation of what a block's arms share"
    )
    relative_sd: Share = Field(
        default=0.0, description="standard deviation as a share of the KV cache, each trial for itself"
    )
    burst: SizeBytes = Field(
        default="4GiB", validate_default=True, description="heavy tail: so much, or up to twice as much"
    )
    burst_share: Share = Field(default=0.0, description="share of trials that a burst hits")
    drift: SizeBytes = Field(default="0B", validate_default=True, description="taken more with each trial")
    start_up: SizeBytes = Field(
        default="0B", validate_default=True, description="taken at the first trial, and less from then on"
    )
    start_up_trials: Positive = Field(default=4.0, description="trials until half of start_up is gone")
    wander_sd: SizeBytes = Field(
        default="0B", validate_default=True, description="standard deviation of an AR(1) process over trials"
    )
    wander_correlation: Share = Field(default=0.9, description="its correlation between neighbouring trials")
    carry_over: SizeBytes = Field(
        default="0B",
        validate_default=True,
        description="left behind by the trial before in the same block; the first finds nothing",
    )


class Landscape(Spec):
    """A function of the user's instead of a law: FUNCTION(configuration, arm, parameters) -> KV bytes, None: no capacity."""

    file: str = Field(
        description="a Python file, of which the run takes a copy; it can use what every arm's Python has"
    )
    function: Annotated[str, AfterValidator(_identifier)] = Field(
        default="kv_cache_bytes", description="its name there"
    )
    parameters: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=dict, description="numbers that the function is given; arms may have their own"
    )


class SimulatedEngine(Spec):
    """No engine and no memory: capacities come from a formula, and every record and figure says so."""

    kind: Literal["simulated"]
    memory_view: Literal["memfree", "memavailable"] = Field(
        default="memfree",
        description="memfree: TensorRT-LLM's law, (total - peak) x fraction, page cache is in the peak; memavailable: "
        "vLLM's and SGLang's, total x fraction - peak, page cache is not",
    )
    memory_total: SizeBytes = Field(
        default="119.7GiB", validate_default=True, description="memory of the simulated machine"
    )
    other_processes: SizeBytes = Field(
        default="6.5GiB", validate_default=True, description="in use before the engine"
    )
    page_cache: SimulatedPageCache = Field(
        default_factory=SimulatedPageCache, description="pages that files have left in memory"
    )
    weights: SizeBytes = Field(
        default="63.5GiB", validate_default=True, description="the engine's, held when the pool is sized"
    )
    transient_per_token: SizeBytes = Field(
        default="384KiB",
        validate_default=True,
        description="what the profiling pass needs for each of max_num_tokens and gives back: it is in the peak",
    )
    graphs_per_sequence: SizeBytes = Field(
        default="51.2MiB", validate_default=True, description="CUDA graphs, for each of max_batch_size"
    )
    graphs_up_to: PositiveInt = Field(default=128, description="largest batch that has a graph of its own")
    cliffs: tuple[Cliff, ...] = Field(default=(), description="work space beyond a limit, added")
    tokens_per_block: PositiveInt = Field(default=32, description="tokens that one block of the pool holds")
    bytes_per_token: PositiveInt = Field(
        default=73728, description="bytes of keys and values of one token over all layers"
    )
    max_seq_len: PositiveInt = Field(
        default=2048, description="tokens one request may hold; the pool must fit at least one"
    )
    max_tokens: PositiveInt | None = Field(default=None, description="a cap on the pool, in tokens")
    effect: Effect = Field(default_factory=Effect, description="what an arm's environment takes")
    noise: Noise = Field(default_factory=Noise, description="what disturbs a trial")
    landscape: Landscape | None = Field(default=None, description="a function of yours instead of the law")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.misfit:
            raise ValueError(self.misfit)
        return self

    @property
    def misfit(self) -> str | None:
        """Why the machine cannot be."""
        if self.landscape is None and self.other_processes + self.weights > self.memory_total:
            return "other_processes and weights are more than memory_total"
        return None

    @property
    def needs_gpu(self) -> bool:
        return False
