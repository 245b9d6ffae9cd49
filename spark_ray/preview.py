"""The plan, before any effect: which arms this host can execute, what is missing, how long it takes. Only looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import (
    content,
    double,
    duration,
    environments,
    guest_podman,
    image,
    landscape,
    nvml,
    plausible,
    power,
    rootfs,
    treatments,
)
from .cluster import Cluster
from .conditions import Fill
from .environment_spec import ChrootEnvironment, DockerEnvironment, IsolatedEnvironment, PodmanEnvironment
from .environments import Offer, Problem
from .errors import InputError, UnavailableError
from .experiment import Experiment
from .plan import arm_order
from .rootact import RootActs
from .search import GP_MEND, attainable
from .search import problems as search_problems
from .units import format_bytes
from .worker import observe


def in_force(experiment: Experiment, noise: power.Noise | None) -> Experiment:
    """As it is executed: its margin at least the noise floor, and no more blocks than a grid has."""
    found = power.in_force(experiment, noise)
    return found.model_copy(update={"search": attainable(found.search)})


@dataclass(frozen=True)
class ArmPlan:
    name: str
    what: str  # environment and treatment in words
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    required: bool

    @property
    def available(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Preview:
    """Everything that is known before the first effect."""

    experiment: Experiment
    arms: tuple[ArmPlan, ...]
    problems: tuple[Problem, ...]  # of the engine, the model, the search: nothing can run
    preparations: tuple[str, ...]
    cluster: Cluster
    trial: duration.TrialTime | None  # expected
    noise: power.Noise | None = None  # of a pilot

    @property
    def executed(self) -> tuple[str, ...]:
        """Arms that will run, in the order of the YAML."""
        return tuple(arm.name for arm in self.arms if arm.available)

    def limited_to(self, begun: Sequence[str]) -> Preview:
        """As a run goes on that was begun with these arms: what the host offers besides by now is left out of it."""
        late = Problem("the run was begun without it", "start a new run to have it")
        arms = (
            arm if arm.name in begun or not arm.available else replace(arm, problems=(late,), required=False)
            for arm in self.arms
        )
        return replace(self, arms=tuple(arms))

    @property
    def is_double(self) -> bool:
        """Whether a stand-in for the engine's library makes the numbers."""
        return double.package_of(self.experiment) is not None

    @property
    def mark(self) -> str:
        """Said with every number, where what makes them is no engine."""
        return (
            "DOUBLE" if self.is_double else "SIMULATED" if self.experiment.engine.kind == "simulated" else ""
        )

    @property
    def blocks(self) -> int:
        return self.experiment.search.blocks

    @property
    def slots(self) -> int:
        return sum(node.slots for node in self.cluster.nodes)

    @property
    def counted(self) -> tuple[str, ...]:
        """Arms that the estimate counts: those that will run, and those without which nothing would."""
        return tuple(arm.name for arm in self.arms if arm.available or self._is_needed(arm))

    @property
    def trials(self) -> int:
        """Executions that the estimate counts, those that fill a warm compile cache among them."""
        arms = [each.arms for each in self.experiment.variants.values()]
        warm = [
            name
            for name in self.counted
            if any(each[name].treatment.compile_cache == "warm" for each in arms)
        ]
        warmings = len(warm) * -(-self.blocks // self.experiment.search.repetitions)  # one a configuration
        return self.blocks * len(self.counted) + warmings

    @property
    def expected_s(self) -> float | None:
        return None if self.trial is None else self.trials * self.trial.total_s / max(1, self.slots)

    def first_orders(self, count: int) -> list[tuple[str, ...]]:
        return [
            arm_order(self.executed, index, self.experiment.seed) for index in range(min(count, self.blocks))
        ]

    def _is_needed(self, arm: ArmPlan) -> bool:
        return arm.required or arm.name in vars(self.experiment.compared).values()

    def lacking(self) -> str | None:
        """What is required and not here, in words; None when the experiment can be executed."""
        missing = [f"  {problem}" for problem in self.problems]
        missing += [
            f"  arm {arm.name}: {problem}"
            for arm in self.arms
            if self._is_needed(arm)
            for problem in arm.problems
        ]
        if missing:
            return "\n".join(["this host lacks what the experiment requires:", *missing])
        if len(self.executed) < 2:
            lacking = [f"  arm {arm.name}: {problem}" for arm in self.arms for problem in arm.problems]
            return "\n".join(["fewer than two arms can be executed here:", *lacking])
        return None

    def refuse_if_impossible(self) -> None:
        """Raises UnavailableError, before any effect, when what is required is not here."""
        if (lacking := self.lacking()) is not None:
            raise UnavailableError(lacking)


def probe(experiment: Experiment) -> Offer:
    """What this host offers; asks the Docker daemon only if an arm wants it."""
    available, reason = RootActs().available()
    why, mend = None, ""
    if any(isinstance(arm.environment, DockerEnvironment) for arm in experiment.arms.values()):
        try:
            image.connect().close()
        except UnavailableError as error:
            why, mend = error.message, error.mend or "start the Docker service"
    wants_podman = any(isinstance(arm.environment, PodmanEnvironment) for arm in experiment.arms.values())
    podman_why, podman_mend = (guest_podman.lacking() if wants_podman else None) or (None, "")
    return Offer(
        root_acts=None if available else reason,
        docker=why,
        docker_mend=mend,
        podman=podman_why,
        podman_mend=podman_mend,
        memory_total_bytes=observe.meminfo()["MemTotal"],
        isolation=_isolation(experiment) if available else {},
    )


def _isolation(experiment: Experiment) -> dict[str, str]:
    """What is tried only if an arm wants it: ways of separating that do not work here."""
    wanted = ChrootEnvironment | IsolatedEnvironment
    if not any(isinstance(arm.environment, wanted) for arm in experiment.arms.values()):
        return {}
    cache = content.cache_folder()
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    try:
        return RootActs().isolation(there)
    except UnavailableError as error:
        return {"mount": error.message}


def preview(
    experiment: Experiment, cluster: Cluster, offer: Offer, noise: power.Noise | None = None
) -> Preview:
    """`experiment`: with the margin in force."""
    problems = [
        *double.problems(experiment),
        *landscape.problems(experiment),
        *content.engine_problems(experiment),
        *content.model_problems(experiment),
    ]
    problems += [Problem(text, GP_MEND) for text in search_problems(experiment.search)]
    problems += _too_large(experiment)
    return Preview(
        experiment=experiment,
        arms=tuple(_arm(experiment, name, offer) for name in experiment.arms),
        problems=tuple(problems),
        preparations=tuple(_preparations(experiment)),
        cluster=cluster,
        trial=duration.of_trial(experiment, observe.meminfo()["MemFree"]),
        noise=noise,
    )


def _too_large(experiment: Experiment) -> list[Problem]:
    """Weights that cannot be in the memory of this node: those of a cluster are alike."""
    model, engine = experiment.model, experiment.engine_of(next(iter(experiment.arms)))
    gpus = nvml.memory_bytes() if engine.needs_gpu else 0  # 0: none of their own, or unified with the host's
    if model is None or model.path is None or gpus is None:
        return []
    total_bytes = gpus or observe.meminfo()["MemTotal"]
    found = plausible.lacking_memory(Path(model.path), engine.model_dump(mode="json"), total_bytes)
    return [Problem(*found)] if found else []


def _arm(experiment: Experiment, name: str, offer: Offer) -> ArmPlan:
    arm, can = experiment.arms[name], offer.root_acts is None
    found = _lacking_at_any(experiment, name, offer)
    aged = _aged(experiment, arm.environment) if not found else []
    state, warnings = treatments.effective(
        experiment.treatment_of(name), can, settles=experiment.settles(name)
    )
    what = f"{_environment_words(arm.environment)}; {treatments.words(state)}"
    if arm.engine:
        what += "; " + ", ".join(f"{key}: {value}" for key, value in arm.engine.items())
    return ArmPlan(name, what, tuple(found), (*aged, *warnings), arm.required)


def _lacking_at_any(experiment: Experiment, name: str, offer: Offer) -> list[Problem]:
    """What an arm lacks here; which values of a knob lack it, where not all do."""
    alike: dict[str, list[str]] = {}  # what an arm is, and the values that make it so
    variants = experiment.variants
    for value, each in variants.items():
        alike.setdefault(each.arms[name].model_dump_json(), []).append(value)
    found: dict[Problem, list[str]] = {}
    for values in alike.values():
        for lacking in _lacking(variants[values[0]], name, offer):
            found.setdefault(lacking, []).extend(values)
    return [
        each if len(values) == len(variants) else Problem(f"with {', '.join(values)}: {each.what}", each.mend)
        for each, values in found.items()
    ]


def _lacking(experiment: Experiment, name: str, offer: Offer) -> Iterator[Problem]:
    """What an arm lacks here, at one value of each knob."""
    arm = experiment.arms[name]
    found = list(environments.module_of(arm.environment).problems(arm.environment, offer))
    if not found:
        found += content.environment_problems(arm.environment)
        found += content.library_problems(experiment, name)
    yield from found
    lacking = treatments.missing(arm.treatment, offer.root_acts is None)
    if lacking:
        mend = "run as root, allow `sudo -n`, or leave the key out to take the strongest possible"
        yield Problem(lacking, mend)
    for what, mend in treatments.impossible(arm.treatment, experiment.limits, observe.meminfo()):
        yield Problem(what, mend)


def _aged(experiment: Experiment, spec: environments.EnvironmentSpec) -> list[str]:
    """Whether a tree was extracted before its image's name came to mean another image, which a docker arm would run."""
    others = [arm.environment for arm in experiment.arms.values()]
    images = {each.image for each in others if isinstance(each, DockerEnvironment)} - {"host"}
    name = getattr(spec, "rootfs", "host")
    if name == "host" or not images:
        return []
    tree = rootfs.load(Path(name))
    try:
        client = image.connect()
    except UnavailableError:  # said of the docker arm
        return []
    try:
        same = tree.origin not in images or image.inspect(client, tree.origin).image.id == tree.image_id
    except (InputError, UnavailableError):  # likewise
        return []
    finally:
        client.close()
    why = f"{name} was extracted when {tree.origin} was another image: extract it again"
    return [] if same else [why]


def _environment_words(spec: environments.EnvironmentSpec) -> str:
    chosen = {key: value for key, value in spec.model_dump(exclude_defaults=True).items() if key != "kind"}
    for key in ("memory", "memory_swap", "shm_size"):
        if key in chosen:
            chosen[key] = format_bytes(chosen[key])
    return " ".join([spec.kind, *(f"{key}={value}" for key, value in chosen.items())])


def _preparations(experiment: Experiment) -> list[str]:
    steps = []
    if surface := landscape.file_of(experiment):
        steps.append(f"take a copy of {_short(surface)}, which is executed in every worker")
    if model := content.model_to_make(experiment):
        steps.append(f"make a random checkpoint in {_short(model)}")
    of_tree = [arm.environment for arm in experiment.arms.values() if content.on_host_tree(arm.environment)]
    if of_tree:
        steps.append(
            f"build the host rootfs in {_short(content.cache_folder() / 'rootfs')}, unless it is there"
        )
    if any(isinstance(spec, DockerEnvironment) for spec in of_tree):
        steps.append("import that rootfs as a Docker image (labelled spark_ray), unless it is there")
    states = [arm.treatment for each in experiment.variants.values() for arm in each.arms.values()]
    fills = [state.page_cache.fill for state in states if isinstance(state.page_cache, Fill)]
    if any(state.compile_cache == "warm" for state in states):
        steps.append(
            "fill each warm compile cache by an execution that is not measured, once a configuration"
        )
    if fills:
        steps.append(f"hold a file of {format_bytes(max(fills))} in the run folder, removed at the end")
    return steps


def _short(path: Path) -> str:
    home = str(Path.home())
    return str(path).replace(home, "~", 1) if str(path).startswith(home) else str(path)
