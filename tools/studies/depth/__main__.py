"""``python -m tools.studies.depth``: see :mod:`tools.studies.depth.repair`."""

from tools.studies.depth.repair import main

main()
