"""Shell: the halfmoon command."""

from __future__ import annotations

import importlib
import sys

import click
from rich.markup import escape

from cli.client_commands import chat, drain, explain, generate, status, undrain
from cli.cluster_commands import config, demo, up
from cli.replay_commands import replay
from cli.tables import make_console
from halfmoon.errors import HalfmoonError
from service.run import EXIT_HARD

LATER = {"simulate": "cli.simulate", "plan": "cli.plan"}
"""Command -> its module, which brings numpy, pyarrow and the simulator: half a second that others need not wait for."""


class Group(click.Group):
    """Turns our typed errors into one readable line and exit code 1, and Ctrl-C into exit code 130."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *LATER])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in LATER:
            found: click.Command = getattr(importlib.import_module(LATER[cmd_name]), cmd_name)
            return found
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except HalfmoonError as error:
            make_console(stderr=True).print(f"[red]{type(error).__name__}[/red]: {escape(str(error))}", soft_wrap=True)
            sys.exit(1)
        except KeyboardInterrupt:
            make_console(stderr=True).print("Interrupted.")
            sys.exit(EXIT_HARD)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="halfmoon-server", prog_name="halfmoon")
def main() -> None:
    """Halfmoon: disaggregated prefill/decode LLM serving. Start with `halfmoon up`, then `halfmoon chat`."""


for command in (up, demo, config, chat, generate, status, explain, replay, drain, undrain):
    main.add_command(command)

if __name__ == "__main__":
    main()
