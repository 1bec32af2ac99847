"""One file per part of the page. Each has `build()`, which lays its components out, and `wire()`, which connects them."""
