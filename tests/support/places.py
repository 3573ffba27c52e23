"""Paths: this repository, its sample model, and facts about the published models, if present."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "samples" / "tiny"
SHARED = ROOT.parent / "shared"
