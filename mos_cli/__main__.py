"""`python -m mos_cli`: the `mos` command, for launchers that start modules (`accelerate launch -m mos_cli`)."""

from mos_cli.cli.app import main

if __name__ == "__main__":
    main()
