"""`python -m spark_ray.sweep EXPERIMENT.yaml`: the command line of the main job."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from . import __version__, double, several
from .completion import FOLDER, YAML
from .errors import DISK_ERRORS, EXIT_INTERRUPTED, EXIT_OK, InputError, RunError, SparkRayError, cannot_write
from .running import Options, resume_line, run
from .units import parse_duration_s

ALLOW_ROOT = click.option(
    "--allow-root",
    "allow_roots",
    metavar="FOLDER",
    multiple=True,
    type=FOLDER,
    help="A folder that the YAML may name, beside its own, the current one and the caches.",
)
DOUBLE = click.option(
    "--double",
    "double_folder",
    metavar="FOLDER",
    type=FOLDER,
    help="A rehearsal: a stand-in for TensorRT-LLM, a small random model, this host's own tree and no GPU. Its numbers "
    "mean nothing, and every record says so.",
)


@click.command("sweep", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("experiments", metavar="EXPERIMENT...", nargs=-1, required=True, type=YAML)
@click.option(
    "--out",
    type=FOLDER,
    help="The run folder (default: runs/NAME); of several experiments, the folder that gets a run for each.",
)
@click.option("--address", help="Join the Ray cluster at this address (auto, or HOST:6379).")
@click.option("--cluster", type=YAML, help="Cluster file whose slots the plan counts.")
@click.option("--local", is_flag=True, help="Without Ray: one slot, in this process. Records are the same.")
@click.option("--resume", is_flag=True, help="Finish exactly what is missing in a run.")
@click.option("--seed", type=click.IntRange(min=0), help="The same as --set seed=N.")
@click.option(
    "--max-blocks",
    type=click.IntRange(min=1),
    help="Begin no more than this many blocks of an experiment now; --resume does the rest.",
)
@click.option(
    "--max-time",
    metavar="DURATION",
    help="Begin no block after this long in all (90s, 20min, 8h); --resume does the rest.",
)
@click.option("-v", "--verbose", is_flag=True, help="Print the log (run.log) on standard error as well.")
@click.option("--plan", is_flag=True, help="Print everything that would happen, and stop.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Change one value of the experiment."
)
@click.option(
    "--no-report",
    is_flag=True,
    help="Leave the report out, which takes seconds; spark-ray report RUN makes it later.",
)
@ALLOW_ROOT
@DOUBLE
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the summary as JSON on standard output, the rest on standard error.",
)
@click.version_option(__version__)
def command(
    experiments: tuple[Path, ...], out: Path | None, address: str | None, cluster: Path | None, local: bool, resume: bool, plan: bool,
    overrides: tuple[str, ...], as_json: bool, seed: int | None, max_blocks: int | None, max_time: str | None, verbose: bool,
    allow_roots: tuple[Path, ...], no_report: bool, double_folder: Path | None,
) -> int:  # fmt: skip
    """Execute each EXPERIMENT (a YAML file) as blocks of paired trials, and write its report.

    Several are executed one after the other, each into its own run in --out FOLDER.
    """
    if local and address:
        raise click.UsageError("--local is without Ray, --address joins one: choose")
    if no_report and (as_json or len(experiments) > 1):
        raise click.UsageError("--no-report leaves out what --json and several experiments end with")
    try:
        max_time_s = parse_duration_s(max_time) if max_time else None
    except ValueError as error:
        raise InputError(f"--max-time: {error}") from error
    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    options = Options(
        out=out, address=address, cluster=cluster, local=local, resume=resume, plan=plan, json=as_json,
        max_blocks=max_blocks, max_time_s=max_time_s, verbose=verbose, allow_roots=allow_roots,
        report=not no_report,
    )  # fmt: skip
    if len(experiments) == 1:
        return run(experiments[0], rehearsed(experiments[0], double_folder) + overrides, options)
    if out is None:
        raise InputError(
            f"{len(experiments)} experiments need one folder for their runs", mend="add --out runs/NAME"
        )
    jobs = [several.Job(path, rehearsed(path, double_folder) + overrides) for path in experiments]
    return several.run(jobs, out, options, _resume_line(experiments, overrides, options, out, double_folder))


def rehearsed(path: Path, double_folder: Path | None) -> tuple[str, ...]:
    """The overrides of `--double`; what the user sets comes after them."""
    return () if double_folder is None else double.overrides(path, double_folder)


def _resume_line(
    experiments: tuple[Path, ...],
    overrides: tuple[str, ...],
    options: Options,
    out: Path,
    double_folder: Path | None,
) -> str:
    """Of several: each has overrides of its own, which only the flag can say again."""
    line = resume_line(experiments, overrides, options, out.absolute())
    return line if double_folder is None else f"{line} --double {shlex.quote(str(double_folder))}"


def call(function: click.Command, arguments: list[str] | None) -> int:
    """Run a click command; errors become one message on standard error and an exit code, never a traceback."""
    try:
        code = function.main(args=arguments, standalone_mode=False)
        return code if isinstance(code, int) else EXIT_OK
    except SparkRayError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        click.echo(f"error: {cannot_write(error)}", err=True)
        return RunError.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED


def main(arguments: list[str] | None = None) -> int:
    return call(command, arguments)


if __name__ == "__main__":
    sys.exit(main())
