"""What is compared where nothing is named, and what it is called."""

from __future__ import annotations

OURS = "LESA"
"""The method whose differences from the others are shown, if it is there."""
SCHEDULES, BUDGETS = ("paper:7", "paper:10"), (10, 8, 6, 5, 4)
"""What is compared where nothing is named: the paper's schedules and planned ones; of few steps, those at 2x."""
AS_PUBLISHED = "no PSNR: wrapped as published"
"""The name in tables, and for `--scores`, of what tables of papers call PSNR and nobody should."""
