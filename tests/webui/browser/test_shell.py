"""The page's head, its tabs and what all of them share, in a browser."""

from __future__ import annotations

from typing import Any

import pytest
from in_browser import TABS, choose_tab, open_tab
from served import Served

pytestmark = pytest.mark.slow


def test_every_tab_opens(page: Any, served: Served) -> None:
    open_tab(page, served)
    for tab in TABS:
        choose_tab(page, tab)
