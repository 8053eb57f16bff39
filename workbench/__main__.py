"""`python -m workbench`, in a checkout: the papers' tables, the testbed's models and ablations, open-ended tasks."""

from __future__ import annotations

import typer

from vidsieve.cli.main import main, root
from workbench.papers.reproduce import reproduce
from workbench.testbed.commands import ablate, build, open_ended, separation, surrogate, talker

app = typer.Typer(
    name="python -m workbench", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
app.callback()(root)
app.command("reproduce")(reproduce)
app.command("build")(build)
app.command("talker")(talker)
app.command("separation")(separation)
app.command("ablate")(ablate)
app.command("surrogate")(surrogate)
app.command("open")(open_ended)

if __name__ == "__main__":
    main(app)
