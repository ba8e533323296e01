"""`python -m rampart STEP --name value …`: one subcommand for each entry point of the MLproject."""

from __future__ import annotations

import dataclasses
import inspect
import re
import signal
import sys
from functools import cache
from typing import Any

import click

from rampart.console import configure_logging
from rampart.errors import RampartError, SettingsError, is_out_of_memory, require
from rampart.settings import STEPS, as_text, names, resolve
from rampart.settings.kinds import DEFAULT_PROFILE

ABOUT = {
    "main": "The whole study: every arm trained, attacked, verified, embedded, and all of them compared.",
    "train": "Train one arm.",
    "contrastive": "Train one arm with SupCon: train with contrastive=double, unless it is given.",
    "evaluate": "Measure a model's accuracy and attack a test set at several ε.",
    "verify": "Prove or refute the robustness of test images.",
    "embed": "Draw UMAP of a model's embeddings.",
    "tune": "Search the settings of one arm's training with Optuna.",
    "compare": "Build every table and figure from the tracking server.",
}

# Entry points that are another step with some of its settings made.
ENTRIES = {"contrastive": ("train", {"contrastive": "double"})}


def documentation(step: str) -> dict[str, str]:
    """What each setting means, from the Args of the dataclasses that it stands in."""
    found: dict[str, str] = {}
    for kind in inspect.getmro(STEPS[step]):
        for name, text in re.findall(r"^        (\w+): (.+(?:\n            .+)*)", kind.__doc__ or "", re.M):
            found.setdefault(name, " ".join(text.split()))
    return found


@cache
def defaults(entry: str) -> dict[str, str]:
    """What each setting of an entry point is where none, but perhaps a model, is given."""
    step, preset = ENTRIES.get(entry, (entry, {}))
    needed = {"model": "needed"} if "model" in names(step) else {}
    found = as_text(resolve(step, preset | needed), {})
    return {name: text for name, text in found.items() if name not in needed}


class Setting(click.Option):
    """An option that shows its default, which is read from the profile when help is asked for."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        try:
            value = defaults(str(ctx.command.name)).get(self.opts[0].removeprefix("--"))
        except RampartError:  # the profile is broken, and help more needed than ever
            value = None
        return (record[0], f"{record[1]}  [{value}]") if record and value else record


def command(entry: str) -> click.Command:
    """A subcommand whose options are its step's settings. Values stay texts: `resolve` gives them their types."""
    step, preset = ENTRIES.get(entry, (entry, {}))
    known = documentation(step)
    fields = {field.name for field in dataclasses.fields(STEPS[step])}
    options: list[click.Parameter] = []
    for name in names(step):
        option = Setting([f"--{name}", name.replace(".", "__")], help=known.get(name, ""))
        option.hidden = name not in fields
        options.append(option)

    def callback(**values: Any) -> None:
        from rampart.study import run_step

        run_step(step, preset | {name.replace("__", "."): text for name, text in values.items() if text is not None})

    about = (
        f"{ABOUT[entry]} In brackets: defaults, which are those of profile {DEFAULT_PROFILE}; other profiles, and some "
        "arms, have others. -P name=value of `mlflow run` is --name value here."
    )
    return click.Command(entry, params=options, callback=callback, help=about)


cli = click.Group("rampart", commands=[command(entry) for entry in ABOUT], help=__doc__)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for bad input, 130 for an interrupt."""
    configure_logging()
    # A polite kill ends like Ctrl-C: the run is marked KILLED.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        cli.main(words, prog_name="rampart", standalone_mode=False)
    except click.ClickException as error:
        entry = next((word for word in words if word in ABOUT), "main" if isinstance(error, click.NoSuchOption) else "")
        if entry:
            return _reject(entry, error)
        # Where no step is named, that is the help.
        click.echo(f"error: {error.format_message()}" if words else error.format_message(), err=True)
        return 2
    except RampartError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):  # click makes the one the other, which is a RuntimeError
        click.echo("interrupted: what was finished is kept", err=True)
        return 130
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        click.echo("error: out of memory: take a smaller width, batch_size or memory", err=True)
        return 2
    return 0


def _reject(entry: str, error: click.ClickException) -> int:
    """What a step cannot be told: said as of any other bad setting, and the run FAILED."""
    from rampart.tracking import open_run

    step, _ = ENTRIES.get(entry, (entry, {}))
    try:
        with open_run(step):
            if isinstance(error, click.NoSuchOption):
                name = error.option_name.lstrip("-")
                require(name != "P", "-P name=value is for `mlflow run`: here it is --name value")
                resolve(step, {name: ""})
            raise SettingsError(error.format_message())
    except RampartError as said:
        click.echo(f"error: {said}", err=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
