"""`python -m raycv.serve run=...`: a resident scorer, which `raycv.infer` finds automatically."""

from raycv.common.locations import runs_folder
from raycv.config.command_line import run_command
from raycv.config.process import ignore_stops
from raycv.config.schema import ServeConfig
from raycv.serving.discovery import announce, announcement, discovery_file, say
from raycv.serving.settings import setup_of
from raycv.serving.watch import watch


def run_server(config: ServeConfig) -> None:
    """Serves until Ctrl-C or SIGTERM, then leaves nothing behind: no process, no discovery file.

    Raises:
        UserError: The run, its model, the port or Ray cannot be used, or others could reach the address without a
            token.
    """
    setup = setup_of(config)
    # We import Ray only here, so that a mistyped key or name is refused at once.
    from raycv.orchestration.ray_serve import running

    limits = setup.config.serve
    file = discovery_file(runs_folder(config.dir), limits.port)
    say(f"loading run {setup.chosen.run}, fold {setup.chosen.fold}")
    try:
        with running(setup):
            try:
                announced, model = announcement(setup)
                announce(announced, model, file, limits)
                watch(announced)
            finally:
                ignore_stops()
                file.unlink(missing_ok=True)
                say("stopping")
    except KeyboardInterrupt:
        say("stopped")


def main() -> None:
    run_command("serve", ServeConfig, run_server)


if __name__ == "__main__":
    main()
