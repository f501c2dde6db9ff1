"""Readers and writers of vocabulary files, and the tables in them; no module here decides which family a file is of."""
