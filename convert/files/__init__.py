"""A file or a folder to arrays by name; no code in a file is ever run. Imports errors and the files beside it."""
