"""`panfm doctor`: is this machine ready?"""

import typer


def run() -> None:
    """Check this machine: versions, devices, threads, disk, matrix rate; says what to do where it is not well.

    Example: panfm doctor
    """
    from panfm.training.doctor import run_checks

    checks = run_checks()
    width = max(len(check.name) for check in checks)
    for check in checks:
        typer.echo(f"{'ok ' if check.ok else 'NO '} {check.name:<{width}}  {check.detail}")
        if not check.ok:
            typer.echo(f"    {'':<{width}}  -> {check.way_out}")
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)
