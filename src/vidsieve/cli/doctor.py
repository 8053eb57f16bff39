"""`vidsieve doctor`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import typer

from vidsieve.cli.options import Json
from vidsieve.cli.output import check_output, out, write_json


def doctor(json: Json = None) -> None:
    """Check versions, extras, model families and methods on this machine, for a bug report.

    Every method, and six families, generate two tokens from tiny models with random weights. Exit code 1 if one of
    them, or an installed extra, does not work.
    """
    from vidsieve.testing import doctor

    check_output(json)
    parts: dict[str, Callable[[], list[doctor.Finding]]] = {
        "versions": doctor.found_versions,
        "extras": doctor.found_extras,
        "model families": doctor.found_families,
        "methods": doctor.found_methods,
    }
    findings = []
    for title, check in parts.items():
        rows = check()
        findings += rows
        words = {None: "", True: "ok", False: "untested" if title == "versions" else "fails"}
        width = max(len(row.name) for row in rows)
        lines = [title, *(f"  {row.name:{width}}  {words[row.ok]:8}  {row.state}" for row in rows)]
        out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    write_json(json, {"findings": [asdict(row) for row in findings]})
    if any(row.ok is False for row in findings if row.kind != "version"):
        raise typer.Exit(1)
