"""``optimum-cli optim``: the commands of ``hf-optim`` under the command line of optimum.

optimum imports every file of the namespace ``optimum.commands.register`` when its command line starts, so nothing heavy
is imported here. (PEP 420: these folders have no ``__init__.py``, and must have none.)
"""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class OptimCommand(BaseOptimumCLICommand):
    """Delegates to ``hf_optim.cli``."""

    COMMAND = CommandInfo(
        name="optim", help="Make a transformer cheaper to run: compress, measure and publish it with hf_optim."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        from hf_optim.cli import add_commands

        add_commands(parser)

    def run(self) -> None:
        from hf_optim.cli import execute

        if self.args.command is None:
            self.parser.print_help()
            raise SystemExit(2)
        raise SystemExit(execute(self.args))


REGISTER_COMMANDS = [OptimCommand]
