"""Of a list that has changed, a page gets the items that it does not have yet."""

from __future__ import annotations

import threading
from collections import OrderedDict

MARK = "<!-- item -->"  # in the HTML of a list: before each item, and after the last one
_MAX_LISTS = 64  # that are remembered


class SentLists:
    """The items of the lists that pages have got, by the list's ETag. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: OrderedDict[str, frozenset[int]] = OrderedDict()  # their hashes

    def changes(self, html: str, etag: str, known: str) -> str:
        """Return a list's HTML; of the items that the list `known` has too, the opening tag alone.

        Those have the attribute `data-same`; static/morph.js leaves their elements as they are.

        Args:
            etag: of the HTML.
            known: the ETag of the list that the page has; empty: none.
        """
        parts = html.split(MARK)
        with self._lock:
            old = self._items.get(known, frozenset())
            self._items[etag] = frozenset(hash(part) for part in parts)
            self._items.move_to_end(etag)
            while len(self._items) > _MAX_LISTS:
                self._items.popitem(last=False)
        for number in range(1, len(parts) - 1):
            if hash(parts[number]) in old:
                tag = parts[number].partition(">")[0].strip()
                parts[number] = f"{tag} data-same></{tag[1:].partition(' ')[0]}>"
        return "".join(parts)
