"""The command ``goc`` where it is not installed: ``python -m goc_deploy run engine --labels 207``."""

from goc_deploy.cli.goc import main

if __name__ == "__main__":
    raise SystemExit(main())
