"""`mos routing`: the group of commands about routes."""

from mos_cli.cli.paths import App
from mos_cli.cli.routing_ablate import ablate
from mos_cli.cli.routing_diff import diff

routing_app = App(name="routing", help="Compare routes, and ablate layers.", no_args_is_help=True)

routing_app.command()(diff)
routing_app.command()(ablate)
