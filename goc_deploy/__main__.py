"""The command ``goc`` without installation: ``python -m goc_deploy run DIR --labels 207``."""

from goc_deploy.cli.goc import main

if __name__ == "__main__":
    raise SystemExit(main())
