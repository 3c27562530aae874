"""One module per public format, with `EXPECTED`, `read(path)` and its table of rows."""
