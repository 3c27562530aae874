"""Public layouts; one file each, with `EXPECTED`, `read(path)` and its table of rows."""
