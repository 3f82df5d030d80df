"""Results that can be believed and compared: full identity, raw samples, prediction beside measurement.

`record` holds the values and their JSON, `identity` the digests that say when two records may be compared,
`results` the database. Nothing is imported here, so that reading a record does not load SQLite.
"""
