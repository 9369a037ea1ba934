"""Performs one task of a teaching, see `part`."""

import sys

from ibisagent.training.teach.part import main

sys.exit(main(*sys.argv[1:]))
