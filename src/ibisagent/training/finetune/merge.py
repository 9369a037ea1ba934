"""`python -m ibisagent.training.finetune.merge RECIPE HISTORY`: writes OUT/policy from the start and OUT/adapter."""

from __future__ import annotations

import sys

from ibisagent.training.finetune.common import merge
from ibisagent.training.finetune.recipes import StageRecipe

if __name__ == "__main__":
    merge(StageRecipe.model_validate_json(sys.argv[1]), sys.argv[2])  # type: ignore[arg-type]
