"""One file per part of the page: `build()` lays its components out, `wire()` connects them."""
