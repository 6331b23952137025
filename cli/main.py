"""Shell: the halfmoon command."""

from __future__ import annotations

import sys

import click
from rich.markup import escape

from cli.client_commands import chat, drain, explain, generate, status
from cli.cluster_commands import config, demo, up
from cli.tables import make_console
from halfmoon.errors import HalfmoonError
from service.run import EXIT_HARD


class Group(click.Group):
    """Turns our typed errors into one readable line and exit code 1, and Ctrl-C into exit code 130."""

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


for command in (up, demo, config, chat, generate, status, explain, drain):
    main.add_command(command)

if __name__ == "__main__":
    main()
