"""Where tests find published data: the folder that WORKBOOK_REAL_DATA names. Without it they skip, saying so."""

from __future__ import annotations

import os

import pytest

REAL_DATA = os.environ.get("WORKBOOK_REAL_DATA", "")
needs_real_data = pytest.mark.skipif(not REAL_DATA, reason="WORKBOOK_REAL_DATA names no folder of real data")
